//! The main job with real processes: whatever was on the disk comes back, bit by bit, and only what changed travels.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Instant,
};

use janus_client::cache::DiskCache;
use janus_proto::hash::hash_block;
use xtask::{
    disk,
    loopback::LoopDevice,
    site::{Client, Plan, Programs, Site, answers},
};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 256 * MIB;
const JANUS_MEMORY: u64 = 64 * MIB;

fn soak() -> bool {
    std::env::var_os("JANUS_SOAK").is_some()
}

/// A site whose only server takes every backup, so that chains grow with each.
fn one_server() -> Site {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    Site::start(Programs::for_tests().unwrap(), &plan).unwrap()
}

/// A disk file of a site and the client that backs it up.
fn disk_of(site: &Site, size_bytes: u64) -> (PathBuf, Client) {
    let path = site.folder().join("disk.raw");
    disk::blank(&path, size_bytes).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    (path, client)
}

fn backup(client: &Client) -> answers::Disk {
    let backup = client.backup().unwrap();
    assert_eq!(backup.disks.len(), 1, "{backup:?}");
    backup.disks[0].clone()
}

/// Restores a snapshot and compares it with what the disk was.
fn assert_restores(client: &Client, site: &Site, snapshot: &str, expected: &Path) {
    let to = site.folder().join(format!("restored-{snapshot}"));
    client.restore(snapshot, &to).unwrap();
    disk::compare(expected, &to).unwrap();
    fs::remove_file(to).unwrap();
}

fn assert_memory(site: &mut Site, client_peak: u64) {
    assert!(client_peak <= MEMORY, "the client had {} MiB", client_peak / MIB);
    for name in site.server_names() {
        let peak = site.server(&name).unwrap().process().unwrap().used().peak_rss_bytes;
        assert!(peak <= MEMORY, "{name} had {} MiB", peak / MIB);
    }
    let peak = site.janus().unwrap().used().peak_rss_bytes;
    assert!(peak <= JANUS_MEMORY, "janus had {} MiB", peak / MIB);
}

#[test]
fn zeros_cost_nothing() {
    let site = one_server();
    let (path, client) = disk_of(&site, 64 * MIB);
    // Real zeros on half of it, a hole on the other.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&vec![0; 32 << 20], 0).unwrap();
    let taken = backup(&client);
    assert_eq!((taken.sent_bytes, taken.kind.as_str()), (0, "full"), "{taken:?}");
    assert!(taken.image_allocated_bytes <= MIB, "{taken:?}");
    assert_restores(&client, &site, &taken.snapshot_id, &path);
}

#[test]
fn random_data_comes_back_within_the_memory_limits() {
    let mut site = one_server();
    let size = if soak() { 1024 } else { 256 } * MIB;
    let (path, client) = disk_of(&site, size);
    disk::write_noise(&path, 0..size, 1).unwrap();
    let finished = client.run(&["backup", "--json"]).unwrap();
    let taken = finished.answer::<answers::Backup>().unwrap().disks[0].clone();
    assert_eq!(taken.sent_bytes, size, "{taken:?}");
    assert_restores(&client, &site, &taken.snapshot_id, &path);
    assert_memory(&mut site, finished.used.peak_rss_bytes);
}

#[test]
fn a_sparse_tebibyte_costs_what_its_data_costs() {
    let mut site = one_server();
    let (path, client) = disk_of(&site, 1 << 40);
    for part in 0..5 {
        let start = part * (200 << 30) + 4096 * part;
        disk::write_noise(&path, start..start + 40 * MIB, part).unwrap();
    }
    let started = Instant::now();
    let finished = client.run(&["backup", "--json"]).unwrap();
    let taken = finished.answer::<answers::Backup>().unwrap().disks[0].clone();
    println!(
        "1 TiB sparse: {:.1} s, client peak {} MiB",
        finished.seconds,
        finished.used.peak_rss_bytes / MIB
    );
    assert_eq!(taken.sent_bytes, 200 * MIB, "{taken:?}");
    assert!(taken.image_allocated_bytes <= 220 * MIB, "{taken:?}");
    assert_memory(&mut site, finished.used.peak_rss_bytes);

    let to = site.folder().join("restored");
    client.restore("disk", &to).unwrap();
    disk::compare(&path, &to).unwrap();
    assert!(disk::allocated_bytes(&to).unwrap() <= 210 * MIB);
    assert_memory(&mut site, 0);

    let changed = disk::change(&path, 2 * MIB, 9).unwrap();
    let taken = backup(&client);
    assert_eq!(taken.sent_bytes, changed.len() as u64 * 4096, "{taken:?}");
    assert!(started.elapsed().as_secs() < 120, "took {:?}", started.elapsed());
}

