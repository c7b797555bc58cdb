//! The snapshots that one server has told of, as many as are remembered.
//!
//! They serve to list what a server holds that can't be reached, and to say how old each machine's newest backup is. Beyond the
//! limit the oldest go, but never the newest of a disk: whoever watches backups would take its machine for overdue.

use std::collections::{BTreeSet, HashMap};

use janus_proto::{ids::SnapshotId, pb::Snapshot};

/// Snapshots remembered of one server, as long as there are older ones of the same disks.
pub(super) const MAX_SNAPSHOTS: usize = 20_000;
/// Disks of one server whose newest snapshot is remembered in any case.
const MAX_DISKS: usize = 40_000;

/// The newest is the greatest; one that lacks blocks is no backup yet.
type Rank = (bool, i64, SnapshotId);
/// Machine and disk.
type Disk = (String, String);

/// See the module.
#[derive(Debug)]
pub(super) struct Snapshots {
    all: HashMap<SnapshotId, Snapshot>,
    disks: HashMap<Disk, BTreeSet<Rank>>,
    /// Those that may go, the oldest first: all but the newest of each disk.
    older: BTreeSet<Rank>,
    limit: usize,
    is_short: bool,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self {
            all: HashMap::new(),
            disks: HashMap::new(),
            older: BTreeSet::new(),
            limit: MAX_SNAPSHOTS,
            is_short: false,
        }
    }
}

fn rank(id: SnapshotId, snapshot: &Snapshot) -> Rank {
    (snapshot.missing_blocks == 0, snapshot.committed_ms, id)
}

fn disk(snapshot: &Snapshot) -> Disk {
    (snapshot.machine.clone(), snapshot.disk_id.clone())
}

impl Snapshots {
    /// Takes one in, or what is new of it.
    pub fn insert(&mut self, id: SnapshotId, snapshot: Snapshot) {
        self.remove(id);
        let (disk, rank) = (disk(&snapshot), rank(id, &snapshot));
        if self.disks.len() >= MAX_DISKS && !self.disks.contains_key(&disk) {
            self.is_short = true;
            return;
        }
        self.all.insert(id, snapshot);
        let of_disk = self.disks.entry(disk).or_default();
        let newest = of_disk.last().copied();
        of_disk.insert(rank);
        self.older.extend(newest.map(|newest| newest.min(rank)));
        while self.all.len() > self.limit
            && let Some((_, _, oldest)) = self.older.first().copied()
        {
            self.remove(oldest);
            self.is_short = true;
        }
    }

    /// One is gone.
    pub fn remove(&mut self, id: SnapshotId) {
        let Some(snapshot) = self.all.remove(&id) else { return };
        let (disk, rank) = (disk(&snapshot), rank(id, &snapshot));
        self.older.remove(&rank);
        let Some(of_disk) = self.disks.get_mut(&disk) else { return };
        of_disk.remove(&rank);
        match of_disk.last() {
            Some(newest) => {
                self.older.remove(newest);
            }
            None => {
                self.disks.remove(&disk);
            }
        }
    }

    /// One of them.
    pub fn get(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.all.get(&id)
    }

    /// All, in no order.
    pub fn values(&self) -> impl Iterator<Item = &Snapshot> {
        self.all.values()
    }

    /// Ids of all, in no order.
    pub fn ids(&self) -> impl Iterator<Item = SnapshotId> {
        self.all.keys().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// The newest of each disk, in no order.
    pub fn newest(&self) -> impl Iterator<Item = &Snapshot> {
        self.disks.values().filter_map(|of_disk| self.all.get(&of_disk.last()?.2))
    }

    /// True when its disk has none that was committed later.
    pub fn is_newest(&self, of: &Snapshot) -> bool {
        let of_disk = self.disks.get(&disk(of)).into_iter().flatten();
        of_disk.into_iter().all(|(_, committed_ms, _)| *committed_ms <= of.committed_ms)
    }

    /// True when there were more than are remembered.
    pub fn is_short(&self) -> bool {
        self.is_short
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn snapshot(machine: u8, disk: u8, committed_ms: i64, missing_blocks: u64) -> Snapshot {
        Snapshot {
            machine: format!("u/{machine}"),
            disk_id: disk.to_string(),
            committed_ms,
            missing_blocks,
            ..Default::default()
        }
    }

    #[test]
    fn beyond_the_limit_the_oldest_go_and_the_newest_of_each_disk_stay() {
        let mut kept = Snapshots { limit: 3, ..Snapshots::default() };
        let mut add = |machine, committed_ms, missing| {
            let id = SnapshotId::new();
            kept.insert(id, snapshot(machine, 0, committed_ms, missing));
            id
        };
        let lone = add(1, 1, 0);
        for at in [2, 4, 3, 5] {
            add(2, at, 0);
        }
        add(2, 6, 7);
        let mut times: Vec<_> = kept.values().map(|one| one.committed_ms).collect();
        times.sort_unstable();
        // What lacks blocks is older than whatever is whole.
        assert_eq!((times, kept.is_short()), (vec![1, 4, 5], true));
        let late = SnapshotId::new();
        kept.insert(late, snapshot(3, 0, 1, 0));
        assert!(kept.get(lone).is_some() && kept.get(late).is_some());
        let mut newest: Vec<_> =
            kept.newest().map(|one| (&*one.machine, one.committed_ms)).collect();
        newest.sort_unstable();
        assert_eq!(newest, [("u/1", 1), ("u/2", 5), ("u/3", 1)]);
    }

    proptest! {
        /// Whatever comes and goes, the newest of each disk is the one of a plain search, and what may go is all the rest.
        #[test]
        fn the_newest_is_always_known(
            steps in proptest::collection::vec((0..12_usize, 0..3_u8, 0..9_i64, 0..2_u64, any::<bool>()), 0..80)
        ) {
            let ids: Vec<SnapshotId> = (0..12).map(|_| SnapshotId::new()).collect();
            let mut kept = Snapshots::default();
            for (which, machine, at, missing, is_removal) in steps {
                match is_removal {
                    true => kept.remove(ids[which]),
                    false => kept.insert(ids[which], snapshot(machine, 0, at, missing)),
                }
                let mut expected: HashMap<Disk, Rank> = HashMap::new();
                for (id, one) in &kept.all {
                    let of_disk = expected.entry(disk(one)).or_insert(rank(*id, one));
                    *of_disk = rank(*id, one).max(*of_disk);
                }
                let newest: HashMap<Disk, Rank> =
                    kept.disks.iter().map(|(disk, all)| (disk.clone(), *all.last().unwrap())).collect();
                prop_assert_eq!(&newest, &expected);
                let rest = kept.all.iter().map(|(id, one)| rank(*id, one));
                let rest: BTreeSet<Rank> =
                    rest.filter(|one| !expected.values().any(|newest| newest == one)).collect();
                prop_assert_eq!(&kept.older, &rest);
            }
        }
    }
}
