//! Retention of a real server: what goes, what stays, what can be brought back, and what a full disk leaves.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::PathBuf,
    process::Output,
    time::{Duration, Instant},
};

use serde_json::Value;
use xtask::{
    disk,
    loopback::SmallFileSystem,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const SERVER: &str = "server-a";

/// A site with one server, whose rules keep two backups of a day.
struct Kept {
    site: Site,
    client: Client,
    disk: PathBuf,
    /// Snapshots, oldest first, each with a copy of the disk.
    copies: Vec<(String, PathBuf)>,
}

impl Kept {
    fn new(is_automatic: bool) -> Self {
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let settings = &mut site.server(SERVER).unwrap().settings;
        settings.set("retention.automatic", is_automatic);
        for (rule, count) in [("keep_all_days", 0), ("daily", 1), ("weekly", 0), ("monthly", 0)] {
            settings.set(&format!("retention.{rule}"), count);
        }
        settings.set("retention.at_least", 2);
        site.start_all().unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, 16 * MIB).unwrap();
        disk::write_noise(&disk, 0..8 * MIB, 1).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, disk, copies: Vec::new() }
    }

    /// A backup after a change of a mebibyte here and there.
    fn backup(&mut self) -> String {
        disk::change(&self.disk, MIB, self.copies.len() as u64).unwrap();
        let snapshot = self.client.backup().unwrap().disks[0].snapshot_id.clone();
        let copy = self.site.folder().join(format!("copy-{}", self.copies.len()));
        disk::copy(&self.disk, &copy).unwrap();
        self.copies.push((snapshot.clone(), copy));
        snapshot
    }

    fn admin(&self, arguments: &[&str]) -> Output {
        self.site.admin(SERVER, arguments).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--json"]).collect();
        let output = self.admin(&arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refused(&self, arguments: &[&str], words: &str) {
        let output = self.admin(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains(words), "{arguments:?}: {said}");
    }

    /// Snapshots that are listed, oldest first.
    fn listed(&self) -> Vec<String> {
        let snapshots = self.client.list().unwrap().snapshots;
        snapshots.into_iter().rev().map(|snapshot| snapshot.snapshot_id).collect()
    }

    /// All that is listed restores as it was backed up.
    fn assert_listed(&self, expected: &[usize]) {
        let expected: Vec<_> = expected.iter().map(|index| self.copies[*index].0.clone()).collect();
        assert_eq!(self.listed(), expected);
        for (snapshot, copy) in self.copies.iter().filter(|(id, _)| expected.contains(id)) {
            let to = self.site.folder().join("restored");
            self.client.restore(snapshot, &to).unwrap();
            disk::compare(copy, &to).unwrap();
            fs::remove_file(to).unwrap();
        }
    }
}

#[test]
fn what_no_rule_keeps_goes_and_the_rest_restores() {
    let mut kept = Kept::new(false);
    for _ in 0..5 {
        kept.backup();
    }
    let shown = kept.admin(&["retention", "plan"]);
    println!("{}", String::from_utf8_lossy(&shown.stdout));
    let plan = kept.json(&["retention", "plan"]);
    assert_eq!((&plan["drops"], &plan["runs"]), (&3.into(), &5.into()), "{plan}");
    let oldest = &plan["machines"][0]["runs"][4];
    assert_eq!((&oldest["keep"], &oldest["why"]), (&false.into(), &"no_rule".into()), "{plan}");
    assert_eq!(kept.admin(&["retention", "run"]).status.code(), Some(2), "needs --now");
    kept.json(&["retention", "run", "--dry-run"]);
    kept.assert_listed(&[0, 1, 2, 3, 4]);

    let before = kept.json(&["usage"])["machines"][0]["allocated_bytes"].as_u64().unwrap();
    let done = kept.json(&["retention", "run", "--now"]);
    println!("{done}");
    let of_machine = &done["machines"][0];
    assert_eq!(of_machine["dropped"].as_array().unwrap().len(), 3, "{done}");
    assert_eq!(of_machine["purged"].as_array().unwrap().len(), 3, "{done}");
    kept.assert_listed(&[3, 4]);
    let after = kept.json(&["usage"])["machines"][0]["allocated_bytes"].as_u64().unwrap();
    assert!(after < before, "{after} {before}");
    assert_eq!(kept.json(&["retention", "plan"])["drops"], 0);
    kept.backup();
    kept.assert_listed(&[3, 4, 5]);
    kept.site.kill_server(SERVER).unwrap();
    kept.site.start_server(SERVER).unwrap();
    kept.site.await_ready(&kept.client).unwrap();
    kept.assert_listed(&[3, 4, 5]);
}

#[test]
fn a_server_thins_by_itself_after_backups() {
    let mut kept = Kept::new(true);
    for _ in 0..4 {
        kept.backup();
    }
    let until = Instant::now() + Duration::from_secs(30);
    while kept.listed().len() > 2 {
        assert!(Instant::now() < until, "{:?}", kept.listed());
        std::thread::sleep(Duration::from_millis(100));
    }
    kept.assert_listed(&[2, 3]);
}

#[test]
fn pins_and_the_trash_hold_what_an_administrator_wants() {
    let mut kept = Kept::new(false);
    let first = kept.backup();
    for _ in 0..3 {
        kept.backup();
    }
    kept.json(&["pin", &first]);
    kept.site.kill_server(SERVER).unwrap();
    // Without a server the command does it itself.
    kept.json(&["retention", "run", "--now"]);
    kept.site.start_server(SERVER).unwrap();
    kept.site.await_ready(&kept.client).unwrap();
    kept.assert_listed(&[0, 2, 3]);

    kept.refused(&["delete", &first], "is pinned");
    kept.json(&["unpin", &first]);
    kept.json(&["delete", &first]);
    kept.assert_listed(&[2, 3]);
    let trash = kept.json(&["trash", "list"]);
    println!("{}", String::from_utf8_lossy(&kept.admin(&["trash", "list"]).stdout));
    assert_eq!(trash["trash"][0]["snapshots"][0]["snapshot"], first.as_str(), "{trash}");
    // Not due: it can still be brought back.
    kept.json(&["retention", "run", "--now"]);
    kept.json(&["trash", "restore", &first]);
    kept.assert_listed(&[0, 2, 3]);
    assert_eq!(kept.json(&["retention", "plan"])["drops"], 0, "what was brought back is pinned");

    kept.json(&["unpin", &first]);
    kept.json(&["delete", "alice/machine"]);
    assert_eq!(kept.listed(), [""; 0]);
    let purged = kept.json(&["trash", "purge"]);
    assert_eq!(purged["machines"][0]["purged"].as_array().unwrap().len(), 3, "{purged}");
    kept.refused(&["trash", "restore", &first], "not in the trash");
    kept.backup();
    kept.assert_listed(&[4]);
}

#[test]
fn a_plan_that_drops_much_waits_for_force() {
    let mut kept = Kept::new(false);
    for _ in 0..8 {
        kept.backup();
    }
    kept.refused(&["retention", "run", "--now"], "6 of 8 runs would go");
    assert_eq!(kept.listed().len(), 8);
    kept.json(&["retention", "run", "--now", "--force"]);
    kept.assert_listed(&[6, 7]);
}

#[test]
fn a_user_over_the_quota_is_refused_and_told_so() {
    let mut kept = Kept::new(false);
    kept.backup();
    let restarted = |kept: &mut Kept, quota: &str| {
        kept.site.stop_server(SERVER).unwrap();
        kept.site.server(SERVER).unwrap().settings.set("quotas.alice", quota);
        kept.site.start_server(SERVER).unwrap();
        kept.site.await_ready(&kept.client).unwrap();
    };
    restarted(&mut kept, "4 MiB");
    kept.client.settings.set("failover_after_seconds", 2);
    let failure = kept.client.failure(&["backup"]).unwrap();
    assert!(failure.error.contains("quota is 4.0 MiB"), "{failure:?}");
    // While it writes: the first backup and 16 MiB of this one are there when it is looked at again.
    restarted(&mut kept, "24 MiB");
    fs::OpenOptions::new().write(true).open(&kept.disk).unwrap().set_len(64 * MIB).unwrap();
    disk::write_noise(&kept.disk, 0..64 * MIB, 5).unwrap();
    let failure = kept.client.failure(&["backup"]).unwrap();
    println!("{}", failure.error);
    assert!(failure.error.contains("quota is 24.0 MiB"), "{failure:?}");
    kept.assert_listed(&[0]);
    restarted(&mut kept, "1 GiB");
    kept.backup();
    kept.assert_listed(&[0, 1]);
}

/// Moves the store of a stopped server to a small file system.
fn move_to_small(kept: &mut Kept, size_bytes: u64) -> SmallFileSystem {
    kept.site.stop_server(SERVER).unwrap();
    let store = SmallFileSystem::mount(size_bytes).unwrap();
    let images = store.folder().join("images");
    let settings = &mut kept.site.server(SERVER).unwrap().settings;
    settings.set("image_path", images.to_string_lossy());
    settings.set("reserve", "8 MiB");
    store
}

/// Below the reserve: no new backups, but reads; and a server that may thin helps itself.
#[test]
fn as_root_below_the_reserve_there_are_reads_and_retention_but_no_backups() {
    let mut kept = Kept::new(false);
    let store = move_to_small(&mut kept, 96 * MIB);
    kept.site.start_server(SERVER).unwrap();
    kept.site.await_ready(&kept.client).unwrap();
    for _ in 0..4 {
        disk::write_noise(&kept.disk, 0..12 * MIB, 50 + kept.copies.len() as u64).unwrap();
        kept.backup();
    }
    let filler = store.folder().join("filler");
    let free = || {
        let usage = kept.json(&["usage"]);
        usage["free_bytes"].as_u64().unwrap()
    };
    let mut file = fs::File::create(&filler).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(7), free() - 4 * MIB), &mut file)
        .unwrap();
    file.sync_all().unwrap();
    kept.client.settings.set("failover_after_seconds", 2);
    let failure = kept.client.failure(&["backup"]).unwrap();
    println!("{}", failure.error);
    // By the server itself, or by janus, which has heard of it.
    assert!(failure.error.contains("kept in reserve") || failure.exit_code == 3, "{failure:?}");
    kept.assert_listed(&[0, 1, 2, 3]);
    let until = Instant::now() + Duration::from_secs(20);
    while kept.client.status().unwrap().servers[0].ready {
        assert!(Instant::now() < until, "health says that backups are taken");
        std::thread::sleep(Duration::from_millis(200));
    }

    kept.site.stop_server(SERVER).unwrap();
    kept.site.server(SERVER).unwrap().settings.set("retention.automatic", true);
    kept.site.start_server(SERVER).unwrap();
    kept.site.await_ready(&kept.client).unwrap();
    kept.assert_listed(&[2, 3]);
    kept.backup();
    drop(kept);
    drop(store);
}

