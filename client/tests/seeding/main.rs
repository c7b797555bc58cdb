//! A new server gets what it needs from another one: the next backup that comes to it is a delta.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod scene;
mod stubs;

use std::{
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use xtask::{disk, site::answers};

use self::scene::{MACHINE, MIB, NEW, OLD, Scene, another_hour, done, json};

#[test]
fn the_backup_after_seeding_is_a_delta_and_later_seedings_fetch_what_differs() {
    let mut scene = Scene::new();
    // At this hour there is no limit.
    let slow = format!("{} 1 Mbit/s", another_hour());
    let seeded = done(&scene.seed(&["--from", OLD, MACHINE, "--bandwidth", &slow]));
    println!("{seeded}");
    assert!(seeded["seconds"].as_f64().unwrap() < 100.0, "{seeded}");
    // Both runs as one base.
    assert_eq!(seeded["written_bytes"], 40 * MIB);
    let listed = scene.client.list().unwrap();
    let here: Vec<_> = listed.snapshots.iter().filter(|one| one.server == NEW).collect();
    assert_eq!(here.len(), 1, "{listed:?}");
    scene.assert_restored(&here[0].snapshot_id);
    let again = done(&scene.seed(&["--from", OLD, "--all"]));
    assert_eq!(again["written_bytes"], 0);
    assert!(again["runs"][0]["newest_here_ms"].is_i64(), "{again}");

    scene.next_backup(NEW, 20..21, 1);
    let known = done(&scene.seed(&["--from", OLD, MACHINE]));
    assert_eq!(known["written_bytes"], 0);
    // Now the old server has what the new one lacks: the chain there goes on.
    scene.next_backup(OLD, 30..32, 3);
    let url = scene.site.server(OLD).unwrap().url();
    let continued = done(&scene.seed(&["--from", &url, "--user", "alice"]));
    assert_eq!(continued["written_bytes"], 2 * MIB, "{continued}");
    scene.next_backup(NEW, 5..6, 1);
    scene.next_backup(OLD, 5..6, 1);
    scene.next_backup(NEW, 5..6, 1);
    let newer = done(&scene.seed(&["--from", OLD, MACHINE]));
    assert!(newer["runs"][0]["newest_here_ms"].is_i64(), "{newer}");
}

/// Disks that were backed up together or one by one, by runs of different ages, and what was dropped here.
#[test]
fn each_disk_is_seeded_for_itself() {
    let scene = Scene::new();
    let other = scene.site.folder().join("other.raw");
    disk::blank(&other, 8 * MIB).unwrap();
    disk::write_noise(&other, 0..3 * MIB, 9).unwrap();
    let disks = [("disk", &scene.disk), ("other", &other)];
    let named = disks.map(|(name, path)| format!("{name}={}", path.display()));
    let mut both = scene.client.clone();
    both.settings.set("disks", named.to_vec());
    let backup = both.answer::<answers::Backup>(&["backup", "--server", OLD]).unwrap();
    assert_eq!((backup.server.as_str(), backup.disks.len()), (OLD, 2));
    let written = |target: &str| {
        done(&scene.seed(&["--from", OLD, target]))["written_bytes"].as_u64().unwrap()
    };
    assert_eq!(written("alice/machine/other"), 3 * MIB);
    assert_eq!(written(MACHINE), 40 * MIB);
    assert_eq!(written(MACHINE), 0);
    // A newer run of one disk keeps nobody from an older one of the other, nor does what is in the trash.
    let delete = scene.site.admin(NEW, &["delete", MACHINE]).unwrap();
    assert_eq!(delete.status.code(), Some(0), "{delete:?}");
    disk::write_noise(&scene.disk, 0..MIB, 10).unwrap();
    let one = scene.client.answer::<answers::Backup>(&["backup", "--server", OLD]).unwrap();
    assert_eq!(one.disks.len(), 1);
    assert_eq!(written("alice/machine/disk"), 40 * MIB);
    assert_eq!(written(MACHINE), 3 * MIB);
    // The older run has its place after the newer one here, and is no newer than what it was made of.
    let known = scene.client.list().unwrap().snapshots.len();
    let back = scene.site.admin(OLD, &["seed", "--json", "--from", NEW, MACHINE]).unwrap();
    let back = done(&back);
    assert!(back["runs"].as_array().unwrap().iter().all(|run| run["newest_here_ms"].is_i64()));
    assert_eq!(
        (&back["written_bytes"], scene.client.list().unwrap().snapshots.len()),
        (&0.into(), known)
    );
    let backup = both.answer::<answers::Backup>(&["backup", "--server", NEW]).unwrap();
    let sent = backup.disks.iter().map(|disk| disk.sent_bytes).sum::<u64>();
    assert_eq!(sent, 0, "{backup:?}");
}

/// By a rule of its settings a server gets what another has, and either alone can restore the newest point.
#[test]
fn a_rule_brings_the_newest_backups_by_itself() {
    let mut scene = Scene::new();
    scene.site.stop_server(NEW).unwrap();
    let settings = &mut scene.site.server(NEW).unwrap().settings;
    // One that has no backup there keeps no other away.
    settings.set(&format!("replicate.{OLD}.machines"), vec!["bob/*", "alice/*"]);
    settings.set(&format!("replicate.{OLD}.every_seconds"), 1);
    settings.set("refresh_seconds", 1);
    settings.set("replicate.nowhere.machines", vec!["*"]);
    settings.set("replicate.nowhere.from", "https://127.0.0.1:1");
    scene.site.start_server(NEW).unwrap();
    scene.await_replicated(40 * MIB);
    for (at, seed) in [(20, 3), (22, 4)] {
        disk::write_noise(&scene.disk, at * MIB..(at + 1) * MIB, seed).unwrap();
        let backup = scene.client.answer::<answers::Backup>(&["backup", "--server", OLD]).unwrap();
        assert_eq!(backup.disks[0].sent_bytes, MIB);
        scene.await_replicated(MIB);
    }
    let rules = || {
        let status = done(&scene.site.admin(NEW, &["seed", "status", "--json"]).unwrap());
        (status["rules"][0].clone(), status["rules"][1].clone())
    };
    let until = Instant::now() + Duration::from_secs(60);
    while rules().0["ended_ms"].is_null() {
        assert!(Instant::now() < until, "{}", scene.site.log(NEW));
        thread::sleep(Duration::from_millis(100));
    }
    let (nowhere, old) = rules();
    assert!(nowhere["failed"].as_str().unwrap().contains("can't be reached"), "{nowhere}");
    assert_eq!((&old["rule"], &old["failed"]), (&OLD.into(), &Value::Null), "{old}");
    // Janus is told, and its status, page and metrics.
    let until = Instant::now() + Duration::from_secs(60);
    let told = || scene.status_of(NEW)["fetching"].clone();
    while told()[1]["bytes"] != 42 * MIB {
        assert!(Instant::now() < until, "{}", told());
        thread::sleep(Duration::from_millis(200));
    }
    let told = told();
    assert_eq!((&told[0]["rule"], &told[1]["rule"]), (&"nowhere".into(), &OLD.into()), "{told}");
    assert!(told[0]["errors"]["away"].as_u64() > Some(0), "{told}");
    assert!(told[0]["succeeded_ms"].is_null() && told[1]["succeeded_ms"].is_i64(), "{told}");
    scene.site.kill_server(OLD).unwrap();
    scene.assert_restored("disk");
    // Its next own one is a delta of what changed since.
    disk::write_noise(&scene.disk, 0..MIB, 5).unwrap();
    let backup = scene.client.backup().unwrap();
    assert_eq!((backup.server.as_str(), backup.disks[0].sent_bytes), (NEW, MIB));
    assert_eq!(backup.disks[0].kind, "delta");
}

/// Rules in both directions: what a server lacks comes with little more, and after that either alone has the newest point.
#[test]
fn two_servers_bring_each_other_what_they_lack_and_little_more() {
    let mut scene = Scene::new();
    for (server, other) in [(OLD, NEW), (NEW, OLD)] {
        scene.site.stop_server(server).unwrap();
        let settings = &mut scene.site.server(server).unwrap().settings;
        settings.set(&format!("replicate.{other}.every_seconds"), 1);
        scene.site.start_server(server).unwrap();
    }
    scene.site.await_ready(&scene.client).unwrap();
    scene.await_equal();
    for (round, holder, lacking) in [(0, NEW, OLD), (1, OLD, NEW), (2, NEW, OLD)] {
        let lacks = 8 * MIB;
        disk::write_noise(&scene.disk, round * lacks..(round + 1) * lacks, 40 + round).unwrap();
        // Of all that goes through janus: what leaves the server that has it, tables and lists too.
        let left = || scene.status_of(holder)["bytes_received"].as_u64().unwrap();
        let before = left();
        let backup =
            scene.client.answer::<answers::Backup>(&["backup", "--server", holder]).unwrap();
        assert_eq!(backup.disks[0].sent_bytes, lacks, "{backup:?}");
        scene.await_equal();
        let moved = left() - before;
        println!("{lacking} lacked {lacks} bytes, {moved} left {holder}");
        assert!((lacks..=lacks + lacks / 10).contains(&moved), "{moved} of {lacks}");
    }
    for (alone, gone) in [(OLD, NEW), (NEW, OLD)] {
        scene.site.kill_server(gone).unwrap();
        let list = scene.client.list().unwrap();
        let newest = list.snapshots.iter().find(|one| one.server == alone).unwrap();
        scene.assert_restored(&newest.snapshot_id);
        scene.site.start_server(gone).unwrap();
        scene.site.await_ready(&scene.client).unwrap();
    }
}

#[test]
fn what_cannot_be_seeded_is_told_with_the_way_out() {
    let mut scene = Scene::new();
    let failed = |more: &[&str], expected: &str| {
        let output = scene.seed(more);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(expected), "{more:?}: {output:?}");
    };
    failed(&["--from", NEW, MACHINE], "is this server");
    failed(&["--from", OLD, "alice/other"], "machines are known at server-a");
    failed(&["--from", "server-x", MACHINE], "machines are known at server-a");
    failed(&["--from", &scene.site.url(), MACHINE], "is a janus");
    failed(&["--from", "https://127.0.0.1:1", MACHINE], "can't be reached");
    let wrong = ["1 MB/s", "08:00-09:00 20 Mbit/s"];
    let wrong = ["--from", OLD, MACHINE, "--bandwidth", wrong[0], "--bandwidth", wrong[1]];
    failed(&wrong, "overlap");
    let mistyped = scene.seed(&["--from", OLD, "alice/machine/dsik"]);
    assert!(mistyped.status.code() == Some(1) && json(&mistyped)["failed"] == 1, "{mistyped:?}");
    let usage = scene.seed(&["--from", OLD]);
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
    // Without a server that runs, too.
    scene.site.stop_server(NEW).unwrap();
    assert_eq!(done(&scene.seed(&["--from", OLD, MACHINE]))["written_bytes"], 40 * MIB);
    scene.site.start_server(NEW).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    scene.next_backup(NEW, 20..21, 1);
}

