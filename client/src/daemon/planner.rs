//! What the daemon does next, as a value: no clock, no disk, no process.
//!
//! It is asked at least once a minute with what the clocks say then, and decides anew each time: a clock that was set, or a
//! machine that slept, costs nothing but the minute. Slots and the last success are compared by the wall clock, pauses
//! by one that goes on in suspend and can't be set.

use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};

use crate::schedule::{Schedule, Slot, believed};

/// What the clocks say.
#[derive(Debug, Clone)]
pub struct Moment {
    /// Wall clock.
    pub wall: Timestamp,
    /// Its zone.
    pub zone: TimeZone,
    /// Time since the machine started, suspend included.
    pub running: Duration,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Back up, for this slot.
    Run(Slot),
    /// Try again for this slot after this.
    Retry(Slot, Duration),
    /// Nothing until the next slot; none with a clock at the end of time.
    Idle(Option<Slot>),
}

#[derive(Debug, Clone, Copy)]
struct Failed {
    slot: Timestamp,
    attempts: u32,
    /// By [`Moment::running`].
    again: Duration,
}

/// Decides; remembers what failed.
#[derive(Debug)]
pub struct Planner {
    schedule: Schedule,
    /// Slots that were due before it aren't made up for.
    ignored_before: Option<Timestamp>,
    /// As it was told last.
    told: Option<Timestamp>,
    /// The same, or what it has become since.
    last_success: Option<Timestamp>,
    /// What a last success far in the future counts as, while it is that.
    clamped: Option<Timestamp>,
    failed: Option<Failed>,
}

impl Planner {
    /// With the last success that is known. Without `catch_up`, what was due before `now` is left out.
    pub fn new(
        schedule: Schedule,
        last_success: Option<Timestamp>,
        catch_up: bool,
        now: &Moment,
    ) -> Self {
        let ignored_before = (!catch_up).then_some(now.wall);
        let told = last_success;
        Self { schedule, ignored_before, told, last_success, clamped: None, failed: None }
    }

    /// Goes on by another schedule, from `now` on.
    pub fn reschedule(&mut self, schedule: Schedule, catch_up: bool, now: &Moment) {
        self.schedule = schedule;
        self.ignored_before = (!catch_up).then_some(now.wall);
        self.failed = None;
    }

    /// The newest success that is known, whoever made it.
    pub fn learn(&mut self, last_success: Option<Timestamp>) {
        if self.told != last_success {
            (self.told, self.last_success) = (last_success, last_success);
        }
    }

    /// What to do now.
    pub fn look(&mut self, now: &Moment) -> Step {
        // The clock was wrong when we began: what is due by the right one counts.
        self.ignored_before = self.ignored_before.map(|before| before.min(now.wall));
        let idle = |planner: &Self| Step::Idle(planner.schedule.next(now.wall, &now.zone));
        let Some(slot) = self.schedule.last(now.wall, &now.zone) else { return idle(self) };
        let is_ignored = self.ignored_before.is_some_and(|before| slot.due < before);
        if is_ignored || self.last_success(now.wall).is_some_and(|last| last >= slot.at) {
            return idle(self);
        }
        match self.failed {
            Some(failed) if failed.slot == slot.at && now.running < failed.again => {
                Step::Retry(slot, failed.again - now.running)
            }
            _ => Step::Run(slot),
        }
    }

    /// A run has succeeded: `taken` is its snapshots' time by the wall clock of then, `took` how long it took
    /// since. Where the clock was set forward meanwhile, the slots it went over count as served.
    pub fn succeeded(&mut self, taken: Timestamp, took: Duration, now: &Moment) {
        let by_now = now.wall.checked_sub(took).unwrap_or(taken);
        (self.told, self.last_success) = (Some(taken), Some(taken.max(by_now)));
        (self.clamped, self.failed) = (None, None);
    }

    /// A run for `slot` has failed; returns the pause until the next attempt.
    pub fn has_failed(&mut self, slot: Slot, now: &Moment) -> Duration {
        let before = self.failed.filter(|failed| failed.slot == slot.at);
        let attempts = before.map_or(0, |failed| failed.attempts).saturating_add(1);
        let pause = self.schedule.pause(attempts);
        self.failed = Some(Failed { slot: slot.at, attempts, again: now.running + pause });
        pause
    }

    /// The slot that is due next.
    pub fn next(&self, now: &Moment) -> Option<Slot> {
        self.schedule.next(now.wall, &now.zone)
    }

    fn last_success(&mut self, now: Timestamp) -> Option<Timestamp> {
        let last = self.last_success?;
        if believed(last, now) == last {
            self.clamped = None;
            return Some(last);
        }
        let clamped = self.clamped.unwrap_or(now).min(now);
        self.clamped = Some(clamped);
        Some(clamped)
    }
}
