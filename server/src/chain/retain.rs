//! Retention as a plan: which runs of a machine go and why, which stay and which rule keeps them. Pure: no clock, no disk.
//!
//! Every disk has its rules and looks at the runs that hold it, newest first:
//!
//! - the newest run and the newest good one stay, pinned and locked ones too, the last good one before an alarm, and what another
//!   server fills a stub from;
//! - all of the last `keep_all_days` stay, counted back from the disk's newest run that isn't of the future: while no backups come,
//!   nothing gets old;
//! - of each of the newest `daily` days that hold a good run, its newest good run stays; so with weeks, months and years.
//!   Days and all else are UTC, weeks begin on Monday;
//! - the newest `at_least` good runs stay.
//!
//! A run is dropped whole, so it stays while any of its disks wants it. Runs with damaged content go first: in a day
//! (week …) with a good run they are never the one that stays, and they use up no count.
//! A chain longer than `max_chain_length` loses the runs that only the weakest rules hold: of those that are held alike the ones
//! in which the chain's disk is damaged, then the oldest.
//!
//! A plan that looks like an accident has a [`Stop`]: whoever carries plans out asks for confirmation then.

mod calendar;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use janus_proto::{
    ids::{BackupId, DiskId, SnapshotId},
    show::date,
};
use serde::Serialize;

use self::calendar::Period;
use super::clocks::is_future;

const DAY_MS: i64 = 86_400_000;
/// So few drops are never taken for an accident.
const FEW_DROPS: usize = 4;

/// What is kept of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// All runs of so many days.
    pub keep_all_days: u32,
    /// Days of which one run is kept.
    pub daily: u32,
    /// Weeks of which one run is kept.
    pub weekly: u32,
    /// Months of which one run is kept.
    pub monthly: u32,
    /// Years of which one run is kept.
    pub yearly: u32,
    /// Good runs that are kept in any case.
    pub at_least: u32,
    /// Links of one chain.
    pub max_chain_length: u32,
}

/// A committed run, as far as retention looks at it.
#[derive(Debug, Clone)]
pub struct Point {
    /// The run.
    pub backup: BackupId,
    /// When it was committed, as its place among the runs has it: see [`super::clocks`].
    pub committed_ms: i64,
    /// It has a pin.
    pub is_pinned: bool,
    /// Another server fills a stub from it.
    pub is_held: bool,
    /// It is locked until a date.
    pub is_locked: bool,
    /// It is the last good one before an alarm.
    pub is_before_alarm: bool,
    /// Its disks.
    pub disks: Vec<DiskPoint>,
}

impl Point {
    /// What keeps it whatever the rules say.
    fn kept_for(&self) -> impl Iterator<Item = Reason> {
        let all = [
            (self.is_pinned, Reason::Pinned),
            (self.is_held, Reason::Held),
            (self.is_before_alarm, Reason::BeforeAlarm),
            (self.is_locked, Reason::Locked),
        ];
        all.into_iter().filter_map(|(applies, reason)| applies.then_some(reason))
    }
}

/// One disk of a run.
#[derive(Debug, Clone)]
pub struct DiskPoint {
    /// The disk.
    pub disk: DiskId,
    /// Its content is known to be damaged.
    pub is_faulty: bool,
    /// Base of its chain.
    pub chain: SnapshotId,
}

/// Why a run stays; from the weakest rule to the strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It is younger than `keep_all_days`.
    Recent,
    /// The newest of its day.
    Daily,
    /// The newest of its week.
    Weekly,
    /// The newest of its month.
    Monthly,
    /// The newest of its year.
    Yearly,
    /// One of `at_least`.
    AtLeast,
    /// Another server fills a stub from it.
    Held,
    /// An administrator pinned it.
    Pinned,
    /// The last good one before an alarm.
    BeforeAlarm,
    /// It is locked until a date.
    Locked,
    /// The newest of a disk, or the newest good one.
    Newest,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recent => "recent",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
            Self::AtLeast => "at least",
            Self::Held => "filling a stub",
            Self::Pinned => "pinned",
            Self::BeforeAlarm => "last before an alarm",
            Self::Locked => "locked",
            Self::Newest => "newest",
        })
    }
}

/// Why a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// No rule of any of its disks keeps it.
    NoRule,
    /// No rule keeps it, and its content is damaged.
    Faulty,
    /// Its chain is too long.
    ChainLength,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoRule => "no rule keeps it",
            Self::Faulty => "damaged, and no rule keeps it",
            Self::ChainLength => "the chain is longer than max_chain_length",
        })
    }
}

