//! Figures of the store alone, on the file systems of this machine: `cargo xtask bench --store` runs it.
//!
//! Merges a delta into the sparse base of a large disk, by sharing blocks (a small XFS, which needs root) and by copying, each
//! beside a plain copy of as many bytes; reads a disk through many links and through one, checks images,
//! and opens a store with many snapshots.

#![allow(clippy::unwrap_used)] // A measurement that can't be made has no result to go on with.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use janus_proto::{
    hash::{hash_blocks, table_digest},
    ids::{BLOCK_BYTES, BackupId, MachineKey, SEGMENT_BYTES, block_count, segment_count},
    model::{Batch, Extent},
};
use janus_server::{
    chain::{Run, opened::OpenedSnapshot, store::Store},
    runs::{CommitDisk, PurgeOptions, Runs, WantedDisk, Writer},
    verify::{Way, check_image, pace::Limit},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xtask::{
    disk,
    loopback::{Kind, SmallFileSystem},
};

const MIB: u64 = 1 << 20;

/// Arguments.
#[derive(clap::Parser)]
struct Args {
    /// Size of the delta, and of the base's data
    #[arg(long, default_value_t = 1024)]
    delta_mib: u64,
    /// Size of the disk that is merged
    #[arg(long, default_value_t = 100)]
    disk_gib: u64,
    /// Links of the chain that is read
    #[arg(long, default_value_t = 100)]
    links: u64,
    /// Size of the disk that is read
    #[arg(long, default_value_t = 1024)]
    read_mib: u64,
    /// Snapshots of the store that is opened
    #[arg(long, default_value_t = 10_000)]
    snapshots: u64,
    /// Lengths of what the delta changes, in KiB
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 64])]
    run_kib: Vec<u64>,
    /// Folder with room for six times the delta
    #[arg(long)]
    place: PathBuf,
    /// Where to write the figures
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() {
    let args: Args = clap::Parser::parse();
    let mut rows = Vec::new();
    for &run_kib in &args.run_kib {
        let folder = tempfile::tempdir_in(&args.place).unwrap();
        rows.push(merge(&args, folder.path(), "in place", run_kib));
        if rustix::process::geteuid().is_root() {
            // XFS takes more space ahead for each short stretch.
            let bytes = (args.delta_mib * 24 + 4096) * MIB;
            let small = SmallFileSystem::mount_in(&args.place, Kind::Xfs, bytes).unwrap();
            rows.push(merge(&args, small.folder(), "sharing (XFS)", run_kib));
        } else {
            println!("NOT RUN, it needs root for a loop device: merges by sharing blocks");
        }
    }
    let folder = || tempfile::tempdir_in(&args.place).unwrap();
    for change in [Change::Mixed, Change::Scattered] {
        rows.extend(read(&args, folder().path(), change));
    }
    rows.push(verify(&args, folder().path()));
    rows.push(start(folder().path(), args.snapshots, 1));
    // Start-up reads what names the data, not the data.
    for blocks in [1, 256] {
        rows.push(start(folder().path(), args.snapshots / 10, blocks));
    }
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
    }
}

/// Merges a delta that changes runs of `run_kib` all over the disk; the base holds every second of them.
fn merge(args: &Args, folder: &Path, way: &str, run_kib: u64) -> Value {
    let runs = open(folder);
    let (disk, run_blocks) = (args.disk_gib << 30, run_kib * 1024 / BLOCK_BYTES);
    let count = args.delta_mib * 1024 / run_kib;
    let step = block_count(disk) / count;
    let places: Vec<_> = (0..count).map(|at| at * step).collect();
    let half: Vec<_> = places.iter().map(|at| at + at / step % 2 * (step / 2)).collect();
    let base = backup(&runs, disk, &half, run_blocks, 1);
    backup(&runs, disk, &places, run_blocks, 2);
    let copy = copy_and_sync(folder, args.delta_mib * MIB);
    let key = key();
    runs.trash(&key, &[base.backup], "bench", 0).unwrap();
    let (written, started) = (written_bytes(), Instant::now());
    let options = PurgeOptions { now_ms: i64::MAX, reserve_bytes: 0, copy: false };
    let report = runs.purge_due(&key, &options, &CancellationToken::new());
    let seconds = started.elapsed().as_secs_f64();
    let written_mib = (written_bytes() - written) as f64 / MIB as f64;
    assert_eq!((report.merged, report.waiting.len()), (1, 0), "{report:?}");
    let ratio = copy / seconds;
    println!(
        "merge {} MiB in runs of {run_kib} KiB into a base of {} GiB, {way}: {seconds:.2} s, {written_mib:.1} MiB written, \
         copy + sync of as much {copy:.2} s: {ratio:.2} of its speed",
        args.delta_mib, args.disk_gib
    );
    json!({
        "what": "merge", "way": way, "run_kib": run_kib, "delta_mib": args.delta_mib, "disk_gib": args.disk_gib,
        "seconds": seconds, "written_mib": written_mib, "copied_bytes": report.moved.copied_bytes,
        "shared_bytes": report.moved.shared_bytes, "copy_and_sync_seconds": copy, "of_copy_speed": ratio,
    })
}

