//! What the cache of a large disk costs after many backups to three servers: space, memory, and time to open after a kill.
//! 64 GiB full of data; 1 TiB with `JANUS_SOAK=1`.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use janus_proto::{
    hash::hash_block,
    ids::{BlockHash, DiskId, SEGMENT_BLOCKS, SEGMENT_BYTES, SnapshotId, StoreGeneration},
};

use crate::cache::{DiskCache, Head, Stage, engine::allocated, tests::model::server};

const FOLDER: &str = "JANUS_CACHE_SIZE_FOLDER";
const GENERATIONS: u64 = 100;
const SERVERS: u64 = 3;

fn is_soak() -> bool {
    std::env::var_os("JANUS_SOAK").is_some()
}

fn segments() -> u64 {
    let gib: u64 = if is_soak() { 1024 } else { 64 };
    (gib << 30) / SEGMENT_BYTES
}

fn hash(block: u64, salt: u64) -> BlockHash {
    hash_block(&[block.to_le_bytes(), salt.to_le_bytes()].concat())
}

fn put(stage: &Stage, segment: u64, salt: u64, is_changed: impl Fn(u64) -> bool) {
    let blocks = (0..SEGMENT_BLOCKS).filter(|at| is_changed(*at));
    let hashes = blocks.map(|at| (at as u16, hash(segment * SEGMENT_BLOCKS + at, salt)));
    stage.put(segment, &hashes.collect::<Vec<_>>()).unwrap();
}

fn head() -> Head {
    Head {
        snapshot_id: SnapshotId::new(),
        table_digest: hash_block(b""),
        store_generation: StoreGeneration::new(),
    }
}

fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn open(folder: &Path) -> DiskCache {
    let disk: DiskId = "disk".parse().unwrap();
    DiskCache::open(folder, &disk, segments() * SEGMENT_BYTES).unwrap()
}

/// Not a test of its own: the process that makes the backups, each of which changes 1 % in runs and single blocks.
#[test]
fn process_of_many_backups() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    for generation in 0..GENERATIONS {
        let cache = open(folder.as_ref());
        if generation == 0 {
            let stage = cache.stage();
            for segment in 0..segments() {
                put(&stage, segment, generation, |_| true);
            }
            cache.commit(stage, &server(0), head(), vec![]).unwrap();
            continue;
        }
        let stage = cache.stage();
        // Every 25th segment, another each time, a quarter of its blocks.
        for segment in (generation % 25..segments()).step_by(25) {
            put(&stage, segment, generation, |at| at % 8 < 2);
        }
        cache.commit(stage, &server((generation % SERVERS) as usize), head(), vec![]).unwrap();
    }
    let cache = open(folder.as_ref());
    let stage = cache.stage();
    stage.put(0, &[(0, hash(0, 0))]).unwrap();
    println!("\npeak {}", peak_mib());
    // Killed with all of it open.
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

#[test]
fn a_large_disks_cache_stays_small_and_opens_soon_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cache::tests::size::process_of_many_backups", "--nocapture"])
        .env(FOLDER, folder.path())
        // As the program has it by `memory::one_heap`, which is too late in a process of tests.
        .env("MALLOC_ARENA_MAX", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let peak = lines.filter_map(|line| line.strip_prefix("peak ")?.parse::<u64>().ok()).next();
    child.kill().unwrap();
    child.wait().unwrap();
    let peak = peak.unwrap();
    let begun = Instant::now();
    let cache = open(folder.path());
    let opening = begun.elapsed();
    assert_eq!(cache.fresh_reason(), None);
    assert_eq!(cache.servers().len(), SERVERS as usize);
    drop(cache);
    let bytes = allocated(folder.path()).unwrap();
    let share = bytes as f64 / (segments() * SEGMENT_BYTES / 128) as f64;
    println!(
        "{} GiB, {GENERATIONS} generations, {SERVERS} servers: {} MiB on disk ({share:.2} of 1/128), opened in {opening:?} after a kill, peak RSS {peak} MiB",
        (segments() * SEGMENT_BYTES) >> 30,
        bytes >> 20,
    );
    assert!(share <= 2.5 && opening <= Duration::from_secs(1));
    assert!(peak <= if is_soak() { 400 } else { 256 }, "{peak} MiB");
    fs::remove_dir_all(folder.path()).unwrap();
}
