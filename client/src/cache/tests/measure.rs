//! Figures, run by hand: `cargo test --release -p janus-client cache::tests::measure -- --ignored --nocapture`.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use janus_proto::{
    hash::hash_block,
    ids::{BlockHash, DiskId, SEGMENT_BLOCKS, SEGMENT_BYTES, SnapshotId, StoreGeneration},
};

use crate::cache::{DiskCache, Head, tests::model::server};

pub(super) fn hash(block: u64, salt: u64) -> BlockHash {
    // Not hashed: the figure is the database's, and hashes must only look random.
    let mut bytes = [0; 32];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let mixed =
            (block ^ salt << 40).wrapping_add(at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        word.copy_from_slice(
            &(mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9).to_le_bytes(),
        );
    }
    BlockHash(bytes)
}

pub(super) fn rss_mib() -> [u64; 2] {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    ["VmRSS:", "VmHWM:"].map(|name| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
    })
}

fn timed<T>(what: &str, payload_bytes: u64, run: impl FnOnce() -> T) -> T {
    // Peak from here on, where the system allows it.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let begun = Instant::now();
    let result = run();
    let seconds = begun.elapsed().as_secs_f64();
    let [now, peak] = rss_mib();
    let rate = payload_bytes as f64 / seconds / f64::from(1 << 20);
    println!("{what:32} {seconds:7.2} s {rate:8.0} MiB/s  RSS {now} peak {peak} MiB");
    result
}

pub(super) fn head() -> Head {
    Head {
        snapshot_id: SnapshotId::new(),
        table_digest: hash_block(b""),
        store_generation: StoreGeneration::new(),
    }
}

#[test]
#[ignore = "figures, not a check"]
fn figures_of_a_dense_disk() {
    let gib: u64 =
        std::env::var("JANUS_CACHE_GIB").ok().and_then(|text| text.parse().ok()).unwrap_or(32);
    let (size, segments, payload) = (gib << 30, (gib << 30) / SEGMENT_BYTES, gib << 23);
    let folder = tempfile::tempdir().unwrap();
    let disk: DiskId = "disk".parse().unwrap();
    let cache = DiskCache::open(folder.path(), &disk, size).unwrap();
    timed("first write, 2 threads", payload, || first_write(&cache, segments));
    timed("ordered scan, warm process", payload, || scan(&cache, segments, 1));
    drop(cache);
    let cache = timed("open", 0, || DiskCache::open(folder.path(), &disk, size).unwrap());
    timed("ordered scan", payload, || scan(&cache, segments, 1));
    timed("ordered scan, 2 threads", payload, || scan(&cache, segments, 2));
    for (name, spread) in [("1 % clustered", false), ("1 % spread", true), ("1 % spread", true)] {
        timed(name, payload / 100, || one_percent(&cache, segments, spread));
    }
    timed("ordered scan over 4 layers", payload, || scan(&cache, segments, 1));
    timed("11 % more, with compaction", payload, || {
        let stage = cache.stage();
        (0..segments / 9).for_each(|segment| put_all(&stage, segment, 9));
        cache.commit(stage, &server(0), head(), Vec::new()).unwrap();
    });
    timed("ordered scan after it", payload, || scan(&cache, segments, 1));
    drop(cache);
    let cache =
        timed("open after compaction", 0, || DiskCache::open(folder.path(), &disk, size).unwrap());
    let allocated = cache.shared.read().engine.allocated_bytes();
    println!("space {:.2} of the payload", allocated as f64 / payload as f64);
}

/// Shows whether memory stays bounded when the disk is read again and again.
#[test]
#[ignore = "figures, not a check"]
fn figures_of_repeated_scans() {
    let (size, segments) = (32 << 30, (32 << 30) / SEGMENT_BYTES);
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path(), &"disk".parse().unwrap(), size).unwrap();
    timed("first write, 2 threads", 256 << 20, || first_write(&cache, segments));
    for _ in 0..10 {
        timed("ordered scan, 2 threads", 256 << 20, || scan(&cache, segments, 2));
    }
}

fn put_all(stage: &crate::cache::Stage, segment: u64, salt: u64) {
    let blocks: Vec<_> = (0..SEGMENT_BLOCKS)
        .map(|at| (at as u16, hash(segment * SEGMENT_BLOCKS + at, salt)))
        .collect();
    stage.put(segment, &blocks).unwrap();
}

pub(super) fn first_write(cache: &DiskCache, segments: u64) {
    let stage = cache.stage();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(segment) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < segments)
                {
                    put_all(&stage, segment, 1);
                }
            });
        }
    });
    cache.commit(stage, &server(0), head(), Vec::new()).unwrap();
}

fn scan(cache: &DiskCache, segments: u64, threads: usize) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(segment) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < segments)
                {
                    assert_eq!(cache.segment(segment).unwrap().len(), 1024);
                }
            });
        }
    });
}

fn one_percent(cache: &DiskCache, segments: u64, spread: bool) {
    let stage = cache.stage();
    if spread {
        for segment in 0..segments {
            let blocks: Vec<_> =
                (0..10).map(|at| (at * 97, hash(segment * 1024 + u64::from(at), 3))).collect();
            stage.put(segment, &blocks).unwrap();
        }
    } else {
        (0..segments)
            .step_by(800)
            .flat_map(|first| first..first + 8)
            .filter(|at| *at < segments)
            .for_each(|segment| put_all(&stage, segment, 2));
    }
    cache.commit(stage, &server(1), head(), Vec::new()).unwrap();
}
