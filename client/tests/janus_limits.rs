//! What janus holds is bounded whatever servers and clients do, and a client waits for its place. Real processes.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use futures::{StreamExt, future::join_all, stream};
use janus_proto::{
    channel,
    error::{ErrorReason, reason},
    pb::{self, backup_service_client::BackupServiceClient},
    tls::Identity,
};
use tonic::{Request, Status, transport::Channel};
use xtask::{
    disk, measure,
    site::{Plan, Programs, Site, USER},
};

const MIB: u64 = 1 << 20;
/// Default of `max_bulk_streams`.
const STREAMS: usize = 64;
/// What janus takes of a stream that its server doesn't read, as the README says.
const WINDOW: u64 = 4 * MIB;
/// What it needs besides.
const BASE: u64 = 64 * MIB;

fn one_server() -> Site {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap()
}

/// A connection of a machine of its own.
async fn connect(site: &Site, machine: &str) -> BackupServiceClient<Channel> {
    site.issue("client", machine, &["--user", USER, "--machine", machine]).unwrap();
    let keys = site.folder().join("pki").join(machine);
    let [cert, key, ca] = ["cert", "key", "ca"].map(|name| keys.join(format!("{name}.pem")));
    let identity = Identity::load(cert, key, ca).unwrap();
    let options = channel::ConnectOptions::default();
    BackupServiceClient::new(
        channel::connect(&site.url(), &identity, options).await.unwrap().channel,
    )
}

fn pinned<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("janus-server", "server-a".parse().unwrap());
    request
}

/// Sends for ever into a session that doesn't exist; `sent` counts the bytes that have left.
async fn flood(mut client: BackupServiceClient<Channel>, sent: Arc<AtomicU64>) -> Status {
    let data = bytes::Bytes::from(vec![7; MIB as usize]);
    let messages = stream::repeat(data).map(move |data| {
        sent.fetch_add(data.len() as u64, Ordering::Relaxed);
        let batch = Some(pb::BlockBatch { data, ..Default::default() });
        pb::WriteBlocksRequest { session_id: "none".into(), batch, ..Default::default() }
    });
    match client.write_blocks(pinned(messages)).await {
        Err(status) => status,
        Ok(mut answers) => answers.get_mut().message().await.unwrap_err(),
    }
}

#[test]
fn uploads_to_a_frozen_server_hold_at_most_a_window_each() {
    let mut site = one_server();
    site.start_all().unwrap();
    let observer = site.client("observer", &[]).unwrap();
    site.await_ready(&observer).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let clients = runtime.block_on(async {
        let mut clients = Vec::new();
        for n in 0..=STREAMS {
            clients.push(connect(&site, &format!("m{n}")).await);
        }
        clients
    });
    let janus = site.janus().unwrap().pid();
    measure::reset_peak(janus);
    site.server("server-a").unwrap().process().unwrap().freeze();

    let (sent, mut clients) = (Arc::new(AtomicU64::new(0)), clients.into_iter());
    let uploads: Vec<_> =
        clients.by_ref().take(STREAMS).map(|c| runtime.spawn(flood(c, sent.clone()))).collect();
    let (begun, mut last) = (Instant::now(), 0);
    loop {
        sleep(Duration::from_secs(1));
        let now = sent.load(Ordering::Relaxed);
        if now == last || begun.elapsed() > Duration::from_secs(10) {
            break;
        }
        last = now;
    }
    let one_more = clients.next().unwrap();
    let refused = runtime.block_on(flood(one_more, Arc::default()));
    assert_eq!(reason(&refused), Some(ErrorReason::TooMany), "{refused}");
    let windows = STREAMS as u64 * WINDOW;
    let peak = measure::used(janus).peak_rss_bytes;
    println!(
        "frozen server: {} MiB taken from {STREAMS} uploads, janus holds {} MiB at most, bound {} MiB",
        last / MIB,
        peak / MIB,
        (windows + BASE) / MIB
    );
    assert!(last >= windows, "the windows are full: {last}");
    assert!(peak > windows / 2, "and janus holds what is in them: {peak}");
    assert!(peak <= windows + BASE, "{} MiB", peak / MIB);

    // Given up within the time after which a silent server counts as lost.
    let ended = runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(40), join_all(uploads)).await });
    for status in ended.expect("the uploads end").into_iter().map(Result::unwrap) {
        assert_eq!(reason(&status), Some(ErrorReason::ServerUnreachable), "{status}");
    }
    site.server("server-a").unwrap().process().unwrap().thaw();
    site.await_ready(&observer).unwrap();
}

#[test]
fn a_backup_waits_for_its_place() {
    let mut site = one_server();
    site.janus_settings().unwrap().set("max_bulk_streams", 1);
    site.start_all().unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 8 * MIB).unwrap();
    disk::write_noise(&path, 0..8 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();

    // Another machine's upload has the only place.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut other = runtime.block_on(connect(&site, "other"));
    let start = pb::StartBackupRequest {
        backup_id: janus_proto::ids::BackupId::new().to_string(),
        disks: vec![pb::DiskStart {
            disk_id: "d".into(),
            size_bytes: MIB,
            logical_sector_bytes: 512,
        }],
        ..Default::default()
    };
    let started = runtime.block_on(other.start_backup(start)).unwrap().into_inner();
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    let session_id = started.sessions[0].session_id.clone();
    let first = pb::WriteBlocksRequest { session_id, epoch: started.epoch, ..Default::default() };
    let held = runtime.block_on(async {
        sender.send(first).await.unwrap();
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
        other.write_blocks(pinned(messages)).await.unwrap()
    });

    let mut running = client.start(&["backup", "--json"]).unwrap();
    sleep(Duration::from_secs(3));
    assert!(!running.has_ended(), "it waits");
    drop((sender, held));
    let finished = running.wait().unwrap();
    assert!(finished.stderr.contains("waiting for a place"), "{}", finished.stderr);
    let answer: xtask::site::answers::Backup = finished.answer().unwrap();
    // What it sent before it heard that there is no place travels twice.
    assert!(answer.disks[0].sent_bytes >= 8 * MIB, "{answer:?}");
    let restored = site.folder().join("restored");
    client.restore("disk", &restored).unwrap();
    disk::compare(&path, &restored).unwrap();
}
