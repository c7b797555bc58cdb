//! Two servers, a janus, one disk and its exports.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use xtask::{
    disk,
    site::{Client, Plan, Programs, Running, Site},
};

pub const MIB: u64 = 1 << 20;
/// No whole segment, block or MiB at the end.
pub const SIZE: u64 = 64 * MIB + 512;

pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub image: PathBuf,
}

impl Scene {
    /// With a disk of data and holes, backed up by nobody yet.
    pub fn new(servers: &[&str]) -> Self {
        let servers = servers.iter().map(|&name| name.to_owned()).collect();
        let site =
            Site::start(Programs::for_tests().unwrap(), &Plan { servers, ..Plan::default() })
                .unwrap();
        let image = site.folder().join("disk.raw");
        disk::blank(&image, SIZE).unwrap();
        for (range, seed) in [(0..3 * MIB, 1), (5 * MIB..37 * MIB, 2), (SIZE - 512..SIZE, 3)] {
            disk::write_noise(&image, range, seed).unwrap();
        }
        let client = site.client("machine", &[format!("vm={}", image.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, image }
    }

    /// Backs up; returns the snapshot's id.
    pub fn backup(&self) -> String {
        self.client.backup().unwrap().disks.remove(0).snapshot_id
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    /// `janus-client nbd WHAT --socket … MORE`, until it is dropped.
    pub fn serve(&self, what: &str, more: &[&str]) -> Export {
        let socket = self.path("x.sock");
        let arguments = [&["nbd", what, "--socket", text(&socket)], more].concat();
        let mut running = self.client.start(&arguments).unwrap();
        await_that("the export listens", || socket.exists() || running.has_ended());
        assert!(socket.exists(), "{:?}", running.wait());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Export { running: Some(running), socket, uri }
    }
}

/// A running export.
pub struct Export {
    running: Option<Running>,
    pub socket: PathBuf,
    pub uri: String,
}

impl Export {
    pub fn pid(&self) -> u32 {
        self.running.as_ref().unwrap().pid()
    }

    pub fn log(&self) -> String {
        self.running.as_ref().unwrap().log()
    }

    /// Kills it.
    pub fn kill(mut self) {
        let running = self.running.take().unwrap();
        running.kill();
        running.wait().unwrap();
    }

    /// Ends it as Ctrl-C does; returns what it said.
    pub fn end(mut self) -> String {
        let running = self.running.take().unwrap();
        running.interrupt();
        let finished = running.wait().unwrap();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        assert!(!self.socket.exists());
        finished.stdout
    }
}

/// Runs a program that must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Resident memory of a process at its most, in MiB.
pub fn peak_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
