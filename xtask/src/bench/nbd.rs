//! `--nbd`: a snapshot served by `janus-client nbd` beside the same disk as a raw file, served by `qemu-nbd`.
//!
//! The raw file and the server's images are read once before, so they are in this machine's memory as far as they fit. Ours comes from a server through
//! janus over TLS, or past it, and is compared with its hashes; qemu-nbd only copies. "Near" is what the export has in its memory.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use crate::{
    disk,
    noise::Noise,
    packages::{self, Tool},
    site::{Plan, Programs, Running, Site},
};

mod load;

use load::Load;

const MIB: u64 = 1 << 20;
/// Read before random reads of it are measured: fits in the export's memory.
const NEAR: u64 = 64 * MIB;
const RANDOM_TIME: Duration = Duration::from_secs(4);
/// Of each; the best of both counts.
const ROUNDS: usize = 2;

#[derive(Serialize)]
struct Row {
    what: String,
    unit: &'static str,
    janus: f64,
    qemu_nbd: f64,
    ratio: f64,
}

pub(super) fn run(programs: &Programs, folder: &Path, bytes: u64, json: &Path) -> Result<()> {
    packages::require(&[
        Tool { program: "qemu-nbd", package: "qemu-utils" },
        Tool { program: "nbdcopy", package: "libnbd-bin" },
    ])?;
    let (work, image) = super::noise_disk(folder, bytes)?;
    let plan = Plan {
        servers: vec!["server-a".into()],
        janus: true,
        folder: Some(work.path().join("site")),
    };
    let site = Site::start(programs.clone(), &plan)?;
    let mut client = site.client("bench", &[format!("disk={}", image.display())])?;
    site.await_ready(&client)?;
    client.backup()?;
    cache(&image)?;
    cache(&work.path().join("site"))?;
    let theirs = QemuNbd::start(&image, &work.path().join("qemu.sock"))?;
    let mut rows = Vec::new();
    for (way, direct) in [("through janus", "never"), ("direct", "prefer")] {
        client.settings.set("direct", direct);
        for connections in [4, 1] {
            let (mut ours, mut qemu) = (0f64, 0f64);
            for _ in 0..ROUNDS {
                // Anew each time: nothing is in its memory.
                let export = Ours::start(&client, &work.path().join("ours.sock"))?;
                ours = ours.max(copy(&export.uri, connections, bytes)?);
                qemu = qemu.max(copy(&theirs.uri, connections, bytes)?);
            }
            let what = format!("sequential {way}, connections: {connections}");
            rows.push(row(&what, "MiB/s", ours, qemu));
        }
    }
    let export = Ours::start(&client, &work.path().join("ours.sock"))?;
    for (what, range) in [("near", NEAR), ("anywhere", bytes)] {
        if what == "near" {
            load::read_all(&export.socket, NEAR)?;
        }
        for depth in [1, 16] {
            let (mut ours, mut qemu) = (0f64, 0f64);
            for round in 0..ROUNDS {
                let seed = round as u64 + 1;
                ours = ours.max(random(&export.socket, depth, range, seed)?);
                qemu = qemu.max(random(&theirs.socket, depth, range, seed)?);
            }
            rows.push(row(&format!("random 4 KiB {what}, depth {depth}"), "reads/s", ours, qemu));
        }
    }
    print(bytes, &rows);
    let report = json!({ "disk_bytes": bytes, "near_bytes": NEAR, "rows": rows });
    fs::write(json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", json.display()))?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

/// Has the system keep what is in a file, or in all below a folder.
fn cache(path: &Path) -> Result<()> {
    for path in disk::files_below(path)? {
        std::io::copy(&mut fs::File::open(path)?, &mut std::io::sink())?;
    }
    Ok(())
}

fn row(what: &str, unit: &'static str, janus: f64, qemu_nbd: f64) -> Row {
    Row { what: what.to_owned(), unit, janus, qemu_nbd, ratio: janus / qemu_nbd }
}

fn print(bytes: u64, rows: &[Row]) {
    println!("\n{} MiB of noise, served over a Unix socket", bytes / MIB);
    println!("{:<42} {:>8} {:>9} {:>9} {:>6}", "what", "unit", "janus", "qemu-nbd", "ratio");
    for row in rows {
        println!(
            "{:<42} {:>8} {:>9.0} {:>9.0} {:>6.2}",
            row.what, row.unit, row.janus, row.qemu_nbd, row.ratio
        );
    }
}

/// Copies all to nowhere; MiB in a second.
fn copy(uri: &str, connections: u32, bytes: u64) -> Result<f64> {
    let started = Instant::now();
    let mut command = Command::new("nbdcopy");
    packages::output(command.arg(format!("--connections={connections}")).args([uri, "null:"]))?;
    Ok((bytes / MIB) as f64 / started.elapsed().as_secs_f64())
}

/// Reads blocks of `0..range`, `depth` at a time; reads in a second.
fn random(socket: &Path, depth: u64, range: u64, seed: u64) -> Result<f64> {
    let mut load = Load::connect(socket)?;
    let mut noise = Noise::new(seed);
    let mut next = || noise.below(range / 4096) * 4096;
    for _ in 0..depth {
        load.ask(next())?;
    }
    let started = Instant::now();
    let mut done = 0u64;
    while started.elapsed() < RANDOM_TIME {
        load.take()?;
        done += 1;
        load.ask(next())?;
    }
    Ok(done as f64 / started.elapsed().as_secs_f64())
}

/// Our export, until it is dropped.
struct Ours {
    running: Option<Running>,
    socket: std::path::PathBuf,
    uri: String,
}

impl Ours {
    fn start(client: &crate::site::Client, socket: &Path) -> Result<Self> {
        let place = socket.to_string_lossy();
        let running = client.start(&["nbd", "disk", "--socket", &place])?;
        await_socket(socket)?;
        let uri = format!("nbd+unix:///?socket={place}");
        Ok(Self { running: Some(running), socket: socket.to_owned(), uri })
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.interrupt();
            let _ = running.wait();
        }
    }
}

struct QemuNbd {
    child: Child,
    socket: std::path::PathBuf,
    uri: String,
}

impl QemuNbd {
    fn start(image: &Path, socket: &Path) -> Result<Self> {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--read-only", "--format=raw", "--shared=16", "--socket"]);
        let child = command.arg(socket).arg(image).spawn().context("start qemu-nbd")?;
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let started = Self { child, socket: socket.to_owned(), uri };
        await_socket(socket)?;
        Ok(started)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn await_socket(socket: &Path) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        ensure!(Instant::now() < until, "nobody listens at {}", socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
