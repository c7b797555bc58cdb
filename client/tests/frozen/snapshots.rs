//! Backups of mounted volumes, from snapshots that the client makes and removes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use xtask::site::{Client, Plan, Programs, Site};

use super::{freezing::write, volumes::Volume};

const THICK: &str = "lvcreate --yes --snapshot --permission r --addtag janus-backup --name NAME --extents 10%ORIGIN vg/system";
const CLONE: &str = "zfs clone -o readonly=on -o volmode=dev vg/disk@NAME vg/NAME";
const SNAPSHOT: &str = "zfs snapshot -o janus-backup:snapshot=yes vg/disk@NAME";

fn site_of(volume: &Volume) -> (Site, Client) {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let disk = format!("disk={}", volume.device().display());
    let mut client = site.client("machine", &[disk]).unwrap();
    client.path = Some(volume.programs());
    (site, client)
}

fn newest(client: &Client) -> Value {
    let list: Value = client.answer(&["list"]).unwrap();
    list["snapshots"][0].clone()
}

fn restore(site: &Site, client: &Client, name: &str) -> PathBuf {
    let to = site.folder().join(name);
    let _: Value = client.answer(&["restore", "disk", "--to", to.to_str().unwrap()]).unwrap();
    to
}

fn output(program: &str, arguments: &[&str], path: &Path) -> String {
    let done = Command::new(program).args(arguments).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{program}: {said} {}", String::from_utf8_lossy(&done.stderr));
    said
}

/// An ext4 that was frozen: it needs no look into its journal.
fn is_clean(image: &Path) -> bool {
    output("e2fsck", &["-fn"], image);
    !output("dumpe2fs", &["-h"], image).contains("needs_recovery")
}

/// Backs up while somebody writes all the time.
fn backup_in_use(volume: &Volume, client: &Client) -> Value {
    let is_over = AtomicBool::new(false);
    let folder = volume.mounted.folder();
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0_u64.. {
                let path = folder.join(format!("busy-{}", number % 50));
                fs::write(path, vec![number as u8; 4000 + (number % 9000) as usize]).unwrap();
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let made = client.answer(&["backup"]);
        is_over.store(true, Ordering::Relaxed);
        made.unwrap()
    })
}

#[test]
fn as_root_a_mounted_lvm_volume_is_read_from_a_snapshot() {
    let volume = Volume::lvm();
    let (site, mut client) = site_of(&volume);
    fs::write(volume.mounted.folder().join("file"), "content").unwrap();
    let _: Value = client.answer(&["backup", "--dry-run"]).unwrap();
    assert!(volume.said().is_empty());

    backup_in_use(&volume, &client);
    assert_eq!(volume.said(), [THICK, "lvremove --yes vg/NAME"]);
    let made = newest(&client);
    assert_eq!((&made["disk_id"], &made["consistency"]), (&"disk".into(), &"frozen".into()));
    let restored = restore(&site, &client, "one.raw");
    assert!(is_clean(&restored));
    assert_eq!(output("debugfs", &["-R", "cat file"], &restored), "content");

    // A client that was killed has left one; those of others are none of our business.
    let group = &volume.group;
    let others = format!(
        "{group} nightly sri-a-s--- system janus-backup\n{group} janus-mine sri-a-s--- system mine\n"
    );
    fs::write(volume.file("janus-left"), "").unwrap();
    fs::write(
        volume.file("snapshots"),
        format!("{others}{group} janus-left sri-a-s--- system janus-backup\n"),
    )
    .unwrap();
    let second: Value = client.answer(&["backup"]).unwrap();
    assert_eq!(second["disks"][0]["kind"], "full", "B's turn");
    let third: Value = client.answer(&["backup"]).unwrap();
    assert_eq!(third["disks"][0]["kind"], "delta", "the same disk as before");
    let said = volume.said();
    assert_eq!(said[..3], ["lvremove --yes vg/janus-left", THICK, "lvremove --yes vg/NAME"]);
    assert_eq!(volume.snapshots(), others);

    // One that can't be removed is told, and the backup counts.
    volume.on("lvremove---yes", "fail 'it is in use'");
    let finished = client.run(&["backup"]).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains("THE SNAPSHOT STAYS"), "{}", finished.stderr);
    assert!(finished.stderr.contains(&format!("type: lvremove --yes {group}/janus-")));
    volume.calm("lvremove---yes");

    client.settings.set("make_snapshots", false);
    let failure = client.failure(&["backup"]).unwrap();
    assert!(failure.exit_code == 4 && failure.error.contains("mounted"), "{failure:?}");
}

