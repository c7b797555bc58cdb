//! `cargo xtask demo`: the whole idea in one minute, each step checked.
//!
//! Two servers and a janus run as processes on loopback with mutual TLS. A real disk is backed up to both in turn, a
//! server dies, backups go on, the newest state is restored and compared, the server comes back.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    disk::{self, Blocks},
    noise::Noise,
    site::{Client, Plan, Profile, Programs, Site, answers},
};

mod place;
mod steps;

use place::Place;
use steps::Steps;

const A: &str = "server-a";
const B: &str = "server-b";
const DISK: &str = "disk";
const MIB: u64 = 1 << 20;

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Disk or image to use; it is only read, changes go to a copy
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Size of the disk that is made when none is given
    #[arg(long, default_value_t = 256)]
    size_mib: u64,
    /// Folder for everything, kept afterwards; by default target/demo, emptied first
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of the story
    #[arg(long)]
    json: bool,
    /// Seed of the changes, to repeat a run
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs the demo.
///
/// # Errors
/// When a step fails; the story or the JSON object says which.
pub fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    let seed = args.seed.unwrap_or_else(Noise::fresh_seed);
    let mut steps = Steps::new(args.json);
    let result = tell(args, seed, &mut steps);
    let ok = result.is_ok();
    if args.json {
        let error = result.as_ref().err().map(|error| format!("{error:#}"));
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{}",
            json!({"ok": ok, "seed": seed, "seconds": seconds, "error": error, "steps": steps.done})
        );
    } else if ok {
        println!("\nEverything held, in {:.0} s. (seed {seed})", started.elapsed().as_secs_f64());
    } else {
        println!("\nA step failed (repeat with --seed {seed}).");
    }
    result
}

fn tell(args: &Args, seed: u64, steps: &mut Steps) -> Result<()> {
    let programs = steps
        .step("build the programs", || Ok((Programs::built_or(Profile::Dev)?, String::new())))?;
    let place = Place::take(args.dir.as_deref())?;
    let plan = Plan { folder: Some(place.folder.clone()), ..Plan::default() };
    let mut site = steps.step("make keys, start two servers and a janus", || {
        let site = Site::start(programs, &plan)?;
        let said = format!("mutual TLS on {}", site.url());
        Ok((site, said))
    })?;
    let mut story = steps.step("make the disk", || Story::begin(args, &site, seed))?;
    site.await_ready(&story.client)?;
    story.turns(&mut site, steps)?;
    story.loss(&mut site, steps)?;
    story.return_of_a(&mut site, steps)?;
    if !args.json {
        story.farewell(&site);
    }
    Ok(())
}

/// The disk, and what each server has not seen of it.
struct Story {
    client: Client,
    disk: PathBuf,
    size_bytes: u64,
    noise: Noise,
    missed_by_a: Blocks,
    missed_by_b: Blocks,
    last_image: [Option<String>; 2],
}

impl Story {
    fn begin(args: &Args, site: &Site, seed: u64) -> Result<(Self, String)> {
        let path = site.folder().join("disk.raw");
        match &args.disk {
            Some(from) => {
                disk::copy(from, &path).with_context(|| format!("copy {}", from.display()))?
            }
            None => disk::make(&path, args.size_mib * MIB, seed)?,
        }
        let size_bytes = std::fs::metadata(&path)?.len();
        let mut client = site.client("laptop", &[format!("{DISK}={}", path.display())])?;
        client.show_progress();
        let said = format!("{}, {} of data", mib(size_bytes), mib(disk::data_bytes(&path)?));
        let story = Self {
            client,
            disk: path,
            size_bytes,
            noise: Noise::new(seed),
            missed_by_a: Blocks::new(),
            missed_by_b: Blocks::new(),
            last_image: [None, None],
        };
        Ok((story, said))
    }

    /// Backups 1 to 3: full on A, full on B, then a delta on A.
    fn turns(&mut self, site: &mut Site, steps: &mut Steps) -> Result<()> {
        steps.step("backup 1: a first full one, to A", || self.full(site, A))?;
        let changed = self.change()?;
        steps
            .step(&format!("{changed} change; backup 2: B's turn, full",), || self.full(site, B))?;
        let changed = self.change()?;
        steps.step(
            &format!("{changed} change; backup 3: A's turn, only what A has not seen"),
            || {
                let backup = self.delta(site, A)?;
                ensure!(
                    backup.skipped.is_empty(),
                    "a server was passed over: {:?}",
                    backup.skipped
                );
                Ok(((), describe(&backup)))
            },
        )
    }

    /// A dies; backups 4 and 5 go to B; list and restore.
    fn loss(&mut self, site: &mut Site, steps: &mut Steps) -> Result<()> {
        steps.step("server A is killed; backup 4: B's turn anyway", || {
            site.kill_server(A)?;
            let backup = self.delta(site, B)?;
            Ok(((), describe(&backup)))
        })?;
        let changed = self.change()?;
        steps.step(
            &format!("{changed} change; backup 5: A's turn, but A is down: B again"),
            || {
                let backup = self.delta(site, B)?;
                let skipped = backup.skipped.iter().find(|skipped| skipped.server == A);
                let skipped = skipped.context("the answer does not say that A was passed over")?;
                let said = format!("{}; {A} passed over: {}", describe(&backup), skipped.reason);
                Ok(((), said))
            },
        )?;
        steps.step("list: both servers' snapshots, A marked as unreachable", || self.list())?;
        steps.step("restore the newest, compare byte by byte", || self.restore("restored.raw"))
    }

