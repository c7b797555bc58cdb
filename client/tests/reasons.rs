//! Every error reason, over real sockets through janus: its gRPC code, its `ErrorInfo` and its `RetryInfo`.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, time::Duration};

use bytes::Bytes;
use janus_proto::{
    channel::{self, ConnectOptions},
    error::{self, ErrorReason, code, reason, retry_after},
    hash::{hash_block, segment_digest, table_digest},
    ids::{BackupId, BlockHash, HandleId, SnapshotId},
    pb::{
        self, backup_service_client::BackupServiceClient,
        maintenance_service_client::MaintenanceServiceClient,
        report_service_client::ReportServiceClient, restore_service_client::RestoreServiceClient,
        server_info_service_client::ServerInfoServiceClient,
    },
    tls::Identity,
};
use tonic::{Request, Status, transport::Channel};
use tonic_types::StatusExt;
use xtask::site::{Plan, Programs, Site};

const MACHINE: &str = "machine";
const BLOCK: usize = 4096;

/// Reasons that no call through janus can get yet, and why. The table test fails for any other that is missing.
const NOT_YET: &[(ErrorReason, &str)] = &[
    (
        ErrorReason::IdentityMissing,
        "our client refuses to load such a certificate: foreign_clients.rs sends one",
    ),
    (ErrorReason::MachineUnknown, "unknown machines are empty lists"),
    (
        ErrorReason::StoreFull,
        "needs a small file system: refusals.rs, as_root_a_full_store_keeps_what_it_has",
    ),
    (
        ErrorReason::QuotaExceeded,
        "needs a quota: retention.rs, a_user_over_the_quota_is_refused_and_told_so",
    ),
    (ErrorReason::VersionUnsupported, "there is one version"),
    (
        ErrorReason::TokenRefused,
        "machines enrol on a port of its own: identity, a_machine_enrols_once_and_backs_up",
    ),
];

struct Caller {
    channel: Channel,
}

impl Caller {
    async fn new(url: &str, keys: &Path) -> Self {
        let path = |name: &str| keys.join(name);
        let identity = Identity::load(path("cert.pem"), path("key.pem"), path("ca.pem")).unwrap();
        Self {
            channel: channel::connect(url, &identity, ConnectOptions::default())
                .await
                .unwrap()
                .channel,
        }
    }

    fn backup(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.channel.clone())
    }

    fn restore(&self) -> RestoreServiceClient<Channel> {
        RestoreServiceClient::new(self.channel.clone())
    }

    /// Waits until janus knows that `count` servers are ready.
    async fn await_ready(&self, count: usize) {
        let mut info = ServerInfoServiceClient::new(self.channel.clone());
        for _ in 0..200 {
            let status =
                info.get_router_status(pb::GetRouterStatusRequest {}).await.unwrap().into_inner();
            if status
                .servers
                .iter()
                .filter(|server| server.ready && server.report_age_ms >= 0)
                .count()
                == count
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{count} servers are not ready after 10 s");
    }

    /// Starts a run of one-block disks on `server`.
    async fn start(
        &self,
        server: &str,
        id: BackupId,
        disks: &[&str],
    ) -> Result<pb::StartBackupResponse, Status> {
        let disks = disks.iter().map(|disk| pb::DiskStart {
            disk_id: (*disk).to_owned(),
            size_bytes: BLOCK as u64,
            logical_sector_bytes: 512,
        });
        let start = pb::StartBackupRequest {
            backup_id: id.to_string(),
            disks: disks.collect(),
            ..Default::default()
        };
        self.backup().start_backup(pinned(server, start)).await.map(tonic::Response::into_inner)
    }

    /// Writes block 0 of the first session.
    async fn write(
        &self,
        server: &str,
        run: &pb::StartBackupResponse,
        data: &[u8],
        hash: BlockHash,
    ) -> Result<u64, Status> {
        let extent = pb::BlockExtent { first_block: 0, block_count: 1, zero: false };
        let batch = pb::BlockBatch {
            extents: vec![extent],
            hashes: Bytes::copy_from_slice(&hash.0),
            data: Bytes::copy_from_slice(data),
            encoding: pb::Encoding::None.into(),
        };
        let message = pb::WriteBlocksRequest {
            session_id: run.sessions[0].session_id.clone(),
            epoch: run.epoch,
            batch: Some(batch),
            settled_block: 1,
        };
        let messages = pinned(server, tokio_stream::iter([message]));
        let mut answers = self.backup().write_blocks(messages).await?.into_inner();
        let mut received = 0;
        while let Some(answer) = answers.message().await? {
            received = answer.received_messages;
        }
        Ok(received)
    }

    async fn commit(
        &self,
        server: &str,
        run: &pb::StartBackupResponse,
        head: &str,
        digest: BlockHash,
    ) -> Result<pb::CommitBackupResponse, Status> {
        let disk = pb::DiskCommit {
            disk_id: run.sessions[0].disk_id.clone(),
            expected_head_id: head.to_owned(),
            table_digest: Bytes::copy_from_slice(&digest.0),
            consistency: pb::Consistency::Frozen.into(),
            skipped_bytes: 0,
        };
        let commit = pb::CommitBackupRequest {
            backup_id: run.backup_id.clone(),
            epoch: run.epoch,
            disks: vec![disk],
            client_seal: Bytes::new(),
        };
        self.backup().commit_backup(pinned(server, commit)).await.map(tonic::Response::into_inner)
    }

    async fn open(&self, server: &str, snapshot: &str) -> Result<pb::OpenSnapshotResponse, Status> {
        let request =
            pb::OpenSnapshotRequest { snapshot_id: snapshot.to_owned(), ..Default::default() };
        self.restore().open_snapshot(pinned(server, request)).await.map(tonic::Response::into_inner)
    }

    async fn read(&self, server: &str, handle: &str) -> Result<(), Status> {
        let request = pb::ReadBlocksRequest { handle: handle.to_owned(), ..Default::default() };
        let mut answers = self.restore().read_blocks(pinned(server, request)).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    }
}

