//! Alerts by a real HTTP listener and a real command.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use janus::config::Settings;
use janus_proto::pb::{self, report_request::Event};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::Mutex,
    time::sleep,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    backend::Backend,
    catalog::{report, snapshot},
    site::{Keys, janus_with, until},
};

type Told = Arc<Mutex<Vec<serde_json::Value>>>;

/// Reads one request; its body.
async fn request(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let (mut request, mut buffer) = (String::new(), [0; 4096]);
    let length = |head: &str| {
        let line = head.lines().find(|line| line.starts_with("content-length: "));
        line.unwrap()["content-length: ".len()..].parse::<usize>().unwrap()
    };
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        request.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        match request.split_once("\r\n\r\n") {
            Some((head, body)) if body.len() >= length(head) => {
                assert!(request.starts_with("POST /hook HTTP/1.1\r\n"), "{request}");
                return body.to_owned();
            }
            _ => {}
        }
    }
}

async fn answer(stream: &mut (impl AsyncWrite + Unpin), status: &str) {
    let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n");
    stream.write_all(answer.as_bytes()).await.unwrap();
    let _ = stream.shutdown().await;
}

/// Takes webhooks: the first `refusals` with 503, the rest with 204. Returns its URL and what it was told.
async fn receiver(mut refusals: usize) -> (String, Told) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let taken = Told::default();
    let told = taken.clone();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let body = request(&mut tcp).await;
            if refusals > 0 {
                refusals -= 1;
                answer(&mut tcp, "503 Service Unavailable").await;
            } else {
                told.lock().await.push(serde_json::from_str(&body).unwrap());
                answer(&mut tcp, "204 No Content").await;
            }
        }
    });
    (url, taken)
}

/// A server that shows the certificate `role` of `keys`, and asks for none.
fn acceptor(keys: &Keys, role: &str) -> TlsAcceptor {
    let folder = keys.files(role);
    let files = ["cert.pem", "key.pem"].map(|name| folder.as_ref().join(name));
    let chain = CertificateDer::pem_file_iter(&files[0]).unwrap();
    let config = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            chain.map(Result::unwrap).collect(),
            PrivateKeyDer::from_pem_file(&files[1]).unwrap(),
        );
    TlsAcceptor::from(Arc::new(config.unwrap()))
}

/// Takes webhooks by TLS, with the certificate that is `shown` at the time; counts handshakes that failed.
async fn tls_receiver(shown: Arc<Mutex<TlsAcceptor>>) -> (String, Told, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/hook", listener.local_addr().unwrap());
    let (taken, failures) = (Told::default(), Arc::new(AtomicUsize::new(0)));
    let (told, failed) = (taken.clone(), failures.clone());
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let acceptor = shown.lock().await.clone();
            match acceptor.accept(tcp).await {
                Ok(mut tls) => {
                    let body = request(&mut tls).await;
                    told.lock().await.push(serde_json::from_str(&body).unwrap());
                    answer(&mut tls, "204 No Content").await;
                }
                Err(_) => drop(failed.fetch_add(1, Ordering::Relaxed)),
            }
        }
    });
    (url, taken, failures)
}

fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_millis() as i64
}

