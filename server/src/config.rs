//! Settings of `janus-server`, with their defaults.

pub mod archive;
pub mod enroll;
pub mod fill;
pub mod prove;
pub mod replicate;
pub mod retention;
pub mod size;

use std::{collections::BTreeMap, path::PathBuf};

use janus_proto::{
    grants::Which,
    ids::check_name,
    listener::STALL,
    log::{LogFormat, LogPlan},
    settings::check_listen,
    tls::Pki,
};
use serde::{Deserialize, Serialize};

pub use self::{
    archive::Archive, enroll::Enroll, fill::Fill, prove::Prove, replicate::Replicate,
    retention::Retention, size::Size,
};
use crate::{audit, caller::RequireProof, image::Format};

/// Settings of one server. Every key is also an environment variable and a flag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address to listen on.
    pub listen: String,
    /// Root of all images.
    pub image_path: PathBuf,
    /// Folder of the audit log; empty: `.audit` in the image path.
    pub audit_path: PathBuf,
    /// Certificate, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// The CA's certificate, PEM; may be empty where `pki` names another one.
    pub ca: PathBuf,
    /// Every janus to report to.
    pub janus_urls: Vec<String>,
    /// This server's own URLs.
    pub urls: Vec<String>,
    /// New chains are VHDX, else VHD; a chain goes on in its own format.
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
    /// Stored images are read and compared in the background, at most so fast; 0: not at all.
    pub scrub_mib_per_second: u64,
    /// An image is read again after so many days.
    pub scrub_days: u64,
    /// Tables of other servers' snapshots are kept here, read through janus.
    pub mirror_tables: bool,
    /// Whose calls through a janus need a signature of their own: `as_issued`, `always` or `never`.
    pub require_proof: RequireProof,
    /// Machines whose own certificates may not read what was backed up: `USER/MACHINE` or `USER/*`.
    pub write_only: Vec<String>,
    /// File with the rights of groups; empty: there are none.
    pub policy: PathBuf,
    /// Socket for accounts whose groups administer machines; empty: none.
    pub admin_socket: PathBuf,
    /// Uploads and downloads at once, in all.
    pub max_bulk_streams: u32,
    /// How many of them one caller may have.
    pub max_bulk_streams_per_caller: u32,
    /// A caller that takes nothing of an answer, or sends no whole message, for so long loses its call.
    pub stall_seconds: u64,
    /// All disks of one run together, by their sizes.
    pub max_machine_size: String,
    /// On SIGTERM, calls may go on for this long.
    pub drain_seconds: u64,
    /// Log filter.
    pub log: String,
    /// How log lines look: `text`, or `json`.
    pub log_format: LogFormat,
    /// URL of a collector that gets the spans of calls; empty: none.
    pub otlp_endpoint: String,
    /// Free space that new backups leave alone: bytes, or percent of the file system.
    pub reserve: String,
    /// What a user's backups may take here, by user.
    pub quotas: BTreeMap<String, String>,
    /// What is kept.
    pub retention: Retention,
    /// How stubs are filled.
    pub fill: Fill,
    /// What comes here from other servers by itself, by their names.
    pub replicate: BTreeMap<String, Replicate>,
    /// Which backups are proven, and how.
    pub prove: Prove,
    /// Certificates for machines that have a token.
    pub enroll: Enroll,
    /// Object stores and folders that `janus-server archive` copies runs to, by name.
    pub archive: BTreeMap<String, Archive>,
    /// Certificates of a PKI of the site's own.
    pub pki: Pki,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7421".into(),
            image_path: "/var/lib/janus/images".into(),
            audit_path: PathBuf::new(),
            cert: "/etc/janus/server/cert.pem".into(),
            key: "/etc/janus/server/key.pem".into(),
            ca: "/etc/janus/server/ca.pem".into(),
            janus_urls: Vec::new(),
            urls: Vec::new(),
            prefer_vhdx: true,
            separate_folders_by_user: true,
            lease_seconds: 60,
            session_keep_days: 7,
            refresh_seconds: 60,
            health_listen: String::new(),
            scrub_mib_per_second: 20,
            scrub_days: 30,
            mirror_tables: true,
            require_proof: RequireProof::AsIssued,
            write_only: Vec::new(),
            policy: PathBuf::new(),
            admin_socket: PathBuf::new(),
            max_bulk_streams: 256,
            max_bulk_streams_per_caller: 16,
            stall_seconds: STALL.as_secs(),
            max_machine_size: "64 TiB".into(),
            drain_seconds: 10,
            log: "info".into(),
            log_format: LogFormat::Text,
            otlp_endpoint: String::new(),
            reserve: "1%".into(),
            quotas: BTreeMap::new(),
            retention: Retention::default(),
            fill: Fill::default(),
            replicate: BTreeMap::new(),
            prove: Prove::default(),
            enroll: Enroll::default(),
            archive: BTreeMap::new(),
            pki: Pki::default(),
        }
    }
}

