//! A machine with a disk of ext4 and one of NTFS, backed up to one server.

use std::{
    fs::{self, OpenOptions},
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use serde_json::Value;
use xtask::{
    disk,
    noise::Noise,
    packages,
    site::{Client, Plan, Programs, Site, free_ports},
};

pub const MIB: u64 = 1 << 20;
pub const SERVER: &str = "server-a";
pub const MACHINE: &str = "alice/machine";
/// A file whose content is looked for in images.
pub const MARKED: &str = "/srv/deep/marked.bin";

pub struct Scene {
    pub site: Site,
    pub client: Client,
    /// ext4, without a partition table.
    pub linux: PathBuf,
    /// First bytes of the marked file.
    pub marks: Vec<u8>,
    /// Where janus tells its figures.
    metrics: String,
}

impl Scene {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// One whose disks are changed before they are backed up.
    pub fn with(change: impl FnOnce(&Path)) -> Self {
        packages::require(packages::DISK_TOOLS).unwrap();
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let folder = site.folder().to_owned();
        let metrics = format!("127.0.0.1:{}", free_ports(1).unwrap()[0]);
        site.janus_settings().unwrap().set("metrics_listen", metrics.as_str());
        // What is found is found by whom the test says.
        site.server(SERVER).unwrap().settings.set("scrub_mib_per_second", 0);
        site.start_all().unwrap();
        let (linux, windows) = (folder.join("linux.raw"), folder.join("windows.raw"));
        let marks = make_linux(&linux, &folder.join("stage"));
        make_windows(&windows, &folder.join("stage/notes.bin"));
        change(&linux);
        let disks = [("linux", &linux), ("windows", &windows)]
            .map(|(name, path)| format!("{name}={}", path.display()));
        let client = site.client("machine", &disks).unwrap();
        site.await_ready(&client).unwrap();
        client.backup().unwrap();
        Self { site, client, linux, marks, metrics }
    }

    /// A figure of janus about the machine at the server.
    pub fn figure(&self, name: &str) -> Option<f64> {
        self.figure_of(&format!("{name}{{machine=\"{MACHINE}\",server=\"{SERVER}\"}} "))
    }

    /// Waits until janus tells so much of the server.
    pub fn await_figure(&self, name: &str, figure: f64) {
        let (start, began) = (format!("{name}{{server=\"{SERVER}\"}} "), Instant::now());
        while self.figure_of(&start) != Some(figure) {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", self.figure_of(&start));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn figure_of(&self, start: &str) -> Option<f64> {
        let mut stream = TcpStream::connect(&self.metrics).unwrap();
        let request = format!("GET /metrics HTTP/1.0\r\nhost: {}\r\n\r\n", self.metrics);
        stream.write_all(request.as_bytes()).unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page.lines().find_map(|line| line.strip_prefix(start))?.parse().ok()
    }

    pub fn prove(&self, more: &[&str]) -> Output {
        let arguments = [&["prove"], more].concat();
        self.site.admin(SERVER, &arguments).unwrap()
    }

    /// The same with `--json`, which must end with this code.
    pub fn proof(&self, more: &[&str], code: i32) -> Value {
        let output = self.prove(&[more, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// How the machine stands, and whether that is good.
    pub fn standing(&self, code: i32) -> Value {
        self.proof(&["status"], code)["machines"][0].clone()
    }

    /// Waits until the machine was proven after this time; returns when.
    pub fn await_proven(&self, after_ms: i64) -> i64 {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let proven_ms = self.standing(0)["proven_ms"].as_i64().unwrap_or(0);
            if proven_ms > after_ms {
                return proven_ms;
            }
            assert!(Instant::now() < until, "{}", self.site.log(SERVER));
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Files of a disk on the server, oldest first.
    pub fn files(&self, disk: &str, extension: &str) -> Vec<PathBuf> {
        let folder = self.machine_folder().join(disk);
        let entries = fs::read_dir(folder).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|found| found == extension));
        files.sort();
        files
    }

    pub fn machine_folder(&self) -> PathBuf {
        self.site.folder().join(SERVER).join(MACHINE)
    }

    /// Does something while the server is stopped.
    pub fn while_stopped(&mut self, work: impl FnOnce(&mut Self)) {
        self.site.stop_server(SERVER).unwrap();
        work(self);
        self.site.start_server(SERVER).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }
}

fn make_linux(image: &Path, stage: &Path) -> Vec<u8> {
    let mut noise = Noise::new(11);
    let mut bytes = |len: u64| {
        let mut bytes = vec![0; len as usize];
        noise.fill(&mut bytes);
        bytes
    };
    let marked = bytes(3 * MIB);
    let notes = bytes(100_000);
    for folder in ["srv/deep", "etc"] {
        fs::create_dir_all(stage.join(folder)).unwrap();
    }
    fs::write(stage.join(&MARKED[1..]), &marked).unwrap();
    fs::write(stage.join("notes.bin"), &notes).unwrap();
    (0..40)
        .for_each(|n| fs::write(stage.join(format!("etc/file-{n}")), &notes[..n * 100]).unwrap());
    let mut make = packages::command("mke2fs");
    make.args(["-q", "-t", "ext4", "-F", "-b", "4096", "-E", "nodiscard", "-d"]).arg(stage);
    packages::output(make.arg(image).arg("32m")).unwrap();
    marked[..64].to_vec()
}

fn make_windows(image: &Path, file: &Path) {
    let mut tools = packages::TEST_TOOLS.to_vec();
    tools.retain(|tool| tool.package == "ntfs-3g");
    packages::require(&tools).unwrap();
    disk::blank(image, 16 * MIB).unwrap();
    xtask::ntfs::format(image, 16 * MIB, 4096).unwrap();
    let mut copy: Command = packages::command("ntfscp");
    packages::output(copy.args(["-q", "-f"]).arg(image).arg(file).arg("notes.bin")).unwrap();
}

/// Where these bytes first stand in a file.
pub fn find(path: &Path, bytes: &[u8]) -> u64 {
    let content = fs::read(path).unwrap();
    memchr::memmem::find(&content, bytes).unwrap() as u64
}

pub fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}