/// Where blocks can't be shared, merging writes before it frees: what has no room for that stays, and is not lost for nothing.
#[test]
fn as_root_what_cannot_be_merged_is_not_dropped() {
    let mut kept = Kept::new(false);
    let store = move_to_small(&mut kept, 128 * MIB);
    kept.site.start_server(SERVER).unwrap();
    kept.site.await_ready(&kept.client).unwrap();
    disk::blank(&kept.disk, 64 * MIB).unwrap();
    for round in 0..6 {
        disk::write_noise(&kept.disk, round * 8 * MIB..(round + 1) * 8 * MIB, round).unwrap();
        kept.backup();
    }
    let leave = |kept: &Kept, bytes: u64| {
        let filler = store.folder().join("filler");
        let _ = fs::remove_file(&filler);
        let free = kept.json(&["usage"])["free_bytes"].as_u64().unwrap();
        let mut file = fs::File::create(&filler).unwrap();
        let mut rest = std::io::Read::take(std::io::repeat(7), free - bytes);
        std::io::copy(&mut rest, &mut file).unwrap();
        file.sync_all().unwrap();
    };
    leave(&kept, 4 * MIB);
    let said = |output: Output| String::from_utf8(output.stdout).unwrap();
    let plan = said(kept.admin(&["retention", "plan"]));
    println!("{plan}");
    assert_eq!(plan.matches("would be kept now, merging it takes").count(), 4, "{plan}");
    let done = kept.json(&["retention", "run", "--now"]);
    println!("{done}");
    let machine = &done["machines"][0];
    assert_eq!(machine["dropped"].as_array().unwrap().len(), 0, "{done}");
    assert!(machine["waiting"][0]["why"].as_str().unwrap().starts_with("it is kept, merging"));
    kept.assert_listed(&[0, 1, 2, 3, 4, 5]);
    let second = kept.copies[1].0.clone();
    let deleted = said(kept.admin(&["delete", &second]));
    assert!(deleted.contains("its space doesn't come free now: merging it takes"), "{deleted}");
    kept.json(&["trash", "restore", &second]);
    kept.json(&["unpin", &second]);

    // With room for one at a time all go, one after the other.
    leave(&kept, 24 * MIB);
    let done = kept.json(&["retention", "run", "--now"]);
    assert_eq!(done["machines"][0]["purged"].as_array().unwrap().len(), 4, "{done}");
    kept.assert_listed(&[4, 5]);
    drop(kept);
    drop(store);
}

