//! Wakes servers up at set times of day, before the backups of the night begin. A packet to a server that is on does nothing, so
//! nothing is remembered: what was missed for less than an hour, while this host slept itself, is made up for.

use std::{str::FromStr, time::Duration};

use janus_proto::wake::{Sleeper, wake_and_tell};
use tokio_util::sync::CancellationToken;

/// How often it is looked at the clock.
const LOOK: Duration = Duration::from_secs(20);
/// Minutes after which a missed time is missed.
const MISSED: i64 = 60;
const DAY: i64 = 24 * 60;

/// A server and the time of day at which it is woken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    /// Minute of the day, local time.
    minute: i64,
    sleeper: Sleeper,
}

impl FromStr for Alarm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let alarm = || {
            let (time, sleeper) = text.trim().split_once(' ')?;
            let (hours, minutes) = time.split_once(':')?;
            let number = |text: &str, end: i64| text.parse().ok().filter(|n| (0..end).contains(n));
            let minute = number(hours, 24)? * 60 + number(minutes, 60)?;
            Some(Self { minute, sleeper: sleeper.trim().parse().ok()? })
        };
        alarm().ok_or_else(|| {
            format!(
                "{text:?} is not a time and a host; write \"22:00 00:11:22:33:44:55\", or \"22:00 00:11:22:33:44:55@192.168.1.255\" with its network's broadcast address"
            )
        })
    }
}

/// Sends the packets at their times, until `shutdown`.
pub async fn follow(alarms: Vec<Alarm>, shutdown: CancellationToken) {
    if alarms.is_empty() {
        return;
    }
    let mut last = local_minute();
    while shutdown.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let now = local_minute();
        for alarm in alarms.iter().filter(|alarm| is_due(alarm.minute, last, now)) {
            wake_and_tell(&alarm.sleeper).await;
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
        assert_eq!(alarm.minute, 22 * 60 + 5);
        for bad in ["", "22:05", "00:11:22:33:44:55", "24:00 00:11:22:33:44:55", "22:05 host"] {
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
