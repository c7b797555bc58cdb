//! Settings of janus.

use std::{path::PathBuf, time::Duration};

use janus_proto::{
    channel::Target,
    listener::STALL,
    log::{LogFormat, LogPlan},
    settings::{Loader, check_listen},
    tls::{PKI_KEYS, Pki},
};
use serde::{Deserialize, Serialize};

use crate::{
    agreement::Required,
    alert::{self, Way},
    router::{BulkLimit, StartRule},
    selection::InitialBackups,
    wake::Alarm,
};

/// Below what one connection to a server takes (1024): probes travel on it, too.
const MAX_BULK_STREAMS: u32 = 1000;

/// Settings as they stand in the file; see `janus.example.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Address and port to listen on.
    pub listen: String,
    /// The servers; the order decides where new machines go first.
    pub server_urls: Vec<String>,
    /// This janus' certificate (PEM).
    pub cert: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Certificate of the group's authority (PEM); may be empty where `pki` names another one.
    pub ca: PathBuf,
    /// Keeps what is known of the servers across restarts; empty: nothing does.
    pub view_file: String,
    /// Whether servers get first full backups of a machine by themselves.
    pub initial_backups: InitialBackups,
    /// First backups that one server takes at once before others are preferred.
    pub max_initial_runs: u32,
    /// Prefer servers whose next two settings are as here.
    pub require_equal_settings: bool,
    /// What servers should have.
    pub prefer_vhdx: bool,
    /// What servers should have.
    pub separate_folders_by_user: bool,
    /// How long a server may take to answer a probe.
    pub probe_ms: u64,
    /// Uploads and downloads that pass through at once; each holds at most one stream window of memory.
    pub max_bulk_streams: u32,
    /// How many of them one caller may have.
    pub max_bulk_streams_per_caller: u32,
    /// A caller that takes nothing of an answer, or sends no whole message, for so long loses its call.
    pub stall_seconds: u64,
    /// Address and port for health checks without TLS; empty: none.
    pub health_listen: String,
    /// Address and port for Prometheus, plain HTTP; empty: none.
    pub metrics_listen: String,
    /// Hours after which `janus status --check` calls a machine without a new backup overdue.
    pub overdue_after_hours: u64,
    /// This janus sends the alerts.
    pub primary: bool,
    /// URL that alerts are posted to; empty: none.
    pub alert_webhook: String,
    /// Certificate authority that its certificate must come from (PEM); empty: those that this system trusts.
    pub alert_ca: PathBuf,
    /// Program and arguments that get each alert as a mail on stdin; empty: none.
    pub alert_command: Vec<String>,
    /// A server that takes no backups for so long is worth an alert.
    pub alert_after_minutes: u64,
    /// Servers to wake up, and when: `22:00 MAC`, `22:00 MAC@BROADCAST`; `MAC` alone: when a client finds none awake.
    pub wake: Vec<String>,
    /// Hard limit for calls in progress after SIGTERM.
    pub drain_seconds: u64,
    /// Log filter.
    pub log: String,
    /// How log lines look: `text`, or `json`.
    pub log_format: LogFormat,
    /// URL of a collector that gets the spans of calls; empty: none.
    pub otlp_endpoint: String,
    /// Certificates of a PKI of the site's own.
    pub pki: Pki,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7420".into(),
            server_urls: Vec::new(),
            cert: "cert.pem".into(),
            key: "key.pem".into(),
            ca: "ca.pem".into(),
            view_file: String::new(),
            initial_backups: InitialBackups::Allow,
            max_initial_runs: 2,
            require_equal_settings: false,
            prefer_vhdx: true,
            separate_folders_by_user: true,
            probe_ms: 1000,
            max_bulk_streams: 64,
            max_bulk_streams_per_caller: 16,
            stall_seconds: STALL.as_secs(),
            health_listen: String::new(),
            metrics_listen: String::new(),
            overdue_after_hours: 26,
            primary: false,
            alert_webhook: String::new(),
            alert_ca: PathBuf::new(),
            alert_command: Vec::new(),
            alert_after_minutes: 60,
            wake: Vec::new(),
            drain_seconds: 10,
            log: "info".into(),
            log_format: LogFormat::Text,
            otlp_endpoint: String::new(),
            pki: Pki::default(),
        }
    }
}

/// A setting that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("setting {key}: {reason}")]
pub struct ConfigError {
    /// The key.
    pub key: &'static str,
    /// What is wrong with it, and the way out.
    pub reason: String,
}

