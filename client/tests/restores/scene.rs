//! A site, a disk full of noise, and backups of it with copies of what it was.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use xtask::{
    disk,
    site::{Client, Plan, Programs, Running, Site, Taken, answers},
};

pub const MIB: u64 = 1 << 20;

pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub disk: PathBuf,
}

impl Scene {
    pub fn new(servers: &[&str], size_bytes: u64) -> Self {
        let servers: Vec<String> = servers.iter().map(|name| (*name).to_owned()).collect();
        let plan = Plan { servers, ..Plan::default() };
        let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, size_bytes).unwrap();
        disk::write_noise(&disk, 0..size_bytes, 1).unwrap();
        let mut client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        client.settings.set("failover_after_seconds", 2);
        site.await_ready(&client).unwrap();
        Self { site, client, disk }
    }

    pub fn backup(&self) -> Taken {
        self.client.backup_and_copy(&self.disk, self.site.folder()).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    pub fn restore(&self, taken: &Taken, to: &Path, more: &[&str]) -> answers::Restore {
        self.client.answer(&arguments(taken, to, more)).unwrap()
    }

    /// A restore that has written `bytes` and goes on.
    pub fn restoring(&self, taken: &Taken, to: &Path, more: &[&str], bytes: u64) -> Running {
        let mut arguments = arguments(taken, to, more);
        arguments.push("--json");
        let running = self.client.start(&arguments).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while partial_of(to).map_or(0, |partial| disk::allocated_bytes(&partial).unwrap_or(0))
            < bytes
        {
            assert!(Instant::now() < until, "it does not get there: {}", running.log());
            thread::sleep(Duration::from_millis(1));
        }
        running
    }
}

fn arguments<'a>(taken: &'a Taken, to: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["restore", &*taken.snapshot, "--to", to.to_str().unwrap()];
    arguments.extend(more);
    arguments
}

/// What a restore to `to` has written so far.
pub fn partial_of(to: &Path) -> Option<PathBuf> {
    let start = format!(".{}.", to.file_name().unwrap().to_str().unwrap());
    let mut entries = fs::read_dir(to.parent().unwrap()).unwrap().flatten();
    let ours = entries.find(|entry| {
        let name = entry.file_name().into_string().unwrap();
        name.starts_with(&start) && name.ends_with(".partial")
    });
    ours.map(|entry| entry.path())
}
