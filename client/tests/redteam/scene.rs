//! A site with a good machine and a bad one, and what must still be true after everything that the bad one does.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use janus_proto::{
    channel::{self, ConnectOptions},
    pb::{self, server_info_service_client::ServerInfoServiceClient},
    tls::Identity,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use xtask::{
    disk, measure,
    site::{Client, Plan, Programs, Site},
};

pub const MIB: u64 = 1 << 20;
/// Setting `stall_seconds` of this site.
pub const STALL: Duration = Duration::from_secs(5);
/// What server or janus may hold at any moment of the suite. The default windows alone would allow a bad machine 64 connections of
/// 32 MiB each.
pub const MEMORY: u64 = 400 * MIB;
pub const GOOD: &str = "good";
pub const BAD: &str = "bad";

/// Who is attacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Server,
    Janus,
}

pub struct Scene {
    pub site: Site,
    pub good: Client,
    pub bad: Client,
    pub runtime: Runtime,
    good_disk: PathBuf,
    bad_disk: PathBuf,
    /// Snapshot of the good machine's disk, and of the bad one's.
    pub snapshots: [String; 2],
    cases: Vec<String>,
    /// Open files of server and janus before everything.
    files: [usize; 2],
    highest: [u64; 2],
}

impl Scene {
    pub fn new() -> Self {
        let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let settings = &mut site.server("server-a").unwrap().settings;
        settings.set("lease_seconds", 3);
        settings.set("stall_seconds", STALL.as_secs());
        site.janus_settings().unwrap().set("stall_seconds", STALL.as_secs());
        site.start_all().unwrap();
        let folder = site.folder().to_owned();
        let made = |name: &str, seed| {
            let path = folder.join(format!("{name}.raw"));
            disk::blank(&path, 32 * MIB).unwrap();
            disk::write_noise(&path, 0..32 * MIB, seed).unwrap();
            let client = site.client(name, &[format!("disk={}", path.display())]).unwrap();
            (path, client)
        };
        let ((good_disk, good), (bad_disk, bad)) = (made(GOOD, 1), made(BAD, 2));
        site.await_ready(&good).unwrap();
        let snapshots =
            [&good, &bad].map(|client| client.backup().unwrap().disks.remove(0).snapshot_id);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let mut scene = Self {
            site,
            good,
            bad,
            runtime,
            good_disk,
            bad_disk,
            snapshots,
            cases: Vec::new(),
            files: [0; 2],
            highest: [0; 2],
        };
        std::thread::sleep(Duration::from_millis(500));
        scene.files = scene.pids().map(open_files);
        scene
    }

    /// Server and janus.
    pub fn pids(&mut self) -> [u32; 2] {
        let server = self.site.server("server-a").unwrap().process().unwrap().pid();
        [server, self.site.janus().unwrap().pid()]
    }

    pub fn url(&mut self, target: Target) -> String {
        match target {
            Target::Server => self.site.server("server-a").unwrap().url(),
            Target::Janus => self.site.url(),
        }
    }

    pub fn address(&mut self, target: Target) -> SocketAddr {
        self.url(target).strip_prefix("https://").unwrap().parse().unwrap()
    }

    pub fn identity(&self, machine: &str) -> Identity {
        let keys = self.site.folder().join("pki").join(machine);
        let [cert, key, ca] = ["cert", "key", "ca"].map(|name| keys.join(format!("{name}.pem")));
        Identity::load(cert, key, ca).unwrap()
    }

    pub fn channel(&mut self, target: Target, machine: &str) -> Channel {
        let (url, identity) = (self.url(target), self.identity(machine));
        let connected = channel::connect(&url, &identity, ConnectOptions::default());
        self.runtime.block_on(connected).unwrap().channel
    }

    /// Notes a case, and looks whether the good machine is served, and what the programs hold.
    pub fn after(&mut self, target: Target, case: &str, outcome: impl std::fmt::Display) {
        let begun = Instant::now();
        for target in [Target::Server, Target::Janus] {
            let channel = self.channel(target, GOOD);
            let mut info = ServerInfoServiceClient::new(channel);
            let asked = info.get_server_info(pb::GetServerInfoRequest {});
            let answer = self
                .runtime
                .block_on(async { tokio::time::timeout(Duration::from_secs(5), asked).await });
            answer.expect(case).expect(case);
        }
        let answered = begun.elapsed();
        for (at, pid) in self.pids().into_iter().enumerate() {
            let peak = measure::used(pid).peak_rss_bytes;
            assert!(peak > 0, "{case}: it has ended");
            assert!(peak <= MEMORY, "{case}: {} MiB", peak / MIB);
            self.highest[at] = self.highest[at].max(peak);
        }
        let line = format!("{target:?}: {case}: {outcome}");
        println!("{line} (the good one is answered in {} ms)", answered.as_millis());
        self.cases.push(line);
    }

    /// The end: nothing is lost, nothing is held. Prints how many cases there were.
    pub fn close(mut self) {
        let before = self.files;
        let until = Instant::now() + Duration::from_secs(15);
        // What a program has open beside what it had: caches of files and pools may keep a few.
        let left = loop {
            let now = self.pids().map(open_files);
            let is_back = now.iter().zip(before).all(|(now, before)| *now <= before + 16);
            if is_back || Instant::now() > until {
                break now;
            }
            std::thread::sleep(Duration::from_millis(200));
        };
        assert!(
            left.iter().zip(before).all(|(now, before)| *now <= before + 16),
            "open files of server and janus: {before:?}, now {left:?}"
        );
        let folder = self.site.folder().to_owned();
        let all = [(&self.good, &self.good_disk), (&self.bad, &self.bad_disk)];
        for ((client, source), snapshot) in all.into_iter().zip(&self.snapshots) {
            let to = folder.join(format!("restored-{snapshot}"));
            client.restore(snapshot, &to).unwrap();
            disk::compare(source, &to).unwrap();
            fs::remove_file(to).unwrap();
        }
        let [server, janus] = self.highest.map(|peak| peak / MIB);
        println!(
            "{} cases; server held {server} MiB at most, janus {janus} MiB, bound {} MiB; open files {before:?}, now {left:?}",
            self.cases.len(),
            MEMORY / MIB
        );
    }

    /// Seconds of a first backup of 64 MiB by a new good machine.
    pub fn good_backup(&mut self, name: &str) -> f64 {
        let path = self.site.folder().join(format!("{name}.raw"));
        disk::blank(&path, 64 * MIB).unwrap();
        disk::write_noise(&path, 0..64 * MIB, 3).unwrap();
        let client = self.site.client(name, &[format!("disk={}", path.display())]).unwrap();
        let begun = Instant::now();
        client.backup().unwrap();
        let seconds = begun.elapsed().as_secs_f64();
        let to = self.site.folder().join(format!("{name}-restored"));
        client.restore("disk", &to).unwrap();
        disk::compare(&path, &to).unwrap();
        let _ = (fs::remove_file(&path), fs::remove_file(to));
        seconds
    }
}

fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}