/// How a disk changes between two backups.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// A hundredth in runs of 64 KiB all over the disk: in the end all of it lies in such pieces.
    Scattered,
    /// Half a hundredth in runs of 64 KiB in the same twentieth of the disk, and as much in one piece elsewhere.
    Mixed,
}

impl Change {
    fn what(self) -> &'static str {
        match self {
            Self::Scattered => "scattered changes",
            Self::Mixed => "mixed changes",
        }
    }

    /// First blocks of the runs of 16 blocks that link `link` changes.
    fn places(self, blocks: u64, link: u64) -> Vec<u64> {
        let runs = (blocks / 100 / 16).max(2);
        match self {
            Self::Scattered => {
                let step = blocks / runs;
                let within = link * 37 % (step - 16);
                (0..runs).map(|at| at * step + within).collect()
            }
            Self::Mixed => {
                let step = (blocks / 20 / (runs / 2)).max(16);
                let within = link * 7 % (step - 15);
                let fresh = blocks / 20 + link * 8 * runs % (blocks - blocks / 20 - 8 * runs);
                let hot = (0..runs / 2).map(|at| at * step + within);
                hot.chain((0..runs / 2).map(|at| fresh + at * 16)).collect()
            }
        }
    }
}

/// Reads a disk that changed by a hundredth with each link, from the whole chain and from its base; nothing is in the cache.
fn read(args: &Args, folder: &Path, change: Change) -> Vec<Value> {
    let runs = open(folder);
    let disk = args.read_mib * MIB;
    let blocks = block_count(disk);
    let all: Vec<_> = (0..blocks / 256).map(|at| at * 256).collect();
    let base = backup(&runs, disk, &all, 256, 1);
    let mut newest = base.clone();
    for link in 1..args.links {
        newest = backup(&runs, disk, &change.places(blocks, link), 16, link + 1);
    }
    let mut best = [f64::INFINITY; 2];
    for _ in 0..3 {
        for (best, run) in best.iter_mut().zip([&base, &newest]) {
            disk::forget(folder).unwrap();
            let opened = runs.open_snapshot(&runs.snapshot(run.snapshots[0].id).unwrap()).unwrap();
            *best = best.min(read_all(&opened, disk));
        }
    }
    let ([base, chain], mib, links) = (best, args.read_mib, args.links);
    println!(
        "read {mib} MiB from {links} links, {}: {chain:.2} s, from the base {base:.2} s: {:.2} of its speed",
        change.what(),
        base / chain
    );
    vec![
        json!({"what": "read", "change": change.what(), "links": links, "mib": mib, "seconds": chain, "base_seconds": base}),
    ]
}

/// Checks every block of a chain against its hash, beside `b3sum` of the same files.
fn verify(args: &Args, folder: &Path) -> Value {
    let runs = open(folder);
    let disk = args.read_mib * MIB;
    let all: Vec<_> = (0..block_count(disk) / 256).map(|at| at * 256).collect();
    let run = backup(&runs, disk, &all, 256, 1);
    let held = runs.snapshot(run.snapshots[0].id).unwrap();
    let image = runs.store().machine_folder(&key()).join(&held.snapshot().image);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (mut ours, mut sum) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..3 {
        disk::forget(folder).unwrap();
        let started = Instant::now();
        let pace = Limit::new(0, CancellationToken::new(), || false);
        let found = check_image(&runs, &held, Way::Anew(threads), &pace).unwrap();
        assert!(found.is_none(), "{found:?}");
        ours = ours.min(started.elapsed().as_secs_f64());
        disk::forget(folder).unwrap();
        let started = Instant::now();
        let said = std::process::Command::new("b3sum").arg(&image).output();
        assert!(said.expect("b3sum is installed").status.success());
        sum = sum.min(started.elapsed().as_secs_f64());
    }
    let speed = args.read_mib as f64 / ours;
    println!("verify {} MiB: {speed:.0} MiB/s, {:.2} of b3sum's speed", args.read_mib, sum / ours);
    json!({"what": "verify", "mib": args.read_mib, "seconds": ours, "b3sum_seconds": sum})
}

