//! The plan against a naive model, and a year of daily backups.

use std::fmt::Write;

use proptest::prelude::*;
use time::{OffsetDateTime, macros::datetime};

use super::*;
use crate::chain::clocks::SLACK_MS;

const DEFAULT: Rules = Rules {
    keep_all_days: 3,
    daily: 7,
    weekly: 4,
    monthly: 12,
    yearly: 0,
    at_least: 3,
    max_chain_length: 128,
};

fn disk(name: &str) -> DiskId {
    name.parse().unwrap()
}

fn point(committed_ms: i64, disks: &[(&str, bool)], chain: SnapshotId) -> Point {
    let disks = disks.iter().map(|(name, is_faulty)| DiskPoint {
        disk: disk(name),
        is_faulty: *is_faulty,
        chain,
    });
    Point {
        backup: BackupId::new(),
        committed_ms,
        is_pinned: false,
        is_held: false,
        is_locked: false,
        is_before_alarm: false,
        disks: disks.collect(),
    }
}

fn ms(time: OffsetDateTime) -> i64 {
    time.unix_timestamp() * 1000
}

fn plan_with(points: &[Point], rules: Rules) -> Plan {
    let newest = points.iter().map(|point| point.committed_ms).max().unwrap_or(0);
    plan(points.to_vec(), &Policy { rules: &|_| rules, max_drop_percent: 50 }, newest)
}

fn kept(plan: &Plan) -> Vec<BackupId> {
    let stays = |planned: &&Planned| matches!(planned.verdict, Verdict::Keep(_));
    plan.runs.iter().filter(stays).map(|planned| planned.point.backup).collect()
}

fn verdict_of<'p>(plan: &'p Plan, point: &Point) -> &'p Verdict {
    &plan.runs.iter().find(|planned| planned.point.backup == point.backup).unwrap().verdict
}

/// Daily backups over a year, each followed by its plan, as a server does it.
fn a_year() -> (Vec<Point>, Plan) {
    let chain = SnapshotId::new();
    let (mut points, mut last) = (Vec::new(), None);
    for day in 0..400 {
        let at = ms(datetime!(2025-10-22 22:00 UTC)) + day * DAY_MS;
        points.push(point(at, &[("disk", false)], chain));
        let plan = plan_with(&points, DEFAULT);
        assert_eq!(plan.stop, None, "day {day}");
        assert!(plan.drops().count() <= 2, "day {day} drops {}", plan.drops().count());
        let kept = kept(&plan);
        points.retain(|point| kept.contains(&point.backup));
        last = Some(plan);
    }
    (points, last.unwrap())
}

fn show(plan: &Plan) -> String {
    let mut text = String::new();
    for planned in &plan.runs {
        let Verdict::Keep(reasons) = &planned.verdict else { continue };
        let reasons: Vec<String> = reasons.iter().map(|(reason, _)| reason.to_string()).collect();
        let day = &date(planned.point.committed_ms)[..10];
        writeln!(text, "{day}  {}", reasons.join(", ")).unwrap();
    }
    text
}

#[test]
fn a_year_of_daily_backups_keeps_what_the_docs_say() {
    let (points, plan) = a_year();
    let shown = show(&plan);
    println!("{shown}");
    assert_eq!(plan_with(&points, DEFAULT).drops().count(), 0, "the last plan was carried out");
    assert_eq!(points.len(), shown.lines().count());
    let docs = include_str!("../../../../docs/retention.md");
    assert!(docs.contains(&shown), "docs/retention.md shows another year than this:\n{shown}");
}

#[test]
fn hourly_backups_keep_all_of_three_days() {
    let chain = SnapshotId::new();
    let newest = ms(datetime!(2026-11-25 12:00 UTC));
    let points: Vec<_> = (0..24 * 10)
        .map(|hour| point(newest - hour * 3_600_000, &[("disk", false)], chain))
        .collect();
    let plan = plan_with(&points, DEFAULT);
    // 72 hours, and the newest of days 4 to 7: day 3 and the first of the week are among them.
    assert_eq!(kept(&plan).len(), 72 + 4, "{}", show(&plan));
}

#[test]
fn a_machine_that_is_off_loses_nothing() {
    let chain = SnapshotId::new();
    let points: Vec<_> =
        (0..20).map(|hour| point(hour * 3_600_000, &[("disk", false)], chain)).collect();
    let policy = Policy { rules: &|_| DEFAULT, max_drop_percent: 50 };
    let years_later = plan(points.clone(), &policy, 10 * 365 * DAY_MS);
    assert_eq!(kept(&years_later).len(), points.len());
}

