//! A site with one server whose store is damaged.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, answers},
};

pub const MIB: u64 = 1 << 20;
pub const SERVER: &str = "server-a";

/// A site with one server, whose store is to be damaged.
pub struct Damaged {
    pub site: Site,
    pub client: Client,
    pub disk: PathBuf,
    /// Copies of the disk, one for each backup.
    pub copies: Vec<(String, PathBuf)>,
}

impl Damaged {
    /// Two backups: a base and a delta.
    pub fn new() -> Self {
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        // What is found is found by whom the test says.
        site.server(SERVER).unwrap().settings.set("scrub_mib_per_second", 0);
        site.start_all().unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, 32 * MIB).unwrap();
        disk::write_noise(&disk, 0..32 * MIB, 1).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        let mut damaged = Self { site, client, disk, copies: Vec::new() };
        assert_eq!(damaged.backup().kind, "full");
        damaged.change();
        assert_eq!(damaged.backup().kind, "delta");
        damaged
    }

    pub fn change(&self) {
        disk::change(&self.disk, MIB, self.copies.len() as u64).unwrap();
    }

    pub fn backup(&mut self) -> answers::Disk {
        let taken = self.client.backup().unwrap().disks[0].clone();
        let copy = self.site.folder().join(format!("copy-{}", self.copies.len()));
        disk::copy(&self.disk, &copy).unwrap();
        self.copies.push((taken.snapshot_id.clone(), copy));
        taken
    }

    /// Restores a backup, counted from 0, and compares it.
    pub fn assert_restores(&self, backup: usize) {
        let (snapshot, copy) = &self.copies[backup];
        let to = self.site.folder().join("restored");
        self.client.restore(snapshot, &to).unwrap();
        disk::compare(copy, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    pub fn folder(&self) -> PathBuf {
        self.site.folder().join(SERVER).join("alice/machine")
    }

    /// The files of this kind in a folder of the machine, oldest first.
    pub fn files(&self, folder: &str, extension: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder().join(folder)).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|found| found == extension));
        files.sort();
        files
    }

    /// Does something to files of the stopped server.
    pub fn while_stopped(&mut self, work: impl FnOnce(&Self)) {
        self.site.stop_server(SERVER).unwrap();
        work(self);
        self.site.start_server(SERVER).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }

    pub fn listed(&self) -> usize {
        self.client.list().unwrap().snapshots.len()
    }

    /// Starts the server again with a background check that never rests, and waits until it has seen all.
    pub fn scrub(&mut self) {
        let began = self.now_ms();
        self.with_scrub(1000, 0);
        self.await_list(|snapshots| {
            snapshots.iter().all(|one| one.damaged_blocks > 0 || one.verified_ms >= began)
        });
        self.with_scrub(0, 30);
    }

    /// `janus-server verify`; it must end with this code.
    pub fn verify(&self, more: &[&str], code: i32) -> serde_json::Value {
        let arguments: Vec<&str> = ["verify", "--json"].iter().chain(more).copied().collect();
        let output = self.site.admin(SERVER, &arguments).unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn with_scrub(&mut self, mib_per_second: u64, days: u64) {
        self.site.stop_server(SERVER).unwrap();
        let settings = &mut self.site.server(SERVER).unwrap().settings;
        settings.set("scrub_mib_per_second", mib_per_second);
        settings.set("scrub_days", days);
        self.site.start_server(SERVER).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }

    fn now_ms(&self) -> i64 {
        std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64
    }

    pub fn await_list(
        &self,
        is_there: impl Fn(&[answers::Snapshot]) -> bool,
    ) -> Vec<answers::Snapshot> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let snapshots = self.client.list().unwrap().snapshots;
            if is_there(&snapshots) {
                return snapshots;
            }
            assert!(Instant::now() < deadline, "{snapshots:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

pub fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}