/// Opens a store with many snapshots, each with so much data.
fn start(folder: &Path, snapshots: u64, blocks: u64) -> Value {
    let runs = open(folder);
    let machines = snapshots.div_ceil(100);
    for snapshot in 0..snapshots {
        let machine = format!("machine{}", snapshot % machines);
        let key = MachineKey::new("user", &machine).unwrap();
        backup_of(&runs, &key, 64 * MIB, &[0], blocks, snapshot + 1);
    }
    drop(runs);
    disk::forget(folder).unwrap();
    let began = Instant::now();
    let runs = open(folder);
    let cold = began.elapsed().as_secs_f64();
    drop(runs);
    let began = Instant::now();
    let runs = open(folder);
    let warm = began.elapsed().as_secs_f64();
    let found: usize = runs.machines().iter().map(|machine| machine.snapshots().len()).sum();
    assert_eq!(found as u64, snapshots);
    let mib = snapshots * blocks * BLOCK_BYTES / MIB;
    println!(
        "start with {snapshots} snapshots of {machines} machines, {mib} MiB: {cold:.2} s, {warm:.2} s from the cache"
    );
    json!({"what": "start", "snapshots": snapshots, "mib": mib, "cold_seconds": cold, "warm_seconds": warm})
}

fn read_all(opened: &OpenedSnapshot, disk: u64) -> f64 {
    let (started, mut buffer) = (Instant::now(), janus_proto::buffers::Buffer::take());
    for segment in 0..segment_count(disk) {
        opened.tables.segment(segment).unwrap();
    }
    let (piece, mut ahead) = (buffer.len() as u64, opened.ahead());
    for at in (0..disk).step_by(piece as usize) {
        let len = (disk - at).min(piece) as usize;
        if at % SEGMENT_BYTES == 0 {
            ahead.segment(at / SEGMENT_BYTES + 1);
        }
        opened.read_at(at, &mut buffer[..len]).unwrap();
    }
    started.elapsed().as_secs_f64()
}

/// Backs up a disk of which the runs of blocks at `places` have changed.
fn backup(runs: &Runs, disk: u64, places: &[u64], run_blocks: u64, seed: u64) -> Arc<Run> {
    backup_of(runs, &key(), disk, places, run_blocks, seed)
}

fn backup_of(
    runs: &Runs,
    key: &MachineKey,
    disk: u64,
    places: &[u64],
    run_blocks: u64,
    seed: u64,
) -> Arc<Run> {
    let name = "disk".parse().unwrap();
    let wanted = WantedDisk { disk: name, size_bytes: disk, logical_sector_bytes: 512 };
    let open = runs.start(key, BackupId::new(), std::slice::from_ref(&wanted), 0).unwrap();
    let (session, epoch) = (open.sessions()[0].clone(), open.record().epoch);
    let writer = Writer::new(open.clone(), session.disk.session, epoch).unwrap();
    for some in places.chunks((256 / run_blocks).max(1) as usize) {
        let extents: Vec<_> = some
            .iter()
            .map(|first| Extent { first: *first, count: run_blocks, zero: false })
            .collect();
        let mut data = vec![0; some.len() * (run_blocks * BLOCK_BYTES) as usize];
        let mut random =
            blake3::Hasher::new().update(&(seed << 40 | some[0]).to_le_bytes()).finalize_xof();
        random.fill(&mut data);
        let mut hashes = Vec::new();
        hash_blocks(&data, &mut hashes);
        let hashes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
        let batch = Batch::new(disk, extents, Bytes::from(hashes), Bytes::from(data)).unwrap();
        writer.apply(Some(&batch), some[0]).unwrap();
    }
    let commit = CommitDisk {
        disk: wanted.disk,
        expected_head: session.disk.head,
        table_digest: table_digest(disk, &session.segment_digests().unwrap()),
        consistency: 0,
        skipped_bytes: 0,
    };
    runs.commit(key, open.backup, epoch, &[commit], b"").unwrap()
}

fn open(folder: &Path) -> Runs {
    let (store, machines) = Store::open(folder, true).unwrap();
    Runs::new(store, machines, Duration::from_secs(60))
}

fn key() -> MachineKey {
    MachineKey::new("user", "machine").unwrap()
}

/// Seconds that copying a file of so many bytes takes, with its sync.
fn copy_and_sync(folder: &Path, bytes: u64) -> f64 {
    let (from, to) = (folder.join("copy.from"), folder.join("copy.to"));
    let mut file = File::create(&from).unwrap();
    let mut random = blake3::Hasher::new().finalize_xof();
    let mut piece = vec![0; MIB as usize];
    for _ in 0..bytes / MIB {
        random.fill(&mut piece);
        file.write_all(&piece).unwrap();
    }
    file.sync_all().unwrap();
    let started = Instant::now();
    let mut source = File::open(&from).unwrap();
    let mut target = File::create(&to).unwrap();
    // Not fs::copy: it shares the blocks where it can.
    while let Ok(read @ 1..) = std::io::Read::read(&mut source, &mut piece) {
        target.write_all(&piece[..read]).unwrap();
    }
    target.sync_all().unwrap();
    let seconds = started.elapsed().as_secs_f64();
    fs::remove_file(from).unwrap();
    fs::remove_file(to).unwrap();
    seconds
}

/// Bytes that this process has caused to be written to disks.
fn written_bytes() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.unwrap().parse().unwrap()
}
