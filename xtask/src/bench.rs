//! `cargo xtask bench`: speed, CPU time and memory of real processes on one machine, beside the limits of that machine.
//!
//! All rows of a run use the same image. Figures of different runs don't compare: the image is made of this machine's
//! programs, and other work on the machine counts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::{
    disk,
    packages::{self, Tool},
    site::{Profile, Programs, cargo, target, workspace},
};

mod chains;
mod hostile;
mod janus;
mod limits;
mod nbd;
mod networks;
mod peers;
mod proxies;
mod restores;
mod seeding;
mod sources;

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the disk
    #[arg(long, default_value_t = 8192)]
    size_mib: u64,
    /// Other programs to run on the same image: borg, restic, rustic
    #[arg(long, value_delimiter = ',')]
    against: Vec<peers::Peer>,
    /// Where to write the figures; default: target/bench/bench.json
    #[arg(long)]
    json: Option<PathBuf>,
    /// Janus as a proxy only, beside a byte copier, nginx and HAProxy
    #[arg(long, conflicts_with_all = ["against", "encoding", "size_mib"])]
    proxies: bool,
    /// With --proxies: how often each way is measured; the best counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The store alone: merges with and without shared blocks, reads through long chains
    #[arg(long, conflicts_with_all = ["against", "encoding", "size_mib", "proxies"])]
    store: bool,
    /// What clients read: an NTFS disk with and without its change journal, a large image from memory and from the disk
    #[arg(long, conflicts_with_all = ["against", "encoding", "proxies", "store"])]
    sources: bool,
    /// The clients' hash cache alone, beside a flat file
    #[arg(long, conflicts_with_all = ["against", "encoding", "size_mib", "proxies", "store", "sources"])]
    cache: bool,
    /// Sealing alone, on one core, beside hashing
    #[arg(long, conflicts_with_all = ["against", "encoding", "size_mib", "proxies", "store", "sources", "cache"])]
    seal: bool,
    /// Networks: URLs that lead nowhere, packing on slow lines; needs root
    #[arg(long, conflicts_with_all = ["against", "encoding", "size_mib", "proxies", "store", "sources"])]
    networks: bool,
    /// A snapshot served over NBD, beside the same disk served by qemu-nbd; of a disk of at most 2048 MiB
    #[arg(long, conflicts_with_all = ["against", "encoding", "proxies", "store", "sources", "cache", "networks", "restore"])]
    nbd: bool,
    /// A new server seeded from another one, beside rsync of the same files over TLS; of a disk of at most 2048 MiB
    #[arg(long, conflicts_with_all = ["against", "encoding", "proxies", "store", "sources", "cache", "networks", "nbd", "restore"])]
    seeding: bool,
    /// Restores only: whole and 1 % back, from one and two servers, beside a copy and, with --against, other programs
    #[arg(long, conflicts_with_all = ["proxies", "store", "sources", "cache", "networks"])]
    restore: bool,
    /// A good backup beside floods of frames by a machine with a valid certificate
    #[arg(long, conflicts_with_all = ["against", "encoding", "size_mib", "proxies", "store", "sources", "cache", "networks", "nbd", "seeding", "restore"])]
    hostile: bool,
    /// How clients pack blocks: auto, none, lz4 or zstd
    #[arg(long, default_value = "none")]
    encoding: String,
}

/// One measured operation.
#[derive(Debug, Clone, Serialize)]
struct Row {
    /// `janus`, `direct`, a peer or `limit`.
    who: String,
    what: String,
    seconds: f64,
    /// MiB of the disk in a second.
    disk_mib_per_second: f64,
    /// CPU seconds for each GiB of the disk, by process.
    cpu_seconds_per_gib: Vec<(String, f64)>,
    peak_rss_mib: Vec<(String, u64)>,
    /// Time of the limit named here, divided by this row's: 1.0 is as fast as this machine can.
    limit: Option<(String, f64)>,
    /// Bytes that janus says it forwarded meanwhile, in both directions: proof of the path.
    through_janus_bytes: Option<u64>,
    /// Bytes the store grew by.
    stored_bytes: Option<u64>,
}

