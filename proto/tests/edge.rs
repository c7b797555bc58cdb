//! Both ends of a connection over real loopback sockets: who gets in, who is refused, and what the message says.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use janus_proto::{
    channel::{self, ConnectError, ConnectOptions, Expect, Target},
    listener::{self, Limits, PeerAddress},
    tls::{Identity, Principal},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::body::Body;
use tower::ServiceExt;

#[path = "edge/pki.rs"]
mod pki;
#[path = "edge/revoked.rs"]
mod revoked;

use pki::Ca;

struct Running {
    port: u16,
    task: JoinHandle<()>,
    shutdown: DropGuard,
}

impl Running {
    fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

async fn start(identity: Identity, limits: Limits) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let shutdown = CancellationToken::new();
    let service = tower::service_fn(answer);
    let task = tokio::spawn(listener::serve(listener, identity, service, limits, shutdown.clone()));
    Running { port, task, shutdown: shutdown.drop_guard() }
}

/// Says who called and how many bytes came; `/never` doesn't answer.
async fn answer(request: Request<Incoming>) -> Result<Response<Body>, std::convert::Infallible> {
    let caller = request.extensions().get::<Arc<Principal>>().unwrap().to_string();
    assert!(request.extensions().get::<PeerAddress>().is_some());
    if request.uri().path() == "/never" {
        std::future::pending::<()>().await;
    }
    let (mut body, mut received) = (request.into_body(), 0);
    while let Some(Ok(frame)) = body.frame().await {
        received += frame.data_ref().map_or(0, Bytes::len);
    }
    let answer = Response::builder().header("caller", caller).header("received", received);
    Ok(answer.body(Body::empty()).unwrap())
}

fn call(path: &str, body: Body) -> Request<Body> {
    Request::post(path).body(body).unwrap()
}