#[test]
fn a_run_in_the_future_stops_the_plan() {
    let chain = SnapshotId::new();
    let points = [point(0, &[("disk", false)], chain), point(DAY_MS, &[("disk", false)], chain)];
    let policy = Policy { rules: &|_| DEFAULT, max_drop_percent: 50 };
    let stopped = plan(points.to_vec(), &policy, DAY_MS - SLACK_MS - 1);
    assert!(matches!(stopped.stop, Some(Stop::Future { .. })), "{:?}", stopped.stop);
    assert_eq!(plan(points.to_vec(), &policy, DAY_MS - SLACK_MS).stop, None);
}

#[test]
fn a_newest_run_of_the_future_makes_no_other_old() {
    let (chain, now) = (SnapshotId::new(), 1000 * DAY_MS);
    let mut points: Vec<_> =
        (0..3).map(|day| point(now - day * DAY_MS, &[("disk", false)], chain)).collect();
    points.push(point(now + 400 * DAY_MS, &[("disk", false)], chain));
    let rules = Rules { daily: 0, weekly: 0, monthly: 0, at_least: 0, ..DEFAULT };
    let policy = Policy { rules: &|_| rules, max_drop_percent: 50 };
    let forced = plan(points.clone(), &policy, now);
    assert!(forced.stop.is_some());
    assert_eq!(forced.drops().count(), 0, "{forced:?}");
    // All of them are of the future: this clock is wrong.
    assert_eq!(plan(points, &policy, 0).drops().count(), 3);
}

#[test]
fn a_plan_that_drops_more_than_the_bound_stops() {
    let chain = SnapshotId::new();
    let points: Vec<_> = (0..100).map(|d| point(d * DAY_MS, &[("disk", false)], chain)).collect();
    let plan = plan_with(&points, DEFAULT);
    assert!(matches!(plan.stop, Some(Stop::TooMany { runs: 100, percent: 50, .. })), "{plan:?}");
    let text = plan.stop.unwrap().to_string();
    assert!(text.contains("of 100 runs") && text.contains("max_drop_percent = 50"), "{text}");
}

#[test]
fn damaged_runs_go_first_and_use_up_no_count() {
    let chain = SnapshotId::new();
    let rules = Rules { keep_all_days: 0, daily: 2, weekly: 0, monthly: 0, at_least: 0, ..DEFAULT };
    let day = |day: i64, hour: i64, faulty| {
        point(day * DAY_MS + hour * 3_600_000, &[("disk", faulty)], chain)
    };
    let good_of_5 = day(5, 1, false);
    let bad_of_5 = day(5, 2, true);
    let only_bad_of_4 = day(4, 1, true);
    let good_of_3 = day(3, 1, false);
    let good_of_2 = day(2, 1, false);
    let newest_and_bad = day(5, 3, true);
    let points = [&good_of_5, &bad_of_5, &only_bad_of_4, &good_of_3, &good_of_2, &newest_and_bad];
    let plan = plan_with(&points.map(Clone::clone), rules);
    let stays = |point: &Point| matches!(verdict_of(&plan, point), Verdict::Keep(_));
    assert!(stays(&newest_and_bad), "the newest stays");
    assert!(stays(&good_of_5) && stays(&good_of_3), "the two newest days with good runs");
    assert!(stays(&only_bad_of_4), "better than none of its day");
    assert_eq!(verdict_of(&plan, &bad_of_5), &Verdict::Drop(DropReason::Faulty));
    assert_eq!(verdict_of(&plan, &good_of_2), &Verdict::Drop(DropReason::NoRule));
}

#[test]
fn a_machine_whose_runs_are_all_damaged_keeps_them_like_good_ones() {
    let chain = SnapshotId::new();
    let points: Vec<_> = (0..30).map(|d| point(d * DAY_MS, &[("disk", true)], chain)).collect();
    let good: Vec<_> = points
        .iter()
        .map(|bad| {
            let mut good = bad.clone();
            good.disks[0].is_faulty = false;
            good
        })
        .collect();
    assert_eq!(kept(&plan_with(&points, DEFAULT)), kept(&plan_with(&good, DEFAULT)));
}

#[test]
fn a_run_stays_while_any_of_its_disks_wants_it() {
    let chain = SnapshotId::new();
    let both: Vec<_> =
        (0..10).map(|d| point(d * DAY_MS, &[("data", false), ("system", false)], chain)).collect();
    let few = Rules { keep_all_days: 0, daily: 1, weekly: 0, monthly: 0, at_least: 1, ..DEFAULT };
    let many = Rules { daily: 10, ..few };
    let rules = |disk: &DiskId| if disk.as_str() == "data" { many } else { few };
    let policy = Policy { rules: &rules, max_drop_percent: 50 };
    let plan = plan(both, &policy, 10 * DAY_MS);
    assert_eq!(kept(&plan).len(), 10);
    let oldest = &plan.runs.last().unwrap().verdict;
    assert_eq!(*oldest, Verdict::Keep(vec![(Reason::Daily, vec![disk("data")])]));
}

