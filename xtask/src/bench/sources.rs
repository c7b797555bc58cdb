//! What clients read: the rows that show what a change journal saves, and how far reading and hashing are from what this
//! machine can do.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::limits::{self, Pages};
use crate::{
    disk,
    ntfs::{self, Library},
    packages::{self, Tool},
    site::{Client, Plan, Programs, Site, answers},
};

const GIB: u64 = 1 << 30;
const BARE: &str = "read with O_DIRECT";
/// Of full compares, warm and cold, each beside its limit.
const ROUNDS: u32 = 7;
const CLUSTER_BYTES: u64 = 4096;
/// The NTFS disk, and the files on it.
const NTFS_BYTES: u64 = 64 * GIB;
const FILES: u64 = 1024;
const FILE_BYTES: u64 = 4 << 20;
/// Files that are overwritten as a whole: 1 %.
const CHANGED: u64 = FILES / 100;
/// How many operations libntfs does between a mount and an unmount.
const AT_ONCE: u64 = 64;
const FIRST_USN: u64 = 1 << 18;
const OVERWRITE_CLOSE: u32 = 0x8000_0001;

#[derive(Serialize)]
struct Row {
    what: String,
    seconds: f64,
    read_bytes: u64,
    sent_bytes: u64,
    /// Of the client, for each GiB read.
    cpu_seconds_per_gib: Option<f64>,
    /// Time of this limit, divided by this row's.
    limit: Option<(String, f64)>,
}

