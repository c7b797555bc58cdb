//! A disk that fills up under a run: the session ends cleanly, and goes on where it was once there is space.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use janus_proto::{
    error::{ErrorReason, reason},
    hash::{hash_blocks, segment_digest, table_digest},
    ids::{BackupId, BlockHash, MachineKey},
    model::Batch,
    pb,
};
use janus_server::{
    chain::store::Store,
    runs::{CommitDisk, Runs, WantedDisk, Writer},
    storage::{Disk, Op, Verdict, Watcher},
};
use tonic::Status;

const BLOCKS: u64 = 512;
const BLOCK: usize = 4096;
const AT_ONCE: u64 = 64;

/// Lets nothing be written while it is full.
#[derive(Debug, Default)]
struct Full(AtomicBool);

impl Watcher for Full {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        match op {
            Op::Write { .. } if self.0.load(Ordering::Relaxed) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(Verdict::Go),
        }
    }
}

fn open(full: &Arc<Full>, root: &Path) -> Runs {
    let disk = Disk::watched(full.clone());
    let (store, machines) = Store::open_on(disk, root, true).unwrap();
    Runs::new(store, machines, Duration::from_secs(60))
}

fn content(first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(|block| vec![block as u8 | 1; BLOCK]).collect()
}

fn batch(first: u64) -> Batch {
    let data = content(first, AT_ONCE);
    let mut hashes = Vec::new();
    hash_blocks(&data, &mut hashes);
    let extent = pb::BlockExtent { first_block: first, block_count: AT_ONCE, zero: false };
    let hashes: Vec<u8> = hashes.iter().flat_map(|hash: &BlockHash| hash.0).collect();
    let wire = pb::BlockBatch {
        extents: vec![extent],
        hashes: hashes.into(),
        data: data.into(),
        encoding: pb::Encoding::None.into(),
    };
    Batch::from_wire(BLOCKS * BLOCK as u64, wire).unwrap()
}

/// Starts the run, or takes it over, and sends what the server doesn't have; how far it got, and why it ended there.
fn send(runs: &Runs, backup: BackupId, mut on_block: impl FnMut(u64)) -> (u64, Result<(), Status>) {
    let key: MachineKey = "alice/web".parse().unwrap();
    let wanted = [WantedDisk {
        disk: "disk".parse().unwrap(),
        size_bytes: BLOCKS * BLOCK as u64,
        logical_sector_bytes: 512,
    }];
    let run = match runs.start(&key, backup, &wanted, 0) {
        Ok(run) => run,
        Err(error) => return (0, Err(error.into())),
    };
    let session = run.sessions()[0].clone();
    let writer = Writer::new(run.clone(), session.disk.session, run.record().epoch).unwrap();
    let mut next = session.marks().received;
    while next < BLOCKS {
        on_block(next);
        match writer.apply(Some(&batch(next)), next + AT_ONCE) {
            Ok(marks) => next = marks.received,
            Err(error) => return (next, Err(error.into())),
        }
    }
    (next, Ok(()))
}

#[test]
fn a_run_on_a_full_disk_goes_on_where_it_was_once_there_is_space() {
    for stop_at in [0, AT_ONCE, 3 * AT_ONCE, BLOCKS - AT_ONCE] {
        for is_restarted in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let (full, backup) = (Arc::new(Full::default()), BackupId::new());
            let mut runs = open(&full, folder.path());
            let fill = |block| full.0.store(block >= stop_at, Ordering::Relaxed);
            let (got, ended) = send(&runs, backup, fill);
            let ended = ended.unwrap_err();
            assert_eq!(reason(&ended), Some(ErrorReason::StoreFull), "at {stop_at}");
            if stop_at > 0 {
                let left = janus_proto::show::amount((BLOCKS - stop_at) * BLOCK as u64);
                let needed = format!("the rest of disk disk needs up to {left}");
                assert!(ended.message().contains(&needed), "{ended}");
                assert!(ended.message().contains("janus-server retention run --now"), "{ended}");
            }
            assert_eq!(got, stop_at);
            if is_restarted {
                full.0.store(false, Ordering::Relaxed);
                drop(runs);
                runs = open(&full, folder.path());
            } else {
                // Still full: it says so again, and harms nothing.
                let (_, ended) = send(&runs, backup, |_| {});
                assert_eq!(reason(&ended.unwrap_err()), Some(ErrorReason::StoreFull));
                full.0.store(false, Ordering::Relaxed);
            }
            let mut first = None;
            let (_, ended) = send(&runs, backup, |block| {
                first.get_or_insert(block);
            });
            ended.unwrap();
            assert!(first.unwrap() >= stop_at.saturating_sub(AT_ONCE), "{first:?} of {stop_at}");
            commit(&runs, backup);
        }
    }
}

#[test]
fn what_an_open_run_holds_counts_before_anybody_takes_it_over() {
    let folder = tempfile::tempdir().unwrap();
    let (full, backup) = (Arc::new(Full::default()), BackupId::new());
    let runs = open(&full, folder.path());
    send(&runs, backup, |_| {}).1.unwrap();
    let held = runs.used_by("alice");
    assert_eq!(held, BLOCKS * BLOCK as u64);
    drop(runs);
    let runs = open(&full, folder.path());
    let left = runs.used_by("alice");
    assert!(left >= held && left < held + (8 << 20), "{left} of {held}");
    send(&runs, backup, |_| {}).1.unwrap();
    assert_eq!(runs.used_by("alice"), held);
    commit(&runs, backup);
}

fn commit(runs: &Runs, backup: BackupId) {
    let key: MachineKey = "alice/web".parse().unwrap();
    let mut hashes = Vec::new();
    hash_blocks(&content(0, BLOCKS), &mut hashes);
    let digests = [segment_digest(&hashes)];
    let table_digest = table_digest(BLOCKS * BLOCK as u64, &digests);
    let disk = "disk".parse().unwrap();
    let disks =
        [CommitDisk { disk, expected_head: None, table_digest, consistency: 1, skipped_bytes: 0 }];
    // One takeover more, as a client after a crash: its epoch counts.
    let (_, ended) = send(runs, backup, |_| {});
    ended.unwrap();
    let epoch = match runs.state(&key, backup).unwrap() {
        janus_server::runs::RunState::Open(run) => run.record().epoch,
        _ => panic!("the run is not open"),
    };
    let run = runs.commit(&key, backup, epoch, &disks, &[]).unwrap();
    assert_eq!(run.snapshots.len(), 1);
}
