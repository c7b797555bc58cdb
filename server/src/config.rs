//! Settings of `janus-server`, with their defaults.

use std::path::PathBuf;

use janus_proto::log::{LogFormat, LogPlan};
use serde::{Deserialize, Serialize};

/// Settings of one server. Every key is also an environment variable and a flag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address to listen on.
    pub listen: String,
    /// Root of all images.
    pub image_path: PathBuf,
    /// Certificate, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// The CA's certificate, PEM.
    pub ca: PathBuf,
    /// Every janus to report to.
    pub janus_urls: Vec<String>,
    /// This server's own URLs.
    pub urls: Vec<String>,
    /// New chains are VHDX; the only format so far.
    pub prefer_vhdx: bool,
    /// A folder for each user below the image path.
    pub separate_folders_by_user: bool,
    /// An open run is kept for its client this long after its last message.
    pub lease_seconds: u64,
    /// Open runs that nobody touches are given up after this.
    pub session_keep_days: u64,
    /// Time after which a report stream's silence is broken.
    pub refresh_seconds: u64,
    /// Address and port for health checks without TLS; empty: none.
    pub health_listen: String,
    /// On SIGTERM, calls may go on for this long.
    pub drain_seconds: u64,
    /// Log filter.
    pub log: String,
    /// How log lines look: `text`, or `json`.
    pub log_format: LogFormat,
    /// URL of a collector that gets the spans of calls; empty: none.
    pub otlp_endpoint: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7421".into(),
            image_path: "/var/lib/janus/images".into(),
            cert: "/etc/janus/cert.pem".into(),
            key: "/etc/janus/key.pem".into(),
            ca: "/etc/janus/ca.pem".into(),
            janus_urls: Vec::new(),
            urls: Vec::new(),
            prefer_vhdx: true,
            separate_folders_by_user: true,
            lease_seconds: 60,
            session_keep_days: 7,
            refresh_seconds: 60,
            health_listen: String::new(),
            drain_seconds: 10,
            log: "info".into(),
            log_format: LogFormat::Text,
            otlp_endpoint: String::new(),
        }
    }
}

/// One line of help for each key.
pub const KEYS: &[(&str, &str)] = &[
    ("listen", "Address and port to listen on"),
    ("image_path", "Root folder of all images"),
    ("cert", "This server's certificate, PEM"),
    ("key", "Its private key, PEM"),
    ("ca", "The CA's certificate, PEM"),
    ("janus_urls", "Every janus to report to"),
    ("urls", "URLs under which clients reach this server"),
    ("prefer_vhdx", "New chains are VHDX (VHD comes later)"),
    ("separate_folders_by_user", "A folder for each user below the image path"),
    ("lease_seconds", "A silent run keeps others of its machine away for so long"),
    ("session_keep_days", "Open runs that nobody touches are given up after this"),
    ("refresh_seconds", "Heartbeat of the report streams"),
    ("health_listen", "Address and port for health checks, plain gRPC and HTTP; empty: none"),
    ("drain_seconds", "Hard limit for calls in progress after SIGTERM"),
    ("log", "Log filter, such as info or janus_server=debug"),
    ("log_format", "Log lines for people or programs: text, or json"),
    ("otlp_endpoint", "Collector that gets the spans of calls by OTLP over gRPC; empty: none"),
];

/// A combination of settings that can't work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value out of range.
    #[error("setting {key}: {reason}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Settings {
    /// Checks what types can't.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let invalid =
            |key, reason: &str| Err(ConfigError::Invalid { key, reason: reason.to_owned() });
        if !self.prefer_vhdx {
            return invalid("prefer_vhdx", "VHD isn't written yet: set it to true");
        }
        if self.lease_seconds == 0 || self.lease_seconds > 3600 {
            return invalid("lease_seconds", "must be 1 to 3600");
        }
        if self.refresh_seconds == 0 {
            return invalid("refresh_seconds", "must be at least 1");
        }
        match self.janus_urls.iter().chain(&self.urls).find(|url| !url.starts_with("https://")) {
            Some(url) => invalid("janus_urls", &format!("{url:?} does not begin with https://")),
            None => Ok(()),
        }
    }

    /// How the program logs.
    pub fn log_plan(&self) -> LogPlan<'_> {
        LogPlan {
            filter: &self.log,
            format: self.log_format,
            otlp_endpoint: &self.otlp_endpoint,
            service: "janus-server",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_shows_every_key() {
        let text = include_str!("../server.example.toml");
        let example: Settings = toml::from_str(text).unwrap();
        example.check().unwrap();
        let toml::Value::Table(known) = toml::Value::try_from(Settings::default()).unwrap() else {
            panic!("a table")
        };
        for key in known.keys() {
            assert!(
                text.lines()
                    .any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} ="))),
                "{key}"
            );
        }
    }
}
