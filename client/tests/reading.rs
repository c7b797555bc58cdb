//! What a backup reads and sends, and that the user is told before.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::FileExt, path::Path, process::Command};

use serde_json::Value;
use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;

#[test]
fn a_dry_run_tells_what_each_server_would_get_and_sends_nothing() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 64 * MIB).unwrap();
    disk::write_noise(&path, 0..24 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    let dry_run = || {
        let answer: Value = client.answer(&["backup", "--dry-run"]).unwrap();
        answer["disks"][0].clone()
    };
    let to = |forecast: &Value, server: &str| {
        let servers = forecast["servers"].as_array().unwrap().clone();
        let named = servers.into_iter().find(|one| one["server"] == server);
        named.map(|one| one["bytes"].as_u64().unwrap())
    };
    let before = dry_run();
    assert_eq!(
        (&before["first_bytes"], &before["read_bytes"]),
        (&(24 * MIB).into(), &(24 * MIB).into())
    );
    assert_eq!(before["reading"]["full_compare"], "there is no change journal");
    site.await_ready(&client).unwrap();
    assert!(client.list().unwrap().snapshots.is_empty());

    let first = client.backup().unwrap();
    disk::write_noise(&path, 8 * MIB..9 * MIB, 2).unwrap();
    let second = client.backup().unwrap();
    assert_ne!(first.server, second.server);
    disk::write_noise(&path, 20 * MIB..21 * MIB, 3).unwrap();
    let then = dry_run();
    assert_eq!((&then["first_bytes"], &then["changed_bytes"]), (&Value::Null, &MIB.into()));
    assert_eq!(to(&then, &first.server), Some(2 * MIB), "what has changed since its own head");
    assert_eq!(to(&then, &second.server), Some(MIB));

    let third = client.backup().unwrap();
    assert_eq!((&third.server, third.disks[0].sent_bytes), (&first.server, 2 * MIB));
}

#[test]
fn a_dry_run_says_why_of_each_volume_and_needs_neither_server_nor_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let (path, part) = (folder.path().join("disk.raw"), folder.path().join("part"));
    disk::blank(&path, 64 * MIB).unwrap();
    disk::blank(&part, 24 * MIB).unwrap();
    disk::write_noise(&part, 0..24 * MIB, 2).unwrap();
    let run = |program: &str, arguments: &[&str], path: &Path| {
        let done = Command::new(program).args(arguments).arg(path).output().unwrap();
        assert!(done.status.success(), "{program}: {done:?}");
    };
    run("sgdisk", &["-n1:2048:+24M", "-n2:0:+16M", "-n3:0:0", "-c3:data"], &path);
    run("mkfs.ext4", &["-qF", "-E", "nodiscard", "-L", "root"], &part);
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&fs::read(&part).unwrap(), MIB).unwrap();
    disk::write_noise(&path, 25 * MIB..43 * MIB, 3).unwrap();

    let programs = Programs::for_tests().unwrap();
    let dry_run = |more: &[&str]| {
        let mut client = Command::new(programs.folder().join("janus-client"));
        client.args(["backup", "--dry-run", "--skip-free", "true", "--skip-volumes", "disk/2"]);
        client.arg("--cache-path").arg(folder.path().join("cache")).args(more);
        client.arg("--disks").arg(format!("disk={}", path.display()));
        let done = client.current_dir(folder.path()).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    };
    println!("{}", dry_run(&[]));
    let answer: Value = serde_json::from_str(&dry_run(&["--json"])).unwrap();
    let disk = &answer["disks"][0];
    let [root, left_out, data, rest] = &**disk["volumes"].as_array().unwrap() else {
        panic!("{disk}")
    };
    assert_eq!((&root["number"], &root["name"]), (&1.into(), &"root".into()));
    let no_journal = "full compare: there is no change journal";
    assert_eq!(root["why"], serde_json::json!(["free space skipped", no_journal]));
    let read = |part: &Value| part["read_bytes"].as_u64().unwrap();
    assert!((100_000..8 * MIB).contains(&read(root)), "{root}");
    assert_eq!(left_out["why"], serde_json::json!(["left out by skip_volumes"]));
    assert_eq!((read(left_out), &left_out["size_bytes"]), (0, &(16 * MIB).into()));
    assert_eq!(data["name"], "data");
    assert!((2 * MIB..3 * MIB).contains(&read(data)), "holes cost nothing: {data}");
    assert_eq!((&rest["number"], &rest["name"]), (&Value::Null, &"table and gaps".into()));
    assert!(read(rest) > 0);
    for sum in ["read_bytes", "changed_bytes"] {
        let of = |part: &&Value| part[sum].as_u64().unwrap();
        let parts: u64 = [root, left_out, data, rest].iter().map(of).sum();
        assert_eq!(disk[sum], parts, "{sum}: {disk}");
    }
}