/// One line of help for each key.
pub const KEYS: &[(&str, &str)] = &[
    ("listen", "Address and port to listen on"),
    ("image_path", "Root folder of all images"),
    ("audit_path", "Folder of the audit log; empty: .audit in the image path"),
    ("cert", "This server's certificate, PEM"),
    ("key", "Its private key, PEM"),
    ("ca", "The CA's certificate, PEM"),
    ("janus_urls", "Every janus to report to"),
    ("urls", "URLs under which clients reach this server"),
    ("prefer_vhdx", "New chains are VHDX, else VHD (up to 2040 GiB, 512-byte sectors)"),
    ("separate_folders_by_user", "A folder for each user below the image path"),
    ("lease_seconds", "A silent run keeps others of its machine away for so long"),
    ("session_keep_days", "Open runs that nobody touches are given up after this"),
    ("refresh_seconds", "Heartbeat of the report streams"),
    ("health_listen", "Address and port for health checks, plain gRPC and HTTP; empty: none"),
    ("scrub_mib_per_second", "Compare stored images with their hashes, at most so fast; 0: never"),
    ("scrub_days", "Compare an image again after so many days"),
    (
        "mirror_tables",
        "Keep hash tables of other servers' snapshots, for restores while these are away",
    ),
    (
        "require_proof",
        "Calls through a janus that their callers must have signed: as_issued, always or never",
    ),
    ("write_only", "Machines that may back up but not restore: USER/MACHINE or USER/*"),
    ("policy", "File that says what groups of users may do; empty: none"),
    ("admin_socket", "Socket for accounts whose groups administer machines; empty: none"),
    ("max_bulk_streams", "Uploads and downloads at once"),
    ("max_bulk_streams_per_caller", "How many of them one caller may have"),
    ("stall_seconds", "A call whose caller takes or sends nothing whole for so long is ended"),
    ("max_machine_size", "All disks of one backup together, such as 64 TiB"),
    ("drain_seconds", "Hard limit for calls in progress after SIGTERM"),
    ("reserve", "Free space that new backups leave alone: 5 GiB, or 1% of the file system"),
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
    /// Where the audit log lies.
    pub fn audit_folder(&self) -> PathBuf {
        match self.audit_path.as_os_str().is_empty() {
            true => self.image_path.join(audit::FOLDER),
            false => self.audit_path.clone(),
        }
    }

    /// Format of the chains that begin here.
    pub fn new_chains(&self) -> Format {
        if self.prefer_vhdx { Format::Vhdx } else { Format::Vhd }
    }

    /// What all disks of a run may have together.
    ///
    /// # Errors
    /// When it is no amount of bytes.
    pub fn max_machine_bytes(&self) -> Result<u64, String> {
        match Size::parse(&self.max_machine_size)? {
            Size::Bytes(bytes) if bytes > 0 => Ok(bytes),
            _ => Err(format!("{:?} is no amount of bytes", self.max_machine_size)),
        }
    }

    /// Machines that don't read what they wrote.
    ///
    /// # Errors
    /// Says what isn't one.
    pub fn write_only(&self) -> Result<Vec<Which>, String> {
        replicate::which(&self.write_only)
    }

    /// The quotas in bytes, by user.
    ///
    /// # Errors
    /// Names the user whose quota is none.
    pub fn quotas(&self) -> Result<BTreeMap<String, u64>, String> {
        let quota = |(user, text): (&String, &String)| {
            check_name("user", user).map_err(|error| error.to_string())?;
            match Size::parse(text).map_err(|reason| format!("{user}: {reason}"))? {
                Size::Bytes(bytes) => Ok((user.clone(), bytes)),
                Size::Percent(_) => Err(format!("{user}: {text:?} is no amount of bytes")),
            }
        };
        self.quotas.iter().map(quota).collect()
    }

    /// Checks what types can't.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let invalid =
            |key, reason: &str| Err(ConfigError::Invalid { key, reason: reason.to_owned() });
        for (key, address) in [("listen", &self.listen), ("health_listen", &self.health_listen)] {
            if key == "listen" || !address.is_empty() {
                check_listen(address).map_err(|reason| ConfigError::Invalid { key, reason })?;
            }
        }
        if self.lease_seconds == 0 || self.lease_seconds > 3600 {
            return invalid("lease_seconds", "must be 1 to 3600");
        }
        if self.refresh_seconds == 0 {
            return invalid("refresh_seconds", "must be at least 1");
        }
        for (key, value) in [
            ("max_bulk_streams", self.max_bulk_streams),
            ("max_bulk_streams_per_caller", self.max_bulk_streams_per_caller),
        ] {
            // Of the runtime's 512 threads for work that blocks some are left for everything else.
            if !(1..=400).contains(&value) {
                return invalid(key, "must be 1 to 400");
            }
        }
        if !(self.lease_seconds.max(5)..=86_400).contains(&self.stall_seconds) {
            return invalid("stall_seconds", "must be 5 to 86400, and no less than lease_seconds");
        }
        self.max_machine_bytes()
            .map_err(|reason| ConfigError::Invalid { key: "max_machine_size", reason })?;
        Size::parse(&self.reserve)
            .map_err(|reason| ConfigError::Invalid { key: "reserve", reason })?;
        self.quotas().map_err(|reason| ConfigError::Invalid { key: "quotas", reason })?;
        self.retention.check()?;
        self.fill.check()?;
        self.prove.check()?;
        self.enroll.check()?;
        self.pki
            .check()
            .map_err(|error| ConfigError::Invalid { key: "pki", reason: error.to_string() })?;
        self.replicate.iter().try_for_each(|(name, rule)| rule.check(name))?;
        self.write_only().map_err(|reason| ConfigError::Invalid { key: "write_only", reason })?;
        self.archive
            .iter()
            .try_for_each(|(name, archive)| archive.check(name, &self.image_path))?;
        let urls = self.janus_urls.iter().chain(&self.urls).chain(&self.enroll.urls);
        match urls.into_iter().find(|url| !url.starts_with("https://")) {
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
        for (key, value) in &known {
            let shows = |line: &str| {
                text.lines().any(|shown| shown.trim_start_matches("# ").starts_with(line))
            };
            let toml::Value::Table(section) = value else {
                assert!(shows(&format!("{key} =")), "{key}");
                continue;
            };
            assert!(shows(&format!("[{key}")), "[{key}]");
            for inner in section.keys() {
                let table = format!("[{key}.{inner}");
                assert!(shows(&format!("{inner} =")) || shows(&table), "{key}.{inner}");
            }
        }
    }
}
