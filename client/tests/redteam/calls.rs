//! Messages that are well-formed, and shouldn't be believed.

use std::{path::Path, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{future::BoxFuture, stream};
use janus_proto::{
    hash::{segment_digest, table_digest, zero_hash},
    ids::{BackupId, HandleId, SessionId, SnapshotId},
    pb::{
        self, backup_service_client::BackupServiceClient,
        catalog_service_client::CatalogServiceClient,
        maintenance_service_client::MaintenanceServiceClient, read_hashes_request::Of,
        report_service_client::ReportServiceClient, restore_service_client::RestoreServiceClient,
        table_service_client::TableServiceClient,
    },
};
use tonic::{Code, Request, Status, transport::Channel};

use crate::scene::{BAD, GOOD, MIB, Scene, Target};

const TIB: u64 = 1 << 40;

pub fn pinned<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("janus-server", "server-a".parse().unwrap());
    request.set_timeout(Duration::from_secs(30));
    request
}

/// A start with these disks, and its id.
pub fn start_of(disks: &[(&str, u64)]) -> (String, pb::StartBackupRequest) {
    let backup_id = BackupId::new().to_string();
    let disks = disks.iter().map(|(name, size_bytes)| pb::DiskStart {
        disk_id: (*name).to_owned(),
        size_bytes: *size_bytes,
        logical_sector_bytes: 512,
    });
    let request = pb::StartBackupRequest {
        backup_id: backup_id.clone(),
        disks: disks.collect(),
        ..Default::default()
    };
    (backup_id, request)
}

/// All services over one connection.
#[derive(Clone)]
struct Caller(Channel);

impl Caller {
    fn backup(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.0.clone())
    }

    fn restore(&self) -> RestoreServiceClient<Channel> {
        RestoreServiceClient::new(self.0.clone())
    }

    fn catalog(&self) -> CatalogServiceClient<Channel> {
        CatalogServiceClient::new(self.0.clone())
    }

    async fn start(&self, disks: &[(&str, u64)]) -> Result<pb::StartBackupResponse, Status> {
        Ok(self.backup().start_backup(pinned(start_of(disks).1)).await?.into_inner())
    }

    async fn write(
        &self,
        session_id: &str,
        epoch: u64,
        batches: Vec<pb::BlockBatch>,
    ) -> Result<u64, Status> {
        let session_id = session_id.to_owned();
        let messages = batches.into_iter().map(move |batch| pb::WriteBlocksRequest {
            session_id: session_id.clone(),
            epoch,
            batch: Some(batch),
            settled_block: 0,
        });
        let messages: Vec<_> = messages.collect();
        let mut answers =
            self.backup().write_blocks(pinned(stream::iter(messages))).await?.into_inner();
        let mut received = 0;
        while let Some(answer) = answers.message().await? {
            received = answer.received_messages;
        }
        Ok(received)
    }

    async fn commit(
        &self,
        backup_id: &str,
        epoch: u64,
        disk_id: &str,
        digest: &[u8],
    ) -> Result<pb::CommitBackupResponse, Status> {
        let disk = pb::DiskCommit {
            disk_id: disk_id.to_owned(),
            table_digest: Bytes::copy_from_slice(digest),
            consistency: pb::Consistency::Frozen.into(),
            ..Default::default()
        };
        let commit = pb::CommitBackupRequest {
            backup_id: backup_id.to_owned(),
            epoch,
            disks: vec![disk],
            client_seal: Bytes::new(),
        };
        Ok(self.backup().commit_backup(pinned(commit)).await?.into_inner())
    }

    async fn abort(&self, backup_id: &str) -> Result<(), Status> {
        let abort = pb::AbortBackupRequest { backup_id: backup_id.to_owned() };
        self.backup().abort_backup(pinned(abort)).await.map(drop)
    }

    async fn open(&self, snapshot_id: &str, table: bool) -> Result<String, Status> {
        let open = pb::OpenSnapshotRequest {
            snapshot_id: snapshot_id.to_owned(),
            table,
            ..Default::default()
        };
        Ok(self.restore().open_snapshot(pinned(open)).await?.into_inner().handle)
    }

    async fn blocks(&self, handle: &str, ranges: Vec<pb::BlockRange>) -> Result<u64, Status> {
        let read =
            pb::ReadBlocksRequest { handle: handle.to_owned(), ranges, ..Default::default() };
        let mut answers = self.restore().read_blocks(pinned(read)).await?.into_inner();
        let mut bytes = 0;
        while let Some(answer) = answers.message().await? {
            bytes += answer.batch.map_or(0, |batch| batch.data.len() as u64);
        }
        Ok(bytes)
    }

    async fn hashes(&self, of: Of, level: pb::HashLevel) -> Result<u64, Status> {
        let read =
            pb::ReadHashesRequest { of: Some(of), level: level.into(), ..Default::default() };
        let mut answers = self.restore().read_hashes(pinned(read)).await?.into_inner();
        let mut bytes = 0;
        while let Some(answer) = answers.message().await? {
            bytes += answer.batch.map_or(0, |batch| batch.hashes.len() as u64);
        }
        Ok(bytes)
    }
}

