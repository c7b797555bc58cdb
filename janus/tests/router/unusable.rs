//! Servers that can't be used, each in its own way: a start passes over them in time and says why.

mod together;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use janus::{config::Settings, selection::InitialBackups};
use janus_proto::{metadata, pb};
use tokio::{io::AsyncReadExt, net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::{
    backend::Backend,
    catalog::report_all,
    site::{Keys, Running, channel, client, janus_with},
    starts::start_request,
};

/// The server that takes a start before which `bad` stands, why that was passed over, and how long it took.
async fn start_after(keys: &Keys, bad: String) -> (String, String, Duration) {
    let good = Backend::new(keys, "good").await;
    let urls = vec![bad, format!("https://{}", good.address())];
    let janus = janus_with(keys, &[], |settings| settings.server_urls = urls).await;
    let mut client = client(keys, &janus.url).await;
    let begun = Instant::now();
    let answer = client.start_backup(start_request()).await.unwrap();
    let took = begun.elapsed();
    let skipped = answer.metadata().get(metadata::SKIPPED).unwrap().to_str().unwrap().to_owned();
    (answer.into_inner().server_id, skipped, took)
}

async fn assert_passed_over(keys: &Keys, bad: String, why: &str) {
    let (server, skipped, took) = start_after(keys, bad).await;
    assert_eq!(server, "good");
    assert!(skipped.contains(why), "{why:?} is not in {skipped:?}");
    assert!(took < Duration::from_secs(2), "{took:?}: {skipped}");
}

/// Accepts connections and does this with each.
async fn listen<F>(
    each: impl Fn(tokio::net::TcpStream) -> F + Send + Sync + 'static,
) -> (SocketAddr, JoinSet<()>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            connections.spawn(each(listener.accept().await.unwrap().0));
        }
    });
    (address, tasks)
}

#[tokio::test]
async fn one_that_resets_every_connection() {
    let (address, _tasks) = listen(|mut tcp| async move {
        // Closing with bytes unread resets.
        let _ = tcp.peek(&mut [0]).await;
        let _ = tcp.read(&mut [0]).await;
    })
    .await;
    assert_passed_over(&Keys::new(), format!("https://{address}"), "reset").await;
}

#[tokio::test]
async fn one_whose_name_does_not_resolve() {
    let url = "https://no-such-host.invalid:7421".to_owned();
    assert_passed_over(&Keys::new(), url, "no-such-host.invalid").await;
}

#[tokio::test]
async fn one_with_a_certificate_of_another_authority() {
    let foreign = Backend::new(&Keys::new(), "a").await;
    let url = format!("https://{}", foreign.address());
    assert_passed_over(&Keys::new(), url, "certificate").await;
}

#[tokio::test]
async fn one_whose_certificate_names_another_host() {
    let keys = Keys::new();
    let a = Backend::new(&keys, "a").await;
    let url = format!("https://localhost:{}", a.address().port());
    assert_passed_over(&keys, url, "localhost").await;
}

#[tokio::test]
async fn one_that_is_no_server() {
    let keys = Keys::new();
    let acceptor = TlsAcceptor::from(keys.identity("janus/other").server_config());
    let (address, _tasks) = listen(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let _open = acceptor.accept(tcp).await;
            std::future::pending().await
        }
    })
    .await;
    assert_passed_over(&keys, format!("https://{address}"), "not a server").await;
}

#[tokio::test]
async fn one_that_says_nothing_after_the_tls_handshake() {
    let keys = Keys::new();
    let acceptor = TlsAcceptor::from(keys.identity("server/mute").server_config());
    let (address, _tasks) = listen(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let _open = acceptor.accept(tcp).await;
            std::future::pending().await
        }
    })
    .await;
    assert_passed_over(&keys, format!("https://{address}"), "no answer for").await;
}

async fn reported(
    keys: &Keys,
    janus: &Running,
    server: &str,
    machines: &[(&str, u64)],
) -> impl Sized + use<> {
    let machine = |(machine, use_counter): &(&str, u64)| pb::MachineReport {
        machine: (*machine).to_owned(),
        use_counter: *use_counter,
        has_chain: true,
        ..Default::default()
    };
    let machines = machines.iter().map(machine).collect();
    let full = pb::StateChange { machines, ..Default::default() };
    report_all(keys, janus, server, pb::ReportHello::default(), full).await
}

#[tokio::test]
async fn first_backups_that_are_held_go_to_a_new_server_only_when_no_other_is_left() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let hold = |settings: &mut Settings| settings.initial_backups = InitialBackups::Hold;
    let janus = janus_with(&keys, &[a.address(), b.address()], hold).await;
    let _a = reported(&keys, &janus, "a", &[("alice/web", 1)]).await;
    let _b = reported(&keys, &janus, "b", &[]).await;
    let mut client = client(&keys, &janus.url).await;
    for _ in 0..3 {
        let answer = client.start_backup(start_request()).await.unwrap();
        assert_eq!(answer.into_inner().server_id, "a");
    }
    a.line.cut();
    let answer = client.start_backup(start_request()).await.unwrap();
    assert_eq!(answer.into_inner().server_id, "b");
}

#[tokio::test]
async fn a_server_takes_so_many_first_backups_at_once() {
    let keys = Keys::new();
    let (a, b) = (Backend::new(&keys, "a").await, Backend::new(&keys, "b").await);
    let one = |settings: &mut Settings| settings.max_initial_runs = 1;
    let janus = janus_with(&keys, &[a.address(), b.address()], one).await;
    // B is the last of three machines, A of none: new machines go to A as long as it has room.
    let _a = reported(&keys, &janus, "a", &[]).await;
    let others = [("bob/x", 1), ("bob/y", 1), ("bob/z", 1)];
    let _b = reported(&keys, &janus, "b", &others).await;
    let mut taken = Vec::new();
    for machine in ["client/alice/one", "client/alice/two"] {
        let channel = channel(&janus.url, &keys.identity(machine)).await;
        let mut client = pb::backup_service_client::BackupServiceClient::new(channel);
        let answer = client.start_backup(start_request()).await.unwrap();
        taken.push(answer.into_inner().server_id);
    }
    assert_eq!(taken, ["a", "b"]);
}