/// One line of help for each key.
pub const KEYS: &[(&str, &str)] = &[
    ("listen", "Address and port to listen on"),
    ("server_urls", "The servers, local one first"),
    ("cert", "This janus' certificate, PEM"),
    ("key", "Its private key, PEM"),
    ("ca", "The CA's certificate, PEM"),
    ("view_file", "Keeps what is known of the servers across restarts; empty: nothing does"),
    ("initial_backups", "First full backups to a server in their turn: allow, or hold"),
    ("max_initial_runs", "First backups that one server takes at once before others are preferred"),
    (
        "require_equal_settings",
        "Send backups to servers with another prefer_vhdx or separate_folders_by_user last",
    ),
    ("prefer_vhdx", "What servers should have"),
    ("separate_folders_by_user", "What servers should have"),
    ("probe_ms", "How long a server may take to answer a probe"),
    ("max_bulk_streams", "Uploads and downloads that pass through at once"),
    ("max_bulk_streams_per_caller", "How many of them one caller may have"),
    ("stall_seconds", "A call whose caller takes or sends nothing whole for so long is ended"),
    ("health_listen", "Address and port for health checks, plain gRPC and HTTP; empty: none"),
    ("metrics_listen", "Address and port for Prometheus, plain HTTP; empty: none"),
    (
        "overdue_after_hours",
        "A machine without a new backup for so long is overdue (janus status --check)",
    ),
    ("primary", "This janus sends the alerts: one of several"),
    ("alert_webhook", "URL that alerts are posted to as JSON; empty: none"),
    (
        "alert_ca",
        "Authority of the webhook's certificate, PEM; empty: those that this system trusts",
    ),
    ("alert_command", "Program and arguments that get each alert as a mail on stdin"),
    ("alert_after_minutes", "A server that takes no backups for so long is worth an alert"),
    (
        "wake",
        "Servers to wake up when a client finds none awake, and when by local time: [22:00 ]MAC[@BROADCAST]",
    ),
    ("drain_seconds", "Hard limit for calls in progress after SIGTERM"),
    ("log", "Log filter, such as info or janus=debug"),
    ("log_format", "Log lines for people or programs: text, or json"),
    ("otlp_endpoint", "Collector that gets the spans of calls by OTLP over gRPC; empty: none"),
];

/// Loads settings from file, environment and flags.
pub fn loader() -> Loader<Settings> {
    Loader::new("JANUS_ROUTER").describe(KEYS).describe_section("pki", PKI_KEYS)
}

impl Settings {
    /// Checks what types can't.
    ///
    /// # Errors
    /// Names the key and the way out.
    pub fn check(&self) -> Result<(), ConfigError> {
        let invalid = |key, reason: &str| Err(ConfigError { key, reason: reason.to_string() });
        for (key, address) in [
            ("listen", &self.listen),
            ("health_listen", &self.health_listen),
            ("metrics_listen", &self.metrics_listen),
        ] {
            if key == "listen" || !address.is_empty() {
                check_listen(address).map_err(|reason| ConfigError { key, reason })?;
            }
        }
        if !(10..=60_000).contains(&self.probe_ms) {
            return invalid("probe_ms", "must be 10 to 60000");
        }
        if self.max_initial_runs == 0 {
            return invalid(
                "max_initial_runs",
                "must be at least 1; to keep first backups back, set initial_backups",
            );
        }
        for (key, value) in [
            ("max_bulk_streams", self.max_bulk_streams),
            ("max_bulk_streams_per_caller", self.max_bulk_streams_per_caller),
        ] {
            if !(1..=MAX_BULK_STREAMS).contains(&value) {
                return invalid(key, &format!("must be 1 to {MAX_BULK_STREAMS}"));
            }
        }
        if !(5..=86_400).contains(&self.stall_seconds) {
            return invalid("stall_seconds", "must be 5 to 86400");
        }
        self.pki.check().map_err(|error| ConfigError { key: "pki", reason: error.to_string() })?;
        self.alert_ways()?;
        self.alarms()?;
        let targets = self.targets()?;
        if targets.is_empty() {
            return invalid(
                "server_urls",
                "is empty; name the servers, such as [\"https://backup-a.example:7421\"]",
            );
        }
        for (at, target) in targets.iter().enumerate() {
            if targets[..at].contains(target) {
                return invalid("server_urls", &format!("{target} is there twice"));
            }
        }
        Ok(())
    }

    /// The servers' addresses.
    ///
    /// # Errors
    /// When a URL is wrong.
    pub fn targets(&self) -> Result<Vec<Target>, ConfigError> {
        let read = |url: &String| {
            Target::parse(url)
                .map_err(|error| ConfigError { key: "server_urls", reason: error.to_string() })
        };
        self.server_urls.iter().map(read).collect()
    }

    /// The probe deadline.
    pub fn probe(&self) -> Duration {
        Duration::from_millis(self.probe_ms)
    }

