//! Section `[enroll]`: certificates for machines that have a token.

use std::{path::PathBuf, time::Duration};

use janus_proto::settings::check_listen;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Descriptions of the keys.
pub const KEYS: &[(&str, &str)] = &[
    (
        "listen",
        "Address and port at which machines enrol and renew their certificates; empty: none",
    ),
    ("ca", "Folder with ca.pem and ca.key, for `listen` and `enroll token`"),
    ("days", "Validity of the certificates; renewed after two thirds of it"),
    ("urls", "Where machines find janus and servers; empty: janus_urls, else urls"),
];

/// An authority of ours is valid for ten years.
const MOST_DAYS: u32 = 3650;

/// Settings of the section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Enroll {
    /// Address to listen on; empty: no enrolment here.
    pub listen: String,
    /// Folder with `ca.pem` and `ca.key`.
    pub ca: PathBuf,
    /// Validity of certificates.
    pub days: u32,
    /// Told to machines; empty: `janus_urls`, else `urls`.
    pub urls: Vec<String>,
}

impl Default for Enroll {
    fn default() -> Self {
        Self { listen: String::new(), ca: PathBuf::new(), days: 90, urls: Vec::new() }
    }
}

impl Enroll {
    /// Validity of certificates.
    pub fn valid(&self) -> Duration {
        Duration::from_secs(u64::from(self.days) * 24 * 60 * 60)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.listen.is_empty() {
            return Ok(());
        }
        check_listen(&self.listen)
            .map_err(|reason| ConfigError::Invalid { key: "enroll.listen", reason })?;
        if self.ca.as_os_str().is_empty() {
            return Err(ConfigError::Invalid {
                key: "enroll.ca",
                reason: "is empty: it names the folder with ca.pem and ca.key".into(),
            });
        }
        if !(1..=MOST_DAYS).contains(&self.days) {
            let reason = format!("is {}: 1 to {MOST_DAYS}", self.days);
            return Err(ConfigError::Invalid { key: "enroll.days", reason });
        }
        Ok(())
    }
}
