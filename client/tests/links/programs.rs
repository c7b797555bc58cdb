//! Programs killed and frozen.

use std::{thread, time::Duration};

use xtask::{
    disk,
    site::{
        Part::{Janus, Server},
        answers,
    },
};

use crate::scene::{
    Fault::Freeze, Fault::Kill, MIB, NORTH, Phase, SOUTH, Scene, case, may_be_sent_again,
};

#[test]
fn as_root_an_upload_whose_server_is_killed() {
    case(SOUTH, Phase::Upload, &[Kill(SOUTH, Server)]);
}

#[test]
fn as_root_a_commit_whose_server_is_killed() {
    case(SOUTH, Phase::Commit, &[Kill(SOUTH, Server)]);
}

#[test]
fn as_root_a_restore_whose_server_is_killed() {
    case(SOUTH, Phase::Restore, &[Kill(SOUTH, Server)]);
}

#[test]
fn as_root_an_upload_whose_server_is_frozen() {
    case(SOUTH, Phase::Upload, &[Freeze(SOUTH, Server)]);
}

#[test]
fn as_root_a_commit_whose_server_is_frozen() {
    case(NORTH, Phase::Commit, &[Freeze(NORTH, Server)]);
}

#[test]
fn as_root_a_restore_whose_server_is_frozen() {
    case(SOUTH, Phase::Restore, &[Freeze(SOUTH, Server)]);
}

#[test]
fn as_root_an_upload_whose_janus_is_killed() {
    case(NORTH, Phase::Upload, &[Kill(NORTH, Janus)]);
}

#[test]
fn as_root_a_commit_whose_janus_is_killed() {
    case(SOUTH, Phase::Commit, &[Kill(NORTH, Janus)]);
}

#[test]
fn as_root_a_restore_whose_janus_is_killed() {
    case(NORTH, Phase::Restore, &[Kill(NORTH, Janus)]);
}

#[test]
fn as_root_an_upload_whose_janus_is_frozen() {
    case(SOUTH, Phase::Upload, &[Freeze(NORTH, Janus)]);
}

#[test]
fn as_root_a_commit_whose_janus_is_frozen() {
    case(NORTH, Phase::Commit, &[Freeze(NORTH, Janus)]);
}

#[test]
fn as_root_a_restore_whose_janus_is_frozen() {
    case(SOUTH, Phase::Restore, &[Freeze(NORTH, Janus)]);
}

#[test]
fn as_root_a_machine_killed_in_a_restore_can_begin_again() {
    let mut scene = Scene::new();
    scene.change(16);
    let backup = scene.client.backup().unwrap();
    let to = scene.sites.folder().join("restored.raw");
    let restore = scene.restoring(&backup.disks[0].snapshot_id, &to);
    restore.kill();
    restore.wait().unwrap();
    assert!(!to.exists(), "half a disk under its final name");
    scene.check_restore(&backup.disks[0].snapshot_id);
}

/// Longer than all keepalives: when it wakes its connections are gone, and nothing else.
const SLEEP: Duration = Duration::from_secs(45);

#[test]
fn as_root_a_machine_that_slept_in_an_upload_goes_on() {
    let mut scene = Scene::new();
    scene.change(16);
    let upload = scene.uploading();
    upload.freeze();
    thread::sleep(SLEEP);
    upload.thaw();
    let finished = upload.wait().unwrap();
    let backup: answers::Backup = finished.answer().unwrap();
    let again = backup.disks[0].sent_bytes - 16 * MIB;
    let limit = may_be_sent_again(&finished);
    println!("{again} bytes sent again, of {limit} that may be");
    assert!(backup.skipped.is_empty() && again <= limit, "{}", finished.stderr);
    scene.check_restore(&backup.disks[0].snapshot_id);
}

#[test]
fn as_root_a_machine_that_slept_in_a_restore_goes_on() {
    let mut scene = Scene::new();
    scene.change(16);
    let backup = scene.client.backup().unwrap();
    let to = scene.sites.folder().join("slept.raw");
    let restore = scene.restoring(&backup.disks[0].snapshot_id, &to);
    restore.freeze();
    thread::sleep(SLEEP);
    restore.thaw();
    restore.wait().unwrap().answer::<answers::Restore>().unwrap();
    disk::compare(&scene.disk, &to).unwrap();
}

#[test]
fn as_root_a_machine_that_slept_in_a_commit_finds_it_done() {
    let mut scene = Scene::new();
    scene.change(16);
    let commit = scene.committing();
    commit.freeze();
    thread::sleep(SLEEP);
    commit.thaw();
    let backup: answers::Backup = commit.wait().unwrap().answer().unwrap();
    scene.check_restore(&backup.disks[0].snapshot_id);
    let same = |snapshot: &&answers::Snapshot| snapshot.backup_id == backup.backup_id;
    assert_eq!(scene.client.list().unwrap().snapshots.iter().filter(same).count(), 1);
}
