//! Section `[retention]`: what is kept, and when what isn't goes.

use std::collections::BTreeMap;

use janus_proto::ids::{DiskId, MachineKey, check_name};
use serde::{Deserialize, Serialize};
use time::{Time, macros::format_description};

use super::ConfigError;
use crate::chain::retain::Rules;

/// Longest lock, since no command takes one off: ten years.
pub const MOST_LOCK_DAYS: u32 = 3660;

/// What is kept. Counts are of days, weeks … that hold a backup; see `chain::retain` for what each rule means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Carried out by the server itself: after backups, and daily at `at`.
    pub automatic: bool,
    /// Time of day, UTC, `HH:MM`; empty: only after backups.
    pub at: String,
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
    /// A plan that drops a greater part of a machine's runs waits for `retention run --force`.
    pub max_drop_percent: u32,
    /// What `delete` deletes can be brought back for so long.
    pub trash_days: u32,
    /// Each new backup is locked for so long; 0: not at all.
    pub lock_days: u32,
    /// What is in the trash is purged before its time only when a second person agrees.
    pub purge_needs_second_operator: bool,
    /// By user, `user/machine` or `user/machine/disk`.
    pub overrides: BTreeMap<String, Override>,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            automatic: true,
            at: "03:00".into(),
            keep_all_days: 3,
            daily: 7,
            weekly: 4,
            monthly: 12,
            yearly: 0,
            at_least: 3,
            max_chain_length: 128,
            max_drop_percent: 50,
            trash_days: 7,
            lock_days: 0,
            purge_needs_second_operator: false,
            overrides: BTreeMap::new(),
        }
    }
}

/// Rules that differ for a user, a machine or a disk; what is absent is as for the next wider one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct Override {
    pub keep_all_days: Option<u32>,
    pub daily: Option<u32>,
    pub weekly: Option<u32>,
    pub monthly: Option<u32>,
    pub yearly: Option<u32>,
    pub at_least: Option<u32>,
    pub max_chain_length: Option<u32>,
}

impl Override {
    fn over(&self, rules: Rules) -> Rules {
        Rules {
            keep_all_days: self.keep_all_days.unwrap_or(rules.keep_all_days),
            daily: self.daily.unwrap_or(rules.daily),
            weekly: self.weekly.unwrap_or(rules.weekly),
            monthly: self.monthly.unwrap_or(rules.monthly),
            yearly: self.yearly.unwrap_or(rules.yearly),
            at_least: self.at_least.unwrap_or(rules.at_least),
            max_chain_length: self.max_chain_length.unwrap_or(rules.max_chain_length),
        }
    }
}

impl Retention {
    /// The rules of a disk: those of the section, then of its user, its machine and itself; the last one that names a rule
    /// wins.
    pub fn rules(&self, machine: &MachineKey, disk: &DiskId) -> Rules {
        let section = Rules {
            keep_all_days: self.keep_all_days,
            daily: self.daily,
            weekly: self.weekly,
            monthly: self.monthly,
            yearly: self.yearly,
            at_least: self.at_least,
            max_chain_length: self.max_chain_length,
        };
        [machine.user().to_owned(), machine.to_string(), format!("{machine}/{disk}")]
            .iter()
            .filter_map(|name| self.overrides.get(name))
            .fold(section, |rules, over| over.over(rules))
    }

