//! Sealed machines: real programs, real stores, and what an attacker finds in them.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod keys;
mod scene;
mod ways;

use std::fs;

use janus_proto::hash::hash_block;
use xtask::disk;

use self::scene::{A, B, MIB, SECRET, SIZE, Scene, files_with, secret, text};

/// The same search finds it in a plain backup, or it would prove nothing.
#[test]
fn a_known_text_of_a_sealed_backup_is_nowhere_in_the_store() {
    let mut plain = Scene::plain();
    let known_hash = hash_block(&secret(4096)).0;
    assert_eq!(plain.backup().server, A);
    let images = plain.images(A);
    assert!(!files_with(&images, SECRET.as_bytes()).is_empty());
    assert!(!files_with(&images, &known_hash).is_empty(), "its hash tells that it is there");

    let (mut sealed, recovery) = Scene::sealed();
    let first = sealed.backup();
    assert_eq!((first.server.as_str(), first.disks[0].kind.as_str()), (A, "full"));
    let second = sealed.backup_to(B);
    let images = [A, B].map(|name| sealed.images(name));
    let sent = disk::data_bytes(&sealed.disk).unwrap();
    for folder in &images {
        assert!(disk::allocated_below(folder) > sent / 2, "there is something to search");
    }
    let everything = sealed.site.folder().to_owned();
    let key = fs::read_to_string(sealed.key_file()).unwrap();
    let key = key.lines().last().unwrap().trim();
    assert!(recovery.contains(key), "the last line of the file is one of the recovery key");
    for (what, wanted) in
        [("text", SECRET.as_bytes()), ("hash", &known_hash), ("key", key.as_bytes())]
    {
        for folder in &images {
            let found = files_with(folder, wanted);
            assert!(found.is_empty(), "{what}: {found:?}");
        }
        // Logs, caches and settings neither: only the disk itself, its copy, and the key's file.
        let mut found = files_with(&everything, wanted);
        found.retain(|path| *path != sealed.disk && *path != second.copy);
        found.retain(|path| *path != sealed.key_file());
        assert!(found.is_empty(), "{what}: {found:?}");
    }
    sealed.assert_restores(&first.disks[0].snapshot_id, &second.copy, &["--verify"]);
    let listed = sealed.client.list().unwrap();
    assert!(listed.snapshots.iter().all(|one| one.sealed_by.is_some()), "{listed:?}");
}

#[test]
fn deltas_send_what_changed_and_restores_fetch_it() {
    let (scene, _) = Scene::sealed();
    let first = scene.backup_to(A);
    let dry: serde_json::Value = scene.client.answer(&["backup", "--dry-run"]).unwrap();
    assert_eq!(dry["disks"][0]["changed_bytes"], 0, "{dry}");
    scene.noise(6..7, 5);
    let second = scene.backup();
    assert_eq!(second.server, B);
    scene.noise(8..9, 6);
    let copy = scene.path("third.raw");
    fs::copy(&scene.disk, &copy).unwrap();
    let third = scene.backup();
    let disk = &third.disks[0];
    assert_eq!((third.server.as_str(), disk.kind.as_str()), (A, "delta"));
    assert_eq!((disk.sent_bytes, disk.wire_bytes), (2 * MIB, 2 * MIB), "{disk:?}");
    let unchanged = scene.backup();
    assert_eq!((unchanged.server.as_str(), unchanged.disks[0].sent_bytes), (B, MIB));

    // Over what is there: all of it is read, sealed and compared, and what differs is fetched.
    let to = scene.path("there.raw");
    fs::copy(&first.copy, &to).unwrap();
    for (more, what) in [(&["--force"][..], "beside it"), (&["--force", "--in-place"], "in place")]
    {
        let arguments = ["restore", &disk.snapshot_id, "--to", text(&to), "--verify"];
        let report: xtask::site::answers::Restore =
            scene.client.answer(&[&arguments, more].concat()).unwrap();
        println!("{what}: {report:?}");
        assert!(report.fetched_bytes <= 2 * MIB, "{report:?}");
        assert_eq!((report.verified_bytes, report.lost.len()), (SIZE, 0));
        disk::compare(&copy, &to).unwrap();
        disk::write_noise(&to, 3 * MIB..4 * MIB, 9).unwrap();
        disk::write_noise(&to, SIZE - 700..SIZE, 9).unwrap();
    }
}

/// What was begun is gone on with, by the next process and after the server was killed.
#[test]
fn an_interrupted_backup_goes_on_sealed() {
    let (mut scene, _) = Scene::sealed();
    scene.client.settings.set("bandwidth", vec!["40 Mbit/s"]);
    for turn in 0..2 {
        let mut running = scene.client.start(&["backup"]).unwrap();
        let images = scene.images(A);
        scene::await_that("some of it is stored", || {
            running.has_ended() || disk::allocated_below(&images) > (20 + 3 * turn) * MIB
        });
        assert!(!running.has_ended(), "{}", running.log());
        running.kill();
        running.wait().unwrap();
    }
    scene.site.kill_server(A).unwrap();
    scene.site.start_server(A).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    scene.client.settings.set("bandwidth", Vec::<String>::new());
    let taken = scene.client.backup().unwrap();
    assert!(taken.resumed && taken.server == A, "{taken:?}");
    assert!(taken.disks[0].sent_bytes < disk::data_bytes(&scene.disk).unwrap(), "{taken:?}");
    let images = scene.images(A);
    assert!(files_with(&images, SECRET.as_bytes()).is_empty());
    scene.assert_restores("disk", &scene.disk.clone(), &[]);
}
