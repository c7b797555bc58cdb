//! Disks behind NBD, served by real `qemu-nbd`s, and qcow2 images with their dirty bitmaps.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

mod qemu;
mod running;

use qemu::QemuNbd;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;

struct Scene {
    site: Site,
    client: Client,
    image: PathBuf,
}

impl Scene {
    /// A qcow2 image with data, and a client that backs up what `disk` makes of it.
    fn new(servers: &[&str]) -> Self {
        let servers = servers.iter().map(|&name| name.to_owned()).collect();
        let plan = Plan { servers, ..Plan::default() };
        let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
        let image = site.folder().join("vm.qcow2");
        qemu::create(&image, SIZE);
        let noise = site.folder().join("noise");
        disk::blank(&noise, 24 * MIB).unwrap();
        disk::write_noise(&noise, 0..24 * MIB, 1).unwrap();
        qemu::io(
            &image,
            &[
                format!("write -q -s {} 3M 24M", noise.display()),
                "write -q -P 7 200M 5000K".into(),
                "write -q -z 100M 1M".into(),
            ],
        );
        let client = site.client("machine", &[format!("vm=qcow2:{}", image.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, image }
    }

    fn take(&mut self, disk: &str) {
        self.client.settings.set("disks", vec![disk.to_owned()]);
    }

    /// Backs up, restores and compares; returns what is said of the disk.
    fn backup(&self) -> Value {
        let answer: Value = self.client.answer(&["backup"]).unwrap();
        let mut taken = answer["disks"][0].clone();
        taken["server"] = answer["server"].clone();
        self.assert_restores(taken["snapshot_id"].as_str().unwrap());
        taken
    }

    fn assert_restores(&self, snapshot: &str) {
        let (flat, restored) = (self.path("flat"), self.path("restored"));
        qemu::flatten(&self.image, &flat);
        self.client.restore(snapshot, &restored).unwrap();
        disk::compare(&flat, &restored).unwrap();
        [flat, restored].iter().for_each(|path| fs::remove_file(path).unwrap());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    fn write(&self, commands: &[&str]) {
        let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
        qemu::io(&self.image, &commands);
    }
}

/// Why all was compared, `None` when a bitmap was believed.
fn full_compare(taken: &Value) -> Option<&str> {
    let reading = &taken["reading"];
    reading["full_compare"].as_str().or_else(|| reading["journals"][0]["full_compare"].as_str())
}

fn read_bytes(taken: &Value) -> u64 {
    taken["read_bytes"].as_u64().unwrap()
}

#[test]
fn exports_over_unix_and_tcp_come_back_equal_and_holes_are_not_read() {
    let mut scene = Scene::new(&["server-a"]);
    let server = QemuNbd::unix(&scene.image, &scene.path("nbd.sock"), &["--read-only"]);
    scene.take(&format!("vm={}", server.uri));
    let taken = scene.backup();
    assert!(read_bytes(&taken) < 40 * MIB, "{taken}");
    assert_eq!(full_compare(&taken), Some("there is no change journal"));
    drop(server);

    scene.write(&["write -q -P 9 64M 100K", "discard -q 5M 4M"]);
    let server = QemuNbd::tcp(&scene.image, &["--read-only"]);
    scene.take(&format!("vm={}", server.uri));
    let taken = scene.backup();
    assert_eq!(taken["kind"], "delta");
    drop(server);

    // Nobody serves it any more.
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("cannot connect"), "{failure:?}");
    assert_eq!(failure.exit_code, 4);
}

#[test]
fn a_writable_export_is_refused_unless_a_smeared_copy_will_do() {
    let mut scene = Scene::new(&["server-a"]);
    let server = QemuNbd::unix(&scene.image, &scene.path("nbd.sock"), &[]);
    scene.take(&format!("vm={}", server.uri));
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("qemu-nbd -r"), "{failure:?}");
    scene.client.settings.set("allow_live", true);
    scene.client.backup().unwrap();
    let wrong = scene.path("nbd.sock");
    scene.take(&format!("vm=nbd+unix:///other?socket={}", wrong.display()));
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("there is no such export"), "{failure:?}");
    scene.take("vm=nbds://localhost/");
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("TLS") && failure.exit_code == 2, "{failure:?}");
}

/// A backup reads no more than a dry run says is read, with what that server lacks beside it.
fn assert_foretold(forecast: &Value, taken: &Value) {
    let of_server = |one: &&Value| one["server"] == taken["server"];
    let server = forecast["servers"].as_array().unwrap().iter().find(of_server).unwrap();
    let foretold = read_bytes(forecast) + server["unread_bytes"].as_u64().unwrap();
    // Reads are rounded to pieces.
    assert!(read_bytes(taken) <= foretold + MIB, "{foretold}: {forecast} {taken}");
    assert!(foretold < 14 * MIB, "{forecast}");
}

