//! Two servers that take turns, a disk with zeros and a short last block, and copies of what it was.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, Taken, answers},
};

use crate::caller::Caller;

pub const MIB: u64 = 1 << 20;
/// Not a whole number of blocks or segments.
pub const SIZE: u64 = 41 * MIB + 3 * 512;
pub const MACHINE: &str = "alice/machine";

pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub disk: PathBuf,
}

impl Scene {
    pub fn new() -> Self {
        Self::of(Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap())
    }

    /// A site that runs.
    pub fn of(site: Site) -> Self {
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, SIZE).unwrap();
        disk::write_noise(&disk, 0..18 * MIB, 1).unwrap();
        disk::write_noise(&disk, 30 * MIB..SIZE, 2).unwrap();
        let mut client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        client.settings.set("failover_after_seconds", 2);
        site.await_ready(&client).unwrap();
        Self { site, client, disk }
    }

    pub fn backup(&self) -> Taken {
        self.client.backup_and_copy(&self.disk, self.site.folder()).unwrap()
    }

    /// A backup that goes to `server`.
    pub fn backup_to(&self, server: &str) -> Taken {
        let taken = self.backup();
        assert_eq!(taken.server, server);
        taken
    }

    pub fn change(&self, bytes: u64, seed: u64) {
        disk::change(&self.disk, bytes, seed).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    /// Somebody with the keys of this name.
    pub fn caller(&self, name: &str) -> Caller {
        Caller::new(&self.site.url(), &self.site.folder().join("pki").join(name))
    }

    /// Waits until a server mirrors exactly these snapshots, and knows what it has of each.
    pub fn await_mirrored(&self, server: &str, taken: &[&Taken]) {
        let caller = self.caller("machine");
        let wanted: BTreeSet<&str> = taken.iter().map(|taken| taken.snapshot.as_str()).collect();
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let tables = caller.mirrored(server, "").unwrap();
            let known = tables.iter().filter(|table| table.share.is_some());
            let ids = known.map(|table| table.snapshot.as_ref().unwrap().snapshot_id.as_str());
            if tables.len() == wanted.len() && ids.collect::<BTreeSet<_>>() == wanted {
                return;
            }
            let log = self.site.log(server);
            assert!(Instant::now() < until, "{wanted:?} are wanted, there are {tables:?}\n{log}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What `list` says of a snapshot.
    pub fn listed(&self, taken: &Taken) -> answers::Snapshot {
        let list = self.client.list().unwrap();
        let one = list.snapshots.into_iter().find(|one| one.snapshot_id == taken.snapshot);
        one.unwrap_or_else(|| panic!("{} is not listed", taken.snapshot))
    }

    pub fn restore(&self, taken: &Taken, to: &str, more: &[&str]) -> answers::Restore {
        let to = self.path(to);
        let mut arguments = vec!["restore", &*taken.snapshot, "--to", to.to_str().unwrap()];
        arguments.extend(more);
        self.client.answer(&arguments).unwrap()
    }

    /// Restores with holes, and compares all with what must come: blocks that are in one of `others` at the same place, zeros
    /// for the rest, and a map that names exactly these.
    pub fn restore_partial(
        &self,
        taken: &Taken,
        others: &[&Taken],
        name: &str,
    ) -> answers::Restore {
        let map = self.path(&format!("{name}.map"));
        let report = self.restore(taken, name, &["--partial", map.to_str().unwrap()]);
        let expected = Expected::of(taken, others);
        let restored = fs::read(self.path(name)).unwrap();
        assert!(restored == expected.content, "another disk came back");
        let ranges = report.lost.iter();
        let lost: BTreeSet<u64> = ranges
            .flat_map(|lost| lost.offset / 4096..(lost.offset + lost.bytes).div_ceil(4096))
            .collect();
        assert_eq!(lost, expected.holes);
        assert_eq!(holes_of(&map), expected.holes);
        let lost_bytes: u64 = report.lost.iter().map(|lost| lost.bytes).sum();
        assert_eq!(lost_bytes, expected.content_bytes - expected.held_bytes);
        assert_eq!(report.verified_bytes, SIZE - lost_bytes);
        report
    }
}

/// What of a snapshot others have, by its copies.
pub struct Expected {
    pub content: Vec<u8>,
    pub holes: BTreeSet<u64>,
    pub content_bytes: u64,
    pub held_bytes: u64,
}

impl Expected {
    pub fn of(taken: &Taken, others: &[&Taken]) -> Self {
        let mut content = fs::read(&taken.copy).unwrap();
        let others: Vec<Vec<u8>> =
            others.iter().map(|other| fs::read(&other.copy).unwrap()).collect();
        let mut holes = BTreeSet::new();
        let (mut content_bytes, mut held_bytes) = (0, 0);
        for (number, block) in content.chunks_mut(4096).enumerate() {
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            content_bytes += block.len() as u64;
            let at = number * 4096;
            if others.iter().any(|other| other.get(at..at + block.len()) == Some(&*block)) {
                held_bytes += block.len() as u64;
            } else {
                holes.insert(number as u64);
                block.fill(0);
            }
        }
        Self { content, holes, content_bytes, held_bytes }
    }
}

/// Blocks that a mapfile calls lost.
fn holes_of(map: &Path) -> BTreeSet<u64> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let map = fs::read_to_string(map).unwrap();
    let lines = map.lines().filter(|line| line.ends_with('-'));
    let range = |line: &str| {
        let mut fields = line.split_whitespace().map(str::to_owned);
        let (start, size) = (number(&fields.next().unwrap()), number(&fields.next().unwrap()));
        start / 4096..(start + size).div_ceil(4096)
    };
    lines.flat_map(range).collect()
}