    /// Where alerts go.
    ///
    /// # Errors
    /// When they can't go there, or this janus isn't the one that sends them.
    pub fn alert_ways(&self) -> Result<Vec<Way>, ConfigError> {
        let invalid = |key, reason: String| ConfigError { key, reason };
        let mut ways = Vec::new();
        if !self.alert_webhook.is_empty() {
            let ca = Some(self.alert_ca.as_path()).filter(|ca| !ca.as_os_str().is_empty());
            let key = if ca.is_some() { "alert_webhook, alert_ca" } else { "alert_webhook" };
            let way = Way::webhook(&self.alert_webhook, ca);
            ways.push(way.map_err(|error| invalid(key, error.to_string()))?);
        }
        if let Some(program) = self.alert_command.first() {
            if !program.starts_with('/') {
                let reason =
                    format!("{program:?} must be a whole path, such as /usr/sbin/sendmail");
                return Err(invalid("alert_command", reason));
            }
            ways.push(Way::Command(self.alert_command.clone()));
        }
        let (primary, none) = (self.primary, ways.is_empty());
        match (primary, none) {
            (true, true) => {
                Err(invalid("primary", "sends alerts: set alert_webhook or alert_command".into()))
            }
            (false, _) => Ok(Vec::new()),
            (true, false) => Ok(ways),
        }
    }

    /// Which servers are woken up, and when.
    ///
    /// # Errors
    /// When one can't be understood.
    pub fn alarms(&self) -> Result<Vec<Alarm>, ConfigError> {
        let parse = |text: &String| text.parse();
        let alarms: Result<_, String> = self.wake.iter().map(parse).collect();
        alarms.map_err(|reason| ConfigError { key: "wake", reason })
    }

    /// When to alert.
    pub fn alert_rule(&self) -> alert::Rule {
        let unreachable = Duration::from_secs(self.alert_after_minutes.saturating_mul(60));
        alert::Rule { overdue: self.overdue(), unreachable }
    }

    /// A machine without a new backup for so long is overdue.
    pub fn overdue(&self) -> Duration {
        Duration::from_secs(self.overdue_after_hours.saturating_mul(3600))
    }

    /// What servers must have to get starts in their turn.
    pub fn required(&self) -> Option<Required> {
        let (prefer_vhdx, separate_folders_by_user) =
            (self.prefer_vhdx, self.separate_folders_by_user);
        self.require_equal_settings.then_some(Required { prefer_vhdx, separate_folders_by_user })
    }

    /// How many bulk streams pass through at once.
    pub fn bulk_limit(&self) -> BulkLimit {
        // At most 1000, which every usize holds.
        let [streams, of_one_caller] =
            [self.max_bulk_streams, self.max_bulk_streams_per_caller].map(|n| n as usize);
        BulkLimit { streams, of_one_caller, stall: Duration::from_secs(self.stall_seconds) }
    }

    /// How starts are spread.
    pub fn start_rule(&self) -> StartRule {
        StartRule { initial_backups: self.initial_backups, max_initial_runs: self.max_initial_runs }
    }

    /// How the program logs.
    pub fn log_plan(&self) -> LogPlan<'_> {
        LogPlan {
            filter: &self.log,
            format: self.log_format,
            otlp_endpoint: &self.otlp_endpoint,
            service: "janus",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_shows_every_key() {
        let text = include_str!("../janus.example.toml");
        let example: Settings = toml::from_str(text).unwrap();
        example.check().unwrap();
        let toml::Value::Table(known) = toml::Value::try_from(Settings::default()).unwrap() else {
            panic!("a table")
        };
        let shows =
            |start: &str| text.lines().any(|line| line.trim_start_matches("# ").starts_with(start));
        for (key, value) in &known {
            let toml::Value::Table(section) = value else {
                assert!(shows(&format!("{key} =")), "{key}");
                continue;
            };
            assert!(shows(&format!("[{key}]")), "[{key}]");
            for inner in section.keys() {
                assert!(
                    shows(&format!("{inner} =")) || shows(&format!("[{key}.{inner}")),
                    "{inner}"
                );
            }
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        let servers = |urls: &[&str]| Settings {
            server_urls: urls.iter().map(ToString::to_string).collect(),
            ..Settings::default()
        };
        assert_eq!(servers(&[]).check().unwrap_err().key, "server_urls");
        assert_eq!(servers(&["http://a:1"]).check().unwrap_err().key, "server_urls");
        assert_eq!(
            servers(&["https://a:1", "https://a:1"]).check().unwrap_err().key,
            "server_urls"
        );
        let good = servers(&["https://a:1", "https://b:1"]);
        good.check().unwrap();
        let none = Settings { max_bulk_streams: 0, ..good.clone() };
        assert_eq!(none.check().unwrap_err().key, "max_bulk_streams");
        assert_eq!(Settings { probe_ms: 0, ..good.clone() }.check().unwrap_err().key, "probe_ms");
        let primary = Settings { primary: true, ..good };
        assert_eq!(primary.check().unwrap_err().key, "primary");
        let command = Settings { alert_command: vec!["sendmail".into()], ..primary.clone() };
        assert_eq!(command.check().unwrap_err().key, "alert_command");
        let webhook = Settings { alert_webhook: "example.org".into(), ..primary.clone() };
        assert_eq!(webhook.check().unwrap_err().key, "alert_webhook");
        let (alert_webhook, alert_ca) = ("https://example.org/".into(), "/nonexistent.pem".into());
        let refused = Settings { alert_webhook, alert_ca, ..primary }.check().unwrap_err();
        assert!(refused.key.contains("alert_ca") && refused.reason.contains("/nonexistent.pem"));
    }
}