#[test]
fn as_root_a_mounted_zvol_is_frozen_by_us_while_its_snapshot_is_made() {
    let volume = Volume::zfs();
    let (site, client) = site_of(&volume);
    backup_in_use(&volume, &client);
    assert_eq!(volume.said(), [SNAPSHOT, CLONE, "zfs destroy vg/NAME", "zfs destroy vg/disk@NAME"]);
    assert_eq!(newest(&client)["consistency"], "frozen");
    assert!(is_clean(&restore(&site, &client, "one.raw")));
    assert_eq!(volume.snapshots(), "");

    // The client is killed while all is frozen: the watchdog thaws, and the next run removes what was left.
    let reached = volume.file("reached");
    volume.on("zfs-snapshot", &format!("touch {}; sleep 3", reached.display()));
    let killed = client.start(&["backup"]).unwrap();
    wait_for(&reached);
    let held = write(volume.mounted.folder(), "held");
    assert!(held.recv_timeout(Duration::from_millis(400)).is_err());
    killed.kill();
    let began = Instant::now();
    held.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    drop(killed);
    volume.calm("zfs-snapshot");
    // The stand-in goes on to its end, as ZFS would.
    thread::sleep(Duration::from_secs(4));
    assert!(volume.snapshots().contains(" yes "), "{}", volume.snapshots());
    volume.said();
    client.backup().unwrap();
    assert_eq!(volume.said()[0], "zfs destroy vg/disk@NAME");
    assert_eq!(volume.snapshots(), "");

    // Somebody else has frozen it and may thaw it at any time.
    let folder = volume.mounted.folder();
    output("fsfreeze", &["--freeze"], folder);
    let made = client.run(&["backup", "--json"]).unwrap();
    output("fsfreeze", &["--unfreeze"], folder);
    assert!(
        made.code == Some(0) && made.stderr.contains("somebody else has frozen it"),
        "{made:?}"
    );
    assert_eq!(newest(&client)["consistency"], "crash");
}

#[test]
fn as_root_nothing_stays_of_a_backup_that_fails_or_is_stopped() {
    let volume = Volume::lvm();
    let (site, mut client) = site_of(&volume);
    let disk = format!("disk={}", volume.device().display());

    // Too small for what was written meanwhile.
    fs::write(volume.mounted.folder().join("file"), vec![7; 9 << 20]).unwrap();
    fs::write(volume.file("overflow"), "").unwrap();
    let failure = client.failure(&["backup"]).unwrap();
    assert!(failure.exit_code == 4 && failure.error.contains("has overflowed"), "{failure:?}");
    assert!(failure.error.contains("snapshot_size"), "{failure:?}");
    assert_eq!(volume.said(), [THICK, "lvremove --yes vg/NAME"]);
    fs::remove_file(volume.file("overflow")).unwrap();

    // A later disk's fails.
    let twin = site.folder().join("twin");
    let node = Command::new("mknod").arg(&twin).args(numbers(volume.device())).status().unwrap();
    assert!(node.success());
    volume.on(
        "lvcreate---yes",
        "[ -e \"$dir/second\" ] && fail 'no space left in the group'; touch \"$dir/second\"",
    );
    client.settings.set("disks", vec![disk.clone(), format!("twin={}", twin.display())]);
    let failure = client.failure(&["backup"]).unwrap();
    assert!(failure.exit_code == 4 && failure.error.contains("no space left"), "{failure:?}");
    assert!(failure.error.contains("make_snapshots = false"), "{failure:?}");
    assert_eq!(volume.said().last().unwrap(), "lvremove --yes vg/NAME");
    assert_eq!(volume.snapshots(), "");
    client.settings.set("disks", vec![disk]);

    // Stopped in the middle of making it: what was begun is done, and undone.
    let reached = volume.file("reached");
    volume.on("lvcreate---yes", &format!("touch {}; sleep 1", reached.display()));
    let stopped = client.start(&["backup"]).unwrap();
    wait_for(&reached);
    stopped.interrupt();
    assert_eq!(stopped.wait().unwrap().code, Some(130));
    assert_eq!(volume.said(), [THICK, "lvremove --yes vg/NAME"]);
    assert_eq!(volume.snapshots(), "");
}

fn numbers(device: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let rdev = fs::metadata(device).unwrap().rdev();
    vec!["b".into(), rustix::fs::major(rdev).to_string(), rustix::fs::minor(rdev).to_string()]
}

fn wait_for(path: &Path) {
    let until = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(Instant::now() < until, "{} doesn't come", path.display());
        thread::sleep(Duration::from_millis(10));
    }
}
