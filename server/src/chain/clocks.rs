//! Times of runs in the order in which they were committed: one clock that was wrong costs its own run its place, and no other.
//!
//! A run keeps the time that the server's clock said. Where that contradicts the order of the runs, the times that fit most of
//! the others are believed, and the rest lies between its neighbours. Who asks for the newest, or of which day a run is, goes by that.

use std::collections::BTreeMap;

/// Clocks are set by so much without being wrong: a run within it comes right after the one before.
pub const SLACK_MS: i64 = 600_000;

/// True for a time that no right clock can have told yet.
pub fn is_future(ms: i64, now_ms: i64) -> bool {
    ms > now_ms.saturating_add(SLACK_MS)
}

/// Runs whose times contradict their order, with the times they get. `times` are those of all runs by their numbers, which ascend.
pub fn corrected(times: &BTreeMap<u64, i64>) -> BTreeMap<u64, i64> {
    let all: Vec<(u64, i64)> = times.iter().map(|(number, ms)| (*number, *ms)).collect();
    let believed = longest_ascent(&all);
    let mut moved = BTreeMap::new();
    let (mut next, mut before) = (0, i64::MIN);
    for (place, (number, ms)) in all.iter().enumerate() {
        if believed.get(next) == Some(&place) {
            (next, before) = (next + 1, *ms);
            continue;
        }
        let after = believed.get(next).and_then(|place| all.get(*place)).map(|(_, ms)| *ms);
        // A millisecond before its successor, so that it is never taken for newer.
        let latest = after.map_or(i64::MAX, |after| after.saturating_sub(1)).max(before);
        before = (*ms).clamp(before, latest);
        moved.insert(*number, before);
    }
    moved
}

/// Places of the longest series that ascends; of several the one that ends earliest.
fn longest_ascent(all: &[(u64, i64)]) -> Vec<usize> {
    // The end of the best series of each length, and what comes before each place in its best series.
    let mut ends: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = Vec::with_capacity(all.len());
    let ms = |place: usize| all.get(place).map_or(i64::MAX, |(_, ms)| *ms);
    for place in 0..all.len() {
        let length = ends.partition_point(|end| ms(*end) <= ms(place));
        before.push(length.checked_sub(1).and_then(|last| ends.get(last).copied()));
        match ends.get_mut(length) {
            Some(end) => *end = place,
            None => ends.push(place),
        }
    }
    let mut series = Vec::with_capacity(ends.len());
    let mut at = ends.last().copied();
    while let Some(place) = at {
        series.push(place);
        at = before.get(place).copied().flatten();
    }
    series.reverse();
    series
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(times: &[i64]) -> Vec<i64> {
        let numbered: BTreeMap<u64, i64> = (1..).zip(times.iter().copied()).collect();
        let moved = corrected(&numbered);
        numbered.iter().map(|(number, ms)| moved.get(number).copied().unwrap_or(*ms)).collect()
    }

    #[test]
    fn a_wrong_clock_costs_its_own_run_its_place() {
        assert_eq!(of(&[10, 20, 30]), [10, 20, 30]);
        assert_eq!(of(&[10, 20, 9000, 30, 40]), [10, 20, 29, 30, 40], "ahead once");
        assert_eq!(of(&[10, 20, 9000]), [10, 20, 9000], "nothing contradicts it yet");
        assert_eq!(of(&[10, 9000, 20]), [10, 19, 20]);
        assert_eq!(of(&[10, 20, 30, 3, 40]), [10, 20, 30, 30, 40], "behind once");
        // As earlier versions dated what came after a wrong clock.
        assert_eq!(of(&[10, 20, 9000, 9001, 30, 40, 50]), [10, 20, 29, 29, 30, 40, 50]);
        assert_eq!(of(&[]), [0; 0]);
    }

    proptest! {
        #[test]
        fn times_never_descend_and_a_few_wrong_ones_move_no_other(
            // Fewer than there are right ones before and after them.
            wrong in prop::collection::btree_map(8..52usize, any::<i64>(), 0..8),
        ) {
            let right: Vec<i64> = (0..60).map(|run| run * 1000).collect();
            let told = right.iter().enumerate();
            let told: Vec<i64> =
                told.map(|(run, ms)| wrong.get(&run).copied().unwrap_or(*ms)).collect();
            let found = of(&told);
            prop_assert!(found.is_sorted(), "{:?}", found);
            // A wrong time that happens to fit is believed; then a right one beside it may not fit any more.
            let fits = |run: &usize| wrong.get(run).is_some_and(|ms| (0..60_000).contains(ms));
            if !wrong.keys().any(fits) {
                for run in (0..60).filter(|run| !wrong.contains_key(run)) {
                    prop_assert_eq!(found[run], right[run], "run {}", run);
                }
            }
        }
    }
}
