use proptest::prelude::*;

use super::*;

fn settings(days: &[&str], times: &[&str], delay: u32) -> ScheduleSettings {
    let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let random_delay_minutes = delay;
    ScheduleSettings {
        days: own(days),
        times: own(times),
        random_delay_minutes,
        ..Default::default()
    }
}

fn daily(time: &str) -> Schedule {
    let all = ScheduleSettings::default().days;
    let all: Vec<_> = all.iter().map(String::as_str).collect();
    Schedule::new(&settings(&all, &[time], 0), "m").unwrap()
}

fn berlin() -> TimeZone {
    TimeZone::get("Europe/Berlin").unwrap()
}

fn at(text: &str) -> Timestamp {
    format!("{text}[Europe/Berlin]").parse::<jiff::ZonedDateTime>().unwrap().timestamp()
}

fn shown(slot: Option<Slot>) -> String {
    slot.unwrap().at.to_zoned_datetime(berlin()).strftime("%a %F %H:%M %:z").to_string()
}

#[test]
fn slots_are_days_and_times_of_the_settings() {
    let workdays = settings(&["fri", "Mon"], &["22:00", "06:30"], 0);
    let schedule = Schedule::new(&workdays, "m").unwrap();
    let saturday = at("2026-11-28T12:00");
    assert_eq!(shown(schedule.last(saturday, &berlin())), "Fri 2026-11-27 22:00 +01:00");
    assert_eq!(shown(schedule.next(saturday, &berlin())), "Mon 2026-11-30 06:30 +01:00");
    let exactly = at("2026-11-30T06:30");
    assert_eq!(shown(schedule.last(exactly, &berlin())), "Mon 2026-11-30 06:30 +01:00");
    assert_eq!(shown(schedule.next(exactly, &berlin())), "Mon 2026-11-30 22:00 +01:00");
}

#[test]
fn the_night_the_clock_is_set_has_one_slot() {
    let schedule = daily("02:30");
    let spring = at("2026-03-29T00:00");
    assert_eq!(shown(schedule.next(spring, &berlin())), "Sun 2026-03-29 03:30 +02:00");
    let after = at("2026-03-29T03:30");
    assert_eq!(shown(schedule.next(after, &berlin())), "Mon 2026-03-30 02:30 +02:00");
    let autumn = at("2026-10-25T00:00");
    let first = schedule.next(autumn, &berlin()).unwrap();
    assert_eq!(shown(Some(first)), "Sun 2026-10-25 02:30 +02:00");
    let again = first.at.checked_add(Duration::from_secs(3600)).unwrap();
    assert_eq!(shown(schedule.last(again, &berlin())), "Sun 2026-10-25 02:30 +02:00");
    assert_eq!(shown(schedule.next(first.at, &berlin())), "Mon 2026-10-26 02:30 +01:00");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |days: &[&str], times: &[&str], delay| {
        settings(days, times, delay).check().unwrap_err().to_string()
    };
    assert!(refused(&["Funday"], &["22:00"], 0).contains("Funday"));
    assert!(refused(&[], &["22:00"], 0).contains("schedule.days is empty"));
    assert!(refused(&["Mon"], &[], 0).contains("schedule.times is empty"));
    for time in ["24:00", "9:00", "22", "22:00:00", "+1:00"] {
        assert!(refused(&["Mon"], &[time], 0).contains(time));
    }
    assert!(refused(&["Mon"], &["22:00"], 721).contains("720"));
    let zero = ScheduleSettings { retry_minutes: 0, ..Default::default() };
    assert_eq!(zero.check(), Err(ScheduleError::Retry));
}

#[test]
fn pauses_grow_to_six_hours() {
    let schedule = daily("22:00");
    let minutes: Vec<_> = (1..=8).map(|n| schedule.pause(n).as_secs() / 60).collect();
    assert_eq!(minutes, [10, 20, 40, 80, 160, 320, 360, 360]);
    assert_eq!(schedule.pause(u32::MAX).as_secs(), 6 * 3600);
}

#[test]
fn a_success_in_the_future_is_believed_for_half_a_day() {
    let now = at("2026-11-28T12:00");
    let near = at("2026-11-29T01:00");
    assert_eq!(believed(near, now), near);
    assert_eq!(believed(at("2026-11-29T03:00"), now), now);
    assert_eq!(believed(at("2025-01-01T00:00"), now), at("2025-01-01T00:00"));
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    let days = proptest::sample::subsequence(DAYS.map(|(name, _)| name).to_vec(), 1..=7);
    let times = proptest::collection::vec((0..24_u32, 0..60_u32), 1..4);
    (days, times, 0..=MOST_DELAY_MINUTES, any::<u64>()).prop_map(|(days, times, delay, seed)| {
        let times: Vec<_> = times.iter().map(|(h, m)| format!("{h:02}:{m:02}")).collect();
        let times: Vec<_> = times.iter().map(String::as_str).collect();
        Schedule::new(&settings(&days, &times, delay), &seed.to_string()).unwrap()
    })
}

fn any_zone() -> impl Strategy<Value = TimeZone> {
    // Half-hour summer time, and a place that once left a day out, are among them.
    let names =
        ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/Sao_Paulo", "Pacific/Apia"];
    proptest::sample::select(names.to_vec()).prop_map(|name| TimeZone::get(name).unwrap())
}

proptest! {
    /// At every moment of 2000 to 2040 there is a last slot that is due and a next one that is not, a delay apart from the
    /// settings at most, and a week and a delay away at most.
    #[test]
    fn every_moment_lies_between_two_slots(
        schedule in any_schedule(),
        zone in any_zone(),
        second in 946_684_800_i64..2_208_988_800,
    ) {
        let now = Timestamp::from_second(second).unwrap();
        let last = schedule.last(now, &zone).unwrap();
        let next = schedule.next(now, &zone).unwrap();
        let week = Duration::from_secs((8 * 24 + 12) * 3600);
        prop_assert!(last.due <= now && now < next.due);
        for slot in [last, next] {
            prop_assert!(slot.at <= slot.due);
            let delay = slot.due.duration_since(slot.at).unsigned_abs();
            prop_assert!(delay <= Duration::from_secs(u64::from(schedule.delay_seconds)));
            prop_assert!(now.duration_since(slot.due).unsigned_abs() <= week);
        }
        // Nothing is due between them.
        let before = next.due.checked_sub(Duration::from_secs(1)).unwrap();
        prop_assert_eq!(schedule.last(before.max(now), &zone).unwrap().at, last.at);
        // The same slot has the same delay whenever it is asked for.
        prop_assert_eq!(schedule.next(last.due.checked_sub(Duration::from_nanos(1)).unwrap(), &zone)
            .unwrap().due, last.due);
    }
}
