//! Figures of the hash cache alone: `cargo xtask bench --cache` runs it.
//!
//! A disk full of data: its hashes are written first, read in order as a backup reads them, and changed by 1 %, in runs and block
//! by block. Beside each the limit: the same bytes in a flat file, with sums, synced.

#![allow(clippy::unwrap_used)] // A measurement that can't be made has no result to go on with.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use janus_client::cache::{DiskCache, Head, Stage};
use janus_proto::{
    hash::hash_block,
    ids::{
        BlockHash, DiskId, SEGMENT_BLOCKS, SEGMENT_BYTES, ServerId, SnapshotId, StoreGeneration,
    },
    memory,
};
use serde_json::{Value, json};

/// Hashes of a segment.
const PAGE_BYTES: usize = SEGMENT_BLOCKS as usize * BlockHash::LEN;
const THREADS: usize = 2;

/// Arguments.
#[derive(clap::Parser)]
struct Args {
    /// Size of the disk
    #[arg(long, default_value_t = 64)]
    disk_gib: u64,
    /// Folder with room for a twentieth of the disk
    #[arg(long)]
    place: PathBuf,
    /// Where to write the figures
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() {
    memory::one_heap();
    let args: Args = clap::Parser::parse();
    let folder = tempfile::tempdir_in(&args.place).unwrap();
    let bench = Bench { segments: (args.disk_gib << 30) / SEGMENT_BYTES };
    let mut rows = Vec::new();
    let mut row = |what: &str, seconds: f64, limit: f64| {
        let ratio = limit / seconds;
        println!(
            "{} GiB full, {what}: {seconds:.2} s, flat file {limit:.2} s: {ratio:.2} of its speed",
            args.disk_gib
        );
        rows.push(json!({ "what": what, "disk_gib": args.disk_gib, "seconds": seconds, "limit_seconds": limit }));
    };
    let flat = Flat::new(folder.path().join("flat"), bench.segments);
    let cache = bench.open(folder.path());
    let limit = timed(|| flat.write());
    row("first write", timed(|| bench.first_write(&cache)), limit);
    drop(cache);
    let opening = timed(|| drop(bench.open(folder.path())));
    let cache = bench.open(folder.path());
    let limit = timed(|| flat.scan());
    row("ordered scan, 2 threads", timed(|| bench.scan(&cache)), limit);
    let limit = timed(|| flat.change(&bench.runs()));
    row("1 % changed in runs of 32 MiB", timed(|| bench.change_runs(&cache)), limit);
    let all: Vec<u64> = (0..bench.segments).collect();
    let limit = timed(|| flat.change(&all));
    row("1 % changed, block by block", timed(|| bench.change_blocks(&cache)), limit);
    println!("opened in {opening:.3} s; peak memory {} MiB", peak_mib());
    rows.push(json!({ "what": "open", "disk_gib": args.disk_gib, "seconds": opening, "peak_rss_mib": peak_mib() }));
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&Value::Array(rows)).unwrap()).unwrap();
    }
}

fn timed(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64()
}

fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// Runs `work` for all segments, on as many threads as a backup has.
fn on_threads(segments: u64, work: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let segment = next.fetch_add(1, Ordering::Relaxed);
                    if segment >= segments {
                        return;
                    }
                    work(segment);
                }
            });
        }
    });
}

/// Not hashed: the figure is the database's, and hashes must only look random.
fn hash(block: u64, salt: u64) -> BlockHash {
    let mut bytes = [0; BlockHash::LEN];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let mixed =
            (block ^ salt << 40).wrapping_add(at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        word.copy_from_slice(
            &(mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9).to_le_bytes(),
        );
    }
    BlockHash(bytes)
}

struct Bench {
    segments: u64,
}

impl Bench {
    fn open(&self, folder: &Path) -> DiskCache {
        let disk: DiskId = "disk".parse().unwrap();
        DiskCache::open(folder, &disk, self.segments * SEGMENT_BYTES).unwrap()
    }

    fn commit(&self, cache: &DiskCache, stage: Stage) {
        let server: ServerId = "server-a".parse().unwrap();
        let head = Head {
            snapshot_id: SnapshotId::new(),
            table_digest: hash_block(b""),
            store_generation: StoreGeneration::new(),
        };
        cache.commit(stage, &server, head, Vec::new()).unwrap();
    }

    fn put_all(stage: &Stage, segment: u64, salt: u64) {
        let first = segment * SEGMENT_BLOCKS;
        let blocks = (0..SEGMENT_BLOCKS).map(|at| (at as u16, hash(first + at, salt)));
        stage.put(segment, &blocks.collect::<Vec<_>>()).unwrap();
    }

    fn first_write(&self, cache: &DiskCache) {
        let stage = cache.stage();
        on_threads(self.segments, |segment| Self::put_all(&stage, segment, 1));
        self.commit(cache, stage);
    }

    fn scan(&self, cache: &DiskCache) {
        on_threads(self.segments, |segment| {
            assert_eq!(cache.segment(segment).unwrap().len(), SEGMENT_BLOCKS as usize);
        });
    }

    /// The segments of runs that make 1 %.
    fn runs(&self) -> Vec<u64> {
        (0..self.segments).filter(|segment| segment % 800 < 8).collect()
    }

    fn change_runs(&self, cache: &DiskCache) {
        let stage = cache.stage();
        self.runs().into_iter().for_each(|segment| Self::put_all(&stage, segment, 2));
        self.commit(cache, stage);
    }

    fn change_blocks(&self, cache: &DiskCache) {
        let stage = cache.stage();
        for segment in 0..self.segments {
            let first = segment * SEGMENT_BLOCKS;
            let blocks = (0..10).map(|at| (at * 97, hash(first + u64::from(at), 3)));
            stage.put(segment, &blocks.collect::<Vec<_>>()).unwrap();
        }
        self.commit(cache, stage);
    }
}

/// The limit: a page of hashes for each segment at its place, whose sums are kept in memory.
struct Flat {
    file: File,
    segments: u64,
}

impl Flat {
    fn new(path: PathBuf, segments: u64) -> Self {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        Self { file, segments }
    }

    fn put(&self, segment: u64, salt: u64) {
        let first = segment * SEGMENT_BLOCKS;
        let page: Vec<u8> =
            (first..first + SEGMENT_BLOCKS).flat_map(|at| hash(at, salt).0).collect();
        std::hint::black_box(blake3::hash(&page));
        self.file.write_all_at(&page, segment * PAGE_BYTES as u64).unwrap();
    }

    fn write(&self) {
        on_threads(self.segments, |segment| self.put(segment, 1));
        self.file.sync_all().unwrap();
    }

    fn scan(&self) {
        on_threads(self.segments, |segment| {
            let mut page = [0; PAGE_BYTES];
            self.file.read_exact_at(&mut page, segment * PAGE_BYTES as u64).unwrap();
            std::hint::black_box(blake3::hash(&page));
        });
    }

    /// Pages are written anew as a whole.
    fn change(&self, segments: &[u64]) {
        segments.iter().for_each(|segment| self.put(*segment, 2));
        self.file.sync_all().unwrap();
    }
}
