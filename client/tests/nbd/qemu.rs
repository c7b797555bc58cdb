//! QEMU's programs, as an administrator runs them.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// Runs a program that must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn create(image: &Path, bytes: u64) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(image), &bytes.to_string()]);
}

/// Runs commands of `qemu-io` on an image.
pub fn io(image: &Path, commands: &[String]) {
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    // A command that fails doesn't change the exit code.
    let said = run("qemu-io", &[&arguments[..], &[text(image)]].concat());
    assert!(!said.contains("failed") && !said.contains("error"), "{commands:?}: {said}");
}

/// Opens an image, writes, and is killed.
pub fn crash(image: &Path, command: &str) {
    // Asking whether the image is locked takes a lock, too: too early that keeps the writer out.
    for pause in (1..20).map(|round| Duration::from_millis(500 * round)) {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2", text(image)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let written = writeln!(input, "{command}\nflush");
        std::thread::sleep(pause);
        let has_it = written.is_ok() && is_locked(image);
        child.kill().unwrap();
        child.wait().unwrap();
        if has_it {
            return;
        }
    }
    panic!("the image is never locked");
}

fn is_locked(image: &Path) -> bool {
    let open = Command::new("qemu-img").args(["info", "-f", "qcow2", text(image)]).output();
    !open.unwrap().status.success()
}

/// What the image holds, as a raw file.
pub fn flatten(image: &Path, to: &Path) {
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(image), text(to)]);
}

/// Names of the image's bitmaps.
pub fn bitmaps(image: &Path) -> Vec<String> {
    // Who exported it for a client that has failed may still be closing it.
    let until = Instant::now() + Duration::from_secs(10);
    while is_locked(image) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    let info = run("qemu-img", &["info", "--output=json", text(image)]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned();
    bitmaps.unwrap_or_default().iter().map(|b| b["name"].as_str().unwrap().to_owned()).collect()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn await_that(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A `qemu-nbd` that serves until it is dropped.
pub struct QemuNbd {
    child: Child,
    pub uri: String,
}

impl QemuNbd {
    /// Over a Unix socket.
    pub fn unix(image: &Path, socket: &Path, more: &[&str]) -> Self {
        let _ = fs::remove_file(socket);
        let child = serve(image, &[&["--socket", text(socket)], more].concat());
        await_that("qemu-nbd listens", || socket.exists());
        Self { child, uri: format!("nbd+unix:///?socket={}", socket.display()) }
    }

    /// Over TCP, with a named export.
    pub fn tcp(image: &Path, more: &[&str]) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let arguments = ["--bind=127.0.0.1", "--export-name=a disk", "--port", &port.to_string()];
        let child = serve(image, &[&arguments[..], more].concat());
        await_that("qemu-nbd listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Self { child, uri: format!("nbd://127.0.0.1:{port}/a%20disk") }
    }
}

fn serve(image: &Path, more: &[&str]) -> Child {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--format=qcow2", "--shared=4"]).args(more).arg(image);
    command.spawn().unwrap()
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processes whose command line names a path.
pub fn processes_with(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.starts_with("qemu-nbd") && line.contains(text(path)) {
            found.push(entry.path());
        }
    }
    found
}