#[test]
fn a_size_that_is_not_a_multiple_of_a_block() {
    let site = one_server();
    let size = 10 * MIB + 3 * 512;
    let (path, client) = disk_of(&site, size);
    disk::write_noise(&path, 4 * MIB..size, 1).unwrap();
    let taken = backup(&client);
    assert_eq!((taken.size_bytes, taken.sent_bytes), (size, size - 4 * MIB), "{taken:?}");
    assert_restores(&client, &site, &taken.snapshot_id, &path);
    // Only the short last block changes.
    disk::write_noise(&path, size - 512..size, 2).unwrap();
    let taken = backup(&client);
    assert_eq!((taken.kind.as_str(), taken.sent_bytes), ("delta", 3 * 512), "{taken:?}");
    assert_restores(&client, &site, &taken.snapshot_id, &path);
}

#[test]
fn an_unchanged_disk_takes_less_than_a_mebibyte() {
    let site = one_server();
    let (path, client) = disk_of(&site, 128 * MIB);
    disk::write_noise(&path, 0..64 * MIB, 1).unwrap();
    backup(&client);
    for _ in 0..2 {
        let taken = backup(&client);
        assert_eq!(
            (taken.kind.as_str(), taken.sent_bytes, taken.changed_blocks),
            ("delta", 0, 0),
            "{taken:?}"
        );
        assert!(taken.image_allocated_bytes < MIB, "{taken:?}");
        assert_restores(&client, &site, &taken.snapshot_id, &path);
    }
}

#[test]
fn a_disk_that_grows_and_shrinks_sends_only_what_changed() {
    let site = one_server();
    let (path, client) = disk_of(&site, 48 * MIB + 512);
    disk::write_noise(&path, 0..48 * MIB + 512, 1).unwrap();
    let mut points = Vec::new();
    let mut keep = |taken: &answers::Disk| {
        let copy = site.folder().join(format!("as-{}", taken.snapshot_id));
        disk::copy(&path, &copy).unwrap();
        points.push((taken.snapshot_id.clone(), copy));
    };
    keep(&backup(&client));

    // Grown: the old last block, which was short, and 3 MiB of new data.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(80 * MIB).unwrap();
    disk::write_noise(&path, 70 * MIB..73 * MIB, 2).unwrap();
    let taken = backup(&client);
    assert_eq!(taken.size_bytes, 80 * MIB);
    assert!((3 * MIB..=3 * MIB + 4096).contains(&taken.sent_bytes), "{taken:?}");
    keep(&taken);

    // Shrunk into the middle of a block, and one block changed.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(20 * MIB + 1024).unwrap();
    disk::write_noise(&path, 5 * MIB..5 * MIB + 4096, 3).unwrap();
    let taken = backup(&client);
    assert_eq!(taken.size_bytes, 20 * MIB + 1024);
    assert!((4096..=4096 + 1024).contains(&taken.sent_bytes), "{taken:?}");
    keep(&taken);

    // Grown again: what was cut off must read as zeros, not as what once stood there.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(60 * MIB).unwrap();
    let taken = backup(&client);
    assert!(taken.sent_bytes <= 4096, "{taken:?}");
    keep(&taken);
    let taken = backup(&client);
    assert_eq!((taken.kind.as_str(), taken.sent_bytes), ("delta", 0), "{taken:?}");
    for (snapshot, expected) in &points {
        assert_restores(&client, &site, snapshot, expected);
    }
}