/// What is refused, with one of these codes and without a way to go on.
#[track_caller]
fn refused<T: std::fmt::Debug>(case: &str, result: Result<T, Status>, codes: &[Code]) -> String {
    let status = result.expect_err(case);
    assert!(codes.contains(&status.code()), "{case}: {status:?}");
    assert!(!status.message().contains("panic"), "{case}: {status:?}");
    format!("{:?}", status.code())
}

const INVALID: &[Code] = &[Code::InvalidArgument];
/// Another's, or nobody's: what is unknown and what is another's can't be told apart.
const UNKNOWN: &[Code] = &[Code::NotFound];

fn zeros(first_block: u64, block_count: u64) -> pb::BlockBatch {
    let extents = vec![pb::BlockExtent { first_block, block_count, zero: true }];
    pb::BlockBatch { extents, ..Default::default() }
}

#[test]
fn names_lead_nowhere() {
    let mut scene = Scene::new();
    let before = tree(scene.site.folder());
    for target in [Target::Server, Target::Janus] {
        let bad = Caller(scene.channel(target, BAD));
        let long = "x".repeat(300);
        let names = [
            "..",
            "../../good/disk",
            "/etc/passwd",
            "a/b",
            "a\\b",
            ".",
            "",
            ".open",
            "a\0b",
            "a\nb",
            "%2e%2e",
            "CON ",
            " x",
            "ü",
            &long,
            ".trash",
            "x/../../y",
            "~root",
            "-rf",
            "\u{202e}x",
        ];
        let mut count = 0;
        for name in names {
            let started = scene.runtime.block_on(bad.start(&[(name, MIB)]));
            let answer = match started {
                // Those that are names after all stay below the machine's folder.
                Ok(started) => scene.runtime.block_on(bad.abort(&started.backup_id)).map(|()| 0),
                Err(status) => Err(status),
            };
            if answer.is_err() {
                refused(name, answer, INVALID);
                count += 1;
            }
            for id in [name, "00000000-0000-0000-0000-00000000000/"] {
                let aborted = scene.runtime.block_on(bad.abort(id));
                refused(id, aborted, INVALID);
                let opened = scene.runtime.block_on(bad.open(id, true));
                refused(id, opened, INVALID);
                let read = scene.runtime.block_on(bad.blocks(id, Vec::new()));
                refused(id, read, INVALID);
            }
        }
        scene.after(
            target,
            "path tricks in names of disks, runs, snapshots and handles",
            format!("{count} of {} disk names refused", names.len()),
        );

        for (key, value) in [
            ("janus-machine", "alice/good"),
            ("janus-machine", "alice/../good"),
            ("janus-machine", "/"),
            ("janus-server", "../server-a"),
            ("janus-run", "../../x"),
            ("janus-use", "-1"),
            ("janus-use", "99999999999999999999999"),
            ("grpc-timeout", "99999999999999S"),
        ] {
            let mut request = Request::new(start_of(&[("d", MIB)]).1);
            request.metadata_mut().insert(key, value.parse().unwrap());
            request.set_timeout(Duration::from_secs(20));
            let started = scene.runtime.block_on(bad.backup().start_backup(request));
            if let Ok(started) = started {
                // A server needs no run to find itself by; janus does.
                let is_ignored = key == "janus-run" && target == Target::Server;
                assert!(key == "grpc-timeout" || is_ignored, "{key} {value}");
                let id = started.into_inner().backup_id;
                scene.runtime.block_on(bad.abort(&id)).unwrap();
            }
        }
        scene.after(target, "path tricks in metadata", "refused");
    }
    let made: Vec<_> =
        tree(scene.site.folder()).into_iter().filter(|path| !before.contains(path)).collect();
    let outside: Vec<_> = made
        .iter()
        .filter(|path| !path.starts_with("server-a/alice/bad") && !path.starts_with("logs"))
        .collect();
    assert!(outside.is_empty(), "{outside:?}");
    scene.close();
}