async fn refused(url: &str, identity: &Identity) -> String {
    let error =
        channel::connect(url, identity, ConnectOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains(url), "names the peer: {error}");
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

#[tokio::test]
async fn mutual_tls_shows_each_side_who_the_other_is() {
    let ca = Ca::new();
    let server = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let connection =
        channel::connect(&server.url(), &client, ConnectOptions::default()).await.unwrap();
    assert_eq!(connection.peer.to_string(), "server a");
    let answer = connection.channel.oneshot(call("/x", Body::empty())).await.unwrap();
    assert_eq!(answer.headers()["caller"], "client alice/web1");
}

#[tokio::test]
async fn a_lazy_channel_connects_at_the_first_call_and_again_after_a_loss() {
    let ca = Ca::new();
    let first = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let port = first.port;
    let client = ca.identity("g/client/alice/web1", "unused");
    let channel = channel::lazy(&first.url(), &client, ConnectOptions::default()).unwrap();
    channel.clone().oneshot(call("/x", Body::empty())).await.unwrap();
    drop(first.shutdown);
    first.task.await.unwrap();
    let error = loop {
        // The first call may still meet the old connection.
        let error = channel.clone().oneshot(call("/x", Body::empty())).await.unwrap_err();
        let text = channel::explain(&tonic::Status::from_error(Box::new(error)));
        if text.contains("refused") {
            break text;
        }
    };
    assert!(error.contains("nothing listens there"), "{error}");
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let identity = ca.identity("g/server/a", "127.0.0.1");
    let shutdown = CancellationToken::new();
    let _stop = shutdown.clone().drop_guard();
    tokio::spawn(listener::serve(
        listener,
        identity,
        tower::service_fn(answer),
        Limits::default(),
        shutdown,
    ));
    channel.oneshot(call("/x", Body::empty())).await.unwrap();
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart_and_a_wrong_one_is_not() {
    let ca = Ca::new();
    let files = ca.files("g/server/a", "127.0.0.1", Duration::from_secs(60));
    let identity = Identity::load(&files[0], &files[1], &files[2]).unwrap();
    let server = start(identity.clone(), Limits::default()).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let seen = async || {
        let options = ConnectOptions::default();
        channel::connect(&server.url(), &client, options).await.unwrap().peer.der
    };
    let first = seen().await;
    assert_eq!(seen().await, first);
    let other = ca.files("g/server/b", "127.0.0.1", Duration::from_secs(60));
    std::fs::copy(&other[0], &files[0]).unwrap();
    std::fs::copy(&other[1], &files[1]).unwrap();
    let error = identity.reload().unwrap_err().to_string();
    assert!(error.contains("server b") && error.contains("restart"), "{error}");
    std::fs::write(&files[0], "").unwrap();
    assert!(identity.reload().is_err());
    assert_eq!(seen().await, first, "the old one stays");
    // Written over the old ones.
    assert_eq!(ca.files("g/server/a", "127.0.0.1", Duration::from_secs(60)), files);
    identity.reload().unwrap();
    let second = seen().await;
    assert_ne!(second, first);
}

#[tokio::test]
async fn a_peer_of_another_ca_is_refused_by_either_side() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let server = start(theirs.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let client = ours.identity("g/client/alice/web1", "unused");
    let error = refused(&server.url(), &client).await;
    assert!(error.contains("its certificate was issued by another CA"), "{error}");

    // A client that trusts the server, with a certificate the server doesn't know.
    let [cert, key, _] = ours.files("g/client/alice/web2", "unused", Duration::from_secs(60));
    let error = raw_client(&server, &theirs, Some([cert, key])).await;
    assert!(error.contains("our certificate was issued by a CA that it doesn't know"), "{error}");
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let ca = Ca::new();
    let server = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let error = raw_client(&server, &ca, None).await;
    assert!(error.contains("asks for a client certificate and got none"), "{error}");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_the_other_side() {
    let ca = Ca::new();
    let soon = Duration::from_secs(3);
    let lasting_server = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let expiring_server =
        start(ca.identity_for("g/server/b", "127.0.0.1", soon), Limits::default()).await;
    let lasting = ca.identity("g/client/alice/web1", "unused");
    let expiring = ca.identity_for("g/client/alice/web2", "unused", soon);
    tokio::time::sleep(soon + Duration::from_secs(2)).await;
    let error = refused(&lasting_server.url(), &expiring).await;
    assert!(error.contains("our certificate has expired"), "{error}");
    let error = refused(&expiring_server.url(), &lasting).await;
    assert!(error.contains("its certificate has expired"), "{error}");
    let der = expiring.principal().der.clone();
    let forwarded = lasting.verify_forwarded(&der, &[]).unwrap_err().to_string();
    assert_eq!(forwarded, "certificate of client alice/web2 has expired");
    lasting.verify_forwarded(&lasting.principal().der, &[]).unwrap();
}

#[tokio::test]
async fn another_group_is_refused_by_either_side() {
    let ca = Ca::new();
    let server = start(ca.identity("home/server/a", "127.0.0.1"), Limits::default()).await;
    let client = ca.identity("work/client/alice/web1", "unused");
    let error = refused(&server.url(), &client).await;
    assert!(error.contains(r#"server a belongs to group "home", this is group "work""#), "{error}");
    assert!(
        client
            .verify_forwarded(&ca.identity("home/operator/o", "unused").principal().der, &[])
            .is_err()
    );

    // A foreign program doesn't check: the server answers its call.
    let answer = foreign_call(&server, &client).await;
    assert_eq!(answer.headers()["grpc-status"], "16");
    let message = answer.headers()["grpc-message"].to_str().unwrap();
    assert!(message.contains("work") && message.contains("home"), "{message}");
}

#[tokio::test]
async fn a_peer_of_the_wrong_role_or_name_is_refused() {
    let ca = Ca::new();
    let janus = start(ca.identity("g/janus/j", "127.0.0.1"), Limits::default()).await;
    let server = start(ca.identity("g/server/a", "a.example"), Limits::default()).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let options = ConnectOptions::expecting(Expect::Server);
    let error = channel::connect(&janus.url(), &client, options).await.unwrap_err();
    assert!(matches!(error, ConnectError::WrongPeer { .. }), "{error}");
    assert!(error.to_string().contains("it is janus j, not a server"), "{error}");
    let error = refused(&server.url(), &client).await;
    assert!(error.contains("not for host \"127.0.0.1\" but for: a.example"), "{error}");
}

#[tokio::test]
async fn plain_http_is_told_what_this_port_is() {
    let ca = Ca::new();
    let server = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let mut tcp = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("TLS with client certificates only"), "{answer}");
    let client = ca.identity("g/client/alice/web1", "unused");
    let url = format!("http://127.0.0.1:{}", server.port);
    let error = refused(&url, &client).await;
    assert!(error.contains(&format!("write {}", server.url())), "{error}");
}

#[tokio::test]
async fn unreachable_peers_are_told_apart() {
    let ca = Ca::new();
    let client = ca.identity("g/client/alice/web1", "unused");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());

    let begin = Instant::now();
    let error = refused(&url, &client).await;
    assert!(
        error.contains("timed out after 2s: it accepted the connection and then said nothing"),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(4));

    let talker = tokio::spawn(async move {
        let (_silent, _) = listener.accept().await.unwrap();
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let (closing, _) = listener.accept().await.unwrap();
        drop(closing);
    });
    let error = refused(&url, &client).await;
    assert!(error.contains("speaks no TLS"), "{error}");
    let error = refused(&url, &client).await;
    assert!(error.contains("connection lost"), "{error}");
    talker.await.unwrap();
    let error = refused(&url, &client).await;
    assert!(error.contains("connection refused; nothing listens there"), "{error}");
    let error = refused("https://no-such-host.invalid:7421", &client).await;
    assert!(
        error.contains("host \"no-such-host.invalid\" not found") || error.contains("timed out"),
        "{error}"
    );
}

#[tokio::test]
async fn shutdown_ends_in_time_whatever_peers_do() {
    let ca = Ca::new();
    let drain = Duration::from_millis(500);
    let server =
        start(ca.identity("g/server/a", "127.0.0.1"), Limits { drain, ..Limits::default() }).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let target = Target::parse(&server.url()).unwrap();
    let _no_tls = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    let _no_preface =
        channel::connect_tls(&target, &client, &ConnectOptions::default()).await.unwrap();
    let connection =
        channel::connect(&server.url(), &client, ConnectOptions::default()).await.unwrap();
    let pending = tokio::spawn(connection.channel.oneshot(call("/never", Body::empty())));
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(server.shutdown);
    let begin = Instant::now();
    tokio::time::timeout(Duration::from_secs(3), server.task)
        .await
        .expect("shutdown ends")
        .unwrap();
    assert!(begin.elapsed() >= drain, "the open call got its time");
    pending.await.unwrap().expect_err("the call was cut off");
}

#[tokio::test]
async fn shutdown_waits_for_an_open_upload() {
    let ca = Ca::new();
    let server = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let connection =
        channel::connect(&server.url(), &client, ConnectOptions::default()).await.unwrap();
    let (feed, chunks) = tokio::sync::mpsc::channel::<Bytes>(1);
    let upload = tokio::spawn(connection.channel.oneshot(call("/x", streamed(chunks))));
    feed.send(Bytes::from_static(b"before")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(server.shutdown);
    tokio::time::sleep(Duration::from_millis(100)).await;
    feed.send(Bytes::from_static(b"after")).await.unwrap();
    drop(feed);
    assert_eq!(upload.await.unwrap().unwrap().headers()["received"], "11");
    tokio::time::timeout(Duration::from_secs(3), server.task)
        .await
        .expect("shutdown ends")
        .unwrap();
}

#[tokio::test]
async fn a_large_upload_flows() {
    let ca = Ca::new();
    let server = start(ca.identity("g/server/a", "127.0.0.1"), Limits::default()).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let connection =
        channel::connect(&server.url(), &client, ConnectOptions::default()).await.unwrap();
    let (feed, chunks) = tokio::sync::mpsc::channel(4);
    let upload = tokio::spawn(connection.channel.oneshot(call("/x", streamed(chunks))));
    let chunk = Bytes::from(vec![7; 1 << 20]);
    for _ in 0..64 {
        feed.send(chunk.clone()).await.unwrap();
    }
    drop(feed);
    assert_eq!(upload.await.unwrap().unwrap().headers()["received"], (64 << 20).to_string());
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_at_once() {
    let ca = Ca::new();
    let limits = Limits { max_connections: 1, ..Limits::default() };
    let server = start(ca.identity("g/server/a", "127.0.0.1"), limits).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let _first = channel::connect(&server.url(), &client, ConnectOptions::default()).await.unwrap();
    let begin = Instant::now();
    let error = refused(&server.url(), &client).await;
    assert!(error.contains("connection lost"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn one_caller_takes_neither_all_connections_nor_all_calls() {
    let ca = Ca::new();
    let limits =
        Limits { max_connections_per_caller: 2, max_calls_per_caller: 3, ..Limits::default() };
    let server = start(ca.identity("g/server/a", "127.0.0.1"), limits).await;
    let open = async |role: &str| {
        let identity = ca.identity(role, "unused");
        channel::connect(&server.url(), &identity, ConnectOptions::default()).await.unwrap().channel
    };
    let code = |answer: Response<tonic::body::Body>| {
        answer.headers().get("grpc-status").map(|code| code.to_str().unwrap().to_owned())
    };
    let busy = Some((tonic::Code::ResourceExhausted as i32).to_string());
    let call = |channel: &tonic::transport::Channel, path: &'static str| {
        tokio::spawn(channel.clone().oneshot(call(path, Body::empty())))
    };
    let (first, second) = (open("g/client/alice/web").await, open("g/client/alice/web").await);
    let third = open("g/client/alice/web").await;
    let answer = call(&third, "/x").await.unwrap().unwrap();
    assert_eq!(code(answer), busy, "a third connection");
    let pending = [&first, &second, &first].map(|channel| call(channel, "/never"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let refused = call(&second, "/x").await.unwrap().unwrap();
    let status = tonic::Status::from_header_map(refused.headers()).unwrap();
    assert_eq!(janus_proto::error::reason(&status), Some(janus_proto::pb::ErrorReason::TooMany));
    assert_eq!(status.message(), "client alice/web has 3 open calls here");
    let other = open("g/client/alice/db").await;
    assert_eq!(code(call(&other, "/x").await.unwrap().unwrap()), None, "others have theirs");
    for call in pending {
        call.abort();
    }
    for attempt in 0.. {
        if code(call(&second, "/x").await.unwrap().unwrap()).is_none() {
            break;
        }
        assert!(attempt < 100, "ended calls don't count");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // A janus speaks for many.
    let janus = open("g/janus/j").await;
    let pending: Vec<_> = (0..10).map(|_| call(&janus, "/never")).collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(code(call(&janus, "/x").await.unwrap().unwrap()), None);
    drop(pending);
}

fn streamed(chunks: tokio::sync::mpsc::Receiver<Bytes>) -> Body {
    let frames = futures::stream::unfold(chunks, async |mut chunks| {
        let chunk = chunks.recv().await?;
        Some((Ok::<_, tonic::Status>(Frame::data(chunk)), chunks))
    });
    Body::new(StreamBody::new(frames))
}

/// What hyper tells a program that connects without our checks, as an explained line.
async fn raw_client(server: &Running, trusts: &Ca, own: Option<[std::path::PathBuf; 2]>) -> String {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let [.., ca] = trusts.files("g/operator/unused", "unused", Duration::from_secs(60));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::ring::default_provider().into(),
    )
    .with_protocol_versions(&[&rustls::version::TLS13])
    .unwrap()
    .with_root_certificates(roots);
    let config = match own {
        None => config.with_no_client_auth(),
        Some([cert, key]) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(cert).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
    };
    let error = call_over(server, config.into()).await.unwrap_err();
    channel::explain_error(&error)
}

async fn foreign_call(server: &Running, identity: &Identity) -> Response<Incoming> {
    call_over(server, identity.client_config()).await.unwrap()
}

async fn call_over(
    server: &Running,
    config: Arc<rustls::ClientConfig>,
) -> Result<Response<Incoming>, hyper::Error> {
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let tcp = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    let name = "127.0.0.1".try_into().unwrap();
    let tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await.unwrap();
    let (mut sender, connection) =
        channel::client_builder(TokioExecutor::new()).handshake(TokioIo::new(tls)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::post(format!("{}/x", server.url())).body(Empty::<Bytes>::new()).unwrap();
    match sender.send_request(request).await {
        Ok(answer) => Ok(answer),
        // The connection knows why it ended; the request only that it was lost.
        Err(error) => Err(connection.await.unwrap().err().unwrap_or(error)),
    }
}
