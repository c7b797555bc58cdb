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

/// Before it, and while data flows: the machine has nowhere to remember what it does, and says so.
#[test]
fn as_root_a_machine_whose_cache_is_full_says_so_and_goes_on_with_space() {
    let mut scene = Scene::new();
    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    let cache = store.folder().join("cache");
    cache_on(&mut scene, &cache);
    fill(store.folder());
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 1, "{failure:?}");
    assert!(failure.error.contains(&*cache.to_string_lossy()), "{failure:?}");

    // A list and a restore need no cache.
    let held = scene.client.list().unwrap().snapshots;
    assert_eq!(held.len(), 2);
    scene.check_restore(&held[0].snapshot_id);

    fs::remove_file(store.folder().join("filler")).unwrap();
    scene.change(16);
    let upload = scene.uploading();
    fill(store.folder());
    let finished = upload.wait().unwrap();
    // What is remembered may have found its space before.
    assert!(matches!(finished.code, Some(0 | 1)), "{finished:?}");
    fs::remove_file(store.folder().join("filler")).unwrap();
    let backup = scene.client.backup().unwrap();
    scene.check_restore(&backup.disks[0].snapshot_id);
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