/// The images of a run: as it is first, and with 1 % changed.
struct Images {
    base: PathBuf,
    changed: PathBuf,
    bytes: u64,
}

impl Images {
    fn gib(&self) -> f64 {
        self.bytes as f64 / f64::from(1 << 30)
    }

    /// A row with the figures that follow from time and disk size.
    fn row(&self, who: &str, what: &str, seconds: f64) -> Row {
        Row {
            who: who.to_owned(),
            what: what.to_owned(),
            seconds,
            disk_mib_per_second: self.gib() * 1024.0 / seconds,
            cpu_seconds_per_gib: Vec::new(),
            peak_rss_mib: Vec::new(),
            limit: None,
            through_janus_bytes: None,
            stored_bytes: None,
        }
    }
}

/// Measures and prints.
///
/// # Errors
/// When a program fails, or restores something else than was backed up.
pub fn run(args: &Args) -> Result<()> {
    packages::require(packages::DISK_TOOLS)?;
    if args.store {
        return store(args);
    }
    if args.cache {
        return of_client(args, "cache");
    }
    if args.seal {
        return of_client(args, "seal");
    }
    let folder = target().join("bench");
    if args.hostile {
        fs::create_dir_all(&folder)?;
        return hostile::run(&args.json.clone().unwrap_or_else(|| folder.join("hostile.json")));
    }
    if args.networks {
        fs::create_dir_all(&folder)?;
        let json = args.json.clone().unwrap_or_else(|| folder.join("networks.json"));
        return networks::run(&Programs::built_or(Profile::Release)?, &json);
    }
    if args.nbd {
        let json = args.json.clone().unwrap_or_else(|| folder.join("nbd.json"));
        let programs = Programs::built_or(Profile::Release)?;
        return nbd::run(&programs, &folder, args.size_mib.min(2048) << 20, &json);
    }
    if args.seeding {
        let json = args.json.clone().unwrap_or_else(|| folder.join("seeding.json"));
        let programs = Programs::built_or(Profile::Release)?;
        return seeding::run(&programs, &folder, args.size_mib.min(2048) << 20, &json);
    }
    let programs = Programs::built_or(Profile::Release)?;
    if args.proxies {
        fs::create_dir_all(&folder)?;
        let json = args.json.clone().unwrap_or_else(|| folder.join("proxies.json"));
        return proxies::run(&programs, args.rounds, &json);
    }
    if args.sources {
        let json = args.json.clone().unwrap_or_else(|| folder.join("sources.json"));
        return sources::run(&programs, &folder, args.size_mib << 20, &json);
    }
    let images = images(&folder, args.size_mib)?;
    let work = tempfile::Builder::new().prefix("run-").tempdir_in(&folder)?;
    let mut rows = match args.restore {
        true => restores::measure(&programs, &images, work.path(), &args.encoding)?,
        false => both_ways(&programs, &images, work.path(), &args.encoding)?,
    };
    for peer in &args.against {
        rows.extend(peers::measure(*peer, &images, work.path())?);
    }
    print(&images, &rows);
    let name = if args.restore { "restores.json" } else { "bench.json" };
    let json = args.json.clone().unwrap_or_else(|| folder.join(name));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let report = serde_json::json!({"disk_bytes": images.bytes, "cores": cores, "encoding": args.encoding, "rows": rows});
    fs::write(&json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", json.display()))?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

/// Through janus and straight to the server, beside what the machine can do.
fn both_ways(
    programs: &Programs,
    images: &Images,
    work: &Path,
    encoding: &str,
) -> Result<Vec<Row>> {
    let limits = limits::measure(images, work)?;
    let mut rows = limits.rows.clone();
    for through_janus in [true, false] {
        rows.extend(janus::measure(programs, images, work, through_janus, encoding, &limits)?);
    }
    Ok(rows)
}

/// Restores through a long chain, then `server/examples/bench_store.rs`: it needs no other process.
fn store(args: &Args) -> Result<()> {
    packages::require(&[Tool { program: "b3sum", package: "b3sum" }])?;
    let place = target().join("bench");
    fs::create_dir_all(&place)?;
    let json = args.json.clone().unwrap_or_else(|| place.join("store.json"));
    let work = tempfile::Builder::new().prefix("run-").tempdir_in(&place)?;
    let restore = chains::measure(&Programs::built_or(Profile::Release)?, work.path())?;
    drop(work);
    measure_by("bench_store", &place, &json)?;
    let mut rows: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(&json)?)?;
    rows.push(restore);
    fs::write(&json, serde_json::to_vec_pretty(&rows)?)?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

/// `client/examples/bench_NAME.rs`.
fn of_client(args: &Args, name: &str) -> Result<()> {
    let place = target().join("bench");
    fs::create_dir_all(&place)?;
    let json = args.json.clone().unwrap_or_else(|| place.join(format!("{name}.json")));
    measure_by(&format!("bench_{name}"), &place, &json)?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

/// Runs an example. Without `-p`: with the features of the whole workspace it is built already.
fn example(name: &str) -> Command {
    let mut command = cargo();
    command.args(["run", "--release", "--quiet", "--example", name]);
    command
}

/// Runs an example that measures a library.
fn measure_by(name: &str, place: &Path, json: &Path) -> Result<()> {
    let mut command = example(name);
    command.arg("--").arg("--place").arg(place).arg("--json").arg(json);
    ensure!(command.status()?.success(), "the measurement failed");
    Ok(())
}

/// Makes the images once for each size; `make_disk.sh` takes minutes.
fn images(folder: &std::path::Path, size_mib: u64) -> Result<Images> {
    let place = folder.join(format!("disk-{size_mib}"));
    let images = Images {
        base: place.join("base.img"),
        changed: place.join("v1.img"),
        bytes: size_mib << 20,
    };
    let done = place.join("done");
    if !done.exists() {
        fs::create_dir_all(&place)?;
        println!("making the disk in {} (once)", place.display());
        let script = workspace().join("xtask/assets/make_disk.sh");
        let mut make = Command::new("bash");
        make.arg(script).arg("-o").arg(&place).args(["-s", &size_mib.to_string()]);
        packages::output(&mut make)
            .context("make_disk.sh (needs e2fsprogs, gdisk, python3, openssl)")?;
        fs::write(done, "")?;
    }
    ensure!(
        fs::metadata(&images.base)?.len() == images.bytes,
        "{} has another size",
        images.base.display()
    );
    Ok(images)
}

/// A disk of noise in a new folder below `folder`, which goes when it is dropped.
fn noise_disk(folder: &Path, bytes: u64) -> Result<(tempfile::TempDir, PathBuf)> {
    fs::create_dir_all(folder)?;
    let work = tempfile::Builder::new().prefix("run-").tempdir_in(folder)?;
    let image = work.path().join("disk.raw");
    disk::blank(&image, bytes)?;
    disk::write_noise(&image, 0..bytes, 1)?;
    Ok((work, image))
}

fn print(images: &Images, rows: &[Row]) {
    println!(
        "\n{:.1} GiB disk; CPU in seconds for each GiB of it; memory is the peak in MiB",
        images.gib()
    );
    let head = ("who", "what", "s", "MiB/s", "limit", "CPU s/GiB", "peak MiB");
    println!(
        "{:<7} {:<26} {:>7} {:>7} {:>6}  {:<38} {}",
        head.0, head.1, head.2, head.3, head.4, head.5, head.6
    );
    for row in rows {
        let limit = row.limit.as_ref().map_or(String::new(), |(_, ratio)| format!("{ratio:.2}"));
        let cpu: Vec<_> = row
            .cpu_seconds_per_gib
            .iter()
            .map(|(name, value)| format!("{name} {value:.2}"))
            .collect();
        let rss: Vec<_> =
            row.peak_rss_mib.iter().map(|(name, value)| format!("{name} {value}")).collect();
        println!(
            "{:<7} {:<26} {:>7.2} {:>7.0} {limit:>6}  {:<38} {}",
            row.who,
            row.what,
            row.seconds,
            row.disk_mib_per_second,
            cpu.join(", "),
            rss.join(", ")
        );
    }
}

/// Compares a restore with what it should be.
fn assert_equal(images: &Images, restored: &std::path::Path, changed: bool) -> Result<()> {
    disk::compare(if changed { &images.changed } else { &images.base }, restored)
}
