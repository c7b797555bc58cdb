//! Which backup is proven next: pure, of what was tried when and what chance draws.
//!
//! The machine whose last try is oldest comes first, so that none waits for ever, whatever its backups are. Of its backups
//! the newest counts most, since that is what a restore would want, but damage of older ones must be found too.

/// A machine that may be proven.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Unix milliseconds of the last try with any of its backups; 0: never.
    pub tried_ms: i64,
    /// Its backups, oldest first.
    pub runs: Vec<Run>,
}

/// A backup of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Run {
    /// Unix milliseconds of its last try; 0: never.
    pub tried_ms: i64,
}

/// Chooses: the place of a machine, and of a run in it. `draw(n)` is below `n`, each as likely. Times after `now_ms` count as
/// never: a clock that was set back must not keep a machine from being proven.
pub fn choose(
    machines: &[Machine],
    now_ms: i64,
    draw: &mut dyn FnMut(usize) -> usize,
) -> Option<(usize, usize)> {
    let seen = |tried_ms: i64| if tried_ms > now_ms { 0 } else { tried_ms };
    let waiting = || machines.iter().enumerate().filter(|(_, machine)| !machine.runs.is_empty());
    let oldest = waiting().map(|(_, machine)| seen(machine.tried_ms)).min()?;
    let first: Vec<usize> = waiting()
        .filter(|(_, machine)| seen(machine.tried_ms) == oldest)
        .map(|(place, _)| place)
        .collect();
    let machine = *first.get(draw(first.len()))?;
    let runs = &machines.get(machine)?.runs;
    Some((machine, choose_run(runs, seen, draw)?))
}

fn choose_run(
    runs: &[Run],
    seen: impl Fn(i64) -> i64,
    draw: &mut dyn FnMut(usize) -> usize,
) -> Option<usize> {
    let newest = runs.len().checked_sub(1)?;
    let mut never: Vec<usize> =
        (0..runs.len()).filter(|run| seen(runs[*run].tried_ms) == 0).collect();
    if never.last() == Some(&newest) && draw(2) == 0 {
        return Some(newest);
    }
    if never.is_empty() {
        // All had their turn: one of the half that waits longest.
        never = (0..runs.len()).collect();
        never.sort_by_key(|run| runs[*run].tried_ms);
        never.truncate(runs.len().div_ceil(2));
    }
    never.get(draw(never.len())).copied()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    const NOW: i64 = 1_000_000;

    fn machine(tried_ms: i64, runs: &[i64]) -> Machine {
        Machine { tried_ms, runs: runs.iter().map(|&tried_ms| Run { tried_ms }).collect() }
    }

    /// How often each was chosen of a thousand times.
    fn chosen(machines: &[Machine]) -> BTreeMap<(usize, usize), u32> {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut counts = BTreeMap::new();
        for _ in 0..1000 {
            let next = choose(machines, NOW, &mut |below| rng.random_range(0..below)).unwrap();
            *counts.entry(next).or_default() += 1;
        }
        counts
    }

    #[test]
    fn the_machine_that_waits_longest_comes_first() {
        let machines =
            [machine(50, &[50]), machine(0, &[]), machine(20, &[20, 0]), machine(30, &[0])];
        assert!(chosen(&machines).keys().all(|(machine, _)| *machine == 2));
        let never = [machine(50, &[50]), machine(0, &[0]), machine(0, &[0])];
        let counts = chosen(&never);
        assert!(counts[&(1, 0)] > 400 && counts[&(2, 0)] > 400 && counts.len() == 2, "{counts:?}");
        assert_eq!(choose(&[machine(0, &[])], NOW, &mut |_| 0), None);
        assert_eq!(choose(&[], NOW, &mut |_| 0), None);
    }

    #[test]
    fn the_newest_backup_has_half_of_the_chances_and_each_has_one() {
        let counts = chosen(&[machine(0, &[0, 0, 0, 0])]);
        assert_eq!(counts.len(), 4, "{counts:?}");
        assert!(counts[&(0, 3)] > 500 && counts[&(0, 3)] < 700, "{counts:?}");
        // Tried ones wait while there are others.
        let counts = chosen(&[machine(9, &[0, 5, 0, 9])]);
        assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [(0, 0), (0, 2)]);
    }

    #[test]
    fn with_all_tried_the_half_that_waits_longest_has_its_turn() {
        let counts = chosen(&[machine(9, &[9, 2, 5, 7])]);
        assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [(0, 1), (0, 2)]);
    }

    #[test]
    fn a_time_in_the_future_is_none() {
        let machines = [machine(NOW + 1, &[NOW + 1]), machine(5, &[5])];
        assert!(chosen(&machines).keys().all(|(machine, _)| *machine == 0));
    }

    #[test]
    fn in_a_round_each_machine_has_one_turn() {
        let mut machines = vec![machine(0, &[0, 0]); 5];
        let mut rng = SmallRng::seed_from_u64(3);
        let mut seen = Vec::new();
        for turn in 1..=5 {
            let (place, run) =
                choose(&machines, NOW, &mut |below| rng.random_range(0..below)).unwrap();
            machines[place].tried_ms = turn;
            machines[place].runs[run].tried_ms = turn;
            seen.push(place);
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4]);
    }
}
