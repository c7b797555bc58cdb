//! How far the units shut their services in, as `systemd-analyze security` counts: 0 is nothing left, 10 is everything.

use std::{fs, process::Command};

use xtask::site::{Programs, workspace};

/// The bounds. The client reads raw disks, makes snapshots, freezes file systems and runs hooks, all as root in the machine's own mounts.
const BOUNDS: [(&str, f64); 3] =
    [("janus.service", 1.5), ("janus-server.service", 1.7), ("janus-client.service", 7.5)];

#[test]
fn units_leave_little_open() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("client.toml");
    fs::write(&config, "urls = [\"https://127.0.0.1:1\"]\ncache_path = \"cache\"\n").unwrap();
    let mut client = Programs::for_tests().unwrap().client();
    client.args(["service", "install", "--root"]).arg(folder.path()).arg("--config").arg(&config);
    let made = client.output().unwrap();
    assert!(made.status.success(), "{made:?}");
    for (name, bound) in BOUNDS {
        let packaged = workspace().join("packaging/debian").join(name);
        let unit = match packaged.exists() {
            true => packaged,
            false => folder.path().join("etc/systemd/system").join(name),
        };
        let mut analyze = Command::new("systemd-analyze");
        let said = analyze.args(["security", "--offline=true", "--no-pager"]).arg(&unit).output();
        let said = String::from_utf8_lossy(&said.unwrap().stdout).into_owned();
        let line = said.lines().find(|line| line.contains("Overall exposure level")).expect(&said);
        let score = line.split(": ").nth(1).and_then(|rest| rest.split(' ').next());
        let score: f64 = score.and_then(|score| score.parse().ok()).expect(line);
        println!("{name}: {score}, bound {bound}");
        assert!(score <= bound, "{said}");
    }
}
