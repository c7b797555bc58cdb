//! Purges that are killed or fail at every operation: all that remains reads at once and after a restart, and the next purge
//! ends what was begun.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{path::Path, sync::Arc};

use chains::{
    Content, Model, changed,
    faults::{Fault, Spoiler},
};
use xtask::loopback::{Kind, SmallFileSystem};

mod chains;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Four runs of one or two disks. The first two and the last are dropped: leaves and merges, with base and delta as the link.
fn prepared(folder: &Path, two_disks: bool) -> Model {
    let mut model = Model::new(folder);
    let zeros: Content = Arc::new(vec![0; (2 << 20) + 8192 + 512]);
    let (mut one, mut two) = (changed(&zeros, &[(0, 300, 1)]), changed(&zeros, &[(500, 20, 2)]));
    let mut runs = Vec::new();
    for link in 0..4 {
        let disks = [("sda", one.clone()), ("sdb", two.clone())];
        runs.push(model.backup(&disks[..1 + usize::from(two_disks)]));
        one = changed(&one, &[(link * 50, 80, link + 3), (280, 30 + link, 4), (20, 9, 0)]);
        two = changed(&two, &[(505 + link, 9, link + 5), (510, 1, 0)]);
    }
    for run in [0, 1, 3] {
        model.trash(&runs[run]);
    }
    model
}

fn every_operation(fault: Fault, copy: bool, folder: &Path, two_disks: bool) -> u64 {
    let original = prepared(&tempfile::tempdir_in(folder).unwrap().keep(), two_disks);
    let mut at = 1;
    loop {
        let copied = tempfile::tempdir_in(folder).unwrap();
        let spoiler = Spoiler::new(fault, at);
        let mut model = original.copy(copied.path(), spoiler.disk());
        let reader = model.open(*model.live.first().unwrap());
        spoiler.arm(true);
        model.purge(copy);
        spoiler.arm(false);
        if matches!(fault, Fault::Error(_)) {
            model.check_opened(&reader);
            model.check();
        }
        drop(reader);
        if at % 2 == 0 || !matches!(fault, Fault::Error(_)) {
            model.reopen();
            model.check();
        }
        model.purge_all(copy);
        model.check();
        model.assert_clean();
        if spoiler.seen() < at {
            break;
        }
        at += 1;
    }
    println!("{fault:?}, copy {copy}: {} fault points", at - 1);
    std::fs::remove_dir_all(&original.folder).unwrap();
    at - 1
}

fn memory() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

#[test]
fn a_purge_killed_at_any_operation_is_ended_by_the_next() {
    assert!(every_operation(Fault::Kill, true, memory(), true) > 50);
}

#[test]
fn a_purge_killed_in_the_middle_of_any_write_is_ended_by_the_next() {
    assert!(every_operation(Fault::Torn, true, memory(), true) > 50);
}

#[test]
fn a_purge_in_which_any_operation_fails_leaves_all_readable() {
    assert!(every_operation(Fault::Error(EIO), true, memory(), true) > 50);
    // With one disk the next step after a failure is the link above it.
    assert!(every_operation(Fault::Error(EIO), true, memory(), false) > 50);
}

#[test]
fn a_purge_for_which_the_disk_is_full_at_any_operation_leaves_all_readable() {
    assert!(every_operation(Fault::Error(ENOSPC), true, memory(), true) > 50);
}

#[test]
fn as_root_purges_that_share_blocks_survive_a_fault_at_any_operation() {
    let small = SmallFileSystem::mount_in(memory(), Kind::Xfs, 400 << 20).unwrap();
    let faults = [Fault::Kill, Fault::Error(EIO), Fault::Torn, Fault::Error(ENOSPC)];
    let most = if std::env::var_os("JANUS_SOAK").is_some() { 4 } else { 2 };
    for fault in &faults[..most] {
        assert!(every_operation(*fault, false, small.folder(), false) > 50);
    }
}
