//! Locks and alarms where they are made: with the commit, whatever fails or is killed; and what they keep.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chains::{
    Content, Model, changed,
    faults::{Fault, Spoiler},
    unlocked,
};
use janus_server::{
    audit::Audit,
    chain::store::{Store, StoreError},
    runs::{RunError, Runs},
    storage::Disk,
};

mod chains;

const MIB: usize = 1 << 20;
const DAY_MS: u64 = 86_400_000;
const EIO: i32 = 5;

/// Opens the model's store anew, with locks of so many days.
fn reopen(model: &mut Model, storage: &Disk, lock_days: u32) {
    model.close();
    let is_locked = |error: &StoreError| matches!(error, StoreError::Locked { .. });
    let opened = unlocked(|| Store::open_on(storage.clone(), &model.folder, true), is_locked);
    let (store, machines) = opened.unwrap();
    let runs = Runs::new(store, machines, Duration::from_secs(60)).locking(lock_days);
    model.runs = Arc::new(runs);
}

/// Text, another in each block.
fn text(bytes: usize) -> Content {
    let mut content = Vec::with_capacity(bytes);
    for block in 0..bytes / 4096 {
        let line = format!("{block:08} it can be read, and packed\n");
        content.extend_from_slice(&line.repeat(4096 / line.len() + 1).as_bytes()[..4096]);
    }
    Arc::new(content)
}

fn locks(model: &Model) -> usize {
    let machine = model.runs.machine(&model.key).unwrap();
    let guarded = machine.guarded();
    let now = model.runs.now();
    machine
        .snapshots()
        .iter()
        .filter(|held| guarded.lock_of(held.run.backup, now).is_some())
        .count()
}

#[test]
fn a_lock_ends_after_days_that_were_seen_and_not_when_a_clock_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let up = Arc::new(AtomicU64::new(5000));
    let disk = |boot: &str| Disk::default().in_boot(boot).up_since(up.clone());
    let mut model = Model::new(folder.path());
    reopen(&mut model, &disk("a"), 3);
    let content = text(MIB);
    let first = model.backup(&[("sda", content.clone())]);
    let drop = |model: &Model| model.runs.trash(&model.key, &[first.backup], "test", 0);
    let is_locked = |model: &Model| matches!(drop(model), Err(RunError::Locked { .. }));
    assert!(is_locked(&model));
    up.fetch_add(2 * DAY_MS, Ordering::Relaxed);
    assert!(is_locked(&model));
    model.runs.save_clock();
    // The machine is off for as long as you like, then up for less than the third day.
    up.store(0, Ordering::Relaxed);
    reopen(&mut model, &disk("b"), 0);
    assert!(is_locked(&model));
    up.store(DAY_MS - 1, Ordering::Relaxed);
    assert!(is_locked(&model));
    assert_eq!(locks(&model), 1);
    model.backup(&[("sda", content)]);
    up.store(DAY_MS, Ordering::Relaxed);
    drop(&model).unwrap();
}

#[test]
fn a_committed_run_has_its_lock_whatever_fails_and_a_given_up_one_has_none() {
    let content = text(MIB);
    let mut tried = 0;
    for fault in [Fault::Error(EIO), Fault::Kill] {
        for at in 1.. {
            let folder = tempfile::tempdir().unwrap();
            let mut model = Model::new(folder.path());
            model.backup(&[("sda", content.clone())]);
            let spoiler = Spoiler::new(fault, at);
            reopen(&mut model, &spoiler.disk(), 1);
            let disks = [("sda", changed(&content, &[(3, 9, at)]))];
            let (run, commits) = model.send(&disks);
            let epoch = run.record().epoch;
            spoiler.arm(true);
            let committed = model.runs.commit(&model.key, run.backup, epoch, &commits, b"");
            spoiler.arm(false);
            if spoiler.seen() < at {
                assert!(committed.is_ok());
                break;
            }
            tried += 1;
            drop(run);
            // The next process.
            reopen(&mut model, &Disk::default(), 0);
            let machine = model.runs.machine(&model.key).unwrap();
            let there = machine.snapshots().len();
            assert!(there == 2 || committed.is_err(), "{fault:?} {at}");
            assert_eq!(locks(&model), there - 1, "{fault:?} {at}");
            // What didn't get that far is given up, and leaves nothing.
            for open in machine.active() {
                model.runs.abort(&model.key, open.backup).unwrap();
                assert!(machine.guarded().locks.is_empty(), "{fault:?} {at}");
            }
        }
    }
    println!("{tried} operations of commits failed");
    assert!(tried > 30);
}