/// Two servers in turn: each backup is a delta to what its server has, though the bitmap speaks of the last run only.
#[test]
fn a_dirty_bitmap_tells_what_is_read_over_many_rounds() {
    let scene = Scene::new(&["server-a", "server-b"]);
    let first = scene.backup();
    assert_eq!(full_compare(&first), Some("nothing is remembered of an earlier backup"));
    // The other server has nothing yet: what it lacks is read, whatever the bitmap says.
    let second = scene.backup();
    assert_eq!((&second["kind"], full_compare(&second)), (&"full".into(), None));
    let rounds: [&[&str]; 5] = [
        &["write -q -P 1 10M 64K", "write -q -P 2 150M 1M"],
        &[],
        &["discard -q 4M 8M", "write -q -z 201M 512K"],
        &["write -q -P 3 255M 1M", "write -q -P 4 0 512"],
        &["write -q -P 5 10M 64K", "discard -q 0 64K"],
    ];
    for (round, commands) in rounds.iter().enumerate() {
        scene.write(commands);
        let before = qemu::bitmaps(&scene.image);
        let forecast: Value = scene.client.answer(&["backup", "--dry-run"]).unwrap();
        let taken = scene.backup();
        assert_foretold(&forecast["disks"][0], &taken);
        println!(
            "round {round}: {} read, {} sent, {:?}",
            taken["read_bytes"], taken["sent_bytes"], taken["reading"]
        );
        assert_eq!(full_compare(&taken), None, "{taken}");
        // What was written, what the server lacks of the round before, and the audited share.
        assert!(read_bytes(&taken) < 14 * MIB, "{taken}");
        let after = qemu::bitmaps(&scene.image);
        assert_eq!((before.len(), after.len()), (1, 1));
        assert_ne!(before, after);
        assert!(qemu::processes_with(&scene.image).is_empty());
    }
}

#[test]
fn failed_runs_leave_the_bitmap_of_the_last_committed_one() {
    let mut scene = Scene::new(&["server-a"]);
    scene.backup();
    let committed = qemu::bitmaps(&scene.image);

    // No server: the run fails, and takes its bitmap back.
    scene.write(&["write -q -P 1 10M 1M"]);
    let urls = scene.client.settings.get("urls").unwrap().clone();
    scene.client.settings.set("urls", vec!["https://127.0.0.1:9".to_owned()]);
    scene.client.failure(&["backup"]).unwrap();
    scene.client.settings.set("urls", urls);
    assert_eq!(qemu::bitmaps(&scene.image), committed);

    // A dry run as well.
    let forecast: Value = scene.client.answer(&["backup", "--dry-run"]).unwrap();
    assert_eq!(full_compare(&forecast["disks"][0]), None, "{forecast}");
    assert_eq!(qemu::bitmaps(&scene.image), committed);

    // Killed: its bitmap stays, its qemu-nbd doesn't, nor does the folder of its socket.
    let before = folders();
    scene.write(&["write -q -P 2 20M 1M"]);
    for _ in 0..6 {
        let running = scene.client.start(&["backup", "--json"]).unwrap();
        qemu::await_that("qemu-nbd runs", || !qemu::processes_with(&scene.image).is_empty());
        std::thread::sleep(std::time::Duration::from_millis(30));
        running.kill();
        running.wait().unwrap();
        qemu::await_that("qemu-nbd is gone", || qemu::processes_with(&scene.image).is_empty());
    }
    qemu::await_that("no folder is left", || folders().is_subset(&before));
    let left = qemu::bitmaps(&scene.image);
    assert!(left.len() <= 6 && left.contains(&committed[0]), "{left:?}");
    scene.write(&["write -q -P 3 30M 1M"]);
    let taken = scene.backup();
    let known = full_compare(&taken);
    // One that was killed may have compared with the server: then the cursor is gone.
    let is_fine = |why: &str| why.contains("server") || why.contains("remembered");
    assert!(known.is_none_or(is_fine), "{taken}");
    assert_eq!(qemu::bitmaps(&scene.image).len(), 1);
}

/// Of sockets for `qemu-nbd`.
fn folders() -> BTreeSet<std::ffi::OsString> {
    let names = std::fs::read_dir(std::env::temp_dir()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with("janus-nbd-")).collect()
}

