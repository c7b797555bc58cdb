//! Section `[replicate.NAME]`: what is brought here from another server, and when.

use std::time::Duration;

use janus_proto::{
    bandwidth::{self, Window},
    grants::Which,
};
use serde::{Deserialize, Serialize};
use time::{Time, macros::format_description};

use super::ConfigError;

const MINUTE_MS: i64 = 60_000;
const DAY_MS: i64 = 24 * 60 * MINUTE_MS;

/// A rule. Its name is that of the other server, unless `from` says another or a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Replicate {
    /// Name or URL of the other server; empty: the rule's name.
    pub from: String,
    /// `*`, `USER/*`, `USER/MACHINE` or `USER/MACHINE/DISK`.
    pub machines: Vec<String>,
    /// Part of the day, UTC, `HH:MM-HH:MM`; empty: always.
    pub hours: String,
    /// Fetched at most so fast; 0: no limit.
    pub mib_per_second: u32,
    /// Or so fast by the time of day, UTC: `20 Mbit/s`, `08:00-18:00 20 Mbit/s`.
    pub bandwidth: Vec<String>,
    /// How often it is looked for newer backups.
    pub every_seconds: u64,
}

impl Default for Replicate {
    fn default() -> Self {
        Self {
            from: String::new(),
            machines: vec!["*".into()],
            hours: String::new(),
            mib_per_second: 0,
            bandwidth: Vec::new(),
            every_seconds: 900,
        }
    }
}

/// A part of each day, in milliseconds since midnight; it may go over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hours {
    from: i64,
    to: i64,
}

impl Hours {
    /// How long it still lasts; `None` outside.
    pub fn left(&self, now_ms: i64) -> Option<Duration> {
        let since = now_ms.rem_euclid(DAY_MS);
        let begun = (since - self.from).rem_euclid(DAY_MS);
        // The same time twice is all day.
        let length = (self.to - self.from - 1).rem_euclid(DAY_MS) + 1;
        let left = u64::try_from(length - begun).ok().filter(|left| *left > 0)?;
        Some(Duration::from_millis(left))
    }
}

impl std::fmt::Display for Hours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [from, to] = [self.from, self.to].map(|time| {
            let minutes = time / MINUTE_MS;
            format!("{:02}:{:02}", minutes / 60, minutes % 60)
        });
        write!(f, "{from}-{to} UTC")
    }
}

impl std::str::FromStr for Hours {
    type Err = String;

    /// `HH:MM-HH:MM`, UTC; empty: always.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self { from: 0, to: DAY_MS });
        }
        let parse = |text: &str| {
            let time = Time::parse(text.trim(), format_description!("[hour]:[minute]")).ok()?;
            Some((i64::from(time.hour()) * 60 + i64::from(time.minute())) * MINUTE_MS)
        };
        let parts = text.split_once('-');
        let parts = parts.and_then(|(from, to)| Some((parse(from)?, parse(to)?)));
        let (from, to) = parts.ok_or_else(|| format!("{text:?} is not as 22:00-06:00"))?;
        Ok(Self { from, to })
    }
}

impl Replicate {
    /// Which machines.
    ///
    /// # Errors
    /// Says what isn't one.
    pub fn which(&self) -> Result<Vec<Which>, String> {
        which(&self.machines)
    }

    /// When.
    ///
    /// # Errors
    /// When that isn't a part of the day.
    pub fn hours(&self) -> Result<Hours, String> {
        self.hours.parse()
    }

    /// How fast.
    ///
    /// # Errors
    /// Says what isn't a limit.
    pub fn limits(&self) -> Result<Vec<Window>, String> {
        limits(self.mib_per_second, &self.bandwidth)
    }

    pub(super) fn check(&self, name: &str) -> Result<(), ConfigError> {
        let invalid = |reason: String| ConfigError::Invalid {
            key: "replicate",
            reason: format!("{name}: {reason}"),
        };
        self.which().map_err(invalid)?;
        self.hours().map_err(invalid)?;
        self.limits().map_err(invalid)?;
        match self.every_seconds {
            0 => Err(invalid("every_seconds must be at least 1".into())),
            _ => Ok(()),
        }
    }
}

/// One rate for all the day, or those of its parts.
pub(crate) fn limits(mib_per_second: u32, by_time: &[String]) -> Result<Vec<Window>, String> {
    match (mib_per_second, by_time) {
        (0, by_time) => bandwidth::parse(by_time).map_err(|error| error.to_string()),
        (mib, []) => Ok(vec![Window::always(u64::from(mib) << 20)]),
        _ => Err("mib_per_second and bandwidth can't both be given".into()),
    }
}

/// Reads names of machines.
pub(crate) fn which(texts: &[String]) -> Result<Vec<Which>, String> {
    let parse = |text: &String| {
        let failed = |error| {
            format!("{text:?} is none of *, USER/*, USER/MACHINE, USER/MACHINE/DISK: {error}")
        };
        text.parse().map_err(failed)
    };
    texts.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_may_go_over_midnight() {
        let left = |hours: &str, hour: i64, minute: i64| {
            let rule = Replicate { hours: hours.into(), ..Replicate::default() };
            let now = 20_000 * DAY_MS + (hour * 60 + minute) * MINUTE_MS;
            rule.hours().unwrap().left(now).map(|left| left.as_secs() / 60)
        };
        assert_eq!(left("22:00-06:00", 23, 0), Some(7 * 60));
        assert_eq!(left("22:00-06:00", 5, 59), Some(1));
        assert_eq!(left("22:00-06:00", 6, 0), None);
        assert_eq!(left("22:00-06:00", 21, 59), None);
        assert_eq!(left("08:30 - 09:00", 8, 30), Some(30));
        assert_eq!(left("08:30-09:00", 9, 0), None);
        assert_eq!(left("", 13, 0), Some(11 * 60));
        assert_eq!(left("13:00-13:00", 13, 0), Some(24 * 60));
        for wrong in ["22-6", "22:00", "25:00-06:00", "night"] {
            let rule = Replicate { hours: wrong.into(), ..Replicate::default() };
            assert!(rule.check("north").is_err(), "{wrong}");
        }
    }

    #[test]
    fn wrong_rules_are_named() {
        let rule = Replicate { machines: vec!["alice".into()], ..Replicate::default() };
        let said = rule.check("north").unwrap_err().to_string();
        assert!(said.contains("north") && said.contains("USER/MACHINE"), "{said}");
        let rule = Replicate { every_seconds: 0, ..Replicate::default() };
        assert!(rule.check("north").is_err());
        Replicate::default().check("north").unwrap();
    }

    #[test]
    fn there_is_one_rate_or_those_of_parts_of_the_day() {
        let rule = |mib_per_second, by_time: &[&str]| Replicate {
            mib_per_second,
            bandwidth: by_time.iter().map(|text| (*text).to_owned()).collect(),
            ..Replicate::default()
        };
        let by_time = ["08:00-18:00 20 Mbit/s", "18:00-22:00 100 Mbit/s"];
        for (rule, windows) in [(rule(0, &[]), 0), (rule(20, &[]), 1), (rule(0, &by_time), 2)] {
            rule.check("north").unwrap();
            assert_eq!(rule.limits().unwrap().len(), windows);
        }
        for wrong in [rule(20, &by_time), rule(0, &["fast"]), rule(0, &["1 MB/s", by_time[0]])] {
            let said = wrong.check("north").unwrap_err().to_string();
            assert!(said.contains("north: "), "{said}");
        }
    }
}