#[tokio::test]
async fn alerts_arrive_once_by_webhook_and_command_although_the_first_attempt_fails() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let (url, told) = receiver(1).await;
    let folder = tempfile::tempdir().unwrap();
    let mails = folder.path().join("mails");
    let script = format!("cat >> '{}'", mails.display());
    let primary = |settings: &mut Settings| {
        settings.primary = true;
        settings.alert_webhook = url.clone();
        settings.alert_command = ["/bin/sh", "-c", script.as_str()].map(str::to_owned).to_vec();
        settings.alert_after_minutes = 0;
    };
    let janus = janus_with(&keys, &[a.address()], primary).await;
    // One of two janus alone tells.
    let (second_url, second_told) = receiver(0).await;
    let second = |settings: &mut Settings| {
        settings.alert_webhook = second_url;
        settings.alert_after_minutes = 0;
    };
    let second = janus_with(&keys, &[a.address()], second).await;
    let _to_second = report(&keys, &second, "a", vec![snapshot("a", 1000)], 1).await;
    let (sender, _answers) = report(&keys, &janus, "a", vec![snapshot("a", 1000)], 1).await;
    let count = || async { told.lock().await.len() };
    until("the overdue machine is told of", || async { count().await >= 1 }).await;
    // A new backup.
    let snapshots = vec![snapshot("a", now_ms())];
    let change = Event::Change(pb::StateChange { snapshots, ..Default::default() });
    sender.send(pb::ReportRequest { sequence: 9, event: Some(change) }).await.unwrap();
    until("its end is told", || async { count().await >= 2 }).await;
    // Each way looks by itself, and what one look finds together has no order.
    let mailed =
        || std::fs::read_to_string(&mails).unwrap_or_default().matches("Subject: ").count();
    until("its end is mailed", || async { mailed() >= 2 }).await;
    a.line.cut();
    until("the lost server is told of", || async { count().await >= 3 }).await;
    sleep(Duration::from_secs(3)).await;
    assert!(second_told.lock().await.is_empty(), "it is not primary");
    let told = told.lock().await;
    let said: Vec<_> = told
        .iter()
        .map(|alert| ["event", "kind", "subject"].map(|key| alert[key].as_str().unwrap()))
        .collect();
    assert_eq!(
        said,
        [
            ["begun", "machine_overdue", "alice/web"],
            ["over", "machine_overdue", "alice/web"],
            ["begun", "server_unreachable", "a"],
        ]
    );
    let text = told[0]["text"].as_str().unwrap();
    assert!(text.ends_with(": alice/web has no backup since 1970-01-01 00:00:01"), "{text}");
    let mails = std::fs::read_to_string(&mails).unwrap();
    let subjects: Vec<_> = mails.lines().filter(|line| line.starts_with("Subject: ")).collect();
    assert_eq!(subjects.len(), 3, "{mails}");
    assert!(subjects[2].contains("] a: "), "{mails}");
}

#[tokio::test]
async fn a_webhook_with_a_wrong_certificate_is_told_nothing_until_it_has_the_right_one() {
    let keys = Keys::new();
    let (right, foreign) = (acceptor(&keys, "server/hook"), acceptor(&Keys::new(), "server/hook"));
    let shown = Arc::new(Mutex::new(foreign));
    let (url, told, failures) = tls_receiver(shown.clone()).await;
    let primary = |settings: &mut Settings| {
        settings.primary = true;
        settings.alert_webhook = url.clone();
        settings.alert_ca = keys.ca();
        settings.alert_after_minutes = 0;
    };
    let a = Backend::new(&keys, "a").await;
    let janus = janus_with(&keys, &[a.address()], primary).await;
    let _report = report(&keys, &janus, "a", vec![snapshot("a", 1000)], 1).await;
    until("it is tried again", || async { failures.load(Ordering::Relaxed) >= 2 }).await;
    // Of the right authority, but for another host.
    let by_name = url.replace("127.0.0.1", "localhost");
    assert_eq!(told.lock().await.len(), 0, "nothing was said to {url}");
    *shown.lock().await = right;
    until("the alert is told", || async { told.lock().await.len() == 1 }).await;
    let first = told.lock().await[0].clone();
    assert_eq!((&first["event"], &first["kind"]), (&"begun".into(), &"machine_overdue".into()));
    drop(janus);

    let failed = failures.load(Ordering::Relaxed);
    let primary = |settings: &mut Settings| {
        settings.primary = true;
        settings.alert_webhook = by_name;
        settings.alert_ca = keys.ca();
        settings.alert_after_minutes = 0;
    };
    let janus = janus_with(&keys, &[a.address()], primary).await;
    let _report = report(&keys, &janus, "a", vec![snapshot("a", 1000)], 1).await;
    until("it is tried again", || async { failures.load(Ordering::Relaxed) >= failed + 2 }).await;
    assert_eq!(told.lock().await.len(), 1, "the certificate names 127.0.0.1 only");
}
