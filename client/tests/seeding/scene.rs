//! A machine, a server that has its backups, and a new one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

pub const MIB: u64 = 1 << 20;
pub const OLD: &str = "server-a";
pub const NEW: &str = "server-b";
pub const MACHINE: &str = "alice/machine";

pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

pub fn done(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    json(output)
}

/// A machine with a disk of 64 MiB, 40 of them with data, two backups at the old server, and a new server that has just
/// been started.
pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub disk: PathBuf,
    /// Of the new server.
    pub images: PathBuf,
}

impl Scene {
    pub fn new() -> Self {
        let plan = Plan { servers: vec![OLD.into(), NEW.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        site.start_server(OLD).unwrap();
        site.start_janus().unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, 64 * MIB).unwrap();
        disk::write_noise(&disk, 0..40 * MIB, 1).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        client.backup().unwrap();
        disk::write_noise(&disk, 8 * MIB..11 * MIB, 2).unwrap();
        client.backup().unwrap();
        site.start_server(NEW).unwrap();
        site.await_ready(&client).unwrap();
        let images = site.server(NEW).unwrap().images().to_owned();
        Self { site, client, disk, images }
    }

    pub fn seed(&self, more: &[&str]) -> Output {
        let arguments = [&["seed", "--json"][..], more].concat();
        self.site.admin(NEW, &arguments).unwrap()
    }

    /// Some MiB are written, and the next backup goes to `server`, as a delta of so many MiB, and restores.
    pub fn next_backup(&self, server: &str, written: std::ops::Range<u64>, delta_mib: u64) {
        let snapshot = self.backup_on(server, written, delta_mib);
        self.assert_restored(&snapshot);
    }

    /// The same, and nothing is read.
    pub fn backup_on(&self, server: &str, written: std::ops::Range<u64>, delta_mib: u64) -> String {
        let seed = xtask::noise::Noise::fresh_seed();
        disk::write_noise(&self.disk, written.start * MIB..written.end * MIB, seed).unwrap();
        let backup = self.client.backup().unwrap();
        assert_eq!(backup.server, server, "{backup:?}");
        let disk = &backup.disks[0];
        assert_eq!((disk.kind.as_str(), disk.sent_bytes), ("delta", delta_mib * MIB), "{backup:?}");
        disk.snapshot_id.clone()
    }

    pub fn assert_restored(&self, snapshot: &str) {
        let to = self.site.folder().join("restored.raw");
        self.client.restore(snapshot, &to).unwrap();
        disk::compare(&self.disk, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    /// Until the new server has fetched a run once more, and no more of it than so many bytes.
    pub fn await_replicated(&self, bytes: u64) {
        self.await_equal();
        let log = self.site.log(NEW);
        let last = log.lines().rev().find(|line| line.contains("replicated")).unwrap_or_default();
        assert!(last.contains(&format!("bytes={bytes}")), "{log}");
    }

    /// Until both servers have a backup of the same time as their newest.
    pub fn await_equal(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        let newest = |server| {
            let list = self.client.list().unwrap();
            let mut of = list.snapshots.into_iter().filter(move |one| one.server == server);
            of.next().map(|newest| newest.committed_ms)
        };
        while newest(NEW) != newest(OLD) {
            assert!(Instant::now() < until, "{}{}", self.site.log(OLD), self.site.log(NEW));
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// What janus says of a server.
    pub fn status_of(&self, server: &str) -> Value {
        let status = self.client.run(&["status", "--json"]).unwrap();
        let status: Value = serde_json::from_str(&status.stdout).unwrap();
        let mut all = status["servers"].as_array().unwrap().iter();
        all.find(|one| one["server"] == server).unwrap().clone()
    }

    /// Until the new server has so many bytes.
    pub fn await_stored(&self, bytes: u64) {
        let images = self.images.clone();
        let until = Instant::now() + Duration::from_secs(60);
        while stored(&images) < bytes {
            assert!(Instant::now() < until, "only {} bytes are there", stored(&images));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Of backups, without the space that is kept for cleaning up.
pub fn stored(images: &Path) -> u64 {
    disk::allocated_below(images).saturating_sub(16 * MIB)
}

/// Part of a day that isn't now.
pub fn another_hour() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let hour = (now / 3600 + 12) % 24;
    format!("{hour:02}:00-{hour:02}:59")
}
