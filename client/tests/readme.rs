//! The walk of the README does what it says: its commands are run as they stand there.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use xtask::site::{Programs, free_ports, workspace};

/// Commands of the walk on one machine, at most ten.
fn walk() -> Vec<String> {
    let text = fs::read_to_string(workspace().join("README.md")).unwrap();
    let section = text.split("## On one machine, by hand").nth(1).unwrap();
    let block = section.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    block.lines().map(str::to_owned).collect()
}

/// Ports of this run in place of the README's, and a disk of 64 MiB with data instead of an empty one.
fn script(ports: &[u16], folder: &Path) -> String {
    let mut lines = walk();
    assert!(
        lines.len() <= 10,
        "the README promises at most ten commands, there are {}",
        lines.len()
    );
    assert!(lines[0].starts_with("cargo build"), "the first command builds: {}", lines[0]);
    // Built already; and everything happens in the test's folder.
    lines[0] = format!("cd {}", folder.display());
    let disk = lines
        .iter()
        .position(|line| line.contains("truncate -s 1G"))
        .expect("the walk makes a disk");
    lines[disk] =
        lines[disk].replace("truncate -s 1G disk.raw", "head -c 64M /dev/urandom > disk.raw");
    // Commands that go to the background are up when they say so.
    let janus = lines
        .iter()
        .position(|line| line.starts_with("janus serve"))
        .expect("the walk starts janus");
    lines.insert(janus + 1, "jobs -p > pids; sleep 3".to_owned());
    let mut text = lines.join("\n");
    for (old, new) in ["7420", "7421", "7422"].iter().zip(ports) {
        text = text.replace(old, &new.to_string());
    }
    format!("set -e\n{text}\n")
}

#[test]
fn the_walk_of_the_readme_works() {
    let programs = Programs::for_tests().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let text = script(&free_ports(3).unwrap(), folder.path());
    let path = std::env::join_paths(
        [programs.folder().to_owned()]
            .into_iter()
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    )
    .unwrap();
    let log = File::create(folder.path().join("log")).unwrap();
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(&text).env("PATH", path).env("USER", "alice").env("HOSTNAME", "laptop");
    bash.env_remove(xtask::site::PROGRAMS_VARIABLE).env_remove("JANUS_SOAK");
    bash.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut child = bash.spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > until => break None,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    for pid in fs::read_to_string(folder.path().join("pids")).unwrap_or_default().lines() {
        let _ = Command::new("kill").arg(pid).status();
    }
    let _ = child.kill();
    let said = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(status.is_some_and(|status| status.success()), "{status:?}\n{text}\n{said}");
    let (disk, restored) = (folder.path().join("disk.raw"), folder.path().join("restored.raw"));
    xtask::disk::compare(&disk, &restored).unwrap();
}