#[test]
fn a_disk_that_is_gone_keeps_its_newest_good_run() {
    let chain = SnapshotId::new();
    let mut points = vec![point(0, &[("old", false)], chain)];
    points.extend((100..120).map(|d| point(d * DAY_MS, &[("new", false)], chain)));
    let rules = Rules { keep_all_days: 0, daily: 1, weekly: 0, monthly: 0, at_least: 1, ..DEFAULT };
    let plan = plan_with(&points, rules);
    assert_eq!(kept(&plan).len(), 2);
    assert!(kept(&plan).contains(&points[0].backup));
}

#[test]
fn long_chains_lose_their_oldest_recent_runs() {
    let (old, new) = (SnapshotId::new(), SnapshotId::new());
    let rules =
        Rules { daily: 0, weekly: 0, monthly: 0, at_least: 1, max_chain_length: 10, ..DEFAULT };
    let mut points: Vec<_> =
        (0..5).map(|hour| point(hour * 3_600_000, &[("disk", false)], old)).collect();
    points.extend((5..30).map(|hour| point(hour * 3_600_000, &[("disk", false)], new)));
    points[7].is_pinned = true;
    let plan = plan_with(&points, rules);
    let in_new: Vec<_> = points[5..].iter().map(|point| verdict_of(&plan, point)).collect();
    let stay = |verdict: &&&Verdict| matches!(verdict, Verdict::Keep(_));
    assert_eq!(in_new.iter().filter(stay).count(), 10);
    assert!(stay(&&in_new[2]), "the pin stays");
    assert_eq!(in_new[0], &Verdict::Drop(DropReason::ChainLength));
    assert_eq!(in_new[15], &Verdict::Drop(DropReason::ChainLength));
    assert!(stay(&&in_new[16]));
    assert_eq!(kept(&plan).len(), 15, "the other chain is whole");
}

#[test]
fn long_chains_lose_their_damaged_runs_before_older_ones() {
    let chain = SnapshotId::new();
    let rules =
        Rules { daily: 0, weekly: 0, monthly: 0, at_least: 1, max_chain_length: 4, ..DEFAULT };
    let is_faulty = |hour: i64| [3, 5].contains(&hour);
    let points: Vec<_> =
        (0..7).map(|hour| point(hour * 3_600_000, &[("disk", is_faulty(hour))], chain)).collect();
    let wanted: Vec<_> = [6, 4, 2, 1].map(|hour: usize| points[hour].backup).into();
    assert_eq!(kept(&plan_with(&points, rules)), wanted);
}

/// What the module's text says, rule by rule, without any cleverness: does a rule of `disk` keep run `index`?
fn model_keeps(points: &[Point], index: usize, name: &DiskId, rules: &Rules) -> bool {
    let of = |point: &Point| point.disks.iter().find(|disk| disk.disk == *name).cloned();
    let Some(own) = of(&points[index]) else { return false };
    let all: Vec<&Point> = points.iter().filter(|point| of(point).is_some()).collect();
    let none_good = all.iter().all(|point| of(point).unwrap().is_faulty);
    let faulty = |point: &Point| !none_good && of(point).unwrap().is_faulty;
    let at = points[index].committed_ms;
    let newer: Vec<&&Point> = all.iter().filter(|point| point.committed_ms > at).collect();
    let newer_good = newer.iter().filter(|point| !faulty(point)).count();
    let is_good = none_good || !own.is_faulty;
    if newer.is_empty() || points[index].is_pinned || (is_good && newer_good == 0) {
        return true;
    }
    if is_good && newer_good < rules.at_least as usize {
        return true;
    }
    let newest = all.iter().map(|point| point.committed_ms).max().unwrap();
    if newest - at < i64::from(rules.keep_all_days) * DAY_MS {
        return true;
    }
    let counts = [
        (Period::Day, rules.daily),
        (Period::Week, rules.weekly),
        (Period::Month, rules.monthly),
        (Period::Year, rules.yearly),
    ];
    counts.into_iter().any(|(period, count)| {
        let same = |point: &&&Point| period.of(point.committed_ms) == period.of(at);
        let in_period: Vec<_> = all.iter().filter(same).collect();
        let best = match in_period.iter().filter(|point| !faulty(point)).count() {
            0 => in_period.iter().map(|point| point.committed_ms).max(),
            _ => {
                let good = in_period.iter().filter(|point| !faulty(point));
                good.map(|point| point.committed_ms).max()
            }
        };
        let later: BTreeSet<i64> = all
            .iter()
            .filter(|point| !faulty(point))
            .map(|point| period.of(point.committed_ms))
            .filter(|number| *number > period.of(at))
            .collect();
        best == Some(at) && later.len() < count as usize
    })
}

