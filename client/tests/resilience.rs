//! The set-up of `docs/resilience.md` does what it says: its blocks are run as they stand there, each on the host that its
//! first line names, and what they print is compared with what the page shows.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use xtask::site::{Network, Programs, workspace};

const HOSTS: [&str; 3] = ["north", "south", "laptop"];
const SECTION: &str = "## From nothing to a cut line";

/// A block of code: its language and its lines.
struct Block {
    language: String,
    lines: Vec<String>,
}

fn blocks() -> Vec<Block> {
    let text = fs::read_to_string(workspace().join("docs/resilience.md")).unwrap();
    let section = text.split(SECTION).last().unwrap().split("\n## ").next().unwrap();
    let parts = section.split("```").skip(1).step_by(2);
    let block = |part: &str| {
        let mut lines = part.lines().map(str::to_owned);
        Block { language: lines.next().unwrap(), lines: lines.collect() }
    };
    parts.map(block).collect()
}

struct Walk {
    // Before the folder: what still runs in the network ends with it.
    network: Network,
    folder: tempfile::TempDir,
    path: std::ffi::OsString,
}

impl Walk {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("janus-walk-").tempdir().unwrap();
        let tools = folder.path().join("tools");
        fs::create_dir(&tools).unwrap();
        // The hosts share one file system, so copying to one needs no network.
        let hosts = folder.path().display();
        write_program(
            &tools.join("ssh"),
            &format!("host=${{1%%.*}}; shift; cd {hosts}/$host && \"$@\""),
        );
        write_program(
            &tools.join("scp"),
            &format!(
                "last=${{@: -1}}; cp -r \"${{@:2:$#-2}}\" \"{hosts}/${{last%%.*}}/${{last#*:}}\""
            ),
        );
        for host in HOSTS {
            fs::create_dir_all(folder.path().join(host).join("janus")).unwrap();
        }
        let programs = Programs::for_tests().unwrap();
        let old = std::env::var_os("PATH").unwrap();
        let path =
            [tools, programs.folder().to_owned()].into_iter().chain(std::env::split_paths(&old));
        let path = std::env::join_paths(path).unwrap();
        Self { network: Network::make(&HOSTS).unwrap(), folder, path }
    }

    fn home(&self, host: &str) -> PathBuf {
        self.folder.path().join(host)
    }

    /// Runs a block and returns what it printed.
    fn run(&self, host: &str, script: &str) -> String {
        let mut bash = Command::new("timeout");
        bash.args(["60", "bash", "-e", "-c", script]).env("PATH", &self.path);
        bash.env("HOME", self.home(host)).env("USER", "alice");
        for (key, _) in
            std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("JANUS_"))
        {
            bash.env_remove(key);
        }
        let mut bash = self.network.command(host, &bash);
        bash.current_dir(self.home(host).join("janus")).stdin(Stdio::null());
        let output = bash.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{host}: {script}\n{said}{errors}\n{}", self.logs());
        // The page can't bring the routes back that a host's network manager brings back.
        if script.contains("link set eth0 up") {
            self.network.plug_in(host).unwrap();
        }
        said
    }

    fn logs(&self) -> String {
        let log = |host: &str, name: &str| {
            let text =
                fs::read_to_string(self.home(host).join("janus").join(name)).unwrap_or_default();
            format!("== {host} {name}\n{text}")
        };
        [log("north", "janus.log"), log("south", "janus.log"), log("south", "server.log")].concat()
    }
}

fn write_program(path: &Path, script: &str) {
    fs::write(path, format!("#!/bin/bash\nset -e\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// What of a line stays the same in every run: words, not numbers, dates, ids and units.
fn shape(line: &str) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "s", "s,"];
    let words = line.split_whitespace().filter(|word| !units.contains(word));
    words
        .map(|word| if word.contains(|c: char| c.is_ascii_digit()) { "#" } else { word })
        .collect::<Vec<_>>()
        .join(" ")
}

fn fits(shown: &str, printed: &str) -> bool {
    match shown.split_once('…') {
        Some((beginning, _)) => shape(printed).starts_with(shape(beginning).as_str()),
        None => shape(printed) == shape(shown),
    }
}

/// Every line that the page shows was printed, in this order; more may have been.
fn assert_shows(shown: &[String], printed: &str) {
    let mut lines = printed.lines();
    for line in shown {
        assert!(lines.any(|printed| fits(line, printed)), "not printed: {line}\nbut: {printed}");
    }
}

#[test]
fn as_root_the_two_sites_of_the_page_are_set_up_cut_and_healed() {
    let walk = Walk::new();
    let (mut ran, mut written, mut compared) = (0, 0, 0);
    let mut printed = String::new();
    for block in blocks() {
        if block.language == "text" {
            assert_shows(&block.lines, &printed);
            compared += 1;
            continue;
        }
        let place = block.lines[0].strip_prefix("# ").expect("a first line that names the host");
        match block.language.as_str() {
            "sh" => {
                println!("-- {place}: {}", block.lines[1..].join("\n   "));
                printed = walk.run(place, &block.lines.join("\n"));
                println!("{printed}");
                ran += 1;
            }
            "toml" => {
                let (host, file) = place.split_once(": ").unwrap();
                fs::write(walk.home(host).join("janus").join(file), block.lines.join("\n"))
                    .unwrap();
                written += 1;
            }
            other => panic!("nobody runs a block of {other}"),
        }
    }
    assert!(ran >= 10 && written == 5 && compared >= 5, "{ran} {written} {compared}");
}

#[test]
fn lines_are_compared_by_what_stays_the_same() {
    assert!(fits("backup 01a2 on north in 0.8 s", "backup 77ff9 on north in 12.4 s"));
    assert!(!fits("backup 01a2 on north in 0.8 s", "backup 77ff9 on south in 12.4 s"));
    assert!(fits("skipped north: …", "skipped north: does not answer"));
    assert!(!fits("skipped north: …", "skipped south: does not answer"));
}