/// What becomes of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It stays; for which reasons, strongest first, and for which disks.
    Keep(Vec<(Reason, Vec<DiskId>)>),
    /// It goes.
    Drop(DropReason),
}

/// A run with its verdict.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The run.
    pub point: Point,
    /// What becomes of it.
    pub verdict: Verdict,
}

/// Why a plan should not be carried out without asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The newest run is in the future: the clock is wrong now, or was then.
    Future {
        /// When the newest run was committed.
        newest_ms: i64,
        /// The clock.
        now_ms: i64,
    },
    /// More would go than the bound allows.
    TooMany {
        /// So many.
        drops: usize,
        /// Of so many.
        runs: usize,
        /// The bound.
        percent: u32,
    },
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Future { newest_ms, now_ms } => write!(
                f,
                "the newest run is from {}, the clock says {}: set the clock right",
                date(*newest_ms),
                date(*now_ms)
            ),
            Self::TooMany { drops, runs, percent } => write!(
                f,
                "{drops} of {runs} runs would go, more than max_drop_percent = {percent}: look at the settings"
            ),
        }
    }
}

/// All runs of a machine with what becomes of them, newest first.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The runs.
    pub runs: Vec<Planned>,
    /// Why nobody should carry it out unasked.
    pub stop: Option<Stop>,
}

impl Plan {
    /// The runs that go, oldest first.
    pub fn drops(&self) -> impl Iterator<Item = &Point> {
        let goes = |planned: &&Planned| matches!(planned.verdict, Verdict::Drop(_));
        self.runs.iter().rev().filter(goes).map(|planned| &planned.point)
    }
}

/// Rules and bounds of a plan for one machine.
pub struct Policy<'a> {
    /// The rules of each disk.
    pub rules: &'a dyn Fn(&DiskId) -> Rules,
    /// A plan that drops more of the machine's runs has a [`Stop`].
    pub max_drop_percent: u32,
}

/// Plans for the runs of one machine; the same input gives the same plan.
pub fn plan(mut points: Vec<Point>, policy: &Policy<'_>, now_ms: i64) -> Plan {
    points.sort_by_key(|point| std::cmp::Reverse(point.committed_ms));
    let mut kept: Vec<BTreeMap<Reason, BTreeSet<DiskId>>> = vec![BTreeMap::new(); points.len()];
    for (disk, series) in series(&points) {
        for (index, reason) in keep(&series, &(policy.rules)(&disk), now_ms) {
            kept[index].entry(reason).or_default().insert(disk.clone());
        }
    }
    let mut verdicts: Vec<Verdict> = points.iter().zip(kept).map(verdict).collect();
    shorten(&points, &mut verdicts, policy);
    let stop = stop(&points, &verdicts, policy.max_drop_percent, now_ms);
    let runs = points.into_iter().zip(verdicts);
    Plan { runs: runs.map(|(point, verdict)| Planned { point, verdict }).collect(), stop }
}

/// One run in the order of a disk.
struct Link {
    index: usize,
    committed_ms: i64,
    /// What keeps it whatever the rules say.
    kept_for: Vec<Reason>,
    is_faulty: bool,
}

/// The runs that hold each disk, newest first.
fn series(points: &[Point]) -> BTreeMap<DiskId, Vec<Link>> {
    let mut all: BTreeMap<DiskId, Vec<Link>> = BTreeMap::new();
    for (index, point) in points.iter().enumerate() {
        for disk in &point.disks {
            all.entry(disk.disk.clone()).or_default().push(Link {
                index,
                committed_ms: point.committed_ms,
                kept_for: point.kept_for().collect(),
                is_faulty: disk.is_faulty,
            });
        }
    }
    for series in all.values_mut().filter(|series| series.iter().all(|link| link.is_faulty)) {
        // Damaged content is better than none: without a good run they are all alike.
        series.iter_mut().for_each(|link| link.is_faulty = false);
    }
    all
}

