//! Health of the janus itself, and its end.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use janus::config::Settings;
use janus_proto::{error::ErrorReason, metadata, pb, pb::report_request::Event};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    backend::{Backend, Mood},
    catalog::{report, snapshot},
    forwarding::hello,
    site::{Keys, channel, client, janus, janus_with, nobody, until},
    starts::start_request,
};

fn asking(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

#[tokio::test]
async fn health_follows_the_servers() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address(), nobody().await]).await;
    let health = HealthClient::new(channel(&janus.url, &keys.identity("client/alice/web")).await);
    let is = |service: &'static str, status: ServingStatus| {
        let mut health = health.clone();
        async move {
            health
                .check(asking(service))
                .await
                .is_ok_and(|answer| answer.get_ref().status() == status)
        }
    };
    for service in ["", "janus.v1.BackupService", "janus.v1.RestoreService"] {
        until("serving", || is(service, ServingStatus::Serving)).await;
    }
    let mut watch =
        health.clone().watch(asking("janus.v1.BackupService")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    a.line.cut();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(is("", ServingStatus::Serving).await, "the process lives");
    let unknown = health.clone().check(asking("no.such.Service")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    a.line.mend();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
}

/// Status line and body of a GET.
async fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[tokio::test]
async fn plain_health_answers_grpc_and_http_and_flips_with_the_last_server() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let listen = |settings: &mut Settings| settings.health_listen = "127.0.0.1:0".into();
    let mut janus = janus_with(&keys, &[a.address(), b.address()], listen).await;
    let address = janus.health.unwrap();
    let plain = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut health = HealthClient::new(plain.connect().await.unwrap());
    let ready = || async { get(address, "/readyz").await.0 == "HTTP/1.1 200 OK" };
    until("ready", ready).await;
    let mut watch = health.watch(asking("janus.v1.BackupService")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    a.line.cut();
    b.line.cut();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let unavailable = "HTTP/1.1 503 Service Unavailable";
    for (path, status, body) in [
        ("/readyz", unavailable, "NOT_SERVING\n"),
        ("/readyz/janus.v1.RestoreService", unavailable, "NOT_SERVING\n"),
        ("/livez", "HTTP/1.1 200 OK", "SERVING\n"),
        ("/readyz/nobody", "HTTP/1.1 404 Not Found", "no such service\n"),
        ("/", "HTTP/1.1 404 Not Found", ""),
    ] {
        assert_eq!(get(address, path).await, (status.into(), body.into()), "{path}");
    }
    a.line.mend();
    until("ready again", ready).await;
    // Nothing else is to be had without a certificate.
    let mut catalog =
        pb::catalog_service_client::CatalogServiceClient::new(plain.connect().await.unwrap());
    let refused = catalog.list_machines(pb::ListMachinesRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);

    // It says so while janus drains, and keeps nobody.
    let _idle = TcpStream::connect(address).await.unwrap();
    let (_sender, messages) = tokio::sync::mpsc::channel(1);
    let mut uploader = client(&keys, &janus.url).await;
    let upload = tokio::spawn(async move {
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
        uploader.write_blocks(messages).await.map(drop)
    });
    until("the upload is open", || async {
        a.seen.headers.lock().unwrap().contains_key(metadata::PRINCIPAL)
    })
    .await;
    janus.stop.cancel();
    until("draining", || async { get(address, "/livez").await.0 == unavailable }).await;
    let began = Instant::now();
    timeout(Duration::from_secs(5), janus.task.take().unwrap()).await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert!(upload.await.unwrap().is_err());
    TcpStream::connect(address).await.unwrap_err();
}

#[tokio::test]
async fn a_taken_port_is_told_with_its_setting() {
    let keys = Keys::new();
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let files = keys.files("janus/door");
    let settings = || Settings {
        listen: "127.0.0.1:0".into(),
        server_urls: vec!["https://127.0.0.1:1".into()],
        cert: files.as_ref().join("cert.pem"),
        key: files.as_ref().join("key.pem"),
        ca: keys.ca(),
        ..Settings::default()
    };
    for (key, settings) in [
        ("listen", Settings { listen: address.clone(), ..settings() }),
        ("metrics_listen", Settings { metrics_listen: address.clone(), ..settings() }),
        ("health_listen", Settings { health_listen: address.clone(), ..settings() }),
    ] {
        let error = janus::serve::Janus::start(settings).await.err().unwrap().to_string();
        assert!(error.contains(&format!("cannot listen on {address}")), "{error}");
        assert!(error.ends_with(&format!("in setting {key}")), "{error}");
    }
}

#[tokio::test]
async fn plain_health_is_off_unless_it_is_asked_for() {
    let keys = Keys::new();
    assert!(janus_with(&keys, &[nobody().await], |_| {}).await.health.is_none());
}

#[tokio::test]
async fn reflection_and_info_are_served() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let janus = janus(&keys, &[a.address()]).await;
    let channel = channel(&janus.url, &keys.identity("operator/root")).await;
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel.clone());
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    assert!(list.service.iter().any(|service| service.name == "janus.v1.BackupService"));

    let mut info = pb::server_info_service_client::ServerInfoServiceClient::new(channel);
    let own = info.get_server_info(pb::GetServerInfoRequest {}).await.unwrap();
    assert_eq!(own.metadata().get(metadata::SERVER).unwrap(), "door");
    assert_eq!(own.into_inner().role, "janus");
}