/// Only disks without a chain get stubs.
#[test]
fn a_run_that_is_named_is_seeded_and_with_hashes_only_its_chain_is_continued() {
    let scene = Scene::new();
    let listed = scene.client.list().unwrap().snapshots;
    let older = &listed.last().unwrap().backup_id;
    let unknown = scene.seed(&["--from", OLD, MACHINE, "--run", &listed[0].snapshot_id]);
    let said = String::from_utf8_lossy(&unknown.stdout);
    assert!(unknown.status.code() == Some(1) && said.contains("it has no run"), "{unknown:?}");
    let usage = scene.seed(&["--from", OLD, "--all", "--run", older]);
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
    let seeded = done(&scene.seed(&["--from", OLD, MACHINE, "--run", older]));
    assert_eq!(seeded["written_bytes"], 40 * MIB);
    let here = || {
        let listed = scene.client.list().unwrap().snapshots;
        listed.into_iter().filter(|one| one.server == NEW).collect::<Vec<_>>()
    };
    assert_eq!(here()[0].committed_ms, listed.last().unwrap().committed_ms);

    let newest = done(&scene.seed(&["--from", OLD, MACHINE, "--hashes-only"]));
    let run = &newest["runs"][0];
    assert_eq!((&run["written_bytes"], &run["promised_bytes"]), (&(3 * MIB).into(), &0.into()));
    let delta = &here()[0];
    assert!(delta.parent_snapshot_id.is_some() && delta.missing_blocks == 0, "{delta:?}");
    scene.assert_restored(&delta.snapshot_id);
    scene.next_backup(NEW, 20..21, 1);
}