/// What the rules of one disk keep of its runs.
fn keep(series: &[Link], rules: &Rules, now_ms: i64) -> Vec<(usize, Reason)> {
    let mut kept = Vec::new();
    let Some(newest) = series.first() else { return kept };
    let good = || series.iter().filter(|link| !link.is_faulty);
    kept.push((newest.index, Reason::Newest));
    kept.extend(good().take(1).map(|link| (link.index, Reason::Newest)));
    for link in series {
        kept.extend(link.kept_for.iter().map(|reason| (link.index, *reason)));
    }
    kept.extend(good().take(rules.at_least as usize).map(|l| (l.index, Reason::AtLeast)));
    // A single run of a wrong clock makes no other old; where all are of the future it is our clock that is wrong.
    let believed = series.iter().find(|link| !is_future(link.committed_ms, now_ms));
    let newest_ms = believed.unwrap_or(newest).committed_ms;
    let since = newest_ms.saturating_sub(i64::from(rules.keep_all_days) * DAY_MS);
    let recent = series.iter().take_while(|link| link.committed_ms > since);
    kept.extend(recent.map(|link| (link.index, Reason::Recent)));
    for (period, count, reason) in [
        (Period::Day, rules.daily, Reason::Daily),
        (Period::Week, rules.weekly, Reason::Weekly),
        (Period::Month, rules.monthly, Reason::Monthly),
        (Period::Year, rules.yearly, Reason::Yearly),
    ] {
        kept.extend(one_of_each(series, period, count).map(|index| (index, reason)));
    }
    kept
}

/// The best run of each of the newest `count` periods that hold a good one, and of those between them that hold none.
fn one_of_each(series: &[Link], period: Period, count: u32) -> impl Iterator<Item = usize> {
    let mut counted = 0;
    let periods =
        series.chunk_by(move |a, b| period.of(a.committed_ms) == period.of(b.committed_ms));
    periods.map_while(move |links| {
        let best = links.iter().find(|link| !link.is_faulty).or(links.first())?;
        if counted == count {
            return None;
        }
        counted += u32::from(!best.is_faulty);
        Some(best.index)
    })
}

fn verdict((point, kept): (&Point, BTreeMap<Reason, BTreeSet<DiskId>>)) -> Verdict {
    if kept.is_empty() {
        let faulty = point.disks.iter().any(|disk| disk.is_faulty);
        return Verdict::Drop(if faulty { DropReason::Faulty } else { DropReason::NoRule });
    }
    let reasons = kept.into_iter().rev();
    Verdict::Keep(reasons.map(|(reason, disks)| (reason, disks.into_iter().collect())).collect())
}

/// Drops more while a chain is too long: weakest reason first, damaged content first, oldest first. Pins and the newest stay
/// whatever the length.
fn shorten(points: &[Point], verdicts: &mut [Verdict], policy: &Policy<'_>) {
    let mut chains: HashMap<(&DiskId, SnapshotId), Vec<usize>> = HashMap::new();
    for (index, point) in points.iter().enumerate() {
        for disk in &point.disks {
            chains.entry((&disk.disk, disk.chain)).or_default().push(index);
        }
    }
    let mut chains: Vec<_> = chains.into_iter().collect();
    chains.sort_unstable_by_key(|(name, _)| *name);
    for ((disk, _), mut links) in chains {
        let most = (policy.rules)(disk).max_chain_length as usize;
        links.retain(|index| matches!(verdicts[*index], Verdict::Keep(_)));
        let excess = links.len().saturating_sub(most);
        let is_good = |index: usize| {
            points[index].disks.iter().all(|held| held.disk != *disk || !held.is_faulty)
        };
        // A stable sort of the oldest first.
        links.reverse();
        links.sort_by_key(|index| (strength(&verdicts[*index]), is_good(*index)));
        for index in links.into_iter().take(excess) {
            if strength(&verdicts[index]) < Some(Reason::AtLeast) {
                verdicts[index] = Verdict::Drop(DropReason::ChainLength);
            }
        }
    }
}

fn strength(verdict: &Verdict) -> Option<Reason> {
    match verdict {
        Verdict::Keep(reasons) => reasons.first().map(|(reason, _)| *reason),
        Verdict::Drop(_) => None,
    }
}

fn stop(points: &[Point], verdicts: &[Verdict], percent: u32, now_ms: i64) -> Option<Stop> {
    let newest_ms = points.first()?.committed_ms;
    if is_future(newest_ms, now_ms) {
        return Some(Stop::Future { newest_ms, now_ms });
    }
    let drops = verdicts.iter().filter(|verdict| matches!(verdict, Verdict::Drop(_))).count();
    let runs = points.len();
    let too_many = drops > FEW_DROPS && drops as u64 * 100 > runs as u64 * u64::from(percent);
    too_many.then_some(Stop::TooMany { drops, runs, percent })
}