#[test]
fn zeros_written_over_data_are_restored_as_zeros() {
    let site = one_server();
    let (path, client) = disk_of(&site, 16 * MIB);
    disk::write_noise(&path, 0..16 * MIB, 1).unwrap();
    backup(&client);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&vec![0; 5 << 20], 3 * MIB).unwrap();
    let taken = backup(&client);
    assert_eq!((taken.sent_bytes, taken.changed_blocks), (0, 5 * 256), "{taken:?}");
    assert!(taken.image_allocated_bytes < 6 * MIB, "{taken:?}");
    assert_restores(&client, &site, &taken.snapshot_id, &path);
}

#[test]
fn every_encoding_restores_the_same() {
    for encoding in ["none", "lz4", "zstd"] {
        let site = one_server();
        let (path, mut client) = disk_of(&site, 32 * MIB);
        client.settings.set("encoding", encoding);
        fs::write(&path, "a line of a log that repeats itself\n".repeat(400_000)).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(32 * MIB).unwrap();
        disk::write_noise(&path, 20 * MIB..24 * MIB, 1).unwrap();
        let taken = backup(&client);
        let packed = taken.wire_bytes < taken.sent_bytes / 2;
        assert_eq!(packed, encoding != "none", "{encoding}: {taken:?}");
        assert_restores(&client, &site, &taken.snapshot_id, &path);
    }
}

#[test]
fn a_lost_cache_costs_time_but_no_data() {
    let site = one_server();
    let (path, client) = disk_of(&site, 64 * MIB);
    disk::write_noise(&path, 0..32 * MIB, 1).unwrap();
    backup(&client);
    fs::remove_dir_all(client.cache()).unwrap();
    let changed = disk::change(&path, MIB, 2).unwrap();
    let taken = backup(&client);
    assert_eq!(taken.compare, "reconciled", "{taken:?}");
    assert_eq!(
        (taken.kind.as_str(), taken.sent_bytes),
        ("delta", changed.len() as u64 * 4096),
        "{taken:?}"
    );
    assert_restores(&client, &site, &taken.snapshot_id, &path);
}

/// A cache that believes in blocks which the server doesn't have: the commit's digest finds it out.
#[test]
fn a_cache_that_lies_is_found_at_the_commit_and_repaired() {
    let site = one_server();
    let (path, client) = disk_of(&site, 64 * MIB);
    disk::write_noise(&path, 0..32 * MIB, 1).unwrap();
    backup(&client);
    let lies = [(0, 700, [7; 4096]), (5, 3, [8; 4096])];
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let cache = DiskCache::open(&client.cache(), &"disk".parse().unwrap(), 64 * MIB).unwrap();
    let server = "server-a".parse().unwrap();
    let (head, stage) = (cache.head(&server).unwrap(), cache.stage());
    for (segment, index, content) in lies {
        file.write_all_at(&content, segment * 4 * MIB + u64::from(index) * 4096).unwrap();
        stage.put(segment, &[(index, hash_block(&content))]).unwrap();
    }
    cache.commit(stage, &server, head, Vec::new()).unwrap();
    drop(cache);
    let taken = backup(&client);
    // The two segments in doubt, and nothing else.
    assert_eq!((taken.kind.as_str(), taken.sent_bytes), ("delta", 2 * 4 * MIB), "{taken:?}");
    assert_restores(&client, &site, &taken.snapshot_id, &path);
    let unchanged = backup(&client);
    assert_eq!(unchanged.sent_bytes, 0, "{unchanged:?}");
}