/// A full disk helps itself: no backups, but reads; retention frees what no rule keeps; then backups go on.
#[test]
fn as_root_a_full_disk_takes_backups_again_after_retention() {
    let mut kept = Kept::new(false);
    let store = move_to_small(&mut kept, 2048 * MIB);
    kept.site.start_server(SERVER).unwrap();
    disk::blank(&kept.disk, 640 * MIB).unwrap();
    // Each writes the same half anew, until there is no room for another.
    let mut failure = None;
    for round in 0..10 {
        disk::write_noise(&kept.disk, 0..320 * MIB, 100 + round).unwrap();
        kept.client.settings.set("failover_after_seconds", 2);
        match kept.client.backup() {
            Ok(backup) => {
                let copy = kept.site.folder().join(format!("full-{round}"));
                disk::copy(&kept.disk, &copy).unwrap();
                kept.copies.push((backup.disks[0].snapshot_id.clone(), copy));
            }
            Err(error) => {
                failure = Some(error.to_string());
                break;
            }
        }
    }
    println!("{} backups fit; then: {failure:?}", kept.copies.len());
    assert!(failure.is_some() && kept.copies.len() >= 3, "{failure:?}");
    let all: Vec<usize> = (0..kept.copies.len()).collect();
    kept.assert_listed(&all);

    // Others take the rest to the last block: the server starts all the same.
    fill(store.folder());
    kept.site.stop_server(SERVER).unwrap();
    // Commands too, which open the store themselves while no server runs.
    kept.json(&["usage"]);
    kept.site.start_server(SERVER).unwrap();
    let spare = store.folder().join("images/.spare");
    assert!(spare.exists(), "whoever fills the disk doesn't get it at a start");
    kept.site.stop_server(SERVER).unwrap();
    let oldest = kept.copies[0].0.clone();
    kept.json(&["delete", &oldest]);
    kept.json(&["trash", "restore", &oldest]);
    kept.json(&["unpin", &oldest]);
    assert!(!spare.exists(), "what frees space gets it");
    kept.site.start_server(SERVER).unwrap();

    let done = kept.json(&["retention", "run", "--now", "--force"]);
    println!("{done}");
    let kept_now = &all[all.len() - 2..];
    kept.assert_listed(kept_now);
    kept.site.await_ready(&kept.client).unwrap();
    let backup = kept.client.backup().unwrap();
    println!("resumed: {}", backup.resumed);
    let to = kept.site.folder().join("restored");
    kept.client.restore(&backup.disks[0].snapshot_id, &to).unwrap();
    disk::compare(&kept.disk, &to).unwrap();

    // Even where nothing was kept for that: what is there can be read.
    kept.site.kill_server(SERVER).unwrap();
    let _ = fs::remove_file(store.folder().join("images/.spare"));
    fill(store.folder());
    kept.site.start_server(SERVER).unwrap();
    let again = kept.site.folder().join("restored again");
    kept.client.restore(&backup.disks[0].snapshot_id, &again).unwrap();
    disk::compare(&kept.disk, &again).unwrap();
    drop(kept);
    drop(store);
}

/// Fills a file system to its last block.
fn fill(folder: &std::path::Path) {
    let path = folder.join(format!("filler-{}", fs::read_dir(folder).unwrap().count()));
    let mut filler = fs::File::create(path).unwrap();
    let error = std::io::copy(&mut std::io::repeat(7), &mut filler).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    filler.sync_all().unwrap();
    let count = fs::read_dir(folder).unwrap().count();
    let more = |number| fs::write(folder.join(format!("more-{count}-{number}")), [7; 4096]);
    let fits = (0..10_000).take_while(|number| more(*number).is_ok()).count();
    println!("{fits} small files fit beside it");
    assert!(fits < 10_000);
}
