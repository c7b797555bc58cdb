//! Which snapshot is newer: by their times, and where a clock was ahead by the use counters of their runs.

use std::{
    cmp::Reverse,
    time::{Duration, SystemTime},
};

use janus_proto::pb::Snapshot;

/// Servers' clocks may differ from ours by so much.
const CLOCK: Duration = Duration::from_secs(3600);

/// Sorts snapshots of one machine, the newest first. One that is of the future comes right before what was begun after it.
pub fn newest_first(snapshots: &mut [Snapshot], now: SystemTime) {
    let is_ahead = |one: &Snapshot| is_ahead(one, now);
    if !snapshots.iter().any(is_ahead) {
        // The times of right clocks are in the order of the counters.
        snapshots.sort_by_key(|one| Reverse(one.committed_ms));
        return;
    }
    let right = snapshots.iter().filter(|one| !is_ahead(one) && one.use_counter > 0);
    let right: Vec<(u64, i64)> = right.map(|one| (one.use_counter, one.committed_ms)).collect();
    snapshots.sort_by_cached_key(|one| {
        let counter = one.use_counter;
        let later = right.iter().filter(|(of, _)| counter > 0 && *of > counter && is_ahead(one));
        let before = later.map(|(_, ms)| ms.saturating_sub(1)).min();
        // Two of them stay in the order of their runs.
        (Reverse(before.unwrap_or(one.committed_ms)), Reverse(counter))
    });
}

/// The first of these snapshots of one disk, newest first, when a wrong clock may have put it there.
pub fn doubtful(snapshots: &[Snapshot], now: SystemTime) -> Option<&Snapshot> {
    let first = snapshots.first().filter(|first| is_ahead(first, now))?;
    let is_older = |other: &Snapshot| {
        other.server_id == first.server_id
            || (other.use_counter > 0 && other.use_counter <= first.use_counter)
    };
    (!snapshots.iter().all(is_older)).then_some(first)
}

fn is_ahead(snapshot: &Snapshot, now: SystemTime) -> bool {
    let latest = (now + CLOCK).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u128::try_from(snapshot.committed_ms).is_ok_and(|ms| ms > latest.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(server: &str, seconds: i64, use_counter: u64) -> Snapshot {
        let committed_ms = ((1 << 30) + seconds) * 1000;
        Snapshot { server_id: server.into(), committed_ms, use_counter, ..Snapshot::default() }
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30)
    }

    fn sorted(mut snapshots: Vec<Snapshot>) -> Vec<u64> {
        newest_first(&mut snapshots, now());
        snapshots.iter().map(|one| one.use_counter).collect()
    }

    #[test]
    fn a_time_of_the_future_is_believed_only_where_nothing_else_can_be_newer() {
        let is_doubtful = |snapshots: &[Snapshot]| doubtful(snapshots, now()).is_some();
        assert!(!is_doubtful(&[]));
        assert!(!is_doubtful(&[of("a", 60, 0), of("b", 0, 0)]));
        assert!(!is_doubtful(&[of("a", 90_000, 0), of("a", 0, 0)]));
        assert!(is_doubtful(&[of("a", 90_000, 0), of("a", 1, 0), of("b", 0, 0)]));
        assert!(is_doubtful(&[of("a", 90_000, 7), of("b", 0, 0)]), "an import");
        assert!(!is_doubtful(&[of("a", 90_000, 7), of("b", 0, 6)]), "the counters say it");
    }

    #[test]
    fn counters_give_a_snapshot_of_a_wrong_clock_its_place() {
        let (hour, year) = (3600, 365 * 86_400);
        let right = |counter: i64| {
            of(["a", "b"][counter as usize % 2], -10 * hour + counter, counter as u64)
        };
        assert_eq!(sorted(vec![right(1), right(2), right(3)]), [3, 2, 1]);
        let wrong = |counter| of("a", year, counter);
        assert_eq!(sorted(vec![right(1), wrong(2), right(3), right(4)]), [4, 3, 2, 1]);
        assert_eq!(sorted(vec![wrong(2), wrong(3), right(1), right(4)]), [4, 3, 2, 1]);
        // Nothing was begun after it.
        assert_eq!(sorted(vec![right(1), right(2), wrong(3)]), [3, 2, 1]);
        // An import has no counter: its time counts.
        assert_eq!(sorted(vec![right(1), wrong(2), of("b", -1, 0), right(4)]), [0, 4, 2, 1]);
    }
}