    /// A is back; backup 6 brings it all it has missed.
    fn return_of_a(&mut self, site: &mut Site, steps: &mut Steps) -> Result<()> {
        let changed = self.change()?;
        steps.step(
            &format!("A is started again, {changed} change; backup 6: A, all that it has missed"),
            || {
                site.start_server(A)?;
                site.await_ready(&self.client)?;
                let backup = self.delta(site, A)?;
                Ok(((), describe(&backup)))
            },
        )?;
        steps.step("restore from A, compare byte by byte", || self.restore("restored-from-a.raw"))
    }

    /// Changes 1 % of the disk; both servers have not seen that.
    fn change(&mut self) -> Result<String> {
        let changed = disk::change(&self.disk, self.size_bytes / 100, self.noise.number())?;
        self.missed_by_a.extend(&changed);
        self.missed_by_b.extend(&changed);
        Ok(mib(changed.len() as u64 * 4096))
    }

    fn full(&mut self, site: &mut Site, server: &str) -> Result<((), String)> {
        let expected = disk::data_bytes(&self.disk)?;
        let backup = self.backup(site, server)?;
        let taken = &backup.disks[0];
        ensure!(taken.kind == "full", "expected a full backup: {taken:?}");
        ensure!(
            taken.sent_bytes == expected,
            "sent {} bytes, the disk has {expected}",
            taken.sent_bytes
        );
        Ok(((), describe(&backup)))
    }

    fn delta(&mut self, site: &mut Site, server: &str) -> Result<answers::Backup> {
        let missed =
            if server == A { self.missed_by_a.len() } else { self.missed_by_b.len() } as u64;
        let backup = self.backup(site, server)?;
        let taken = &backup.disks[0];
        ensure!(taken.kind == "delta", "expected a delta: {taken:?}");
        ensure!(
            taken.sent_bytes == missed * 4096,
            "sent {} bytes, {server} had missed {missed} blocks = {} bytes",
            taken.sent_bytes,
            missed * 4096
        );
        // What isn't data: header, tables and bitmaps of the format, of which a few MiB are holes.
        let limit = missed * 4096 + 2 * MIB + self.size_bytes / 1000;
        ensure!(
            taken.image_allocated_bytes <= limit,
            "the image takes {} bytes, over {limit}",
            taken.image_allocated_bytes
        );
        Ok(backup)
    }

    fn backup(&mut self, site: &mut Site, server: &str) -> Result<answers::Backup> {
        let backup = self.client.backup()?;
        ensure!(backup.server == server, "went to {}, not {server}: {backup:?}", backup.server);
        ensure!(
            backup.disks.len() == 1 && backup.disks[0].size_bytes == self.size_bytes,
            "wrong disks: {backup:?}"
        );
        let image = site.server(server)?.images().join(&backup.disks[0].image);
        ensure!(disk::allocated_bytes(&image)? > 0, "{} is empty", image.display());
        if server == A {
            self.missed_by_a.clear();
            self.last_image[0] = Some(image.display().to_string());
        } else {
            self.missed_by_b.clear();
            self.last_image[1] = Some(image.display().to_string());
        }
        Ok(backup)
    }

    fn list(&self) -> Result<((), String)> {
        let list = self.client.list()?;
        let count = |server: &str| list.snapshots.iter().filter(|s| s.server == server).count();
        ensure!(
            count(A) == 2 && count(B) == 3,
            "expected 2 snapshots of A and 3 of B: {:?}",
            list.snapshots
        );
        ensure!(list.snapshots[0].server == B, "the newest is not B's: {:?}", list.snapshots[0]);
        let marks_fit = list.snapshots.iter().all(|s| s.reachable == (s.server == B));
        ensure!(marks_fit, "reachable marks are wrong: {:?}", list.snapshots);
        let unreachable = list
            .unreachable
            .iter()
            .find(|u| u.server == A)
            .context("A is not listed as unreachable")?;
        Ok(((), format!("{B}: 3, {A}: 2, unreachable ({})", unreachable.reason)))
    }

    fn restore(&self, name: &str) -> Result<((), String)> {
        let to = self.disk.with_file_name(name);
        let restored = self.client.restore(DISK, &to)?;
        disk::compare(&self.disk, &to)?;
        let said = format!("{} from {}: equal", mib(restored.size_bytes), restored.server);
        Ok(((), said))
    }

    fn farewell(&self, site: &Site) {
        let images: Vec<_> = self.last_image.iter().flatten().collect();
        println!("\nKept in {}. Newest images:", site.folder().display());
        for image in &images {
            println!("  {image}");
        }
        println!(
            "Look at them without this software (the newest file of a chain finds its parents itself):"
        );
        for image in images {
            println!("  7z x -so -tVHDX '{image}' | sha256sum");
        }
        println!(
            "  qemu-img info IMAGE   (bases, the first image of each folder; qemu does not read VHDX children)"
        );
    }
}

/// The default folder, without what an earlier demo left there.
fn describe(backup: &answers::Backup) -> String {
    let disk = &backup.disks[0];
    let (sent, stored) = (mib(disk.sent_bytes), mib(disk.image_allocated_bytes));
    format!(
        "{} to {}: {sent} sent, image {stored}, {:.1} s",
        disk.kind, backup.server, backup.seconds
    )
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}