pub(super) fn run(programs: &Programs, folder: &Path, bytes: u64, json: &Path) -> Result<()> {
    packages::require(&[Tool { program: "mkntfs", package: "ntfs-3g" }])?;
    fs::create_dir_all(folder)?;
    let work = tempfile::Builder::new().prefix("run-").tempdir_in(folder)?;
    let mut rows = plain(programs, work.path(), bytes)?;
    rows.extend(journal(programs, work.path())?);
    print(&rows);
    let report = json!({ "ntfs_bytes": NTFS_BYTES, "ntfs_file_bytes": FILES * FILE_BYTES, "plain_bytes": bytes, "rows": rows });
    fs::write(json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", json.display()))?;
    println!("\nfigures: {}", json.display());
    Ok(())
}

/// One client with one disk, and its server.
struct Bench {
    // Ends after the client.
    _site: Site,
    client: Client,
}

impl Bench {
    fn new(programs: &Programs, folder: &Path, disk: &Path) -> Result<Self> {
        let plan = Plan {
            servers: vec!["server-a".into()],
            janus: false,
            folder: Some(folder.to_owned()),
        };
        let site = Site::start(programs.clone(), &plan)?;
        let client = site.client("bench", &[format!("disk={}", disk.display())])?;
        Ok(Self { _site: site, client })
    }

    fn backup(&self, what: &str) -> Result<(Row, answers::Disk)> {
        let finished = self.client.run(&["backup", "--json"])?;
        let answer: answers::Backup = finished.answer()?;
        let taken = answer.disks.into_iter().next().context("no disk was backed up")?;
        let gib = taken.read_bytes as f64 / GIB as f64;
        let row = Row {
            what: what.to_owned(),
            seconds: finished.seconds,
            read_bytes: taken.read_bytes,
            sent_bytes: taken.sent_bytes,
            // Of less than that the start of the program is the most.
            cpu_seconds_per_gib: (gib > 1.0).then(|| finished.used.cpu_seconds / gib),
            limit: None,
        };
        Ok((row, taken))
    }
}

/// A disk of noise: nothing of it is a hole.
fn plain(programs: &Programs, work: &Path, bytes: u64) -> Result<Vec<Row>> {
    let image = work.join("plain.raw");
    disk::blank(&image, bytes)?;
    disk::write_noise(&image, 0..bytes, 1)?;
    File::open(&image)?.sync_all()?;
    let bench = Bench::new(programs, &work.join("plain"), &image)?;
    let (first, _) = bench.backup("first backup")?;
    let mut rows = vec![first];
    for round in 1..=ROUNDS {
        limits::read_all(&image)?;
        let limit = limits::timed(|| limits::hash_pieces(&image))?;
        rows.push(limit_row(&format!("read and hash, warm ({round})"), limit, bytes));
        let (mut row, _) = bench.backup(&format!("full compare, warm ({round})"))?;
        row.limit = Some(("read and hash".into(), limit / row.seconds));
        rows.push(row);
    }
    disk::forget(&image)?;
    // Disks of virtual machines save up what they are allowed while they are idle: the first to read gets that.
    limits::read_direct(&image, Pages::Small)?;
    for round in 1..=ROUNDS {
        let (mut row, _) = bench.backup(&format!("full compare, cold ({round})"))?;
        for (name, pages) in [(BARE, Pages::Small), ("the same into huge pages", Pages::Huge)] {
            let limit = limits::timed(|| limits::read_direct(&image, pages))?;
            rows.push(limit_row(&format!("{name}, cold ({round})"), limit, bytes));
            row.limit.get_or_insert((BARE.into(), limit / row.seconds));
        }
        rows.push(row);
    }
    fs::remove_file(image)?;
    let middle: Vec<_> = ["warm", "cold"].iter().filter_map(|what| middle(&rows, what)).collect();
    rows.extend(middle);
    Ok(rows)
}

/// The rounds of a kind in one row: a disk is half as fast in one round as in the next on shared machines.
fn middle(rows: &[Row], what: &str) -> Option<Row> {
    let what = format!("full compare, {what}");
    let rounds: Vec<_> = rows.iter().filter(|row| row.what.starts_with(&what)).collect();
    let of = |figure: &dyn Fn(&Row) -> Option<f64>| {
        let mut figures: Vec<_> = rounds.iter().filter_map(|row| figure(row)).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied()
    };
    let name = rounds.first()?.limit.as_ref()?.0.clone();
    Some(Row {
        what: format!("{what} (median)"),
        seconds: of(&|row| Some(row.seconds))?,
        read_bytes: rounds.first()?.read_bytes,
        sent_bytes: 0,
        cpu_seconds_per_gib: of(&|row| row.cpu_seconds_per_gib),
        limit: Some((name, of(&|row| row.limit.as_ref().map(|(_, ratio)| *ratio))?)),
    })
}

fn limit_row(what: &str, seconds: f64, bytes: u64) -> Row {
    let what = what.to_owned();
    Row { what, seconds, read_bytes: bytes, sent_bytes: 0, cpu_seconds_per_gib: None, limit: None }
}

/// An NTFS volume with a change journal, and what of it changes.
struct Volume {
    library: Library,
    image: PathBuf,
    files: Vec<u64>,
    usn: u64,
    lsn: u64,
}

impl Volume {
    fn new(image: PathBuf) -> Result<Self> {
        ntfs::format(&image, NTFS_BYTES, CLUSTER_BYTES)?;
        let (library, files) = (Library::start()?, Vec::new());
        let mut volume = Self { library, image, files, usn: FIRST_USN, lsn: 1 << 20 };
        volume.change(&[json!(["journal", 1, FIRST_USN])])?;
        for from in (0..FILES).step_by(AT_ONCE as usize) {
            let make = |file| json!(["write", format!("/f{file}"), 0, FILE_BYTES, file, true]);
            let made: Vec<_> = (from..from + AT_ONCE).map(make).collect();
            let answers = volume.change(&made)?;
            volume.files.extend(answers.iter().filter_map(serde_json::Value::as_u64));
        }
        ensure!(volume.files.len() as u64 == FILES, "not all files were made");
        let all: Vec<_> = (0..FILES).collect();
        volume.record(&all)?;
        Ok(volume)
    }

    fn change(&mut self, operations: &[serde_json::Value]) -> Result<Vec<serde_json::Value>> {
        self.lsn += 100;
        let clusters = (NTFS_BYTES - 512) / CLUSTER_BYTES;
        let log = (self.lsn, true);
        Ok(self.library.change(&self.image, clusters, operations, log)?.answers)
    }

    fn record(&mut self, files: &[u64]) -> Result<()> {
        let record = |file: &u64| (self.files[*file as usize], OVERWRITE_CLOSE);
        let records: Vec<_> = files.iter().map(record).collect();
        let answers = self.change(&[json!(["records", self.usn, records])])?;
        self.usn = answers.first().and_then(serde_json::Value::as_u64).context("no position")?;
        Ok(())
    }

    /// Overwrites 1 % of the files, those after `first`.
    fn overwrite(&mut self, first: u64) -> Result<()> {
        let files: Vec<_> = (first..first + CHANGED).collect();
        let write = |file: &u64| {
            json!(["write", format!("/f{file}"), 0, FILE_BYTES, file + 7 * FILES, false])
        };
        let operations: Vec<_> = files.iter().map(write).collect();
        self.change(&operations)?;
        self.record(&files)
    }
}

fn journal(programs: &Programs, work: &Path) -> Result<Vec<Row>> {
    let image = work.join("ntfs.raw");
    let mut volume = Volume::new(image.clone())?;
    let mut bench = Bench::new(programs, &work.join("ntfs"), &volume.image)?;
    let (first, _) = bench.backup("NTFS: first backup")?;
    let mut rows = vec![first];
    let mut measure = |bench: &mut Bench, what: &str, believe: bool| -> Result<()> {
        bench.client.settings.set("full_compare_runs", if believe { 0 } else { 1 });
        disk::forget(&image)?;
        let (row, taken) = bench.backup(&format!("NTFS: {what}"))?;
        let full = taken.reading["full_compare"].as_str();
        let heard = &taken.reading["journals"][0]["full_compare"];
        ensure!((full.is_none() && heard.is_null()) == believe, "{what}: {}", taken.reading);
        rows.push(row);
        Ok(())
    };
    measure(&mut bench, "unchanged, full compare", false)?;
    measure(&mut bench, "unchanged, by the journal", true)?;
    volume.overwrite(0)?;
    measure(&mut bench, "1 % changed, by the journal", true)?;
    volume.overwrite(CHANGED)?;
    measure(&mut bench, "1 % changed, full compare", false)?;
    Ok(rows)
}

fn print(rows: &[Row]) {
    println!(
        "{:<34} {:>8} {:>9} {:>9} {:>7} {:>9}  limit",
        "what", "s", "MiB read", "MiB sent", "MiB/s", "CPU s/GiB"
    );
    for row in rows {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let cpu = row.cpu_seconds_per_gib.map_or(String::new(), |cpu| format!("{cpu:.2}"));
        let limit = row
            .limit
            .as_ref()
            .map_or(String::new(), |(name, ratio)| format!("{ratio:.2} of {name}"));
        println!(
            "{:<34} {:>8.2} {:>9.0} {:>9.0} {:>7.0} {cpu:>9}  {limit}",
            row.what,
            row.seconds,
            mib(row.read_bytes),
            mib(row.sent_bytes),
            mib(row.read_bytes) / row.seconds
        );
    }
}
