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

/// Chooses the newest snapshot of each disk that is meant, or that of `only` one run, and before it the one that was `begun`: a
/// large disk takes days, and each may bring a newer one.
///
/// # Errors
/// When what is listed makes no sense.
pub fn choose(
    listed: &[pb::Snapshot],
    here: &[Held],
    begun: Option<BackupId>,
    only: Option<BackupId>,
    takes: impl Fn(&DiskId) -> bool,
) -> Result<Choice, WireError> {
    let mut disks: BTreeMap<DiskId, Vec<&pb::Snapshot>> = BTreeMap::new();
    for snapshot in listed {
        let disk: DiskId = snapshot.disk_id.parse()?;
        if takes(&disk) && only.is_none_or(|only| snapshot.backup_id == only.to_string()) {
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
            match known.filter(|held| covers(held, run, snapshot)) {
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

/// Of what time the content of a snapshot is: a copy that came to its server later is no newer.
pub(super) fn taken_ms(snapshot: &pb::Snapshot) -> i64 {
    if snapshot.taken_ms > 0 { snapshot.taken_ms } else { snapshot.committed_ms }
}

/// True when a snapshot here is of that run, or of the one that is a copy of, or newer.
fn covers(held: &Held, run: BackupId, snapshot: &pb::Snapshot) -> bool {
    let origin: Option<BackupId> = snapshot.origin_backup_id.parse().ok();
    held.run.is_made_of(run)
        || origin.is_some_and(|origin| held.run.is_made_of(origin))
        || held.run.taken_ms() >= taken_ms(snapshot)
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
        let choice = choose(&all, &[], None, None, |_| true).unwrap();
        let expected = vec![vec![("a", 1)], vec![("b", 2), ("c", 2)], vec![("d", 3)]];
        assert_eq!(chosen(&choice), expected);
        assert_eq!(choice.passed_over, ["b".parse().unwrap()]);
        let only = choose(&all, &[], None, None, |disk| disk.as_str() == "c").unwrap();
        assert_eq!(chosen(&only), vec![vec![("c", 2)]]);
    }

    #[test]
    fn what_is_here_is_left_out_disk_by_disk_and_what_was_begun_comes_first() {
        let [one, two] = [(); 2].map(|()| BackupId::new());
        let all = [listed("a", two, 2, 0), listed("b", two, 2, 0), listed("a", one, 1, 0)];
        // Of the same run, whatever its time here; newer; older; and of another disk.
        let here = [held("a", Some(two), 9), held("b", None, 1), held("x", None, 50)];
        let choice = choose(&all, &here, None, None, |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("b", 2)]]);
        assert_eq!(choice.here, [("a".parse().unwrap(), 9)]);
        let newer = [held("a", None, 3), held("b", None, 2)];
        let choice = choose(&all, &newer, None, None, |_| true).unwrap();
        assert!(choice.runs.is_empty() && choice.here.len() == 2, "{choice:?}");

        let choice = choose(&all, &[], Some(one), None, |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("a", 1)], vec![("a", 2), ("b", 2)]]);
        let choice = choose(&all, &[], Some(two), None, |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("a", 2), ("b", 2)]]);
    }

    #[test]
    fn one_run_can_be_named_though_newer_ones_are_there() {
        let [one, two] = [(); 2].map(|()| BackupId::new());
        let all = [listed("a", two, 2, 0), listed("b", two, 2, 0), listed("a", one, 1, 0)];
        let choice = choose(&all, &[], Some(two), Some(one), |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("a", 1)]]);
        assert!(choice.passed_over.is_empty());
        let choice = choose(&all, &[held("a", None, 3)], None, Some(one), |_| true).unwrap();
        assert!(choice.runs.is_empty() && choice.here.len() == 1, "{choice:?}");
        let none = choose(&all, &[], None, Some(BackupId::new()), |_| true).unwrap();
        assert!(none.runs.is_empty() && none.here.is_empty());
    }

    /// A copy gets its place after runs of other disks there, and looks newer than what it was made of.
    #[test]
    fn a_copy_elsewhere_is_no_newer_than_its_original_here() {
        let [original, copy] = [(); 2].map(|()| BackupId::new());
        let origin_backup_id = original.to_string();
        let copied = pb::Snapshot { origin_backup_id, taken_ms: 5, ..listed("a", copy, 9, 0) };
        let mut here = held("a", None, 5);
        Arc::make_mut(&mut here.run).backup = original;
        // The original itself, another copy of it, something newer, and something older.
        let covering = [here, held("a", Some(original), 5), held("a", None, 6)];
        for here in covering {
            let choice = choose(std::slice::from_ref(&copied), &[here], None, None, |_| true);
            assert!(choice.unwrap().runs.is_empty());
        }
        let choice = choose(&[copied], &[held("a", None, 4)], None, None, |_| true).unwrap();
        assert_eq!(chosen(&choice), vec![vec![("a", 9)]]);
    }
}