/// All paths below a folder.
fn tree(folder: &Path) -> std::collections::BTreeSet<String> {
    let mut found = std::collections::BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
            let path = entry.path();
            found.insert(path.strip_prefix(folder).unwrap().to_string_lossy().into_owned());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            }
        }
    }
    found
}

#[test]
fn what_is_anothers_is_neither_read_nor_changed() {
    let mut scene = Scene::new();
    let of_good = scene.snapshots[0].clone();
    for target in [Target::Server, Target::Janus] {
        let good = Caller(scene.channel(target, GOOD));
        let bad = Caller(scene.channel(target, BAD));
        // The good one has a run open, and a snapshot.
        let run = scene.runtime.block_on(good.start(&[("d", MIB)])).unwrap();
        let (id, session, epoch) = (&run.backup_id, &run.sessions[0].session_id, run.epoch);
        let handle = scene.runtime.block_on(good.open(&of_good, false)).unwrap();
        let digest = [7; 32];
        let cases: Vec<(&str, BoxFuture<Result<u64, Status>>)> = vec![
            ("writes to its session", Box::pin(bad.write(session, epoch, vec![zeros(0, 1)]))),
            (
                "commits its run",
                Box::pin(async { bad.commit(id, epoch, "d", &digest).await.map(|_| 0) }),
            ),
            (
                "asks how its run stands",
                Box::pin(async {
                    let get = pb::GetBackupRequest { backup_id: id.clone() };
                    bad.backup().get_backup(pinned(get)).await.map(|_| 0)
                }),
            ),
            (
                "reads hashes of its session",
                Box::pin(bad.hashes(Of::SessionId(session.clone()), pb::HashLevel::Block)),
            ),
            (
                "reads hashes of its handle",
                Box::pin(bad.hashes(Of::Handle(handle.clone()), pb::HashLevel::Segment)),
            ),
            ("reads blocks of its handle", Box::pin(bad.blocks(&handle, Vec::new()))),
            ("opens its snapshot", Box::pin(async { bad.open(&of_good, false).await.map(|_| 0) })),
            (
                "opens its mirrored table",
                Box::pin(async { bad.open(&of_good, true).await.map(|_| 0) }),
            ),
            (
                "reads its table",
                Box::pin(async {
                    let read =
                        pb::ReadTableRequest { snapshot_id: of_good.clone(), ..Default::default() };
                    TableServiceClient::new(bad.0.clone()).read_table(pinned(read)).await.map(|_| 0)
                }),
            ),
            (
                "asks for its snapshot",
                Box::pin(async {
                    let get = pb::GetSnapshotRequest { snapshot_id: of_good.clone() };
                    bad.catalog().get_snapshot(get).await.map(|_| 0)
                }),
            ),
        ];
        for (case, call) in cases {
            let outcome = refused(case, scene.runtime.block_on(call), UNKNOWN);
            scene.after(target, case, outcome);
        }
        // An abort of what one doesn't have is no error, and does nothing. Nor does a start with its id.
        scene.runtime.block_on(bad.abort(id)).unwrap();
        let replayed =
            pb::StartBackupRequest { backup_id: id.clone(), ..start_of(&[("d", MIB)]).1 };
        if let Ok(own) = scene.runtime.block_on(bad.backup().start_backup(pinned(replayed))) {
            assert_ne!(&own.into_inner().sessions[0].session_id, session);
            scene.runtime.block_on(bad.abort(id)).unwrap();
        }
        let written =
            scene.runtime.block_on(good.write(session, epoch, vec![zeros(0, 1)])).unwrap();
        assert_eq!(written, 1, "the good one goes on");
        scene.after(target, "aborts and replays its run", "the good one goes on");

        let denied = [
            Code::PermissionDenied,
            Code::Unauthenticated,
            Code::InvalidArgument,
            Code::Unimplemented,
        ];
        let named = |mut request: Request<pb::ListSnapshotsRequest>| {
            request.metadata_mut().insert("janus-machine", "alice/good".parse().unwrap());
            request
        };
        let list = pb::ListSnapshotsRequest { machine: "alice/good".into(), ..Default::default() };
        let listed = scene.runtime.block_on(bad.catalog().list_snapshots(list.clone()));
        let outcome = refused("lists its snapshots", listed, &denied);
        scene.after(target, "lists its snapshots", outcome);
        let listed = scene
            .runtime
            .block_on(bad.catalog().list_snapshots(named(Request::new(Default::default()))));
        let outcome = refused("calls itself another", listed, &denied);
        scene.after(target, "calls itself another", outcome);
        // A certificate beside one's own: believed of a janus alone.
        let mut request =
            pinned(pb::OpenSnapshotRequest { snapshot_id: of_good.clone(), ..Default::default() });
        let der = scene.identity(GOOD).principal().der.clone();
        let text = STANDARD.encode(&der);
        request.metadata_mut().insert("janus-principal", text.parse().unwrap());
        let opened = scene.runtime.block_on(bad.restore().open_snapshot(request));
        let outcome = refused("brings another's certificate", opened, UNKNOWN);
        scene.after(target, "brings another's certificate", outcome);
        let machines =
            scene.runtime.block_on(bad.catalog().list_machines(pb::ListMachinesRequest::default()));
        if let Ok(machines) = machines {
            let told: Vec<_> =
                machines.into_inner().machines.into_iter().map(|one| one.machine).collect();
            assert!(told.iter().all(|name| name == "alice/bad"), "{told:?}");
        }
        scene.after(target, "lists machines", "its own alone");
        let forget = pb::ForgetServerRequest { server_id: "server-a".into() };
        let forgot = scene
            .runtime
            .block_on(MaintenanceServiceClient::new(bad.0.clone()).forget_server(forget));
        let outcome = refused("has janus forget a server", forgot, &denied);
        scene.after(target, "has janus forget a server", outcome);
        let hello = pb::ReportRequest::default();
        let reported = scene.runtime.block_on(async {
            let mut reports = ReportServiceClient::new(bad.0.clone());
            let mut answers = reports.report(stream::iter([hello])).await?.into_inner();
            answers.message().await
        });
        let outcome = refused("reports as a server", reported, &denied);
        scene.after(target, "reports as a server", outcome);

        // What never was: as another's.
        for (case, answer) in [
            (
                "a session that never was",
                scene.runtime.block_on(bad.write(
                    &SessionId::new().to_string(),
                    1,
                    vec![zeros(0, 1)],
                )),
            ),
            (
                "a snapshot that never was",
                scene.runtime.block_on(bad.open(&SnapshotId::new().to_string(), false)).map(|_| 0),
            ),
            (
                "a handle that never was",
                scene.runtime.block_on(bad.blocks(&HandleId::new().to_string(), Vec::new())),
            ),
        ] {
            let outcome = refused(case, answer, UNKNOWN);
            scene.after(target, case, outcome);
        }

        // An epoch of before a takeover.
        let own = scene.runtime.block_on(bad.start(&[("own", MIB)])).unwrap();
        let again = pb::StartBackupRequest {
            backup_id: own.backup_id.clone(),
            ..start_of(&[("own", MIB)]).1
        };
        scene.runtime.block_on(bad.backup().start_backup(pinned(again))).unwrap();
        let session = &own.sessions[0].session_id;
        let late = scene.runtime.block_on(bad.write(session, own.epoch, vec![zeros(0, 1)]));
        let outcome = refused("writes with an old epoch", late, &[Code::Aborted]);
        scene.after(target, "writes with an old epoch", outcome);
        let late = scene.runtime.block_on(bad.commit(&own.backup_id, own.epoch, "own", &digest));
        let outcome = refused("commits with an old epoch", late, &[Code::Aborted]);
        scene.after(target, "commits with an old epoch", outcome);
        scene.runtime.block_on(bad.abort(&own.backup_id)).unwrap();
        scene.runtime.block_on(good.abort(id)).unwrap();
    }
    scene.close();
}

