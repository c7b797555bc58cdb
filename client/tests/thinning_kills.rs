//! SIGKILL of a server that thins, merges and checks while backups go on: what was acknowledged and no plan may drop restores
//! bit by bit after each round. Rounds: 6, or 100 with `JANUS_SOAK=1`; `JANUS_KILL_SEED` repeats a run.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf, thread, time::Duration};

use xtask::{
    disk,
    noise::Noise,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 48;
const SERVER: &str = "server-a";
const MACHINE: &str = "alice/machine";
/// Good runs that every plan keeps.
const OWED: usize = 3;

/// One server whose plan keeps the newest runs, and one machine.
struct Thinned {
    site: Site,
    client: Client,
    disk: PathBuf,
    /// Acknowledged snapshots, oldest first, each with a copy of the disk.
    acknowledged: Vec<(String, PathBuf)>,
    copies: usize,
}

impl Thinned {
    fn new(seed: u64) -> Self {
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let settings = &mut site.server(SERVER).unwrap().settings;
        for rule in ["keep_all_days", "daily", "weekly", "monthly", "trash_days"] {
            settings.set(&format!("retention.{rule}"), 0);
        }
        settings.set("retention.at_least", OWED);
        settings.set("retention.max_drop_percent", 100);
        settings.set("scrub_mib_per_second", 200);
        site.start_all().unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, DISK_MIB * MIB).unwrap();
        disk::write_noise(&disk, 0..DISK_MIB * MIB * 3 / 4, seed).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, disk, acknowledged: Vec::new(), copies: 0 }
    }

    fn backup(&mut self) {
        let snapshot = self.client.backup().unwrap().disks[0].snapshot_id.clone();
        self.acknowledge(snapshot);
    }

    fn acknowledge(&mut self, snapshot: String) {
        let copy = self.site.folder().join(format!("copy-{}", self.copies));
        self.copies += 1;
        disk::copy(&self.disk, &copy).unwrap();
        self.acknowledged.push((snapshot, copy));
    }

    /// Changes the disk, backs it up, and kills the server meanwhile or in what it does afterwards.
    fn round(&mut self, noise: &mut Noise) -> String {
        disk::change(&self.disk, (1 + noise.below(16)) * MIB, noise.number()).unwrap();
        let mut running = self.client.start(&["backup", "--json"]).unwrap();
        let is_after = noise.below(2) == 0;
        if is_after {
            while !running.has_ended() {
                thread::sleep(Duration::from_millis(2));
            }
        }
        // After a backup: in the plan, the drops, the merges, the check.
        let delay = Duration::from_millis(noise.below(if is_after { 120 } else { 400 }));
        thread::sleep(delay);
        self.site.kill_server(SERVER).unwrap();
        self.site.start_all().unwrap();
        let finished = running.wait().unwrap();
        self.site.await_ready(&self.client).unwrap();
        // Noise where zeros were looks like encryption: an operator has seen that it is none, else nothing would be thinned.
        let answer = self.site.admin(SERVER, &["alarm", "clear", MACHINE]).unwrap();
        assert!(answer.status.success(), "{answer:?}");
        let when = if is_after { "after the backup" } else { "in the backup" };
        format!("{delay:?} {when}, client ended with {:?}", finished.code)
    }

    /// What is listed and known restores as it was; the newest ones that were acknowledged are listed.
    fn check(&mut self) -> usize {
        let listed: Vec<String> =
            self.client.list().unwrap().snapshots.into_iter().map(|s| s.snapshot_id).collect();
        // The run that was hit may have been committed: it holds the disk as it is.
        let known = |id: &&String| self.acknowledged.iter().any(|(known, _)| known == *id);
        let new: Vec<String> = listed.iter().filter(|id| !known(id)).cloned().collect();
        assert!(new.len() <= 1, "unexpected snapshots: {new:?}");
        new.into_iter().for_each(|id| self.acknowledge(id));
        let owed = self.acknowledged.len().saturating_sub(OWED);
        for (id, _) in &self.acknowledged[owed..] {
            assert!(listed.contains(id), "snapshot {id} is lost");
        }
        let mut compared = 0;
        self.acknowledged.retain(|(id, copy)| {
            if !listed.contains(id) {
                fs::remove_file(copy).unwrap();
                return false;
            }
            let to = self.site.folder().join("restored");
            self.client.restore(id, &to).unwrap();
            disk::compare(copy, &to).unwrap();
            fs::remove_file(to).unwrap();
            compared += 1;
            true
        });
        compared
    }
}

#[test]
fn what_retention_owes_survives_kills_of_a_server_that_thins() {
    let seed = std::env::var("JANUS_KILL_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(Noise::fresh_seed);
    let rounds = if std::env::var_os("JANUS_SOAK").is_some() { 100 } else { 6 };
    println!("seed {seed} (JANUS_KILL_SEED={seed} repeats it), {rounds} rounds");
    let mut noise = Noise::new(seed);
    let mut thinned = Thinned::new(seed);
    for _ in 0..OWED {
        thinned.backup();
    }
    let mut compared = 0;
    for round in 0..rounds {
        let killed = thinned.round(&mut noise);
        let now = thinned.check();
        println!("round {round}: killed {killed}; {now} snapshots restored bit by bit");
        compared += now;
        thinned.backup();
    }
    compared += thinned.check();
    println!("{compared} comparisons");
    // It thins, or nothing was tried.
    let answer = thinned.site.admin(SERVER, &["retention", "run", "--now", "--json"]).unwrap();
    assert!(answer.status.success(), "{answer:?}");
    assert!(thinned.check() <= OWED + 1);
    let answer = thinned.site.admin(SERVER, &["verify", "--json"]).unwrap();
    assert!(answer.status.success(), "{answer:?}");
}
