//! Section `[fill]`: how stubs get their blocks.

use janus_proto::bandwidth::Window;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    replicate::{self, Hours},
};

/// One line of help for each key.
pub const KEYS: &[(&str, &str)] = &[
    ("hours", "Part of the day (UTC) in which stubs are filled, as 22:00-06:00; empty: always"),
    ("mib_per_second", "Fetch at most so fast for stubs; 0: no limit"),
    ("bandwidth", "Or by the time of day (UTC): 20 Mbit/s, 08:00-18:00 20 Mbit/s"),
    (
        "ask_clients_after_seconds",
        "Ask the machine's next backup for what no server has had for so long",
    ),
];

/// The section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fill {
    /// Part of the day, UTC, `HH:MM-HH:MM`; empty: always. What somebody reads is fetched at any time.
    pub hours: String,
    /// Fetched at most so fast; 0: no limit.
    pub mib_per_second: u32,
    /// Or so fast by the time of day, UTC.
    pub bandwidth: Vec<String>,
    /// What no server has for so long is asked of the machine's next backup.
    pub ask_clients_after_seconds: u64,
}

impl Default for Fill {
    fn default() -> Self {
        Self {
            hours: String::new(),
            mib_per_second: 0,
            bandwidth: Vec::new(),
            ask_clients_after_seconds: 600,
        }
    }
}

impl Fill {
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
        replicate::limits(self.mib_per_second, &self.bandwidth)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let invalid = |key| move |reason| ConfigError::Invalid { key, reason };
        self.hours().map_err(invalid("fill.hours"))?;
        self.limits().map(drop).map_err(invalid("fill.bandwidth"))
    }
}
