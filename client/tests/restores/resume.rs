//! Ended in the middle: the same command goes on.

use std::fs;

use xtask::disk;

use crate::scene::{MIB, Scene, partial_of};

#[test]
fn a_killed_restore_goes_on_where_it_was() {
    const SIZE: u64 = 96 * MIB;
    let mut scene = Scene::new(&["server-a"], SIZE);
    let taken = scene.backup();
    // Slow enough to be hit.
    scene.client.settings.set("bandwidth", serde_json::json!(["800 Mbit/s"]));
    for percent in [10, 50, 90] {
        let to = scene.path(&format!("killed-at-{percent}"));
        let running = scene.restoring(&taken, &to, &[], SIZE * percent / 100);
        running.kill();
        assert_eq!(running.wait().unwrap().code, None);
        assert!(!to.exists(), "half a disk under its final name");
        let there = disk::allocated_bytes(&partial_of(&to).unwrap()).unwrap();
        let report = scene.restore(&taken, &to, &[]);
        println!("killed at {percent} %: {} MiB were there; {report:?}", there / MIB);
        disk::compare(&taken.copy, &to).unwrap();
        assert!(report.resumed && report.verified_bytes == SIZE);
        assert!(report.fetched_bytes <= SIZE - SIZE * percent / 100, "{report:?}");
        assert!(partial_of(&to).is_none());
    }
}

#[test]
fn an_interrupted_restore_keeps_what_it_has_and_says_so() {
    const SIZE: u64 = 64 * MIB;
    let mut scene = Scene::new(&["server-a"], SIZE);
    let older = scene.backup();
    disk::change(&scene.disk, MIB, 3).unwrap();
    let newer = scene.backup();
    scene.client.settings.set("bandwidth", serde_json::json!(["400 Mbit/s"]));
    let to = scene.path("restored");
    fs::write(&to, "as it was").unwrap();
    let running = scene.restoring(&older, &to, &["--force"], 8 * MIB);
    // Nobody else may write there meanwhile.
    let to_text = to.to_string_lossy().into_owned();
    let busy = ["restore", &newer.snapshot, "--to", &to_text, "--force"];
    let failure = scene.client.failure(&busy).unwrap();
    assert_eq!(failure.exit_code, 6, "{failure:?}");
    running.interrupt();
    let finished = running.wait().unwrap();
    assert_eq!(finished.code, Some(130), "{finished:?}");
    assert!(finished.stderr.contains("what was restored is kept there"), "{}", finished.stderr);
    assert_eq!(fs::read(&to).unwrap(), b"as it was");
    // Another snapshot to the same place: what was left is named, and removed in the end.
    let left = partial_of(&to).unwrap();
    let finished = scene.client.run(&[&busy[..], &["--json"]].concat()).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains(left.to_str().unwrap()), "{}", finished.stderr);
    disk::compare(&newer.copy, &to).unwrap();
    assert!(partial_of(&to).is_none());
}
