//! Seeded by hashes alone: the next backup is a delta at once, and what it builds on comes later.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use xtask::{disk, packages, site::answers};

use super::scene::{MACHINE, MIB, NEW, OLD, Scene, another_hour, done};

/// Fetched in a second, so that it takes a while.
const SLOW: u32 = 4;

impl Scene {
    fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.site.server(NEW).unwrap().settings.set(key, value);
    }

    fn restart_new(&mut self) {
        let is_running = self.site.server(NEW).unwrap().process().is_some();
        if is_running {
            self.site.stop_server(NEW).unwrap();
        }
        self.site.start_server(NEW).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }

    /// Seeds by hashes, as slowly as is said, and answers what it said.
    fn seed_hashes(&mut self, mib_per_second: u32, more: &[(&str, Value)]) -> Value {
        self.set("fill.mib_per_second", mib_per_second);
        for (key, value) in more {
            self.set(key, value.clone());
        }
        self.restart_new();
        done(&self.seed(&["--from", OLD, MACHINE, "--hashes-only"]))
    }

    /// On the old server, once it is told to.
    fn keep_only_the_newest(&mut self) {
        self.site.stop_server(OLD).unwrap();
        let settings = &mut self.site.server(OLD).unwrap().settings;
        settings.set("retention.automatic", false);
        for (rule, count) in [("keep_all_days", 0), ("daily", 1), ("weekly", 0), ("monthly", 0)] {
            settings.set(&format!("retention.{rule}"), count);
        }
        settings.set("retention.at_least", 1);
        self.site.start_server(OLD).unwrap();
    }

    /// What an admin command of the old server says of the machine.
    fn clean(&self, how: &[&str]) -> Value {
        let said = done(&self.site.admin(OLD, &[how, &["--json"]].concat()).unwrap());
        println!("{said}");
        said["machines"][0].clone()
    }

    fn stubs(&self) -> Vec<Value> {
        let status = done(&self.site.admin(NEW, &["seed", "status", "--json"]).unwrap());
        status["stubs"].as_array().unwrap().clone()
    }

    fn lacking(&self) -> u64 {
        self.stubs().iter().map(|stub| stub["missing_bytes"].as_u64().unwrap()).sum()
    }

    /// Until its stubs lack no more than so many bytes.
    fn await_filled(&self, rest: u64) {
        let until = Instant::now() + Duration::from_secs(90);
        while self.lacking() > rest {
            assert!(Instant::now() < until, "{:?}\n{}", self.stubs(), self.site.log(NEW));
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Until blocks of its stub are asked of the next backup.
    fn await_asked(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.stubs()[0]["asked_bytes"] == 0 {
            assert!(Instant::now() < until, "{:?}\n{}", self.stubs(), self.site.log(NEW));
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Snapshots on the new server, newest first.
    fn new_ones(&self) -> Vec<answers::Snapshot> {
        let list = self.client.list().unwrap();
        list.snapshots.into_iter().filter(|one| one.server == NEW).collect()
    }

    fn image(&self, snapshot: &answers::Snapshot) -> PathBuf {
        self.images.join(&snapshot.image)
    }

    /// The file of a snapshot while it is a stub.
    fn stub_file(&self, snapshot: &answers::Snapshot) -> PathBuf {
        self.images.join(format!("{}.stub", snapshot.image))
    }

    /// The disk as another program sees it that finds the parents by itself.
    fn read_elsewhere(&self, snapshot: &answers::Snapshot) -> Option<Vec<u8>> {
        seven_zip(&self.image(snapshot))
    }

    /// No other program reads a stub, by whichever name, or what builds on it.
    fn assert_nobody_reads(&self, stub: &answers::Snapshot, child: &answers::Snapshot) {
        let (file, child) = (self.stub_file(stub), self.image(child));
        assert!(file.exists() && child.exists() && !self.image(stub).exists());
        for image in [&file, &child] {
            assert_eq!(seven_zip(image), None, "7-Zip read {}", image.display());
        }
        // It doesn't know parents.
        let mut qemu = Command::new("qemu-img");
        let to = self.site.folder().join("qemu.raw");
        let format = if stub.image.ends_with(".vhdx") { "vhdx" } else { "vpc" };
        qemu.args(["convert", "-O", "raw"]).args(packages::for_qemu(&file, format)).arg(to);
        let read = qemu.output().unwrap();
        assert!(!read.status.success(), "qemu-img read {}", file.display());
        for images in [&[&file][..], &[&child], &[&file, &child]] {
            let error = packages::libvhdi(images, "").unwrap_err().to_string();
            assert!(error.contains("pyvhdi"), "{images:?}: {error}");
        }
    }

    /// Until a server has said something so often.
    fn await_log(&self, server: &str, said: &str, count: usize) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.site.log(server).matches(said).count() < count {
            assert!(Instant::now() < until, "{}", self.site.log(server));
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Only the new server is left, and has all of its newest snapshot.
    fn assert_new_alone_has_it(&mut self) {
        if self.site.server(OLD).unwrap().process().is_some() {
            self.site.kill_server(OLD).unwrap();
        }
        let newest = &self.new_ones()[0];
        assert_eq!((newest.missing_blocks, newest.damaged_blocks), (0, 0), "{newest:?}");
        self.assert_restored(&newest.snapshot_id);
        let verify = self.site.admin(NEW, &["verify", MACHINE, "--json"]).unwrap();
        assert_eq!(verify.status.code(), Some(0), "{verify:?}");
        assert!(self.read_elsewhere(newest).unwrap() == fs::read(&self.disk).unwrap());
    }

    /// Only the new server is asked, without janus: what it lacks it has to get itself.
    fn restore_from_new_alone(&mut self, snapshot: &str) {
        let url = self.site.server(NEW).unwrap().url();
        let mut direct = self.client.twin("direct").unwrap();
        direct.settings.set("urls", vec![url]);
        let to = self.site.folder().join("direct.raw");
        direct.restore(snapshot, &to).unwrap();
        disk::compare(&self.disk, &to).unwrap();
        fs::remove_file(to).unwrap();
    }
}

#[test]
fn the_backup_after_seeding_hashes_is_a_delta_and_the_rest_comes_in_the_background() {
    packages::require(packages::TEST_TOOLS).unwrap();
    let mut scene = Scene::new();
    let seeded = scene.seed_hashes(SLOW, &[]);
    println!("{seeded}");
    let run = &seeded["runs"][0];
    assert_eq!((&run["written_bytes"], &run["promised_bytes"]), (&0.into(), &(40 * MIB).into()));
    assert!(scene.lacking() > 30 * MIB);
    // What clients and other programs see meanwhile.
    let stub = scene.new_ones().remove(0);
    assert!(stub.missing_blocks > 0 && stub.damaged_blocks == 0, "{stub:?}");
    // What it will take counts at once, for quotas as well.
    assert!(stub.image_allocated_bytes >= 40 * MIB, "{stub:?}");
    assert!(!scene.image(&stub).exists());
    let status = scene.client.run(&["status"]).unwrap();
    assert!(status.stdout.contains("1 snapshots incomplete"), "{status:?}");
    scene.restore_from_new_alone(&stub.snapshot_id);
    scene.next_backup(NEW, 20..21, 1);
    let child = scene.new_ones().remove(0);
    assert!(child.parent_snapshot_id == Some(stub.snapshot_id.clone()), "{child:?}");
    scene.await_filled(0);
    assert!(scene.image(&stub).exists());
    assert!(scene.read_elsewhere(&child).unwrap() == fs::read(&scene.disk).unwrap());
    scene.assert_new_alone_has_it();
}

#[test]
fn what_a_stub_lacks_is_read_from_elsewhere_and_never_as_zeros() {
    let mut scene = Scene::new();
    // Only what is read is fetched.
    scene.seed_hashes(0, &[("fill.hours", another_hour().into())]);
    let stub = scene.new_ones().remove(0);
    let verify = scene.site.admin(NEW, &["verify", MACHINE]).unwrap();
    let said = String::from_utf8_lossy(&verify.stdout);
    assert!(verify.status.code() == Some(1) && said.contains("it builds on a stub"), "{verify:?}");
    assert_eq!(seven_zip(&scene.stub_file(&stub)), None);
    let folder = scene.site.folder().join("carried");
    let export = ["export", &stub.snapshot_id, "--to", folder.to_str().unwrap()];
    let exported = scene.site.admin(NEW, &export).unwrap();
    assert!(
        exported.status.code() == Some(1) && !folder.join("janus-backup.json").exists(),
        "{exported:?}"
    );

    scene.site.kill_server(OLD).unwrap();
    let to = scene.site.folder().join("lost.raw");
    let to_text = to.to_str().unwrap();
    let lost = scene.client.failure(&["restore", &stub.snapshot_id, "--to", to_text]).unwrap();
    assert!(lost.error.contains("seeded by hashes") && !to.exists(), "{lost:?}");
    scene.site.start_server(OLD).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    // What was looked for in vain is looked for again after a second.
    thread::sleep(Duration::from_secs(1));
    scene.restore_from_new_alone(&stub.snapshot_id);
    // What was read is here to stay.
    scene.site.kill_server(OLD).unwrap();
    scene.restore_from_new_alone(&stub.snapshot_id);
}

#[test]
fn a_stub_goes_on_after_its_server_or_its_source_was_killed() {
    let mut scene = Scene::new();
    // By the time of day it is as slow.
    let limits = vec!["00:00-12:00 32 Mbit/s", "12:00-24:00 32 Mbit/s"];
    scene.seed_hashes(0, &[("fill.bandwidth", limits.into())]);
    scene.await_filled(30 * MIB);
    scene.site.kill_server(NEW).unwrap();
    scene.site.start_server(NEW).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let lacking = scene.lacking();
    assert!((1..=30 * MIB).contains(&lacking), "{lacking}");
    scene.site.kill_server(OLD).unwrap();
    thread::sleep(Duration::from_secs(1));
    scene.site.start_server(OLD).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    scene.await_filled(0);
    scene.next_backup(NEW, 20..21, 1);
    scene.assert_new_alone_has_it();
}

/// What is fetched by day is only what somebody reads; its source stays all the same.
#[test]
fn outside_of_its_hours_a_stub_keeps_its_source_and_no_other_program_reads_it() {
    packages::require(packages::TEST_TOOLS).unwrap();
    let mut scene = Scene::new();
    scene.keep_only_the_newest();
    let seeded = scene.site.folder().join("seeded.raw");
    disk::copy(&scene.disk, &seeded).unwrap();
    let opened = scene.site.log(OLD).matches("snapshot opened").count();
    scene.seed_hashes(0, &[("fill.hours", another_hour().into())]);
    let lacking = scene.lacking();
    assert!(lacking >= 40 * MIB);
    // Once by the seeding.
    scene.await_log(OLD, "snapshot opened", opened + 2);
    for at in 36..38 {
        disk::write_noise(&scene.disk, at * MIB..(at + 1) * MIB, at).unwrap();
        let backup = scene.client.answer::<answers::Backup>(&["backup", "--server", OLD]).unwrap();
        assert_eq!(backup.disks[0].sent_bytes, MIB);
    }
    scene.backup_on(NEW, 20..21, 3);
    let (child, stub) = (scene.new_ones().remove(0), scene.new_ones().remove(1));
    assert_eq!(child.parent_snapshot_id.as_ref(), Some(&stub.snapshot_id));
    assert_eq!(scene.lacking(), lacking);
    scene.assert_nobody_reads(&stub, &child);

    // The source thins what is older and newer than what was seeded, merges what isn't read, and lets all of it go.
    let thinned = scene.clean(&["retention", "run", "--now"]);
    assert_eq!(thinned["dropped"].as_array().unwrap().len(), 2, "{thinned}");
    assert_ne!(thinned["purged"].as_array().unwrap().len(), 0, "{thinned}");
    let delete = scene.site.admin(OLD, &["delete", MACHINE]).unwrap();
    assert_eq!(delete.status.code(), Some(0), "{delete:?}");
    let waiting = scene.clean(&["trash", "purge"])["waiting"].to_string();
    assert!(waiting.contains("another server still reads it"), "{waiting}");
    assert_eq!(scene.lacking(), lacking);
    scene.restore_from_new_alone(&child.snapshot_id);
    // What was read came as whole segments, and that was all of it.
    scene.await_filled(0);
    scene.site.kill_server(OLD).unwrap();
    let to = scene.site.folder().join("stub.raw");
    scene.client.restore(&stub.snapshot_id, &to).unwrap();
    disk::compare(&seeded, &to).unwrap();
    assert!(scene.read_elsewhere(&child).unwrap() == fs::read(&scene.disk).unwrap());
}

/// The source is restarted and thins at once, before the server that fills from it has come again.
#[test]
fn a_source_that_was_restarted_keeps_what_a_stub_is_filled_from() {
    let mut scene = Scene::new();
    scene.keep_only_the_newest();
    let seeded = scene.site.folder().join("seeded.raw");
    disk::copy(&scene.disk, &seeded).unwrap();
    scene.seed_hashes(0, &[("fill.hours", another_hour().into())]);
    let stub = scene.new_ones().remove(0);
    scene.site.kill_server(NEW).unwrap();
    // What was seeded is covered by what is newer, so that nothing else has it.
    for seed in [50, 51] {
        disk::write_noise(&scene.disk, 0..4 * MIB, seed).unwrap();
        let backup = scene.client.answer::<answers::Backup>(&["backup", "--server", OLD]).unwrap();
        assert_eq!(backup.disks[0].sent_bytes, 4 * MIB);
    }
    scene.site.kill_server(OLD).unwrap();
    scene.site.start_server(OLD).unwrap();
    let planned = scene.clean(&["retention", "plan"]);
    let hold = &planned["holds"][0];
    assert_eq!((&hold["server"], planned["holds"].as_array().unwrap().len()), (&NEW.into(), 1));
    let for_a_week = hold["until_ms"].as_i64().unwrap() - stub.committed_ms;
    assert!(for_a_week > 6 * 86_400_000, "{planned}");
    assert!(planned["runs"].to_string().contains("held"), "{planned}");
    let thinned = scene.clean(&["retention", "run", "--now"]);
    assert_eq!(thinned["dropped"].as_array().unwrap().len(), 2, "{thinned}");

    scene.set("fill.hours", "");
    scene.site.start_server(NEW).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    scene.await_filled(0);
    // What is full needs nothing any more.
    let until = Instant::now() + Duration::from_secs(30);
    while scene.clean(&["retention", "plan"])["holds"] != Value::Array(Vec::new()) {
        assert!(Instant::now() < until, "{}", scene.site.log(NEW));
        thread::sleep(Duration::from_millis(200));
    }
    let thinned = scene.clean(&["retention", "run", "--now"]);
    assert_eq!(thinned["dropped"].as_array().unwrap().len(), 1, "{thinned}");
    scene.site.kill_server(OLD).unwrap();
    let to = scene.site.folder().join("stub.raw");
    scene.client.restore(&stub.snapshot_id, &to).unwrap();
    disk::compare(&seeded, &to).unwrap();
}

/// A VHD has its signature at both ends. What nobody has is asked for by day, too.
#[test]
fn a_stub_of_a_server_that_is_gone_comes_with_the_next_backup_at_any_hour() {
    packages::require(packages::TEST_TOOLS).unwrap();
    let mut scene = Scene::new();
    let settings = [
        ("prefer_vhdx", false.into()),
        ("fill.hours", another_hour().into()),
        ("fill.ask_clients_after_seconds", 1.into()),
    ];
    scene.seed_hashes(0, &settings);
    scene.backup_on(NEW, 20..21, 1);
    let (child, stub) = (scene.new_ones().remove(0), scene.new_ones().remove(1));
    assert!(child.image.ends_with(".vhd") && stub.image.ends_with(".vhd"), "{stub:?}");
    scene.assert_nobody_reads(&stub, &child);
    assert_eq!(scene.stubs()[0]["asked_bytes"], 0, "the old server has it");

    scene.site.kill_server(OLD).unwrap();
    scene.restart_new();
    scene.await_asked();
    // All but what the first one has sent.
    scene.next_backup(NEW, 21..22, 39);
    let newest = scene.new_ones().remove(0);
    assert_eq!((newest.missing_blocks, newest.damaged_blocks), (0, 0), "{newest:?}");
}

#[test]
fn what_no_server_has_any_more_comes_with_the_next_backup() {
    let mut scene = Scene::new();
    scene.seed_hashes(4, &[("fill.ask_clients_after_seconds", 1.into())]);
    scene.await_filled(20 * MIB);
    scene.site.kill_server(OLD).unwrap();
    scene.await_asked();
    let lacking = scene.lacking();
    disk::write_noise(&scene.disk, 38 * MIB..39 * MIB, 77).unwrap();
    let backup = scene.client.backup().unwrap();
    let sent = backup.disks[0].sent_bytes;
    assert_eq!((backup.server.as_str(), backup.disks[0].kind.as_str()), (NEW, "delta"));
    assert!(sent >= lacking.min(38 * MIB) && sent <= 24 * MIB, "{sent} of {lacking}: {backup:?}");
    let newest = scene.new_ones().remove(0);
    assert_eq!((newest.missing_blocks, newest.damaged_blocks), (0, 0), "{newest:?}");
    scene.assert_restored(&newest.snapshot_id);
    // What didn't change since completes the stub; what did is lost with the old server.
    scene.await_filled(2 * MIB);
    let stub = scene.new_ones().pop().unwrap();
    assert!(stub.missing_blocks * 4096 <= MIB, "{stub:?}");
    // The next one is small again.
    disk::write_noise(&scene.disk, 10 * MIB..11 * MIB, 78).unwrap();
    let backup = scene.client.backup().unwrap();
    assert_eq!(backup.disks[0].sent_bytes, MIB, "{backup:?}");
    scene.assert_restored(&backup.disks[0].snapshot_id);
}

/// A block of a stub that was there once is fetched again, by whoever misses it first.
#[test]
fn what_a_stub_has_lost_again_comes_again() {
    let mut scene = Scene::new();
    scene.seed_hashes(SLOW, &[]);
    scene.await_filled(30 * MIB);
    let stub = scene.new_ones().remove(0);
    scene.site.stop_server(NEW).unwrap();
    assert!(stub.missing_blocks > 0);
    let path = scene.images.join(format!("{}.stub", stub.image));
    let image = fs::read(&path).unwrap();
    let block = &fs::read(&scene.disk).unwrap()[MIB as usize..][..4096];
    let at = image.windows(4096).step_by(4096).position(|found| found == block).unwrap();
    let mut damaged = image;
    damaged[at * 4096 + 7] ^= 1;
    fs::write(&path, damaged).unwrap();
    scene.set("fill.hours", another_hour());
    scene.restart_new();
    scene.restore_from_new_alone(&stub.snapshot_id);
    scene.site.kill_server(OLD).unwrap();
    scene.restore_from_new_alone(&stub.snapshot_id);
}

/// The file of a stub is gone: its snapshots are lost, as those of any other image, and the next backup begins anew.
#[test]
fn a_stub_whose_file_is_lost_is_told_and_the_next_backup_is_whole() {
    let mut scene = Scene::new();
    scene.seed_hashes(SLOW, &[]);
    let stub = scene.new_ones().remove(0);
    scene.site.stop_server(NEW).unwrap();
    let path = scene.images.join(format!("{}.stub", stub.image));
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(2 * MIB).unwrap();
    scene.site.start_server(NEW).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while scene.new_ones()[0].damaged_blocks == 0 {
        assert!(Instant::now() < until, "{}", scene.site.log(NEW));
        thread::sleep(Duration::from_millis(100));
    }
    assert!(scene.stubs().is_empty());
    let backup = scene.client.backup().unwrap();
    assert_eq!(
        (backup.server.as_str(), backup.disks[0].kind.as_str()),
        (NEW, "full"),
        "{backup:?}"
    );
    scene.site.kill_server(OLD).unwrap();
    scene.assert_restored(&backup.disks[0].snapshot_id);
}

/// The disk as 7-Zip sees it.
fn seven_zip(image: &Path) -> Option<Vec<u8>> {
    assert!(packages::is_here("7z"));
    let kind = if image.to_string_lossy().contains(".vhdx") { "VHDX" } else { "VHD" };
    packages::seven_zip(image, kind).ok()
}
