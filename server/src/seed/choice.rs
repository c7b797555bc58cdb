//! Which snapshots of a machine are taken: pure, of what the other server lists and what is here.

use std::collections::{BTreeMap, BTreeSet};

use janus_proto::{
    error::WireError,
    ids::{BackupId, DiskId},
    pb,
};

use crate::chain::Held;

/// What is to be seeded of a machine, and what isn't.
#[derive(Debug, Default)]
pub struct Choice {
    /// Snapshots of one run each, oldest run first.
    pub runs: Vec<Vec<pb::Snapshot>>,
    /// Disks of which this server has that snapshot or a newer one, with the time of the newest.
    pub here: Vec<(DiskId, i64)>,
    /// Disks of which an older snapshot is taken, since the newest has lost something.
    pub passed_over: Vec<DiskId>,
}

/// Chooses the newest snapshot of each disk that is meant, and before it the one that was `begun`: a large disk takes days,
/// and each may bring a newer one.
///
/// # Errors
/// When what is listed makes no sense.
pub fn choose(
    listed: &[pb::Snapshot],
    here: &[Held],
    begun: Option<BackupId>,
    takes: impl Fn(&DiskId) -> bool,
) -> Result<Choice, WireError> {
    let mut disks: BTreeMap<DiskId, Vec<&pb::Snapshot>> = BTreeMap::new();
    for snapshot in listed {
        let disk: DiskId = snapshot.disk_id.parse()?;
        if takes(&disk) {
            disks.entry(disk).or_default().push(snapshot);
        }
    }
    let mut choice = Choice::default();
    let mut runs: BTreeMap<(i64, BackupId), Vec<pb::Snapshot>> = BTreeMap::new();
    for (disk, snapshots) in disks {
        let whole = |snapshot: &&pb::Snapshot| {
            (snapshot.damaged_blocks == 0 && snapshot.missing_blocks == 0, snapshot.committed_ms)
        };
        let newest = snapshots.iter().copied().max_by_key(|snapshot| snapshot.committed_ms);
        let taken = snapshots.iter().copied().max_by_key(whole);
        if newest != taken {
            choice.passed_over.push(disk.clone());
        }
        let begun = snapshots
            .iter()
            .copied()
            .filter(|snapshot| begun.is_some_and(|begun| snapshot.backup_id == begun.to_string()));
        let known = here.iter().filter(|held| held.snapshot().disk == disk);
        let known = known.max_by_key(|held| held.run.committed_ms);
        let mut seen = BTreeSet::new();
        for snapshot in begun.chain(taken) {
            let run: BackupId = snapshot.backup_id.parse()?;
            match known.filter(|held| covers(held, run, snapshot.committed_ms)) {
                Some(held) if taken == Some(snapshot) => {
                    choice.here.push((disk.clone(), held.run.committed_ms));
                }
                Some(_) => {}
                None if seen.insert(run) => {
                    runs.entry((snapshot.committed_ms, run)).or_default().push(snapshot.clone());
                }
                None => {}
            }
        }
    }
    choice.runs = runs.into_values().collect();
    Ok(choice)
}

/// True when a snapshot here is of that run, or newer.
fn covers(held: &Held, run: BackupId, committed_ms: i64) -> bool {
    let taken_ms = held.run.origin.as_ref().map_or(held.run.committed_ms, |origin| origin.taken_ms);
    held.run.is_made_of(run) || taken_ms >= committed_ms
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use janus_proto::ids::{BlockHash, SnapshotId};
    use uuid::Uuid;

    use super::*;
    use crate::chain::{Origin, Run, Snapshot};

    fn listed(disk: &str, run: BackupId, committed_ms: i64, damaged_blocks: u64) -> pb::Snapshot {
        let (disk_id, backup_id) = (disk.to_owned(), run.to_string());
        pb::Snapshot { disk_id, backup_id, committed_ms, damaged_blocks, ..Default::default() }
    }

    fn held(disk: &str, origin: Option<BackupId>, committed_ms: i64) -> Held {
        let snapshot = Snapshot {
            id: SnapshotId::new(),
            disk: disk.parse().unwrap(),
            size_bytes: 4096,
            logical_sector_bytes: 512,
            table_digest: BlockHash([0; 32]),
            parent: None,
            image: String::new(),
            table: String::new(),
            data_write: Uuid::nil(),
            virtual_disk: Uuid::nil(),
            consistency: 1,
            skipped_bytes: 0,
            image_allocated_bytes: 0,
            image_length_bytes: 0,
        };
        let run = Run {
            format: 1,
            backup: BackupId::new(),
            machine: "u/m".parse().unwrap(),
            committed_ms,
            sequence: 1,
            use_counter: 0,
            client_seal: Vec::new(),
            origin: origin.map(|run| Origin { run: Some(run), taken_ms: committed_ms, from: None }),
            snapshots: vec![snapshot],
        };
        Held::all(&Arc::new(run)).next().unwrap()
    }

    fn chosen(choice: &Choice) -> Vec<Vec<(&str, i64)>> {
        choice
            .runs
            .iter()
            .map(|run| run.iter().map(|one| (one.disk_id.as_str(), one.committed_ms)).collect())
            .collect()
    }

    #[test]
    fn of_each_disk_the_newest_whole_snapshot_is_taken_by_runs_in_their_order() {
        let [one, two, three] = [(); 3].map(|()| BackupId::new());
        let all = [
            listed("b", three, 3, 7),
            listed("c", two, 2, 0),
            listed("b", two, 2, 0),
            listed("a", one, 1, 0),
            listed("b", one, 1, 0),
            listed("d", three, 3, 1),
        ];
        let choice = choose(&all, &[], None, |_| true).unwrap();
        let expected = vec![vec![("a", 1)], vec![("b", 2), ("c", 2)], vec![("d", 3)]];
        assert_eq!(chosen(&choice), expected);
        assert_eq!(choice.passed_over, ["b".parse().unwrap()]);
        let only = choose(&all, &[], None, |disk| disk.as_str() == "c").unwrap();
        assert_eq!(chosen(&only), vec![vec![("c", 2)]]);
    }

    #[test]
    fn what_is_here_is_left_out_disk_by_disk_and_what_was_begun_comes_first() {
        let [one, two] = [(); 2].map(|()| BackupId::new());
        let all = [listed("a", two, 2, 0), listed("b", two, 2, 0), listed("a", one, 1, 0)];
        // Of the same run, whatever its time here; newer; older; and of another disk.
        let here = [held("a", Some(two), 9), held("b", None, 1), held("x", None, 50)];
        let choice = choose(&all, &here, None, |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("b", 2)]]);
        assert_eq!(choice.here, [("a".parse().unwrap(), 9)]);
        let newer = [held("a", None, 3), held("b", None, 2)];
        let choice = choose(&all, &newer, None, |_| true).unwrap();
        assert!(choice.runs.is_empty() && choice.here.len() == 2, "{choice:?}");

        let choice = choose(&all, &[], Some(one), |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("a", 1)], vec![("a", 2), ("b", 2)]]);
        let choice = choose(&all, &[], Some(two), |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("a", 2), ("b", 2)]]);
    }
}