    /// Time of day at which the plan is carried out; `None`: only after backups.
    ///
    /// # Errors
    /// When it is no time.
    pub fn time_of_day(&self) -> Result<Option<Time>, ConfigError> {
        if self.at.is_empty() {
            return Ok(None);
        }
        let time = Time::parse(&self.at, format_description!("[hour]:[minute]"));
        time.map(Some).map_err(|_| ConfigError::Invalid {
            key: "retention.at",
            reason: format!("{:?} is not a time of day such as 03:00", self.at),
        })
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let invalid = |key, reason: String| Err(ConfigError::Invalid { key, reason });
        self.time_of_day()?;
        if !(1..=100).contains(&self.max_drop_percent) {
            return invalid("retention.max_drop_percent", "must be 1 to 100".into());
        }
        if self.purge_needs_second_operator && self.trash_days == 0 {
            let reason = "needs trash_days of at least 1: what is due at once needs nobody";
            return invalid("retention.purge_needs_second_operator", reason.into());
        }
        if self.lock_days > MOST_LOCK_DAYS {
            let reason = format!("{} days: at most {MOST_LOCK_DAYS}", self.lock_days);
            return invalid("retention.lock_days", reason);
        }
        for name in self.overrides.keys() {
            let parts: Vec<&str> = name.split('/').collect();
            if parts.len() > 3 || parts.iter().any(|part| check_name("name", part).is_err()) {
                let reason = format!("{name:?} is no user, user/machine or user/machine/disk");
                return invalid("retention.overrides", reason);
            }
        }
        for over in std::iter::once(&Override::default()).chain(self.overrides.values()) {
            let of = |over: Option<u32>, section| over.unwrap_or(section);
            let longest = of(over.max_chain_length, self.max_chain_length);
            if longest < 2 || longest <= of(over.at_least, self.at_least) {
                let reason = format!("{longest} links: must be at least 2, and more than at_least");
                return invalid("retention.max_chain_length", reason);
            }
        }
        Ok(())
    }
}

/// One line of help for each key.
pub const KEYS: &[(&str, &str)] = &[
    ("automatic", "Drop what no rule keeps after backups, and daily at retention.at"),
    ("at", "Time of day for it, UTC; empty: only after backups"),
    ("keep_all_days", "Keep all backups of so many days"),
    ("daily", "Keep the newest backup of so many days"),
    ("weekly", "Keep the newest backup of so many weeks"),
    ("monthly", "Keep the newest backup of so many months"),
    ("yearly", "Keep the newest backup of so many years"),
    ("at_least", "Keep so many good backups in any case"),
    ("max_chain_length", "A chain of deltas with more links is shortened"),
    ("max_drop_percent", "A plan that drops more of a machine's backups waits for --force"),
    ("trash_days", "What `delete` deletes can be brought back for so long"),
    ("lock_days", "Nobody can drop a backup before it is so old; 0: no lock"),
    ("purge_needs_second_operator", "`trash purge` waits until a second person confirms it"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_override_wins_rule_by_rule() {
        let text = "daily = 1\n[overrides.alice]\ndaily = 2\nweekly = 2\n\
            [overrides.\"alice/web\"]\nweekly = 3\n[overrides.\"alice/web/data\"]\nmonthly = 4\n";
        let section: Retention = toml::from_str(text).unwrap();
        section.check().unwrap();
        let of = |machine: &str, disk: &str| {
            let rules = section.rules(&machine.parse().unwrap(), &disk.parse().unwrap());
            (rules.daily, rules.weekly, rules.monthly)
        };
        assert_eq!(of("bob/web", "data"), (1, 4, 12));
        assert_eq!(of("alice/db", "data"), (2, 2, 12));
        assert_eq!(of("alice/web", "system"), (2, 3, 12));
        assert_eq!(of("alice/web", "data"), (2, 3, 4));
    }

    #[test]
    fn what_can_not_be_meant_is_refused() {
        for bad in [
            "at = \"25:00\"",
            "max_drop_percent = 0",
            "max_chain_length = 3",
            "lock_days = 36500",
            "purge_needs_second_operator = true\ntrash_days = 0",
            "[overrides.\"a/b/c/d\"]",
            "[overrides.\"../x\"]",
            "[overrides.a]\nat_least = 128",
        ] {
            let section: Retention = toml::from_str(bad).unwrap();
            assert!(section.check().is_err(), "{bad}");
        }
        assert!(toml::from_str::<Retention>("[overrides.a]\nhourly = 1").is_err());
        assert!(toml::from_str::<Retention>("daily = -1").is_err());
    }
}
