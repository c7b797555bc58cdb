//! What is mirrored is kept as long as its server has it, and is read again when it is damaged.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use xtask::site::Taken;

use crate::scene::{MIB, Scene};

const A: &str = "server-a";
const B: &str = "server-b";

/// Two servers with three backups each, all of them different; those of the first, and the newest of the other.
fn three_each() -> (Scene, Vec<Taken>, Vec<Taken>) {
    let scene = Scene::new();
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    for seed in 0..3 {
        of_a.push(scene.backup_to(A));
        scene.change(MIB, 100 + seed);
        of_b.push(scene.backup_to(B));
        scene.change(MIB, 200 + seed);
    }
    scene.await_mirrored(B, &of_a.iter().collect::<Vec<_>>());
    (scene, of_a, of_b)
}

/// Files that a server mirrors.
fn files(scene: &mut Scene, extension: &str) -> Vec<PathBuf> {
    let folder = scene.site.server(B).unwrap().images().join(".mirror");
    let mut found = Vec::new();
    walk(&folder, &mut found);
    found.retain(|path| path.extension().is_some_and(|one| one == extension));
    found.sort();
    found
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => walk(&path, found),
            false => found.push(path),
        }
    }
}

fn delete(scene: &Scene, taken: &Taken) {
    let output = scene.site.admin(A, &["delete", &taken.snapshot]).unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_the_holder_drops_goes_and_the_rest_stays_whole() {
    let (mut scene, of_a, of_b) = three_each();
    let allocated = |files: &[PathBuf]| -> u64 {
        files.iter().map(|path| fs::metadata(path).unwrap().len()).sum()
    };
    let tables = files(&mut scene, "table");
    println!("{} bytes in {tables:?}", allocated(&tables));
    // Differences: together they are hardly more than one of them whole (0.8 % of 29 MiB).
    assert!(tables.len() == 3 && allocated(&tables) < 3 * 29 * MIB / 128 / 2, "{tables:?}");
    let usage = scene.site.admin(B, &["usage", "--json"]).unwrap();
    let usage: serde_json::Value = serde_json::from_slice(&usage.stdout).unwrap();
    assert!(usage["mirrored_bytes"].as_u64() >= Some(allocated(&tables)), "{usage}");
    // The whole one is the newest of those that were there at first, so each has its turn.
    let [first, second, third] = &of_a[..] else { panic!("three were taken") };
    delete(&scene, first);
    scene.await_mirrored(B, &[second, third]);
    delete(&scene, second);
    scene.await_mirrored(B, &[third]);
    assert_eq!((files(&mut scene, "table").len(), files(&mut scene, "json").len()), (1, 1));

    // Away it stays, for many looks, and over a restart.
    scene.site.kill_server(A).unwrap();
    thread::sleep(Duration::from_secs(3));
    scene.site.stop_server(B).unwrap();
    scene.site.start_server(B).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    thread::sleep(Duration::from_secs(2));
    scene.await_mirrored(B, &[third]);
    scene.restore_partial(third, &of_b.iter().collect::<Vec<_>>(), "third");

    // With the last one all goes.
    scene.site.start_server(A).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    delete(&scene, third);
    scene.await_mirrored(B, &[]);
    assert!(files(&mut scene, "table").is_empty() && files(&mut scene, "json").is_empty());
    assert!(!scene.site.server(B).unwrap().images().join(".mirror").exists());
}

#[test]
fn what_is_damaged_is_found_and_read_again() {
    let (mut scene, of_a, of_b) = three_each();
    let all: Vec<&Taken> = of_a.iter().collect();
    for (round, extension) in ["table", "table", "json"].into_iter().enumerate() {
        scene.site.stop_server(B).unwrap();
        let says = ["damaged; it is read again", "a mirrored table will be read again"];
        let said = |scene: &Scene| {
            let log = scene.site.log(B);
            says.iter().map(|says| log.matches(says).count()).sum::<usize>()
        };
        let before = said(&scene);
        // The largest, which the others are built on: a page of it, its header, its record.
        let files = files(&mut scene, extension);
        let hit = files.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
        let at = if round == 1 { 20 } else { fs::metadata(hit).unwrap().len() / 3 };
        let file = OpenOptions::new().read(true).write(true).open(hit).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        scene.site.start_server(B).unwrap();
        scene.site.await_ready(&scene.client).unwrap();
        let until = std::time::Instant::now() + Duration::from_secs(30);
        while said(&scene) == before {
            assert!(std::time::Instant::now() < until, "{}", scene.site.log(B));
            thread::sleep(Duration::from_millis(50));
        }
        scene.await_mirrored(B, &all);
    }
    scene.site.kill_server(A).unwrap();
    let others: Vec<&Taken> = of_b.iter().collect();
    for (number, taken) in of_a.iter().enumerate() {
        scene.restore_partial(taken, &others, &format!("restored-{number}"));
    }
}

#[test]
fn nothing_is_mirrored_where_that_is_off() {
    let mut scene = Scene::new();
    scene.site.stop_server(B).unwrap();
    scene.site.server(B).unwrap().settings.set("mirror_tables", false);
    scene.site.start_server(B).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let first = scene.backup_to(A);
    let second = scene.backup_to(B);
    // The other server has had the time.
    scene.await_mirrored(A, &[&second]);
    assert!(scene.caller("machine").mirrored(B, "").unwrap().is_empty());
    scene.site.kill_server(A).unwrap();
    assert_eq!(scene.listed(&first).elsewhere, None);
    let to = scene.path("refused");
    let failure =
        scene.client.failure(&["restore", &first.snapshot, "--to", to.to_str().unwrap()]).unwrap();
    println!("{}", failure.error);
    assert!(failure.error.contains("no other server has its table"), "{failure:?}");
}