/// A machine whose first backup is to come from another server gets no full one meanwhile, unless nobody else is there.
#[test]
fn what_waits_to_be_seeded_is_backed_up_elsewhere_first() {
    let mut scene = Scene::new();
    let hours = another_hour();
    done(&scene.seed(&["--from", OLD, "--all", "--queue", "--hours", &hours]));
    scene.backup_on(OLD, 20..21, 1);
    // After a restart, too.
    scene.site.stop_server(NEW).unwrap();
    scene.site.start_server(NEW).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    disk::write_noise(&scene.disk, 21 * MIB..22 * MIB, 7).unwrap();
    let backup = scene.client.backup().unwrap();
    let skipped = format!("{:?}", backup.skipped);
    assert!(backup.server == OLD && skipped.contains("from another server"), "{backup:?}");

    scene.site.kill_server(OLD).unwrap();
    let backup = scene.client.backup().unwrap();
    assert_eq!((backup.server.as_str(), backup.disks[0].kind.as_str()), (NEW, "full"));
    scene.assert_restored(&backup.disks[0].snapshot_id);
}

#[test]
fn the_queue_goes_on_by_itself() {
    let mut scene = Scene::new();
    scene.site.kill_server(OLD).unwrap();
    let queued = |scene: &Scene| {
        let status = done(&scene.site.admin(NEW, &["seed", "status", "--json"]).unwrap());
        status["queue"].as_array().unwrap().clone()
    };
    let first = done(&scene.seed(&["--from", OLD, MACHINE, "--queue"]));
    let later = done(&scene.seed(&["--from", OLD, "--all", "--queue"]));
    assert_eq!((&first["number"], &later["number"]), (&1.into(), &2.into()));
    let cancel = |number| scene.site.admin(NEW, &["seed", "cancel", number, "--json"]).unwrap();
    assert_eq!(cancel("7").status.code(), Some(1));
    done(&cancel("2"));
    let waiting = queued(&scene);
    assert_eq!(waiting.len(), 1, "{waiting:?}");
    assert_eq!((&waiting[0]["from"], &waiting[0]["what"]), (&OLD.into(), &MACHINE.into()));

    scene.site.kill_server(NEW).unwrap();
    scene.site.start_server(NEW).unwrap();
    scene.site.start_server(OLD).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while !queued(&scene).is_empty() {
        assert!(Instant::now() < until, "{:?}: {}", queued(&scene), scene.site.log(NEW));
        thread::sleep(Duration::from_millis(100));
    }
    scene.site.await_ready(&scene.client).unwrap();
    scene.next_backup(NEW, 20..21, 1);
    // Numbers aren't given twice.
    assert_eq!(done(&scene.seed(&["--from", OLD, "--all", "--queue"]))["number"], 3);
}

