//! SIGKILL of client, janus or a server at random moments: what was committed stays whole, what wasn't isn't listed,
//! and the next backup succeeds. Rounds: 6, or 100 with `JANUS_SOAK=1`; `JANUS_KILL_SEED` repeats a run.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, fs, path::PathBuf, thread, time::Duration};

use xtask::{
    disk,
    noise::Noise,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 192;

/// Copies of the disk as it was at each committed backup, by table digest.
struct Points {
    folder: PathBuf,
    by_snapshot: BTreeMap<String, PathBuf>,
}

#[test]
fn committed_snapshots_survive_kills_at_random_moments() {
    let seed = std::env::var("JANUS_KILL_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(Noise::fresh_seed);
    let rounds = if std::env::var_os("JANUS_SOAK").is_some() { 100 } else { 6 };
    println!("seed {seed} (JANUS_KILL_SEED={seed} repeats it), {rounds} rounds");
    let mut noise = Noise::new(seed);
    let mut site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, DISK_MIB * MIB).unwrap();
    disk::write_noise(&path, 0..DISK_MIB * MIB * 3 / 4, seed).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    let mut points = Points { folder: site.folder().join("points"), by_snapshot: BTreeMap::new() };
    fs::create_dir_all(&points.folder).unwrap();
    points.take(&client, &path, "before");

    for round in 0..rounds {
        // Large changes keep the run going long enough to be hit anywhere in it.
        disk::change(&path, noise.below(DISK_MIB / 2) * MIB + MIB, noise.number()).unwrap();
        let victim = ["client", "janus", "server-a", "server-b"][noise.below(4) as usize];
        let delay = Duration::from_millis(noise.below(500));
        let mut running = client.start(&["backup", "--json"]).unwrap();
        thread::sleep(delay);
        let hit = !running.has_ended();
        match victim {
            "client" => running.kill(),
            "janus" => site.kill_janus().unwrap(),
            server => site.kill_server(server).unwrap(),
        }
        site.start_all().unwrap();
        let finished = running.wait().unwrap();
        println!(
            "round {round}: {victim} after {delay:?}, in the run: {hit}, client ended with {:?}",
            finished.code
        );
        site.await_ready(&client).unwrap();
        points.check_list(&client, finished.code == Some(0), &path);
        points.take(&client, &path, &format!("round-{round}"));
        // Also a commit that was at work when its client was killed has ended by now: this backup waited for it.
        points.check_list(&client, false, &path);
    }
    points.check_restores(&client);
}

impl Points {
    /// The next backup succeeds, and is remembered.
    fn take(&mut self, client: &Client, disk: &std::path::Path, name: &str) {
        let backup = client.backup().unwrap();
        let copy = self.folder.join(name);
        disk::copy(disk, &copy).unwrap();
        self.by_snapshot.insert(backup.disks[0].snapshot_id.clone(), copy);
        let to = self.folder.join("restored");
        client.restore(&backup.disks[0].snapshot_id, &to).unwrap();
        disk::compare(disk, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    /// All known snapshots are listed; an unknown one is that of the run just hit, whole and with the disk's content.
    fn check_list(&mut self, client: &Client, reported_done: bool, disk: &std::path::Path) {
        let listed: Vec<_> =
            client.list().unwrap().snapshots.into_iter().map(|s| s.snapshot_id).collect();
        for known in self.by_snapshot.keys() {
            assert!(listed.contains(known), "snapshot {known} is lost");
        }
        let new: Vec<_> =
            listed.iter().filter(|id| !self.by_snapshot.contains_key(*id)).cloned().collect();
        // A run may have been committed on a server and, its answer lost with a killed peer, again on the other.
        assert!(
            new.len() <= 2 && (!reported_done || !new.is_empty()),
            "unexpected snapshots: {new:?}"
        );
        for id in new {
            let copy = self.folder.join(format!("committed-{id}"));
            client.restore(&id, &copy).unwrap();
            disk::compare(disk, &copy).unwrap();
            self.by_snapshot.insert(id, copy);
        }
    }

    fn check_restores(&self, client: &Client) {
        for (snapshot, expected) in &self.by_snapshot {
            let to = self.folder.join("restored");
            client.restore(snapshot, &to).unwrap();
            disk::compare(expected, &to).unwrap();
            fs::remove_file(to).unwrap();
        }
        println!("{} snapshots restored bit by bit", self.by_snapshot.len());
    }
}
