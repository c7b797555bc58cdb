//! When backups are due: a slot for each day and time of the settings, by the wall clock of a time zone. Pure.
//!
//! A slot is served by any backup whose snapshots were taken at or after it, whoever started it. Where the clock is set
//! forward over a slot's time of day, the slot is as much later; a time of day that comes twice counts at its first. A
//! last success in the future is believed as far as clocks are commonly wrong, and counts as just now beyond that: it
//! must neither repeat a slot nor keep all others away.

use std::time::Duration;

use jiff::{
    Timestamp, ToSpan,
    civil::{Time, Weekday},
    tz::TimeZone,
};
use serde::{Deserialize, Serialize};

/// How far in the future a last success may lie: a clock that was taken for local time is off by so much at most.
const BELIEVED: Duration = Duration::from_secs(14 * 3600);
/// Longest random delay.
const MOST_DELAY_MINUTES: u32 = 720;
/// Days around now that hold the last and the next slot of any schedule, delays included.
const DAYS_AROUND: i64 = 9;
const DAYS: [(&str, Weekday); 7] = [
    ("Mon", Weekday::Monday),
    ("Tue", Weekday::Tuesday),
    ("Wed", Weekday::Wednesday),
    ("Thu", Weekday::Thursday),
    ("Fri", Weekday::Friday),
    ("Sat", Weekday::Saturday),
    ("Sun", Weekday::Sunday),
];

/// The section `[schedule]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSettings {
    /// Days of the week: `Mon` to `Sun`.
    pub days: Vec<String>,
    /// Times of day: `22:00`.
    pub times: Vec<String>,
    /// A backup begins later by up to so much.
    pub random_delay_minutes: u32,
    /// What was missed while nothing ran is made up for.
    pub catch_up: bool,
    /// Wakes the machine from suspend.
    pub wake: bool,
    /// Also on battery.
    pub on_battery: bool,
    /// Also over a metered link.
    pub on_metered: bool,
    /// Pause before a failed backup is tried again; it doubles each time.
    pub retry_minutes: u32,
}

impl Default for ScheduleSettings {
    fn default() -> Self {
        Self {
            days: DAYS.iter().map(|(name, _)| (*name).to_owned()).collect(),
            times: vec!["22:00".into()],
            random_delay_minutes: 30,
            catch_up: true,
            wake: false,
            on_battery: false,
            on_metered: false,
            retry_minutes: 10,
        }
    }
}

/// A schedule that can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Not a day.
    #[error("schedule.days: {0:?} is none of Mon, Tue, Wed, Thu, Fri, Sat, Sun")]
    Day(String),
    /// Not a time of day.
    #[error("schedule.times: {0:?} is not a time of day; write HH:MM, as in \"22:00\"")]
    Time(String),
    /// Never.
    #[error("schedule.{0} is empty, so that there would never be a backup")]
    Never(&'static str),
    /// Too long.
    #[error("schedule.random_delay_minutes: at most {MOST_DELAY_MINUTES}")]
    Delay,
    /// At once, and again and again.
    #[error("schedule.retry_minutes: at least 1")]
    Retry,
}

impl ScheduleSettings {
    /// The days, from Monday on, each once.
    ///
    /// # Errors
    /// When one isn't a day, or there is none.
    pub fn weekdays(&self) -> Result<Vec<(&'static str, Weekday)>, ScheduleError> {
        let is = |given: &String, name: &str| given.eq_ignore_ascii_case(name);
        if let Some(wrong) =
            self.days.iter().find(|day| DAYS.iter().all(|(name, _)| !is(day, name)))
        {
            return Err(ScheduleError::Day(wrong.clone()));
        }
        let days: Vec<_> = DAYS
            .into_iter()
            .filter(|(name, _)| self.days.iter().any(|day| is(day, name)))
            .collect();
        if days.is_empty() { Err(ScheduleError::Never("days")) } else { Ok(days) }
    }