fn pinned<T>(server: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("janus-server", server.parse().unwrap());
    request.set_timeout(Duration::from_secs(30));
    request
}

/// Digest of a disk of one block.
fn digest_of(block: BlockHash) -> BlockHash {
    table_digest(BLOCK as u64, &[segment_digest(&[block])])
}

/// What was seen, and the check of each.
#[derive(Default)]
struct Table(Vec<ErrorReason>);

impl Table {
    fn expect<T: std::fmt::Debug>(&mut self, expected: ErrorReason, result: Result<T, Status>) {
        let status = result.expect_err(expected.as_str_name());
        assert_eq!(reason(&status), Some(expected), "{status:?}");
        assert_eq!(status.code(), code(expected), "{status:?}");
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        assert_eq!(retry, retry_after(expected), "{expected:?}");
        let text = status.message();
        assert!(!text.is_empty() && !text.contains('\n'), "{expected:?} says {text:?}");
        println!("{:<40} {:?}: {text}", expected.as_str_name(), status.code());
        self.0.push(expected);
    }

    fn assert_complete(&self) {
        for number in 1.. {
            let Ok(reason) = ErrorReason::try_from(number) else { break };
            let excused = NOT_YET.iter().any(|(excused, _)| *excused == reason);
            assert!(
                self.0.contains(&reason) != excused,
                "{reason:?}: seen and excused, or neither"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_reason_arrives_through_janus_as_the_table_says() {
    let mut site = tokio::task::block_in_place(|| {
        Site::start(Programs::for_tests().unwrap(), &Plan::default())
    })
    .unwrap();
    site.client(MACHINE, &[]).unwrap();
    let caller = Caller::new(&site.url(), &site.folder().join("pki").join(MACHINE)).await;
    caller.await_ready(2).await;
    let mut table = Table::default();
    run_states(&caller, &mut table).await;
    reads(&caller, &mut table).await;
    roles_and_places(&site, &caller, &mut table).await;
    broken_store(&site, &caller, &mut table).await;
    lost_servers(&mut site, &caller, &mut table).await;
    table.assert_complete();
}

/// What the life of a run can bring; leaves a committed snapshot of disk `one` on server-a.
async fn run_states(caller: &Caller, table: &mut Table) {
    let (a, data) = ("server-a", [7; BLOCK]);
    let (hash, wrong) = (hash_block(&data), hash_block(&[1]));
    let id = BackupId::new();

    let twice = caller.start(a, BackupId::new(), &["one", "one"]).await;
    table.expect(ErrorReason::DiskTwice, twice);
    table.expect(ErrorReason::InvalidField, caller.start(a, BackupId::new(), &["../one"]).await);
    let unknown = pb::GetBackupRequest { backup_id: BackupId::new().to_string() };
    table.expect(ErrorReason::SessionExpired, caller.backup().get_backup(pinned(a, unknown)).await);

    let old = caller.start(a, id, &["one"]).await.unwrap();
    let held = caller.start(a, BackupId::new(), &["one"]).await;
    assert_eq!(held.as_ref().err().and_then(error::lease_holder), Some(id));
    table.expect(ErrorReason::LeaseHeld, held);
    let run = caller.start(a, id, &["one"]).await.unwrap();
    assert!(run.epoch > old.epoch);
    table.expect(ErrorReason::EpochSuperseded, caller.write(a, &old, &data, hash).await);
    table.expect(ErrorReason::BlockHashMismatch, caller.write(a, &run, &data, wrong).await);
    // The session stays open: the right block goes in, and a wrong commit can be repaired.
    assert_eq!(caller.write(a, &run, &data, hash).await.unwrap(), 1);
    let elsewhere = SnapshotId::new().to_string();
    table.expect(ErrorReason::HeadMoved, caller.commit(a, &run, &elsewhere, digest_of(hash)).await);
    table.expect(ErrorReason::DigestMismatch, caller.commit(a, &run, "", digest_of(wrong)).await);
    let first = caller.commit(a, &run, "", digest_of(hash)).await.unwrap();
    // Repeating a commit answers its result again; the run itself is over.
    assert_eq!(caller.commit(a, &run, "", digest_of(hash)).await.unwrap(), first);
    let abort = pb::AbortBackupRequest { backup_id: run.backup_id.clone() };
    table.expect(ErrorReason::RunState, caller.backup().abort_backup(pinned(a, abort)).await);
}

async fn reads(caller: &Caller, table: &mut Table) {
    let a = "server-a";
    table
        .expect(ErrorReason::SnapshotUnknown, caller.open(a, &SnapshotId::new().to_string()).await);
    table.expect(ErrorReason::HandleExpired, caller.read(a, &HandleId::new().to_string()).await);

    let snapshot = snapshot_of(caller).await;
    // More handles than one server gives out; they are closed again.
    let mut handles = Vec::new();
    let refused = loop {
        match caller.open(a, &snapshot.snapshot_id).await {
            Ok(opened) if handles.len() < 2000 => handles.push(opened.handle),
            result => break result,
        }
    };
    table.expect(ErrorReason::TooMany, refused);
    for handle in handles {
        caller
            .restore()
            .close_snapshot(pinned(a, pb::CloseSnapshotRequest { handle, ..Default::default() }))
            .await
            .unwrap();
    }
    caller.open(a, &snapshot.snapshot_id).await.unwrap();
}

/// The snapshot that `run_states` has left.
async fn snapshot_of(caller: &Caller) -> pb::Snapshot {
    let mut catalog = pb::catalog_service_client::CatalogServiceClient::new(caller.channel.clone());
    let list =
        catalog.list_snapshots(pb::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    list.snapshots.into_iter().next().expect("a snapshot is there")
}

async fn roles_and_places(site: &Site, caller: &Caller, table: &mut Table) {
    let a = "server-a";
    let mut request = pinned(a, pb::GetBackupRequest { backup_id: BackupId::new().to_string() });
    request.metadata_mut().insert("janus-machine", "alice/other".parse().unwrap());
    table.expect(ErrorReason::NotAllowed, caller.backup().get_backup(request).await);
    // A client is no server: it can't report.
    let mut reports = ReportServiceClient::new(caller.channel.clone());
    let hello = pb::ReportRequest { sequence: 1, event: None };
    let result = match reports.report(tokio_stream::iter([hello])).await {
        Ok(answers) => answers.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    table.expect(ErrorReason::NotAllowed, result);
    // Only a server itself can find that a call is another's: janus sends each where it belongs.
    let keys = site.folder().join("pki").join(MACHINE);
    let direct = Caller::new(&url_of(site, "server-b"), &keys).await;
    table.expect(ErrorReason::WrongServer, direct.start(a, BackupId::new(), &["one"]).await);
    // Who restores a machine writes nothing, by janus or without it.
    let of_machine = ["--user", xtask::site::USER, "--machine", MACHINE, "--hours", "1"];
    tokio::task::block_in_place(|| site.issue("restore", "rescue", &of_machine)).unwrap();
    let keys = site.folder().join("pki").join("rescue");
    for url in [site.url(), url_of(site, a)] {
        let rescue = Caller::new(&url, &keys).await;
        table.expect(ErrorReason::NotAllowed, rescue.start(a, BackupId::new(), &["one"]).await);
    }
    // A server that is in use is not forgotten, whoever asks for it.
    let keys = site.folder().join("pki").join("eve");
    tokio::task::block_in_place(|| site.issue("operator", "eve", &[])).unwrap();
    let operator = Caller::new(&site.url(), &keys).await;
    // An operator's calls through janus are signed; straight to a server TLS says enough.
    let nothing = SnapshotId::new().to_string();
    table.expect(ErrorReason::ProofRefused, operator.open(a, &nothing).await);
    let straight = Caller::new(&url_of(site, a), &keys).await;
    table.expect(ErrorReason::SnapshotUnknown, straight.open(a, &nothing).await);
    let forget = pb::ForgetServerRequest { server_id: a.into() };
    let forgotten = MaintenanceServiceClient::new(operator.channel).forget_server(forget).await;
    table.expect(ErrorReason::ServerInUse, forgotten);
}

fn url_of(site: &Site, server: &str) -> String {
    let text = fs::read_to_string(site.folder().join(format!("settings/{server}.toml"))).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("listen = ")).unwrap();
    format!("https://{}", line.trim_matches('"'))
}

/// Files of the store are damaged behind the server's back.
async fn broken_store(site: &Site, caller: &Caller, table: &mut Table) {
    let a = "server-a";
    let snapshot = snapshot_of(caller).await;
    let image = site.folder().join(a).join(&snapshot.image);
    let length = fs::metadata(&image).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xA5; length as usize], 0).unwrap();
    let damaged = match caller.open(a, &snapshot.snapshot_id).await {
        Ok(opened) => caller.read(a, &opened.handle).await,
        Err(status) => Err(status),
    };
    table.expect(ErrorReason::StoreDamaged, damaged);

    // The folder of a machine becomes a file while a run of it is open.
    let b = "server-b";
    let data = [9; BLOCK];
    let run = caller.start(b, BackupId::new(), &["two"]).await.unwrap();
    caller.write(b, &run, &data, hash_block(&data)).await.unwrap();
    let folder = site.folder().join(b).join("alice").join(MACHINE);
    fs::rename(&folder, folder.with_extension("away")).unwrap();
    fs::write(&folder, "in the way").unwrap();
    table.expect(
        ErrorReason::StoreFailed,
        caller.commit(b, &run, "", digest_of(hash_block(&data))).await,
    );
    fs::remove_file(&folder).unwrap();
    fs::rename(folder.with_extension("away"), &folder).unwrap();
    caller
        .commit(b, &run, "", digest_of(hash_block(&data)))
        .await
        .expect("the run can be committed after the repair");
}

async fn lost_servers(site: &mut Site, caller: &Caller, table: &mut Table) {
    let id = BackupId::new();
    tokio::task::block_in_place(|| site.kill_server("server-a")).unwrap();
    table.expect(ErrorReason::ServerUnreachable, caller.start("server-a", id, &["one"]).await);
    tokio::task::block_in_place(|| site.kill_server("server-b")).unwrap();
    let start = pb::StartBackupRequest {
        backup_id: id.to_string(),
        disks: vec![pb::DiskStart {
            disk_id: "one".into(),
            size_bytes: 4096,
            logical_sector_bytes: 512,
        }],
        ..Default::default()
    };
    let refused = caller.backup().start_backup(start).await;
    let text =
        refused.as_ref().map_or_else(|status| status.message().to_owned(), |_| String::new());
    assert!(text.contains("server-a") && text.contains("server-b"), "each server is named: {text}");
    table.expect(ErrorReason::NoServerReady, refused);

    // A stream that waits for news is told when janus goes.
    let mut reports = health_watch(caller).await;
    let stopping = tokio::task::block_in_place(|| site.stop_janus());
    let last = loop {
        match reports.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => break status,
        }
    };
    stopping.unwrap();
    table.expect::<()>(ErrorReason::Draining, Err(last));
    assert_eq!(error::DOMAIN, "janus.v1");
}

async fn health_watch(caller: &Caller) -> tonic::Streaming<tonic_health::pb::HealthCheckResponse> {
    let mut health = tonic_health::pb::health_client::HealthClient::new(caller.channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
    let mut stream = health.watch(request).await.unwrap().into_inner();
    stream.message().await.unwrap();
    stream
}
