//! From several servers at once, and without the one that holds the snapshot.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
};

use xtask::{disk, site::answers};

use xtask::site::Taken;

use crate::scene::{MIB, Scene};

const SIZE: u64 = 96 * MIB;

/// A disk that both servers have; on the second some blocks are others.
fn shared(changed_bytes: u64) -> (Scene, [Taken; 2], BTreeSet<u64>) {
    let mut scene = Scene::new(&["server-a", "server-b"], SIZE);
    let first = scene.backup();
    let changed = match changed_bytes {
        0 => BTreeSet::new(),
        bytes => disk::change(&scene.disk, bytes, 11).unwrap(),
    };
    let second = scene.backup();
    assert_ne!(first.server, second.server);
    scene.client.settings.set("bandwidth", serde_json::json!(["400 Mbit/s"]));
    (scene, [first, second], changed)
}

#[test]
fn two_servers_share_a_restore() {
    let (scene, [first, second], changed) = shared(2 * MIB);
    for taken in [&first, &second] {
        let to = scene.path(&format!("of-{}", taken.server));
        let report = scene.restore(taken, &to, &[]);
        println!("{} of {} blocks differ: {report:?}", changed.len(), SIZE / 4096);
        disk::compare(&taken.copy, &to).unwrap();
        assert_eq!(report.sources.len(), 2, "{report:?}");
        assert!(report.sources.iter().all(|source| source.bytes > SIZE / 8), "{report:?}");
        assert!(report.fetched_bytes <= SIZE, "nothing comes twice: {report:?}");
        // Only one when told so.
        let alone =
            scene.restore(taken, &scene.path("alone"), &["--server", &taken.server, "--force"]);
        assert_eq!(alone.sources.len(), 1, "{alone:?}");
    }
}

#[test]
fn the_holding_server_is_killed_and_another_has_the_rest() {
    let (mut scene, [first, _], _) = shared(0);
    let to = scene.path("restored");
    let running = scene.restoring(&first, &to, &[], SIZE / 4);
    scene.site.kill_server(&first.server).unwrap();
    let finished = running.wait().unwrap();
    let report: answers::Restore = finished.answer().unwrap();
    println!("{report:?}\n{}", finished.stderr);
    disk::compare(&first.copy, &to).unwrap();
    assert_eq!(report.verified_bytes, SIZE);
    assert_eq!(report.sources.len(), 2, "{report:?}");
}

#[test]
fn what_only_the_killed_server_has_is_named_and_the_rest_comes_back() {
    let (mut scene, [first, _], changed) = shared(4 * MIB);
    let (to, map) = (scene.path("restored"), scene.path("map"));
    let running = scene.restoring(&first, &to, &[], SIZE / 4);
    scene.site.kill_server(&first.server).unwrap();
    let finished = running.wait().unwrap();
    assert_eq!(finished.code, Some(3), "{finished:?}");
    let failure: answers::Failure = serde_json::from_str(finished.answer_line()).unwrap();
    println!("{}", failure.error);
    assert!(failure.error.contains("are nowhere else"), "{failure:?}");
    assert!(!to.exists());
    let missing: BTreeSet<u64> = failure
        .lost
        .iter()
        .flat_map(|lost| lost.offset / 4096..(lost.offset + lost.bytes) / 4096)
        .collect();
    assert!(missing.is_subset(&changed), "{missing:?}");

    // It is back, and the same command goes on with what is there.
    scene.site.start_server(&first.server).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let report = scene.restore(&first, &to, &[]);
    assert!(report.resumed && report.fetched_bytes < SIZE / 2, "{report:?}");
    disk::compare(&first.copy, &to).unwrap();

    // Killed again, with a map wanted: holes are exactly what is missing.
    let to = scene.path("partial");
    let running = scene.restoring(&first, &to, &["--partial", map.to_str().unwrap()], SIZE / 4);
    scene.site.kill_server(&first.server).unwrap();
    let report: answers::Restore = running.wait().unwrap().answer().unwrap();
    let holes = holes(&fs::read_to_string(&map).unwrap());
    println!("{} of {} changed blocks are holes", holes.len(), changed.len());
    assert!(!holes.is_empty() && holes.is_subset(&changed));
    let expected = OpenOptions::new().write(true).open(&first.copy).unwrap();
    for block in &holes {
        expected.write_all_at(&[0; 4096], block * 4096).unwrap();
    }
    disk::compare(&first.copy, &to).unwrap();
    assert_eq!(report.verified_bytes, SIZE - holes.len() as u64 * 4096);
}

/// Blocks that a mapfile calls lost.
fn holes(map: &str) -> BTreeSet<u64> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let lines = map.lines().filter(|line| line.ends_with('-'));
    let range = |line: &str| {
        let mut fields = line.split_whitespace().map(str::to_owned);
        let (start, size) = (number(&fields.next().unwrap()), number(&fields.next().unwrap()));
        start / 4096..(start + size) / 4096
    };
    lines.flat_map(range).collect()
}

#[test]
fn what_one_server_has_lost_comes_from_another() {
    let (mut scene, [first, _], _) = shared(0);
    scene.site.stop_server(&first.server).unwrap();
    let folder = scene.site.folder().join(&first.server).join("alice/machine/disk");
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let image = entries.into_iter().find(|path| path.extension().is_some_and(|e| e == "vhdx"));
    let file = OpenOptions::new().read(true).write(true).open(image.unwrap()).unwrap();
    for at in [30 * MIB, 70 * MIB + 12_345] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
    scene.site.start_server(&first.server).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let to = scene.path("restored");
    let report = scene.restore(&first, &to, &[]);
    println!("{report:?}");
    disk::compare(&first.copy, &to).unwrap();
    assert!(report.lost.is_empty() && report.sources.len() == 2, "{report:?}");
    // Alone it is still lost.
    let alone = scene.path("alone");
    let alone = alone.to_str().unwrap();
    let arguments = ["restore", &first.snapshot, "--to", alone, "--server", &first.server];
    let failure = scene.client.failure(&arguments).unwrap();
    assert_eq!(failure.reason.as_deref(), Some("STORE_DAMAGED"), "{failure:?}");
}