#[test]
fn an_interrupted_backup_goes_on_where_it_was() {
    let site = one_server();
    let (path, client) = disk_of(&site, 512 * MIB);
    disk::write_noise(&path, 0..512 * MIB, 1).unwrap();
    let images = site.folder().join("server-a");
    let before = folder_bytes(&images);
    let running = client.start(&["backup", "--json"]).unwrap();
    while folder_bytes(&images) < before + 64 * MIB {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    running.interrupt();
    let stopped = running.wait().unwrap();
    assert_eq!(stopped.code, Some(130), "{stopped:?}");
    assert!(client.list().unwrap().snapshots.is_empty());
    let backup = client.backup().unwrap();
    assert!(backup.resumed, "{backup:?}");
    assert!(backup.disks[0].sent_bytes < 480 * MIB, "{backup:?}");
    assert_restores(&client, &site, &backup.disks[0].snapshot_id, &path);
}

/// A client killed while its start is on the way knows no server, but a server may hold the run.
#[test]
fn a_start_whose_answer_was_lost_does_not_hold_the_machine_up() {
    let site = one_server();
    let (path, client) = disk_of(&site, 256 * MIB);
    disk::write_noise(&path, 0..256 * MIB, 1).unwrap();
    let images = site.folder().join("server-a");
    let before = folder_bytes(&images);
    let running = client.start(&["backup", "--json"]).unwrap();
    while folder_bytes(&images) < before + 16 * MIB {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    running.kill();
    running.wait().unwrap();
    let state = client.cache().join("state.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    assert_eq!(record["open"]["server"], "server-a");
    record["open"]["server"] = serde_json::Value::Null;
    fs::write(&state, record.to_string()).unwrap();
    let backup = client.backup().unwrap();
    assert_restores(&client, &site, &backup.disks[0].snapshot_id, &path);
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => folder_bytes(&entry.path()),
            _ => disk::allocated_bytes(&entry.path()).unwrap_or(0),
        })
        .sum()
}

#[test]
fn as_root_two_disks_of_which_one_fails_are_both_not_committed() {
    let site = one_server();
    let (good, bad) = (site.folder().join("good.raw"), site.folder().join("bad.raw"));
    for path in [&good, &bad] {
        disk::blank(path, 32 * MIB).unwrap();
        disk::write_noise(path, 0..32 * MIB, 1).unwrap();
    }
    // A device that returns read errors in its second half: the file under it was cut.
    let device = LoopDevice::attach(&bad).unwrap();
    OpenOptions::new().write(true).open(&bad).unwrap().set_len(16 * MIB).unwrap();
    let disks = [format!("good={}", good.display()), format!("bad={}", device.path().display())];
    let mut client = site.client("machine", &disks).unwrap();
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 4, "{failure:?}");
    assert!(failure.error.contains(&*device.path().to_string_lossy()), "{failure:?}");
    assert!(client.list().unwrap().snapshots.is_empty());

    // Without the bad disk the good one is taken; nothing of the failed run is in the way.
    client.settings.set("disks", vec![disks[0].clone()]);
    let backup = client.backup().unwrap();
    assert_restores(&client, &site, &backup.disks[0].snapshot_id, &good);
    assert_eq!(client.list().unwrap().snapshots.len(), 1);
}

#[test]
fn two_disks_are_committed_together() {
    let site = one_server();
    let paths = [site.folder().join("one.raw"), site.folder().join("two.raw")];
    for (number, path) in paths.iter().enumerate() {
        disk::blank(path, 24 * MIB).unwrap();
        disk::write_noise(path, 0..8 * MIB, number as u64).unwrap();
    }
    let disks = [format!("one={}", paths[0].display()), format!("two={}", paths[1].display())];
    let client = site.client("machine", &disks).unwrap();
    for _ in 0..2 {
        let backup = client.backup().unwrap();
        assert_eq!(backup.disks.len(), 2);
        for (taken, path) in backup.disks.iter().zip(&paths) {
            assert_restores(&client, &site, &taken.snapshot_id, path);
        }
        disk::change(&paths[1], MIB, 5).unwrap();
    }
    let list = client.list().unwrap();
    assert_eq!(list.snapshots.len(), 4);
    assert_eq!(list.snapshots[0].backup_id, list.snapshots[1].backup_id);
}