#[test]
fn sources_look_into_an_image_and_begin_no_bitmap() {
    let scene = Scene::new(&["server-a"]);
    scene.backup();
    let before = qemu::bitmaps(&scene.image);
    let sources = || -> Value {
        let found: Value = scene.client.answer(&["sources"]).unwrap();
        found["disks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["configured"] == true)
            .unwrap()
            .clone()
    };
    let found = sources();
    assert_eq!((&found["error"], &found["frozen"]), (&Value::Null, &"unmounted".into()), "{found}");
    assert_eq!(found["journal"], "qemu-bitmap");
    assert!(found["size_bytes"] == SIZE, "{found}");
    assert_eq!(qemu::bitmaps(&scene.image), before);
    assert!(qemu::processes_with(&scene.image).is_empty());
    std::fs::remove_file(&scene.image).unwrap();
    let error = sources()["error"].as_str().unwrap().to_owned();
    assert!(error.contains("cannot be opened"), "{error}");
}

#[test]
fn a_writer_that_crashed_makes_the_next_backup_compare_all() {
    let scene = Scene::new(&["server-a"]);
    scene.backup();
    scene.write(&["write -q -P 1 10M 1M"]);
    qemu::crash(&scene.image, "write -q -P 2 40M 1M");
    let taken = scene.backup();
    let reason = full_compare(&taken).unwrap();
    println!("full compare: {reason}");
    assert!(reason.contains("inconsistent"), "{reason}");
    // From then on it goes on as before.
    scene.write(&["write -q -P 3 50M 1M"]);
    let taken = scene.backup();
    assert_eq!(full_compare(&taken), None, "{taken}");
    assert_eq!(qemu::bitmaps(&scene.image).len(), 1);
}

#[test]
fn what_a_bitmap_cannot_know_is_named() {
    let scene = Scene::new(&["server-a"]);
    scene.backup();
    let name = qemu::bitmaps(&scene.image).remove(0);
    let image = qemu::text(&scene.image).to_owned();
    let bitmap = |arguments: &[&str]| {
        qemu::run("qemu-img", &[&["bitmap"], arguments, &[&image, &name]].concat())
    };
    bitmap(&["--remove"]);
    scene.write(&["write -q -P 1 10M 1M"]);
    assert_reason(&scene, "is gone");

    let name = qemu::bitmaps(&scene.image).remove(0);
    let bitmap = |arguments: &[&str]| {
        qemu::run("qemu-img", &[&["bitmap"], arguments, &[&image, &name]].concat())
    };
    bitmap(&["--remove"]);
    bitmap(&["--add", "-g", "32768"]);
    assert_reason(&scene, "granularity");

    let name = qemu::bitmaps(&scene.image).remove(0);
    qemu::run("qemu-img", &["bitmap", "--disable", &image, &name]);
    assert_reason(&scene, "turned off");

    qemu::run("qemu-img", &["resize", "-q", &image, "300M"]);
    scene.write(&["write -q -P 6 290M 1M"]);
    assert_reason(&scene, "bytes and has 314572800");
}

fn assert_reason(scene: &Scene, part: &str) {
    let taken = scene.backup();
    let reason = full_compare(&taken).unwrap_or_default();
    println!("full compare: {reason}");
    assert!(reason.contains(part), "{taken}");
    assert_eq!(full_compare(&scene.backup()), None);
}

#[test]
fn an_image_that_a_machine_uses_is_refused_with_the_way_out() {
    let scene = Scene::new(&["server-a"]);
    let _machine = QemuNbd::unix(&scene.image, &scene.path("nbd.sock"), &[]);
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("lock") && failure.error.contains("NBD export"), "{failure:?}");
    assert_eq!(failure.exit_code, 4);
}

#[test]
fn images_that_are_no_qcow2_or_have_a_backing_file() {
    let mut scene = Scene::new(&["server-a"]);
    let child = scene.path("child.qcow2");
    let (base, overlay) = (qemu::text(&scene.image), qemu::text(&child));
    qemu::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay]);
    scene.take(&format!("vm=qcow2:{}", child.display()));
    scene.image = child;
    scene.backup();
    scene.write(&["write -q -P 1 10M 1M"]);
    let taken = scene.backup();
    assert!(full_compare(&taken).unwrap().contains("backing file"), "{taken}");

    let raw = scene.path("raw");
    disk::blank(&raw, MIB).unwrap();
    scene.take(&format!("vm=qcow2:{}", raw.display()));
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("raw image"), "{failure:?}");
    scene.take("vm=qcow2:/nonexistent");
    let failure = scene.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("/nonexistent"), "{failure:?}");
}
