//! A server's clock that was wrong for one backup: the others keep their order and their times.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf};

use janus_proto::summed::{checked, with_sum};
use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const YEAR_MS: i64 = 365 * 86_400_000;

struct Scene {
    site: Site,
    client: Client,
    disk: PathBuf,
    /// Snapshots, oldest first, with their servers and copies of the disk.
    taken: Vec<(String, String, PathBuf)>,
}

impl Scene {
    fn backup(&mut self) {
        let number = self.taken.len();
        disk::change(&self.disk, MIB, number as u64).unwrap();
        let backup = self.client.backup().unwrap();
        let copy = self.site.folder().join(format!("copy-{number}"));
        disk::copy(&self.disk, &copy).unwrap();
        self.taken.push((backup.disks[0].snapshot_id.clone(), backup.server, copy));
    }

    /// Dates a backup as a server does whose clock is a year ahead.
    fn redate(&mut self, number: usize) {
        let (snapshot, server, _) = self.taken[number].clone();
        self.site.stop_server(&server).unwrap();
        let runs = self.site.folder().join(&server).join("alice/machine/.runs");
        for entry in fs::read_dir(runs).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            let mut manifest: Value = serde_json::from_slice(checked(&bytes).unwrap()).unwrap();
            if manifest["snapshots"][0]["id"] == snapshot.as_str() {
                let ms = manifest["committed_ms"].as_i64().unwrap();
                manifest["committed_ms"] = (ms + YEAR_MS).into();
                let mut text = serde_json::to_vec_pretty(&manifest).unwrap();
                text.push(b'\n');
                fs::write(&path, with_sum(text)).unwrap();
            }
        }
        self.site.start_server(&server).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }

    /// All are listed in their order, and the newest one is what a restore of the disk gives. Their times.
    fn assert_in_order(&self) -> Vec<i64> {
        let list = self.client.list().unwrap();
        let listed: Vec<_> = list.snapshots.iter().map(|one| one.snapshot_id.as_str()).collect();
        let taken: Vec<_> = self.taken.iter().rev().map(|(id, ..)| id.as_str()).collect();
        assert_eq!(listed, taken);
        self.assert_newest();
        list.snapshots.iter().rev().map(|one| one.committed_ms).collect()
    }

    /// Times of the backups, in the order in which they were made.
    fn times(&self) -> Vec<i64> {
        let list = self.client.list().unwrap().snapshots;
        let time = |id: &str| list.iter().find(|one| one.snapshot_id == id).unwrap().committed_ms;
        self.taken.iter().map(|(id, ..)| time(id)).collect()
    }

    fn assert_newest(&self) {
        let newest = &self.taken[self.taken.len() - 1];
        assert_eq!(self.client.list().unwrap().snapshots[0].snapshot_id, newest.0);
        let to = self.site.folder().join("restored");
        let restored = self.client.restore("disk", &to).unwrap();
        assert_eq!(restored.snapshot_id, newest.0);
        disk::compare(&newest.2, &to).unwrap();
        fs::remove_file(to).unwrap();
    }
}

#[test]
fn one_wrong_clock_changes_no_order_and_dates_no_other_backup() {
    let plan = Plan { servers: vec!["server-a".into(), "server-b".into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let disk = site.folder().join("disk.raw");
    disk::blank(&disk, 8 * MIB).unwrap();
    disk::write_noise(&disk, 0..4 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
    site.await_ready(&client).unwrap();
    let mut scene = Scene { site, client, disk, taken: Vec::new() };
    (0..3).for_each(|_| scene.backup());
    let right = scene.assert_in_order();
    scene.redate(2);
    assert_eq!(scene.assert_in_order()[2], right[2] + YEAR_MS, "nothing says that it is wrong");

    // On the other server: what is newer is told by the counters.
    scene.backup();
    assert_ne!(scene.taken[3].1, scene.taken[2].1);
    let times = scene.assert_in_order();
    assert!(times[3] < right[2] + YEAR_MS, "{times:?}");

    // On the same one: its own clock contradicts it, and dates nothing after it.
    scene.backup();
    assert_eq!(scene.taken[4].1, scene.taken[2].1);
    scene.assert_newest();
    let times = scene.times();
    assert!(times[4] < right[2] + YEAR_MS / 2, "{times:?}");
    assert_eq!(times[2], times[4] - 1, "its place is before the next one there: {times:?}");

    let server = scene.taken[2].1.clone();
    let plan = scene.site.admin(&server, &["retention", "plan", "--json"]).unwrap();
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert!(plan["machines"][0]["stop"].is_null(), "{plan}");

    // So it stays after a restart, and where a janus has to hear it anew.
    scene.site.stop_server(&server).unwrap();
    scene.site.start_server(&server).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    scene.assert_newest();
    assert_eq!(scene.times(), times);
    scene.site.stop_server(&server).unwrap();
    assert_eq!(scene.times(), times, "as janus remembers them");
}