fn any_rules() -> impl Strategy<Value = Rules> {
    (0u32..4, 0u32..5, 0u32..4, 0u32..4, 0u32..3, 0u32..4).prop_map(
        |(keep_all_days, daily, weekly, monthly, yearly, at_least)| Rules {
            keep_all_days,
            daily,
            weekly,
            monthly,
            yearly,
            at_least,
            max_chain_length: 1000,
        },
    )
}

fn any_points() -> impl Strategy<Value = Vec<Point>> {
    let hours = prop_oneof![4 => 1i64..30, 1 => 1i64..2000];
    let one = (
        hours,
        prop::option::weighted(0.7, prop::bool::weighted(0.3)),
        prop::option::weighted(0.7, prop::bool::weighted(0.3)),
        prop::bool::weighted(0.05),
    );
    prop::collection::vec(one, 0..60).prop_map(|all| {
        let (chain, mut at) = (SnapshotId::new(), 0);
        let points = all.into_iter().map(|(hours, a, b, is_pinned)| {
            at += hours * 3_600_000;
            let disks = [("a", a), ("b", b)];
            let held: Vec<_> =
                disks.iter().filter_map(|(name, faulty)| faulty.map(|f| (*name, f))).collect();
            Point { is_pinned, ..point(at, &held, chain) }
        });
        points.filter(|point| !point.disks.is_empty()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_is_what_the_rules_say(points in any_points(), a in any_rules(), b in any_rules()) {
        let rules = |disk: &DiskId| if disk.as_str() == "a" { a } else { b };
        let policy = Policy { rules: &rules, max_drop_percent: 50 };
        let plan = plan(points.clone(), &policy, i64::MAX / 2);
        let kept = kept(&plan);
        for (index, point) in points.iter().enumerate() {
            let wanted = model_keeps(&points, index, &disk("a"), &a)
                || model_keeps(&points, index, &disk("b"), &b);
            prop_assert_eq!(kept.contains(&point.backup), wanted, "{:?}", point);
        }
        prop_assert_eq!(kept.len() + plan.drops().count(), points.len());
    }

    #[test]
    fn a_long_chain_loses_the_weakest_of_them_the_damaged_of_them_the_oldest(
        mut points in any_points(),
        rules in any_rules(),
        most in 1u32..10,
    ) {
        // What several disks want of one run is another matter.
        points.iter_mut().for_each(|point| point.disks.retain(|held| held.disk.as_str() == "a"));
        points.retain(|point| !point.disks.is_empty());
        let mut left = plan_with(&points, rules).runs;
        left.retain(|planned| matches!(planned.verdict, Verdict::Keep(_)));
        while left.len() > most as usize {
            let may_go = left.iter().filter(|p| strength(&p.verdict) < Some(Reason::AtLeast));
            let goes = may_go.min_by_key(|planned| {
                let is_good = !planned.point.disks[0].is_faulty;
                (strength(&planned.verdict), is_good, planned.point.committed_ms)
            });
            let Some(goes) = goes.map(|planned| planned.point.backup) else { break };
            left.retain(|planned| planned.point.backup != goes);
        }
        let left: Vec<_> = left.iter().map(|planned| planned.point.backup).collect();
        let plan = plan_with(&points, Rules { max_chain_length: most, ..rules });
        prop_assert_eq!(kept(&plan), left);
    }

    #[test]
    fn a_plan_carried_out_leaves_nothing_to_do(points in any_points(), rules in any_rules()) {
        let first = plan_with(&points, rules);
        let left: Vec<_> = {
            let kept = kept(&first);
            points.iter().filter(|point| kept.contains(&point.backup)).cloned().collect()
        };
        prop_assert_eq!(plan_with(&left, rules).drops().count(), 0);
    }

    #[test]
    fn chains_end_within_their_limit_and_pins_stay(
        points in any_points(),
        rules in any_rules(),
        most in 1u32..10,
    ) {
        let rules = Rules { max_chain_length: most, ..rules };
        let plan = plan_with(&points, rules);
        let kept = kept(&plan);
        for name in ["a", "b"] {
            let holds = |point: &&Point| point.disks.iter().any(|d| d.disk.as_str() == name);
            let links = points.iter().filter(holds).filter(|p| kept.contains(&p.backup));
            let fixed = |planned: &&Planned| {
                strength(&planned.verdict) >= Some(Reason::AtLeast)
                    && planned.point.disks.iter().any(|d| d.disk.as_str() == name)
            };
            let fixed = plan.runs.iter().filter(fixed).count();
            prop_assert!(links.count() <= fixed.max(most as usize));
        }
        prop_assert!(points.iter().filter(|p| p.is_pinned).all(|p| kept.contains(&p.backup)));
        prop_assert!(points.is_empty() || !kept.is_empty());
    }
}
