//! A process that commits in a loop is killed at random moments; what it leaves is complete, old or new.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use janus_proto::ids::{DiskId, SEGMENT_BYTES, SnapshotId};

use crate::cache::{
    DiskCache,
    tests::model::{Content, World, server},
};

const FOLDER: &str = "JANUS_CACHE_KILL_FOLDER";
/// The place in a compaction where the process waits to be killed.
const STOP: &str = "JANUS_CACHE_KILL_AT";
const SIZE: u64 = 6 * SEGMENT_BYTES + 1536;

/// The disk after `generation` changes: the same in the process that is killed and the one that looks.
struct Replay {
    disk: Content,
    generation: u64,
}

impl Replay {
    fn new() -> Self {
        Self { disk: Content::zeros(SIZE), generation: 0 }
    }

    fn advance(&mut self) {
        self.generation += 1;
        let random = self.generation.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
        let blocks = self.disk.blocks.len() as u64;
        let (count, step) = if random.is_multiple_of(5) { (3000, 1) } else { (300, 7) };
        let number = if random.is_multiple_of(11) { 0 } else { self.generation as u32 };
        for at in 0..count {
            self.disk.blocks[((random + at * step) % blocks) as usize] = number;
        }
    }
}

fn snapshot(generation: u64) -> SnapshotId {
    format!("{generation:032x}").parse().unwrap()
}

fn generation(snapshot: SnapshotId) -> u64 {
    u64::from_str_radix(&snapshot.to_string().replace('-', "")[16..], 16).unwrap()
}

fn disk_id() -> DiskId {
    "disk".parse().unwrap()
}

/// Newest generation that any server has, by the cache.
fn newest(cache: &DiskCache) -> u64 {
    (0..2)
        .filter_map(|number| cache.head(&server(number)))
        .map(|head| generation(head.snapshot_id))
        .max()
        .unwrap_or(0)
}

/// Not a test of its own: what the killed process does.
#[test]
fn killed_process() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let cache = DiskCache::open(folder.as_ref(), &disk_id(), SIZE).unwrap();
    let mut replay = Replay::new();
    while replay.generation < newest(&cache) {
        replay.advance();
    }
    let mut world = World::default();
    loop {
        replay.advance();
        let stage = cache.stage();
        for segment in 0..7 {
            stage.put_hashes(segment, &replay.disk.segment(segment)).unwrap();
        }
        let id = server(replay.generation as usize % 2);
        let head = world.commit_as(&id, replay.disk.clone(), snapshot(replay.generation));
        cache.commit(stage, &id, head, replay.generation.to_le_bytes().to_vec()).unwrap();
        println!("\ncommitted {}", replay.generation);
    }
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_state_or_the_new_one() {
    let kills: u32 = if std::env::var_os("JANUS_SOAK").is_some() { 100 } else { 10 };
    let seed = RandomState::new().hash_one(0u8);
    println!("seed {seed}");
    let folder = tempfile::tempdir().unwrap();
    let mut reported = 0;
    for kill in 0..kills {
        let wait = 30 + seed.rotate_left(kill * 7) % 500;
        let last = run_and_kill(folder.path(), Duration::from_millis(wait));
        reported = last.unwrap_or(reported);
        look(folder.path(), reported, wait);
    }
    assert!(reported > 0, "no commit in {kills} rounds");
}

/// Called where a compaction gets to; waits there to be killed, if it is to be there.
pub(in crate::cache) fn reached(place: &str) {
    if std::env::var(STOP).is_ok_and(|wanted| wanted == place) {
        println!("\nreached {place}");
        loop {
            std::thread::park();
        }
    }
}

#[test]
fn a_kill_anywhere_in_a_compaction_leaves_the_old_database_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let databases = || {
        let names = std::fs::read_dir(folder.path().join("disk")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let numbers = names.filter_map(|name| name.strip_prefix("db-")?.parse().ok());
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        numbers
    };
    let (mut reported, mut number) = (0, 1);
    for (place, is_switched) in
        [("opened", false), ("rewriting", false), ("written", false), ("persisted", true)]
    {
        let mut child = start(folder.path(), Some(place));
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let waits = format!("reached {place}");
        let told = lines.by_ref().take_while(|line| *line != waits);
        reported = told.filter_map(committed).last().unwrap_or(reported);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(databases(), [number, number + 1], "killed at {place}");
        look(folder.path(), reported, 0);
        number += u64::from(is_switched);
        assert_eq!(databases(), [number], "killed at {place}");
        println!("killed at {place}: database {number}, commit {reported}");
    }
    // With nobody who kills it compacts.
    let mut child = start(folder.path(), None);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    reported = lines.filter_map(committed).nth(20).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    look(folder.path(), reported, 0);
    assert!(databases()[0] > number);
}

fn start(folder: &std::path::Path, stop: Option<&str>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "cache::tests::kill::killed_process", "--nocapture"]);
    command.env(FOLDER, folder).envs(stop.map(|place| (STOP, place)));
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// The commit that a line tells of.
fn committed(line: String) -> Option<u64> {
    line.strip_prefix("committed ")?.parse().ok()
}

fn run_and_kill(folder: &std::path::Path, wait: Duration) -> Option<u64> {
    let mut child = start(folder, None);
    std::thread::sleep(wait);
    child.kill().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let last = lines.filter_map(committed).last();
    child.wait().unwrap();
    last
}

fn look(folder: &std::path::Path, reported: u64, wait: u64) {
    let cache = DiskCache::open(folder, &disk_id(), SIZE).unwrap();
    let newest = newest(&cache);
    if reported > 0 {
        assert_eq!(cache.fresh_reason(), None, "after {wait} ms");
    }
    assert!(
        newest >= reported,
        "commit {reported} was reported and lost after {wait} ms: newest is {newest}"
    );
    let mut world = World::default();
    let mut replay = Replay::new();
    while replay.generation < newest {
        replay.advance();
        let id = server(replay.generation as usize % 2);
        world.commit_as(&id, replay.disk.clone(), snapshot(replay.generation));
    }
    if newest > 0 {
        assert_eq!(cache.cursor(), newest.to_le_bytes());
    }
    assert_eq!(
        cache.segment_digests().unwrap(),
        replay.disk.digests(),
        "T is the newest generation's, {wait} ms"
    );
    world.check(&cache).unwrap();
}