    /// The times of day, each once.
    ///
    /// # Errors
    /// When one isn't a time, or there is none.
    pub fn times_of_day(&self) -> Result<Vec<Time>, ScheduleError> {
        let parse = |text: &String| {
            let digits = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
            let (hour, minute) = text.split_once(':').filter(|(h, m)| digits(h) && digits(m))?;
            Time::new(hour.parse().ok()?, minute.parse().ok()?, 0, 0).ok()
        };
        let times = self.times.iter();
        let times = times.map(|text| parse(text).ok_or_else(|| ScheduleError::Time(text.clone())));
        let mut times = times.collect::<Result<Vec<_>, _>>()?;
        times.sort();
        times.dedup();
        if times.is_empty() { Err(ScheduleError::Never("times")) } else { Ok(times) }
    }

    /// Checks all of it.
    ///
    /// # Errors
    /// At the first that can't be used.
    pub fn check(&self) -> Result<(), ScheduleError> {
        Schedule::new(self, "").map(drop)
    }
}

/// A time at which a backup is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// By the settings.
    pub at: Timestamp,
    /// With its random delay.
    pub due: Timestamp,
}

/// When backups are due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    days: Vec<Weekday>,
    times: Vec<Time>,
    delay_seconds: u32,
    retry: Duration,
    seed: String,
}

impl Schedule {
    /// By these settings. Machines with other seeds get other delays; the same one gets the same for the same slot.
    ///
    /// # Errors
    /// When a setting can't be used.
    pub fn new(settings: &ScheduleSettings, seed: &str) -> Result<Self, ScheduleError> {
        if settings.random_delay_minutes > MOST_DELAY_MINUTES {
            return Err(ScheduleError::Delay);
        }
        if settings.retry_minutes == 0 {
            return Err(ScheduleError::Retry);
        }
        Ok(Self {
            days: settings.weekdays()?.into_iter().map(|(_, day)| day).collect(),
            times: settings.times_of_day()?,
            delay_seconds: settings.random_delay_minutes * 60,
            retry: Duration::from_secs(u64::from(settings.retry_minutes) * 60),
            seed: seed.to_owned(),
        })
    }

    /// The same without delays: somebody else has waited for them already.
    pub fn without_delays(self) -> Self {
        Self { delay_seconds: 0, ..self }
    }

    /// The newest slot that is due at `now`.
    pub fn last(&self, now: Timestamp, zone: &TimeZone) -> Option<Slot> {
        self.around(now, zone).filter(|slot| slot.due <= now).max_by_key(|slot| slot.at)
    }

    /// The slot that is due next after `now`.
    pub fn next(&self, now: Timestamp, zone: &TimeZone) -> Option<Slot> {
        self.around(now, zone).filter(|slot| slot.due > now).min_by_key(|slot| slot.due)
    }

    /// The pause before the next attempt, after so many failed ones.
    pub fn pause(&self, failures: u32) -> Duration {
        const LONGEST: Duration = Duration::from_secs(6 * 3600);
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
        self.retry.saturating_mul(doubled).min(LONGEST.max(self.retry))
    }

    fn around(&self, now: Timestamp, zone: &TimeZone) -> impl Iterator<Item = Slot> {
        let today = now.to_zoned_datetime(zone.clone()).date();
        let dates = (-DAYS_AROUND..=DAYS_AROUND)
            .filter_map(move |days| today.checked_add(days.days()).ok())
            .filter(|date| self.days.contains(&date.weekday()));
        let places =
            dates.flat_map(|date| self.times.iter().map(move |time| date.to_datetime(*time)));
        places.filter_map(|place| {
            let at = zone.to_ambiguous_zoned_datetime(place).compatible().ok()?.timestamp();
            let due = at.checked_add(self.delay(at)).ok()?;
            Some(Slot { at, due })
        })
    }

    fn delay(&self, at: Timestamp) -> Duration {
        let hash = blake3::hash(format!("{} {}", self.seed, at.as_second()).as_bytes());
        let drawn = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Duration::from_secs(drawn % (u64::from(self.delay_seconds) + 1))
    }
}

/// The last success as it may be used at `now`: see the text of this module.
pub fn believed(last_success: Timestamp, now: Timestamp) -> Timestamp {
    let is_far = now.checked_add(BELIEVED).is_ok_and(|latest| last_success > latest);
    if is_far { now } else { last_success }
}

#[cfg(test)]
mod tests;