#[test]
fn the_last_run_before_an_alarm_is_dropped_by_nobody_until_it_is_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = Model::new(folder.path());
    let good = text(8 * MIB);
    model.backup(&[("sda", good.clone())]);
    let calm = model.backup(&[("sda", changed(&good, &[(0, 5, 1)]))]);
    let machine = model.runs.machine(&model.key).unwrap();
    assert_eq!(machine.alarm(), None);
    let encrypted = changed(&good, &[(0, 1000, 2)]);
    let bad = model.backup(&[("sda", encrypted.clone())]);
    let told = machine.alarm().unwrap();
    assert!(told.contains(&bad.backup.to_string()) && told.contains("sda"), "{told}");
    // Later ones are compared with what is encrypted now.
    let later = model.backup(&[("sda", changed(&encrypted, &[(0, 900, 3)]))]);
    assert_eq!(machine.guarded().alarms.len(), 1);
    assert_eq!(machine.guarded().kept_by(calm.backup), Some(bad.backup));
    let drop = |model: &Model, run: &janus_server::chain::Run| {
        model.runs.trash(&model.key, &[run.backup], "test", 0)
    };
    for open in [false, true] {
        if open {
            model.reopen();
        }
        let refused = drop(&model, &calm).unwrap_err();
        assert!(matches!(refused, RunError::KeptByAlarm { .. }), "{refused}");
    }
    model.trash(&bad);
    model.purge_all(false);
    model.check();
    let machine = model.runs.machine(&model.key).unwrap();
    assert!(machine.alarm().is_some(), "that its run is gone ends no alarm");
    assert_eq!(model.runs.clear_alarms(&machine).unwrap().len(), 1);
    assert_eq!(machine.alarm(), None);
    model.trash(&calm);
    model.purge_all(false);
    model.check();
    assert!(model.live.contains(&later.snapshots[0].id));
}

#[test]
fn sealed_content_is_no_alarm_and_a_disk_that_becomes_sealed_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(folder.path());
    let commit = |content: &Content, seal: &[u8]| {
        let (run, commits) = model.send(&[("sda", content.clone())]);
        let epoch = run.record().epoch;
        model.runs.commit(&model.key, run.backup, epoch, &commits, seal).unwrap();
        model.runs.machine(&model.key).unwrap().guarded().alarms.len()
    };
    // Who writes text below a seal must know what he does; it is what a seal says that counts.
    let good = text(8 * MIB);
    assert_eq!(commit(&good, b"seal"), 0);
    let noise = changed(&good, &[(0, 1000, 2)]);
    assert_eq!(commit(&noise, b"seal"), 0);
    assert_eq!(commit(&good, b""), 0);
    assert_eq!(commit(&noise, b"seal"), 1);
}

#[test]
fn all_that_runs_do_is_recorded_and_follows_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let log = tempfile::tempdir().unwrap();
    let mut model = Model::new(folder.path());
    model.close();
    let (store, machines) = Store::open(folder.path(), true).unwrap();
    let audit = |folder: &Path| Audit::new(Disk::default(), folder);
    let runs = Runs::new(store, machines, Duration::from_secs(60)).with_audit(audit(log.path()));
    model.runs = Arc::new(runs);
    let good = text(8 * MIB);
    let first = model.backup(&[("sda", good.clone())]);
    model.backup(&[("sda", changed(&good, &[(0, 1000, 2)]))]);
    let machine = model.runs.machine(&model.key).unwrap();
    model.runs.clear_alarms(&machine).unwrap();
    model.trash(&first);
    model.restore(&first);
    model.trash(&first);
    model.purge_all(false);
    let head = model.runs.audit().unwrap().head().unwrap();
    let mut whats = Vec::new();
    let mut seen = |record: &janus_server::audit::Record, _: &[u8]| {
        whats.push(serde_json::to_value(record.what).unwrap().as_str().unwrap().to_owned());
    };
    let disk = Disk::default();
    let found =
        janus_server::audit::verify::verify(&disk, log.path(), head, None, &mut seen).unwrap();
    assert_eq!(found.bad, None);
    assert_eq!(whats, ["alarm", "alarm_clear", "drop", "restore", "drop", "purge"]);
}
