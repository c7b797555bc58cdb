//! Backups by the clock: `janus-client daemon`, and with `--once` what the systemd timer starts.
//!
//! Each backup is a process of its own, `janus-client backup`, so that nothing of a failed one stays here. A daemon that
//! is killed leaves its backup running; the next daemon finds it busy and comes back later. What it needs to know after
//! a restart is the last success, which the backup itself stores. The clocks are looked at once a minute at least, so a
//! clock that was set or a machine that slept is noticed within a minute.

use std::time::Duration;

use jiff::Timestamp;
use tokio::{sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    schedule::{Schedule, ScheduleError, ScheduleSettings, Slot},
};

pub mod conditions;
pub mod host;
pub mod planner;

use conditions::Hindrance;
use planner::{Moment, Planner, Step};

/// Longest time without a look at the clocks.
const LOOK: Duration = Duration::from_secs(60);
/// With less time than this until the next slot, [`Until::Served`] leaves the rest to it.
const LAST_CALL: Duration = Duration::from_secs(60);

/// How a backup ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was made.
    Made,
    /// It was not.
    Failed {
        /// Why.
        message: String,
        /// Exit code of `janus-client backup`.
        exit_code: u8,
    },
    /// We were asked to stop.
    Stopped,
}

/// When to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// When asked to.
    Stopped,
    /// As soon as no backup is due, or the next slot is.
    Served,
}

/// Why the daemon ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It was asked to.
    Stopped,
    /// No backup was due.
    NothingDue,
    /// The backup that was due was made.
    Made,
    /// Something kept it from being made until the next slot.
    PutOff(Hindrance),
    /// It failed until the next slot.
    Failed {
        /// Why, the last time.
        message: String,
        /// Exit code of the last attempt.
        exit_code: u8,
    },
}

/// What the daemon needs of the machine: a seam, so that tests bring clocks that jump.
pub trait Host {
    /// The clocks.
    fn now(&self) -> Moment;
    /// Time of the last success as it is stored.
    fn last_success(&self) -> impl Future<Output = Option<Timestamp>> + Send;
    /// What speaks against a backup now.
    fn hindrance(
        &self,
        settings: &ScheduleSettings,
    ) -> impl Future<Output = Option<Hindrance>> + Send;
    /// Makes a backup; asked to stop, it ends it resumably.
    fn back_up(&self, stop: &CancellationToken) -> impl Future<Output = Ended> + Send;
    /// Takes other settings.
    fn adopt(&mut self, settings: &Settings);
}

/// The daemon.
pub struct Daemon<H> {
    /// The machine.
    pub host: H,
    /// Settings of the schedule.
    pub settings: ScheduleSettings,
    /// Makes this machine's delays differ from another's.
    pub seed: String,
    /// When to end.
    pub until: Until,
    /// Settings that were read again.
    pub reloads: mpsc::Receiver<Box<Settings>>,
    /// Asks it to end.
    pub stop: CancellationToken,
}

impl<H: Host> Daemon<H> {
    /// Runs until its end.
    ///
    /// # Errors
    /// When the schedule can't be used.
    pub async fn run(mut self) -> Result<End, ScheduleError> {
        let catch_up = self.settings.catch_up || self.until == Until::Served;
        let (now, last) = (self.host.now(), self.host.last_success().await);
        let mut planner = Planner::new(self.schedule()?, last, catch_up, &now);
        let (mut told, mut nothing_done) = (None, End::NothingDue);
        while !self.stop.is_cancelled() {
            planner.learn(self.host.last_success().await);
            let now = self.host.now();
            let wait = match planner.look(&now) {
                Step::Idle(_) if self.until == Until::Served => return Ok(nothing_done),
                Step::Idle(next) => {
                    tell(&mut told, &idle_text(next, &now));
                    next.map_or(LOOK, |next| until(next.due, &now))
                }
                Step::Retry(_, pause) => pause,
                Step::Run(slot) => match self.host.hindrance(&self.settings).await {
                    Some(hindrance) if self.is_last_call(&planner, LOOK) => {
                        return Ok(End::PutOff(hindrance));
                    }
                    Some(hindrance) => {
                        tell(&mut told, &format!("a backup is due and waits: {hindrance}"));
                        LOOK
                    }
                    None => {
                        told = None;
                        match self.attempt(&mut planner, slot).await {
                            Some(End::Made) => nothing_done = End::Made,
                            Some(end) => return Ok(end),
                            None => {}
                        }
                        continue;
                    }
                },
            };
            self.wait(&mut planner, wait).await;
        }
        Ok(End::Stopped)
    }

    /// Makes a backup; `None` when it is to be tried again.
    async fn attempt(&self, planner: &mut Planner, slot: Slot) -> Option<End> {
        let began = self.host.now();
        let ended = self.host.back_up(&self.stop).await;
        let now = self.host.now();
        match ended {
            Ended::Stopped => Some(End::Stopped),
            Ended::Made => {
                let taken = self.host.last_success().await.unwrap_or(began.wall);
                planner.succeeded(taken, now.running.saturating_sub(began.running), &now);
                Some(End::Made)
            }
            Ended::Failed { message, exit_code } => {
                let pause = planner.has_failed(slot, &now);
                if self.is_last_call(planner, pause) {
                    return Some(End::Failed { message, exit_code });
                }
                tracing::warn!(exit_code, retry = ?pause, "the backup failed: {message}");
                None
            }
        }
    }

    /// Whether the next slot comes before `pause` is over, and is to have a process of its own.
    fn is_last_call(&self, planner: &Planner, pause: Duration) -> bool {
        let now = self.host.now();
        let next = planner.next(&now);
        self.until == Until::Served
            && next.is_some_and(|next| until(next.at, &now) <= pause + LAST_CALL)
    }

    /// Waits, and takes other settings as they come.
    async fn wait(&mut self, planner: &mut Planner, longest: Duration) {
        let reloaded = tokio::select! {
            () = sleep(longest.clamp(Duration::from_secs(1), LOOK)) => return,
            () = self.stop.cancelled() => return,
            // The sender lives as long as the program.
            Some(settings) = self.reloads.recv() => settings,
        };
        let before = std::mem::replace(&mut self.settings, reloaded.schedule.clone());
        match self.schedule() {
            Ok(schedule) => {
                self.host.adopt(&reloaded);
                if before != self.settings {
                    planner.reschedule(schedule, self.settings.catch_up, &self.host.now());
                }
                tracing::info!("settings were read again");
            }
            Err(error) => {
                self.settings = before;
                tracing::error!(%error, "the old settings stay in use");
            }
        }
    }

    fn schedule(&self) -> Result<Schedule, ScheduleError> {
        let schedule = Schedule::new(&self.settings, &self.seed)?;
        // The timer that has started us has waited already.
        Ok(if self.until == Until::Served { schedule.without_delays() } else { schedule })
    }
}

fn until(time: Timestamp, now: &Moment) -> Duration {
    Duration::try_from(time.duration_since(now.wall)).unwrap_or_default()
}

fn idle_text(next: Option<Slot>, now: &Moment) -> String {
    match next {
        Some(next) => {
            let due = next.due.to_zoned_datetime(now.zone.clone());
            format!("next backup {}", due.strftime("%a %Y-%m-%d %H:%M:%S %Z"))
        }
        None => "no next backup: the clock is at the end of time".into(),
    }
}

/// Says it unless it was said last.
fn tell(told: &mut Option<String>, text: &str) {
    if told.as_deref() != Some(text) {
        tracing::info!("{text}");
        *told = Some(text.to_owned());
    }
}

#[cfg(test)]
mod tests;
