//! Wakes servers up at set times of day, before the backups of the night begin, and for a client that finds none awake. A packet to
//! a server that is on does nothing, so nothing is remembered: what was missed for less than an hour, while this host slept
//! itself, is made up for.

use std::{str::FromStr, time::Duration};

use janus_proto::{
    clock,
    wake::{Sleeper, wake_and_tell},
};
use tokio::{sync::Mutex, time::Instant};
use tokio_util::sync::CancellationToken;

/// How often it is looked at the clock.
const LOOK: Duration = Duration::from_secs(20);
/// Minutes after which a missed time is missed.
const MISSED: i64 = 60;
const DAY: i64 = 24 * 60;

/// Least time between packets for clients, however many ask.
const AGAIN: Duration = Duration::from_secs(5);

/// A server, and the time of day at which it is woken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    /// Minute of the day, local time; `None`: only when a client finds no server awake.
    minute: Option<i64>,
    sleeper: Sleeper,
}

/// Wakes the servers up that the settings name, whatever their times, when somebody asks.
#[derive(Debug)]
pub struct Waker {
    sleepers: Vec<Sleeper>,
    sent: Mutex<Option<Instant>>,
}

impl Waker {
    /// Of these servers, each once.
    pub fn new(alarms: &[Alarm]) -> Self {
        let mut sleepers: Vec<Sleeper> = Vec::new();
        for Alarm { sleeper, .. } in alarms {
            if !sleepers.contains(sleeper) {
                sleepers.push(*sleeper);
            }
        }
        Self { sleepers, sent: Mutex::default() }
    }

    /// Sends the packets, unless that was done a moment ago; returns how many hosts get them.
    pub async fn wake(&self) -> u32 {
        // Held while they are sent: who else asks meanwhile finds them sent.
        let mut sent = self.sent.lock().await;
        if sent.is_none_or(|at| at.elapsed() >= AGAIN) {
            for sleeper in &self.sleepers {
                wake_and_tell(sleeper).await;
            }
            *sent = Some(Instant::now());
        }
        u32::try_from(self.sleepers.len()).unwrap_or(u32::MAX)
    }
}

impl FromStr for Alarm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let alarm = || {
            let Some((time, sleeper)) = text.trim().split_once(' ') else {
                return Some(Self { minute: None, sleeper: text.trim().parse().ok()? });
            };
            let (hours, minutes) = time.split_once(':')?;
            let number = |text: &str, end: i64| text.parse().ok().filter(|n| (0..end).contains(n));
            let minute = number(hours, 24)? * 60 + number(minutes, 60)?;
            Some(Self { minute: Some(minute), sleeper: sleeper.trim().parse().ok()? })
        };
        alarm().ok_or_else(|| {
            format!(
                "{text:?} is no host, or no time and a host; write \"00:11:22:33:44:55\" or \"22:00 00:11:22:33:44:55\", or \"22:00 00:11:22:33:44:55@192.168.1.255\" with its network's broadcast address"
            )
        })
    }
}

/// Sends the packets at their times, until `shutdown`.
pub async fn follow(alarms: Vec<Alarm>, shutdown: CancellationToken) {
    let timed = |alarm: &Alarm| Some((alarm.minute?, alarm.sleeper));
    let alarms: Vec<_> = alarms.iter().filter_map(timed).collect();
    if alarms.is_empty() {
        return;
    }
    clock::warn_without_zone("times of `wake`");
    let mut last = local_minute();
    while shutdown.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let now = local_minute();
        for (_, sleeper) in alarms.iter().filter(|(minute, _)| is_due(*minute, last, now)) {
            wake_and_tell(sleeper).await;
        }
        last = now;
    }
}

/// Whether a time of day lies after `last` and not after `now`, minutes of the local clock. A clock that was set back waits.
fn is_due(minute: i64, last: i64, now: i64) -> bool {
    let from = last.max(now - MISSED);
    let latest = now - (now - minute).rem_euclid(DAY);
    latest > from && latest <= now
}

fn local_minute() -> i64 {
    let now = jiff::ZonedDateTime::now();
    let seconds = now.timestamp().as_second() + i64::from(now.offset().seconds());
    seconds.div_euclid(60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_is_a_time_and_a_host() {
        let alarm: Alarm = "22:05 00:11:22:33:44:55@10.0.0.255".parse().unwrap();
        assert_eq!(alarm.minute, Some(22 * 60 + 5));
        let alarm: Alarm = "00:11:22:33:44:55".parse().unwrap();
        assert_eq!(alarm.minute, None);
        for bad in ["", "22:05", "24:00 00:11:22:33:44:55", "22:05 host"] {
            assert!(bad.parse::<Alarm>().unwrap_err().contains("22:00 00:11"), "{bad}");
        }
    }

    #[test]
    fn each_time_comes_once_a_day_and_a_short_sleep_misses_none() {
        let at = 22 * 60;
        let day = 20_000 * DAY;
        let due = (0..3 * DAY).filter(|minute| is_due(at, day + minute - 1, day + minute));
        assert_eq!(due.count(), 3);
        assert!(!is_due(at, day + at, day + at), "looked at twice within a minute");
        assert!(is_due(at, day + at - 30, day + at + 20), "asleep for less than an hour");
        assert!(!is_due(at, day + at - 30, day + at + 200), "too late");
        assert!(!is_due(at, day + at + 5, day + at - 5), "a clock that was set back");
        assert!(is_due(0, day - 1, day), "midnight");
    }
}