#[test]
fn huge_disks_bombs_and_ranges_cost_little() {
    let mut scene = Scene::new();
    for target in [Target::Server, Target::Janus] {
        let bad = Caller(scene.channel(target, BAD));
        for (case, disks) in [
            ("a disk of 2^63 bytes", vec![("d", 1 << 63)]),
            ("a disk of 2^64 - 512 bytes", vec![("d", u64::MAX - 511)]),
            ("a disk that is no whole sector", vec![("d", 511)]),
            ("two disks of one name", vec![("d", MIB), ("D", MIB)]),
            ("two disks of 64 TiB", vec![("d", 64 * TIB), ("e", 64 * TIB)]),
            ("no disk", vec![]),
            ("1000 disks", vec![("d", MIB); 1000]),
        ] {
            let answer = scene.runtime.block_on(bad.start(&disks));
            let outcome = refused(case, answer, &[Code::InvalidArgument, Code::AlreadyExists]);
            scene.after(target, case, outcome);
        }

        // The largest disk there may be, empty: kept, read and gone on with.
        let started = scene.runtime.block_on(bad.start(&[("huge", 4 * TIB)])).unwrap();
        let (session, epoch) = (started.sessions[0].session_id.clone(), started.epoch);
        let begun = std::time::Instant::now();
        let again = (0..200).map(|_| zeros(0, TIB / 1024)).collect();
        let written = scene.runtime.block_on(bad.write(&session, epoch, again)).unwrap();
        let outcome = format!("{written} messages in {:.2} s", begun.elapsed().as_secs_f64());
        assert!(begun.elapsed() < Duration::from_secs(10), "{outcome}");
        scene.after(target, "zeros over 4 TiB, 200 times", outcome);

        let overflows = [
            ("an extent past 2^64", vec![(u64::MAX, 2)]),
            ("an extent past the disk", vec![(0, TIB)]),
            ("an extent of nothing", vec![(0, 0)]),
            ("extents in a wrong order", vec![(9, 1), (3, 1)]),
            ("extents that overlap", vec![(3, 5), (5, 1)]),
            ("5000 extents", (0..5000).map(|n| (n * 2, 1)).collect()),
        ];
        for (case, extents) in overflows {
            let extents = extents.into_iter().map(|(first_block, block_count)| pb::BlockExtent {
                first_block,
                block_count,
                zero: true,
            });
            let batch = pb::BlockBatch { extents: extents.collect(), ..Default::default() };
            let answer = scene.runtime.block_on(bad.write(&session, epoch, vec![batch]));
            let outcome = refused(case, answer, INVALID);
            scene.after(target, case, outcome);
        }

        for (case, encoding, data) in bombs() {
            let extents = vec![pb::BlockExtent { first_block: 0, block_count: 1, zero: false }];
            let hashes = Bytes::copy_from_slice(&zero_hash(4096).0);
            let batch =
                pb::BlockBatch { extents, hashes, data: data.into(), encoding: encoding.into() };
            let answer = scene.runtime.block_on(bad.write(&session, epoch, vec![batch]));
            let outcome = refused(case, answer, INVALID);
            scene.after(target, case, outcome);
        }
        scene.runtime.block_on(bad.abort(&started.backup_id)).unwrap();

        let disk = if target == Target::Server { "again" } else { "through-janus" };
        // The same block for ever: what is remembered of it doesn't grow with it.
        let started = scene.runtime.block_on(bad.start(&[(disk, MIB)])).unwrap();
        let session = started.sessions[0].session_id.clone();
        let same = (0..20_000).map(|n| zeros(n % 7, 1 + n % 5)).collect();
        let written = scene.runtime.block_on(bad.write(&session, started.epoch, same)).unwrap();
        assert_eq!(written, 20_000);
        let digests = scene
            .runtime
            .block_on(bad.hashes(Of::SessionId(session), pb::HashLevel::Block))
            .unwrap();
        assert_eq!(digests, 256 * 32);
        let all_zero = table_digest(MIB, &[segment_digest(&[zero_hash(4096); 256])]);
        scene
            .runtime
            .block_on(bad.commit(&started.backup_id, started.epoch, disk, &all_zero.0))
            .unwrap();
        scene.after(target, "the same blocks 20000 times, then a commit", "right");

        let own = scene.snapshots[1].clone();
        let handle = scene.runtime.block_on(bad.open(&own, false)).unwrap();
        for (case, first_block, block_count) in [
            ("a range past 2^64", u64::MAX, u64::MAX),
            ("a range past the disk", 1 << 40, 1),
            ("a range of 2^63 blocks", 0, 1 << 63),
        ] {
            let ranges = vec![pb::BlockRange { first_block, block_count }];
            let answer = scene.runtime.block_on(bad.blocks(&handle, ranges));
            let outcome = refused(case, answer, INVALID);
            scene.after(target, case, outcome);
        }
        let ranges = (0..5000).map(|n| pb::BlockRange { first_block: n, block_count: 1 }).collect();
        let answer = scene.runtime.block_on(bad.blocks(&handle, ranges));
        let outcome = refused("5000 ranges", answer, INVALID);
        scene.after(target, "5000 ranges", outcome);

        // Handles: those of one machine leave the others theirs.
        let (mut opened, mut full) = (Vec::new(), None);
        for _ in 0..200 {
            match scene.runtime.block_on(bad.open(&own, false)) {
                Ok(handle) => opened.push(handle),
                Err(status) => {
                    full = Some(status.code());
                    break;
                }
            }
        }
        assert_eq!(full, Some(Code::ResourceExhausted));
        let good = Caller(scene.channel(target, GOOD));
        let of_good = scene.snapshots[0].clone();
        let theirs = scene.runtime.block_on(good.open(&of_good, false)).unwrap();
        assert_eq!(scene.runtime.block_on(good.blocks(&theirs, Vec::new())).unwrap(), 32 * MIB);
        let held = opened.len();
        scene.after(
            target,
            "opens its snapshot again and again",
            format!("{held} handles, then refused"),
        );
        for handle in opened.into_iter().chain([handle]) {
            let close = pb::CloseSnapshotRequest { handle, ..Default::default() };
            scene.runtime.block_on(bad.restore().close_snapshot(pinned(close))).unwrap();
        }
        let close = pb::CloseSnapshotRequest { handle: theirs, ..Default::default() };
        scene.runtime.block_on(good.restore().close_snapshot(pinned(close))).unwrap();
    }
    scene.close();
}

/// Packed data of a block that unpack to much more, or to something else.
fn bombs() -> Vec<(&'static str, pb::Encoding, Vec<u8>)> {
    // A literal, then a match of one byte that goes on and on.
    let mut lz4 = vec![0x1f, 0, 1, 0];
    lz4.extend(std::iter::repeat_n(0xff, 1 << 20));
    lz4.push(0);
    // Frame with a content size of 2^40, a window of 2 GiB, and blocks of 128 KiB of one byte each.
    let mut zstd = vec![0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0xa8];
    zstd.extend((1u64 << 40).to_le_bytes());
    for _ in 0..100_000 {
        zstd.extend([0x02, 0x00, 0x10, 0]);
    }
    vec![
        ("LZ4 that unpacks to 256 MiB", pb::Encoding::Lz4, lz4),
        ("zstd that unpacks to 12 GiB", pb::Encoding::Zstd, zstd),
        ("zstd of nothing", pb::Encoding::Zstd, vec![0x28, 0xb5, 0x2f, 0xfd]),
        ("more than a block, not packed", pb::Encoding::None, vec![0; 8192]),
        ("less than a block", pb::Encoding::None, vec![0; 4095]),
    ]
}
