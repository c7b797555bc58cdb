//! Disks without space: of a server, of a machine's cache, of a restore.

use std::{fs, path::Path};

use xtask::{
    disk,
    loopback::SmallFileSystem,
    site::{Part, SITES, answers, url},
};

use crate::scene::{Fault::Fill, MIB, NORTH, Phase, SOUTH, Scene, case, fill};

#[test]
fn as_root_an_upload_whose_server_is_full() {
    case(SOUTH, Phase::Upload, &[Fill(SOUTH)]);
}

#[test]
fn as_root_a_commit_whose_server_is_full() {
    case(NORTH, Phase::Commit, &[Fill(NORTH)]);
}

#[test]
fn as_root_a_restore_whose_server_is_full() {
    case(SOUTH, Phase::Restore, &[Fill(SOUTH)]);
}

/// What it keeps may be lost at any time, and needn't be kept at all.
#[test]
fn as_root_a_janus_whose_disk_is_full_goes_on() {
    let mut scene = Scene::new();
    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    fill(store.folder());
    scene.sites.kill(NORTH, Part::Janus).unwrap();
    let settings = scene.sites.settings.get_mut(&(NORTH, Part::Janus)).unwrap();
    settings.set("view_file", store.folder().join("view").to_string_lossy());
    scene.sites.start_part(NORTH, Part::Janus).unwrap();
    scene.client.settings.set("urls", vec![url(NORTH, 7420)]);
    for _ in SITES {
        scene.change(1);
        let backup = scene.client.backup().unwrap();
        assert_eq!(scene.client.list().unwrap().snapshots[0].backup_id, backup.backup_id);
        scene.check_restore(&backup.disks[0].snapshot_id);
    }
}

fn cache_on(scene: &mut Scene, folder: &Path) {
    scene.client.settings.set("cache_path", folder.to_string_lossy());
}

/// A backup by what its server has, since nothing can be remembered; it says so.
fn without_memory(scene: &mut Scene) {
    scene.change(1);
    let finished = scene.client.run(&["backup", "--json"]).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains("make room there"), "{finished:?}");
    let backup: answers::Backup = finished.answer().unwrap();
    let disk = &backup.disks[0];
    println!("on {}: {}, {} bytes sent", backup.server, disk.compare, disk.sent_bytes);
    assert!(disk.compare == "reconciled" && disk.sent_bytes <= MIB, "{backup:?}");
    scene.check_restore(&disk.snapshot_id);
}

/// What is remembered is only a help: before the first backup there, while data flows, and where nothing can be written at all.
#[test]
fn as_root_a_machine_whose_cache_is_full_backs_up_all_the_same() {
    let mut scene = Scene::new();
    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    cache_on(&mut scene, &store.folder().join("cache"));
    let free = || fs::remove_file(store.folder().join("filler")).unwrap();
    fill(store.folder());
    for _ in 0..4 {
        without_memory(&mut scene);
    }
    let held = scene.client.list().unwrap().snapshots;
    assert_eq!(held.len(), 6);

    free();
    scene.change(16);
    let upload = scene.uploading();
    fill(store.folder());
    let finished = upload.wait().unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let backup: answers::Backup = finished.answer().unwrap();
    scene.check_restore(&backup.disks[0].snapshot_id);
    // Full, with whatever that one has left.
    scene.client.backup().unwrap();

    // With room it remembers again.
    free();
    let compared: Vec<_> =
        (0..4).map(|_| scene.client.backup().unwrap().disks[0].compare.clone()).collect();
    assert_eq!(compared[2..], ["cache", "cache"], "{compared:?}");

    store.make_read_only().unwrap();
    without_memory(&mut scene);
    without_memory(&mut scene);
}

/// The backup is made already: what can't be remembered costs a comparison next time.
#[test]
fn as_root_a_cache_that_fills_in_a_commit_costs_time_only() {
    let mut scene = Scene::new();
    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    cache_on(&mut scene, &store.folder().join("cache"));
    scene.change(16);
    let commit = scene.committing();
    fill(store.folder());
    let finished = commit.wait().unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let committed = scene.client.list().unwrap().snapshots;
    assert_eq!(committed.len(), 3, "{finished:?}");
    scene.check_restore(&committed[0].snapshot_id);
    fs::remove_file(store.folder().join("filler")).unwrap();
    let backup = scene.client.backup().unwrap();
    scene.check_restore(&backup.disks[0].snapshot_id);
}

#[test]
fn as_root_a_restore_onto_a_full_disk_leaves_nothing() {
    let scene = Scene::new();
    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    fill(store.folder());
    let to = store.folder().join("restored.raw");
    let failure =
        scene.client.failure(&["restore", "disk", "--to", &to.to_string_lossy()]).unwrap();
    assert!(failure.error.contains("restored.raw") && failure.exit_code == 1, "{failure:?}");
    let left: Vec<_> =
        fs::read_dir(store.folder()).unwrap().flatten().map(|f| f.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("restored")), "{left:?}");
    fs::remove_file(store.folder().join("filler")).unwrap();
    let restored: answers::Restore =
        scene.client.answer(&["restore", "disk", "--to", &to.to_string_lossy()]).unwrap();
    disk::compare(&scene.disk, &to).unwrap();
    assert_eq!(restored.size_bytes, 16 * MIB);
}
