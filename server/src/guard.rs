//! What protects backups from who would destroy them: alarms, and locks until a date.
//!
//! A commit that looks as if somebody had encrypted or overwritten a disk ([`change`]) raises an alarm. While that is open, the last
//! run before it stays: no plan drops it, no merge takes it in, no command deletes it. An operator ends it.
//!
//! A locked run can't be dropped by anybody before its date, nor is there a command that takes the lock off. Clocks that jump don't
//! end it: [`clock`] counts the time that this server has seen pass.
//!
//! Both stand in `<machine>/.guard.json`, written before the manifest that they are about: a crash never leaves a run without. A
//! damaged file means that nobody knows, so nothing of the machine is dropped. Locking is the caller's.

pub mod change;
pub mod clock;

use std::collections::{BTreeMap, BTreeSet};

use janus_proto::{
    ids::{BackupId, DiskId},
    show::date,
};
use serde::{Deserialize, Serialize};

/// More alarms of one machine say nothing new: the first ones name what was good.
const MOST_ALARMS: usize = 64;
/// Runs whose changes are remembered.
const MOST_CHANGES: usize = 32;
const HOUR_MS: u64 = 3_600_000;

/// What protects runs of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guarded {
    /// Locked runs.
    #[serde(default)]
    pub locks: BTreeMap<BackupId, Lock>,
    /// Open alarms, by the runs that raised them.
    #[serde(default)]
    pub alarms: BTreeMap<BackupId, Alarm>,
}

/// Until when a run can't be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Unix milliseconds, by the clock that it was locked by.
    pub until_ms: i64,
    /// When it was locked, as [`clock`] counts.
    pub from_seen_ms: u64,
    /// The server must have seen so much time pass.
    pub seen_ms: u64,
    /// The date was named by an operator: the clock must say it, too.
    pub is_dated: bool,
}

impl Lock {
    /// True while it holds.
    pub fn holds(&self, now: Now) -> bool {
        now.seen_ms < self.seen_ms || (self.is_dated && now.wall_ms < self.until_ms)
    }

    /// The one that holds longer, in each respect.
    #[must_use]
    pub fn or_longer(self, other: Self) -> Self {
        Self {
            until_ms: self.until_ms.max(other.until_ms),
            from_seen_ms: self.from_seen_ms.max(other.from_seen_ms),
            seen_ms: self.seen_ms.max(other.seen_ms),
            is_dated: self.is_dated || other.is_dated,
        }
    }

    /// How long it holds, for people.
    pub fn describe(&self, now: Now) -> String {
        let until = date(self.until_ms);
        let left = self.seen_ms.saturating_sub(now.seen_ms);
        match now.wall_ms < self.until_ms {
            true => format!("until {until}"),
            false => format!(
                "until {until}, and for {} more hours: the clock says that it is later, but this server has not seen so much time pass",
                left.div_ceil(HOUR_MS)
            ),
        }
    }
}

/// What time it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Unix milliseconds by the clock, which anybody may have set.
    pub wall_ms: i64,
    /// What the server has seen pass: see [`clock`].
    pub seen_ms: u64,
}

/// Something that an operator should look at before more is lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// Unix milliseconds.
    pub raised_ms: i64,
    /// What was seen, disk by disk, for people.
    pub disks: BTreeMap<DiskId, String>,
    /// The last runs before it, which stay.
    pub keeps: BTreeSet<BackupId>,
}

impl Guarded {
    /// Raises an alarm.
    pub fn raise(&mut self, run: BackupId, alarm: Alarm) {
        if self.alarms.len() < MOST_ALARMS || self.alarms.contains_key(&run) {
            self.alarms.insert(run, alarm);
        }
    }

    /// Locks a run, or locks it for longer.
    pub fn lock(&mut self, run: BackupId, lock: Lock) {
        let known = self.locks.get(&run).copied();
        self.locks.insert(run, known.map_or(lock, |known| known.or_longer(lock)));
    }

    /// The lock of a run, while it holds.
    pub fn lock_of(&self, run: BackupId, now: Now) -> Option<Lock> {
        self.locks.get(&run).copied().filter(|lock| lock.holds(now))
    }