#[test]
fn a_seeding_goes_on_after_its_server_or_the_other_one_was_killed() {
    let mut scene = Scene::new();
    let start = |scene: &Scene, limit: [&str; 2]| {
        let arguments = [&["seed", "--json", "--from", OLD, MACHINE], &limit[..]].concat();
        let mut command = scene.site.admin_command(NEW, &arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // While it goes on a backup finds the other server.
    let seeding = start(&scene, ["--mib-per-second", "4"]);
    scene.await_stored(8 * MIB);
    let backup = scene.client.backup().unwrap();
    assert_eq!(backup.server, OLD, "{backup:?}");
    let open = |scene: &Scene| {
        let status = done(&scene.site.admin(NEW, &["seed", "status", "--json"]).unwrap());
        status["open"].as_array().unwrap().clone()
    };
    let going_on = &open(&scene)[0];
    let received = going_on["received_bytes"].as_u64().unwrap();
    assert!(going_on["going_on"] == true && (1..40 * MIB).contains(&received), "{going_on}");
    scene.site.kill_server(NEW).unwrap();
    let lost = seeding.wait_with_output().unwrap();
    assert_ne!(lost.status.code(), Some(0), "{lost:?}");

    scene.site.start_server(NEW).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let stopped = &open(&scene)[0];
    assert_eq!((&stopped["disk_id"], &stopped["going_on"]), (&"disk".into(), &false.into()));
    let seeding = start(&scene, ["--bandwidth", "00:00-24:00 32 Mbit/s"]);
    scene.await_stored(16 * MIB);
    scene.site.kill_server(OLD).unwrap();
    thread::sleep(Duration::from_secs(2));
    scene.site.start_server(OLD).unwrap();
    let seeded = done(&seeding.wait_with_output().unwrap());
    println!("{seeded}");
    // What was begun first, then the backup that was made meanwhile.
    let runs = seeded["runs"].as_array().unwrap();
    assert_eq!((runs.len(), &runs[0]["went_on"]), (2, &true.into()));
    assert!(runs[0]["written_bytes"].as_u64() < Some(40 * MIB), "{seeded}");
    assert!(open(&scene).is_empty());
    scene.site.await_ready(&scene.client).unwrap();
    scene.next_backup(NEW, 20..21, 1);
}