#[tokio::test]
async fn a_drain_ends_in_time_whatever_hangs_on() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let mut janus = janus(&keys, &[a.address()]).await;
    // One that never speaks, one that watches, one that uploads.
    let address = janus.url.strip_prefix("https://").unwrap().to_string();
    let _silent = TcpStream::connect(address).await.unwrap();
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut watch = HealthClient::new(channel).watch(asking("")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let (_sender, messages) = tokio::sync::mpsc::channel(1);
    let mut uploader = client(&keys, &janus.url).await;
    let upload = tokio::spawn(async move {
        uploader
            .write_blocks(tokio_stream::wrappers::ReceiverStream::new(messages))
            .await
            .map(|_| ())
    });
    let begun = Instant::now();
    janus.stop.cancel();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    timeout(Duration::from_secs(5), janus.task.take().unwrap()).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!(upload.await.unwrap().is_err());
}

#[tokio::test]
async fn an_idle_janus_with_watchers_and_reports_stops_at_once() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let mut janus = janus(&keys, &[a.address()]).await;
    let channel = channel(&janus.url, &keys.identity("client/alice/web")).await;
    let mut watch = HealthClient::new(channel).watch(asking("")).await.unwrap().into_inner();
    watch.message().await.unwrap();
    let begun = Instant::now();
    janus.stop.cancel();
    timeout(Duration::from_secs(5), janus.task.take().unwrap()).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
}

/// What Prometheus gets, by plain HTTP/1.1.
pub async fn scrape(address: SocketAddr) -> String {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn who_holds_connections_to_the_metrics_takes_nothing_from_backups() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let listen = |settings: &mut Settings| settings.metrics_listen = "127.0.0.1:0".into();
    let janus = janus_with(&keys, &[a.address()], listen).await;
    let metrics = janus.metrics.unwrap();
    let mut held = Vec::new();
    for _ in 0..300 {
        held.push(TcpStream::connect(metrics).await.unwrap());
    }
    // All but those that have a place are closed at once.
    let closed = async {
        let mut closed = 0;
        for tcp in &mut held {
            let mut byte = [0];
            let read = tcp.read(&mut byte);
            closed += usize::from(timeout(Duration::from_millis(20), read).await.is_ok());
        }
        closed
    };
    assert!(closed.await >= 300 - 128);
    client(&keys, &janus.url).await.start_backup(start_request()).await.unwrap();
    drop(held);
    until("there is a place again", || async {
        let mut tcp = TcpStream::connect(metrics).await.unwrap();
        let mut byte = [0];
        let asked = tcp.write_all(b"GET /metrics HTTP/1.1\r\nhost: janus\r\n\r\n").await;
        asked.is_ok() && tcp.read(&mut byte).await.is_ok_and(|read| read == 1)
    })
    .await;
}

#[tokio::test]
async fn prometheus_sees_the_servers_and_a_slow_reader_does_not_keep_janus() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let listen = |settings: &mut Settings| settings.metrics_listen = "127.0.0.1:0".into();
    let mut janus = janus_with(&keys, &[a.address(), b.address()], listen).await;
    let metrics = janus.metrics.unwrap();
    let snapshots = vec![snapshot("a", 1_767_225_600_000), snapshot("a", 5)];
    let (sender, mut answers) = report(&keys, &janus, "a", snapshots, 1).await;
    let vitals = pb::Vitals { free_bytes: 7 << 30, total_bytes: 9 << 30, ..Default::default() };
    let heartbeat = Event::Heartbeat(pb::Heartbeat { vitals: Some(vitals) });
    sender.send(pb::ReportRequest { sequence: 9, event: Some(heartbeat) }).await.unwrap();
    while answers.message().await.unwrap().unwrap().sequence < 9 {}
    let mut client = client(&keys, &janus.url).await;
    client.start_backup(start_request()).await.unwrap();
    a.set_mood(Mood::Refuse(ErrorReason::LeaseHeld));
    client.start_backup(start_request()).await.unwrap_err();
    client.write_blocks(tokio_stream::once(hello("early"))).await.unwrap_err();
    b.line.cut();
    let down = "janus_server_ready{server=\"b\"} 0.0";
    until("b is down", || async { scrape(metrics).await.contains(down) }).await;
    let page = scrape(metrics).await;
    for line in [
        "janus_server_ready{server=\"a\"} 1.0",
        "janus_server_starts_total{server=\"b\"} 1",
        "janus_machine_last_backup_timestamp_seconds{machine=\"alice/web\",server=\"a\"} 1767225600.0",
        "janus_settings_differences 0.0",
        "janus_server_free_bytes{server=\"a\"} 7516192768.0",
        "janus_server_total_bytes{server=\"a\"} 9663676416.0",
        "janus_server_errors_total{server=\"a\",reason=\"LEASE_HELD\"} 1",
        "janus_server_errors_total{server=\"b\",reason=\"SESSION_EXPIRED\"} 1",
        "janus_call_seconds_count{class=\"start\"} 2",
        "janus_call_seconds_count{class=\"pinned\"} 0",
        "janus_call_seconds_count{class=\"upload\"} 1",
        "# EOF",
    ] {
        assert!(page.lines().any(|found| found == line), "no {line} in {page}");
    }
    assert!(page.contains("janus_server_report_age_seconds{server=\"a\"} "), "{page}");
    assert!(!page.contains("janus_server_report_age_seconds{server=\"b\"} "), "{page}");
    assert!(!page.contains("janus_server_free_bytes{server=\"b\"} "), "{page}");
    // Certificates of the test are valid for two thousand years.
    for expiry in [
        "server_certificate_expiry_timestamp_seconds{server=\"b\"}",
        "certificate_expiry_timestamp_seconds",
    ] {
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("janus_{expiry} ")));
        assert!(line.unwrap().parse::<f64>().unwrap() > 4e9, "{page}");
    }

    let mut half_asked = TcpStream::connect(metrics).await.unwrap();
    half_asked.write_all(b"GET /met").await.unwrap();
    let began = Instant::now();
    janus.stop.cancel();
    janus.task.take().unwrap().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}
