//! A backup of chosen volumes without their free space, and what comes back.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::FileExt, process::Command};

use serde_json::Value;
use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;

fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
    done.stdout
}

#[test]
fn a_chosen_volume_without_its_free_space_comes_back_whole_and_the_others_as_zeros() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let (path, part) = (site.folder().join("disk.raw"), site.folder().join("part"));
    disk::blank(&path, 40 * MIB).unwrap();
    disk::write_noise(&path, 0..40 * MIB, 1).unwrap();
    let name = path.to_str().unwrap();
    run("sgdisk", &["--zap-all", name]);
    run("sgdisk", &["-n1:2048:+24M", "-n2:0:0", name]);

    // A file system whose free space holds old data.
    let files = site.folder().join("files");
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("kept"), vec![7; 3 << 20]).unwrap();
    disk::blank(&part, 24 * MIB).unwrap();
    disk::write_noise(&part, 0..24 * MIB, 2).unwrap();
    run(
        "mkfs.ext4",
        &["-qF", "-E", "nodiscard", "-d", files.to_str().unwrap(), part.to_str().unwrap()],
    );
    let disk = fs::File::options().read(true).write(true).open(&path).unwrap();
    disk.write_all_at(&fs::read(&part).unwrap(), MIB).unwrap();

    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    let failure = client.failure(&["backup", "--skip-volumes", "disk/4"]).unwrap();
    assert_eq!(failure.exit_code, 2);
    assert!(failure.error.contains("no volume 4; it has 1, 2"), "{}", failure.error);
    let backup = ["backup", "--skip-volumes", "disk/2", "--skip-free", "true"];
    let answer: Value = client.answer(&backup).unwrap();
    let reading = &answer["disks"][0]["reading"];
    assert!(reading["zero_bytes"].as_u64().unwrap() > 28 * MIB, "{reading}");

    let restored = site.folder().join("restored.raw");
    let _: Value = client.answer(&["restore", "disk", "--to", restored.to_str().unwrap()]).unwrap();
    let (before, after) = (fs::read(&path).unwrap(), fs::read(&restored).unwrap());
    let (first, second) = (MIB as usize, 25 * MIB as usize);
    assert_eq!(before[..first], after[..first], "the table and the gap behind it");
    let gpt = 40 * first - (16 << 10);
    assert_eq!(before[gpt..], after[gpt..], "the backup GPT");
    let end = second + 14 * first;
    assert!(after[second..end].iter().all(|byte| *byte == 0), "the volume that was not chosen");

    let volume = site.folder().join("restored-part");
    fs::write(&volume, &after[first..second]).unwrap();
    let volume = volume.to_str().unwrap();
    run("fsck.ext4", &["-fn", volume]);
    assert_eq!(run("debugfs", &["-R", "cat /kept", volume]), vec![7; 3 << 20]);
}