    /// The run whose alarm keeps this one.
    pub fn kept_by(&self, run: BackupId) -> Option<BackupId> {
        let keeps = |(_, alarm): &(&BackupId, &Alarm)| alarm.keeps.contains(&run);
        self.alarms.iter().find(keeps).map(|(by, _)| *by)
    }

    /// Forgets what a run has that never came to be.
    pub fn forget(&mut self, run: BackupId) -> bool {
        let had_lock = self.locks.remove(&run).is_some();
        self.alarms.remove(&run).is_some() || had_lock
    }
}

/// What the last runs of a machine have changed, oldest first. Losing it costs some runs until it is known anew.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes(Vec<Changed>);

/// What one run has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Changed {
    run: BackupId,
    /// Blocks, by disk; disks without a head are absent.
    blocks: BTreeMap<DiskId, u64>,
}

impl Changes {
    /// One more run.
    pub fn add(&mut self, run: BackupId, blocks: BTreeMap<DiskId, u64>) {
        self.0.retain(|known| known.run != run);
        self.0.push(Changed { run, blocks });
        let excess = self.0.len().saturating_sub(MOST_CHANGES);
        self.0.drain(..excess);
    }

    /// Changed blocks of a disk's runs, newest first, but for this run's.
    pub fn of<'a>(&'a self, disk: &'a DiskId, but: BackupId) -> impl Iterator<Item = u64> + 'a {
        let others = self.0.iter().rev().filter(move |changed| changed.run != but);
        others.filter_map(|changed| changed.blocks.get(disk).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: i64 = 86_400_000;

    fn at(wall_days: i64, seen_days: i64) -> Now {
        Now { wall_ms: wall_days * DAY_MS, seen_ms: (seen_days * DAY_MS).cast_unsigned() }
    }

    fn lock(until_days: i64, seen_days: i64, is_dated: bool) -> Lock {
        let now = at(until_days, seen_days);
        Lock { until_ms: now.wall_ms, from_seen_ms: 0, seen_ms: now.seen_ms, is_dated }
    }

    #[test]
    fn a_lock_holds_until_both_the_date_and_the_time_have_passed() {
        let dated = lock(130, 40, true);
        assert!(dated.holds(at(100, 10)));
        assert!(dated.holds(at(3000, 10)), "a clock that jumped ahead");
        assert!(dated.holds(at(129, 45)), "a clock that was ahead when it was locked");
        assert!(!dated.holds(at(130, 40)));
        let days = lock(130, 40, false);
        assert!(days.holds(at(3000, 39)));
        assert!(!days.holds(at(100, 40)), "its own clock was ahead: so many days have passed");
        assert!(
            dated.describe(at(3000, 10)).contains("720 more hours"),
            "{}",
            dated.describe(at(3000, 10))
        );
    }

    #[test]
    fn a_lock_is_never_shortened() {
        let (run, mut guarded) = (BackupId::new(), Guarded::default());
        guarded.lock(run, lock(130, 40, true));
        guarded.lock(run, lock(110, 20, false));
        assert_eq!(guarded.lock_of(run, at(120, 39)), Some(lock(130, 40, true)));
        guarded.lock(run, lock(150, 60, false));
        assert_eq!(guarded.lock_of(run, at(149, 70)), Some(lock(150, 60, true)));
        assert_eq!(guarded.lock_of(run, at(150, 60)), None);
    }

    #[test]
    fn changes_are_of_the_last_runs() {
        let (disk, mut changes) = ("disk".parse::<DiskId>().unwrap(), Changes::default());
        let runs: Vec<BackupId> = (0..40).map(|_| BackupId::new()).collect();
        for (number, run) in (0..).zip(&runs) {
            changes.add(*run, BTreeMap::from([(disk.clone(), number)]));
        }
        let all: Vec<u64> = changes.of(&disk, runs[38]).collect();
        assert_eq!((all.len(), all[0], all[1]), (31, 39, 37));
        changes.add(runs[39], BTreeMap::new());
        assert_eq!(changes.of(&disk, runs[38]).next(), Some(37), "told again");
    }
}
