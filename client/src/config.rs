//! Settings of the client.

use std::{num::NonZero, path::PathBuf, time::Duration};

use janus_proto::{
    bandwidth,
    channel::{NoProxy, Proxies, Target},
    error::WireError,
    ids::{DiskId, MachineKey},
    log::{LogFormat, LogPlan},
    pb,
    tls::Pki,
    wake::WakeError,
};
use serde::{Deserialize, Serialize};

use crate::{
    enroll::Files, frozen::Wish, link::Direct, nbd, notify::NotifySettings, packing,
    reading::Policy, scan::Threads, schedule::ScheduleSettings, survey::Choice, wake,
};

/// Settings as they stand in the file; see `client.example.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where to find janus or a server, tried together, earlier ones with a head start.
    pub urls: Vec<String>,
    /// This machine's certificate (PEM).
    pub cert: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Certificate of the group's authority (PEM); may be empty where `pki` names another one.
    pub ca: PathBuf,
    /// Folder of the hash cache, the lock and the record of an open run.
    pub cache_path: PathBuf,
    /// Who encrypts backups: nobody, or this client.
    pub encryption: Encryption,
    /// File of the key they are sealed with; empty: `seal.key` beside `key`.
    pub seal_key: PathBuf,
    /// Whose disks these are, `USER/MACHINE`, where a group's rights let the certificate back others up; empty: the
    /// certificate's own.
    pub for_machine: String,
    /// Disks to back up: `/dev/sdb`, `name=/path/disk.img`, `name=nbd://host/export`, `name=qcow2:/path/disk.qcow2`.
    pub disks: Vec<String>,
    /// Read disks that are mounted writable.
    pub allow_live: bool,
    /// Read disks that are mounted writable from a snapshot of LVM or ZFS, made for it.
    pub make_snapshots: bool,
    /// How much a snapshot of a thick volume of LVM can take up: `10%ORIGIN`, `5G`.
    pub snapshot_size: String,
    /// Program with its arguments that runs before a backup; it fails when that fails.
    pub pre_backup: Vec<String>,
    /// Program with its arguments that runs after a backup, also a failed one.
    pub post_backup: Vec<String>,
    /// Longest time each of both may take.
    pub hook_seconds: u64,
    /// Threads that read and hash; 0: one for each core, and eight where reads wait for the disk.
    pub hash_threads: usize,
    /// Count free space of NTFS, ext4 and XFS as zeros.
    pub skip_free: bool,
    /// Volumes to count as zeros: `DISK/NUMBER`.
    pub skip_volumes: Vec<String>,
    /// Everything is compared after so many backups, whatever a change journal says; 0: never for that reason.
    pub full_compare_runs: u32,
    /// Everything is compared after so many days, whatever a change journal says; 0: never for that reason.
    pub full_compare_days: u32,
    /// Share of what a change journal says is unchanged that each backup reads all the same, in percent.
    pub audit_percent: u32,
    /// How data is packed on its way: `auto`, `none`, `lz4` or `zstd`.
    pub encoding: String,
    /// How long a lost server is waited for before the backup starts again elsewhere.
    pub failover_after_seconds: u64,
    /// The longest that it is waited for where the backup has taken longer than that already.
    pub failover_wait_seconds: u64,
    /// `never`: all data goes through janus; `prefer`: straight to the server where it can be reached at once.
    pub direct: Direct,
    /// Limits of what is sent and received, by local time: `20 Mbit/s`, `08:00-18:00 20 Mbit/s`.
    pub bandwidth: Vec<String>,
    /// Servers to wake before a backup or a restore: `MAC`, `MAC@BROADCAST`, `remembered`.
    pub wake: Vec<String>,
    /// How long a server that was woken is waited for.
    pub boot_seconds: u64,
    /// HTTP proxy for all connections: a URL; `none`; empty: what the environment says.
    pub proxy: String,
    /// What is logged: `error`, `warn`, `info`, `debug`, `trace`, or a filter as of `RUST_LOG`.
    pub log: String,
    /// How log lines look: `text`, or `json`.
    pub log_format: LogFormat,
    /// URL of a collector that gets the spans of calls; empty: none.
    pub otlp_endpoint: String,
    /// When the service and the daemon back up.
    pub schedule: ScheduleSettings,
    /// Who is told how backups ended.
    pub notify: NotifySettings,
    /// Certificates of a PKI of the site's own.
    pub pki: Pki,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            cert: "cert.pem".into(),
            key: "key.pem".into(),
            ca: "ca.pem".into(),
            cache_path: "/var/cache/janus-client".into(),
            for_machine: String::new(),
            encryption: Encryption::None,
            seal_key: PathBuf::new(),
            disks: Vec::new(),
            allow_live: false,
            make_snapshots: true,
            snapshot_size: "10%ORIGIN".into(),
            pre_backup: Vec::new(),
            post_backup: Vec::new(),
            hook_seconds: 300,
            hash_threads: 0,
            skip_free: false,
            skip_volumes: Vec::new(),
            full_compare_runs: Policy::default().full_compare_runs,
            full_compare_days: Policy::default().full_compare_days,
            audit_percent: Policy::default().audit_percent,
            encoding: "auto".into(),
            failover_after_seconds: 60,
            failover_wait_seconds: 600,
            direct: Direct::Never,
            bandwidth: Vec::new(),
            wake: Vec::new(),
            boot_seconds: 180,
            proxy: String::new(),
            log: "info".into(),
            log_format: LogFormat::Text,
            otlp_endpoint: String::new(),
            schedule: ScheduleSettings::default(),
            notify: NotifySettings::default(),
            pki: Pki::default(),
        }
    }
}

/// Who encrypts backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encryption {
    /// Nobody: images open in every hypervisor.
    #[default]
    None,
    /// This client, by a key that servers never have: see [`crate::seal`].
    Client,
}

/// A setting that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No URL is set.
    #[error("no server is set; add urls = [\"https://HOST:7420\"] to the settings, or --urls")]
    NoUrls,
    /// A URL can't be understood.
    #[error("urls: {0}")]
    Url(String),
    /// No disk is set.
    #[error("no disk is set; add disks = [\"NAME=/dev/sdX\"] to the settings, or --disks")]
    NoDisks,
    /// A disk can't be understood.
    #[error(
        "disks: {text:?} is none of /PATH, qcow2:/PATH, nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH, also with NAME= before it: {reason}"
    )]
    Disk {
        /// As written.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// A volume can't be understood.
    #[error("skip_volumes: {0:?} is not DISK/NUMBER, as `janus-client sources` shows them")]
    Volume(String),
    /// More than all.
    #[error("audit_percent: {0} is not a share of 0 to 100")]
    AuditPercent(u32),
    /// Not a size.
    #[error(
        "snapshot_size: {0:?} is neither a share (10%ORIGIN, 10%FREE, 10%VG) nor a size (512M, 5G, 1T)"
    )]
    SnapshotSize(String),
    /// Not a limit.
    #[error("bandwidth: {0}")]
    Bandwidth(bandwidth::LimitError),
    /// Not a machine.
    #[error("setting for_machine: {0}")]
    Machine(WireError),
    /// Not a host to wake.
    #[error("wake: {0}, or \"remembered\"")]
    Wake(WakeError),
    /// Not a proxy.
    #[error("proxy: it {0}")]
    Proxy(NoProxy),
    /// Not an encoding.
    #[error("encoding: {0:?} is not auto, none, lz4 or zstd")]
    Encoding(String),
}

/// A disk as the settings name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its id; else the disk itself must tell one.
    pub name: Option<DiskId>,
    /// Block device, image file, or what else [`crate::source::Source::open`] takes.
    pub path: PathBuf,
}

impl DiskSpec {
    fn parse(text: &str) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::Disk { text: text.to_owned(), reason };
        // A path may contain '=': a name has no slash before it.
        let (name, path) = match text.split_once('=') {
            Some((name, path)) if !name.contains('/') => (
                Some(name.parse().map_err(|e: janus_proto::error::WireError| bad(e.to_string()))?),
                path,
            ),
            _ => (None, text),
        };
        if path.is_empty() {
            return Err(bad("the path is missing".into()));
        }
        if nbd::uri::is_uri(path) {
            nbd::Uri::parse(path).map_err(bad)?;
        }
        Ok(Self { name, path: path.into() })
    }
}

impl Settings {
    /// The files of this machine's identity.
    pub fn identity_files(&self) -> Files {
        Files { cert: self.cert.clone(), key: self.key.clone(), ca: self.ca.clone() }
    }

    /// URLs, at least one.
    ///
    /// # Errors
    /// When there is none.
    pub fn checked_urls(&self) -> Result<&[String], ConfigError> {
        if self.urls.is_empty() {
            return Err(ConfigError::NoUrls);
        }
        for url in &self.urls {
            Target::parse(url).map_err(|error| ConfigError::Url(error.to_string()))?;
        }
        Ok(&self.urls)
    }

    /// The disks, at least one.
    ///
    /// # Errors
    /// When there is none or one can't be understood.
    pub fn disk_specs(&self) -> Result<Vec<DiskSpec>, ConfigError> {
        if self.disks.is_empty() {
            return Err(ConfigError::NoDisks);
        }
        self.disks.iter().map(|text| DiskSpec::parse(text)).collect()
    }

    /// File of the key that backups are sealed with. Not in the cache's folder, which may be lost at any time.
    pub fn seal_key_path(&self) -> PathBuf {
        match self.seal_key.as_os_str().is_empty() {
            true => self.key.with_file_name("seal.key"),
            false => self.seal_key.clone(),
        }
    }

    /// How snapshots are made; `None`: not at all.
    ///
    /// # Errors
    /// When a size can't be understood.
    pub fn snapshots(&self) -> Result<Option<Wish>, ConfigError> {
        let bad = |()| ConfigError::SnapshotSize(self.snapshot_size.clone());
        let size = self.snapshot_size.parse().map_err(bad)?;
        Ok(self.make_snapshots.then_some(Wish { size, allow_live: self.allow_live }))
    }

    /// How data is packed.
    ///
    /// # Errors
    /// When it isn't a known encoding.
    pub fn encoding(&self) -> Result<packing::Wish, ConfigError> {
        use packing::Wish::{Auto, Only};
        match self.encoding.as_str() {
            "auto" => Ok(Auto),
            "none" => Ok(Only(pb::Encoding::None)),
            "lz4" => Ok(Only(pb::Encoding::Lz4)),
            "zstd" => Ok(Only(pb::Encoding::Zstd)),
            _ => Err(ConfigError::Encoding(self.encoding.clone())),
        }
    }

    /// Whose disks these are, where the settings say so.
    ///
    /// # Errors
    /// When that is no machine.
    pub fn machine(&self) -> Result<Option<MachineKey>, ConfigError> {
        match self.for_machine.as_str() {
            "" => Ok(None),
            name => name.parse().map(Some).map_err(ConfigError::Machine),
        }
    }

    /// Limits of what travels.
    ///
    /// # Errors
    /// When one can't be understood.
    pub fn limits(&self) -> Result<Vec<bandwidth::Window>, ConfigError> {
        bandwidth::parse(&self.bandwidth).map_err(ConfigError::Bandwidth)
    }

    /// Servers to wake.
    ///
    /// # Errors
    /// When one can't be understood.
    pub fn wishes(&self) -> Result<Vec<wake::Wish>, ConfigError> {
        wake::parse(&self.wake).map_err(ConfigError::Wake)
    }

    /// See [`Settings::boot_seconds`].
    pub fn boot(&self) -> Duration {
        Duration::from_secs(self.boot_seconds)
    }

    /// Which proxies carry connections.
    ///
    /// # Errors
    /// When it isn't a proxy's URL.
    pub fn proxies(&self) -> Result<Proxies, ConfigError> {
        Proxies::parse(&self.proxy).map_err(ConfigError::Proxy)
    }

    /// What is left out.
    ///
    /// # Errors
    /// When a volume can't be understood.
    pub fn choice(&self) -> Result<Choice, ConfigError> {
        let parse = |text: &String| {
            let (disk, number) = text.rsplit_once('/')?;
            Some((disk.parse().ok()?, number.parse().ok()?))
        };
        let skip_volumes = self
            .skip_volumes
            .iter()
            .map(|text| parse(text).ok_or_else(|| ConfigError::Volume(text.clone())));
        Ok(Choice {
            skip_free: self.skip_free,
            skip_volumes: skip_volumes.collect::<Result<_, _>>()?,
        })
    }

    /// How far change journals are trusted.
    ///
    /// # Errors
    /// When a share is more than all.
    pub fn policy(&self) -> Result<Policy, ConfigError> {
        let Self { full_compare_runs, full_compare_days, audit_percent, .. } = *self;
        match audit_percent {
            0..=100 => Ok(Policy { full_compare_runs, full_compare_days, audit_percent }),
            _ => Err(ConfigError::AuditPercent(audit_percent)),
        }
    }

    /// Threads that read and hash.
    pub fn threads(&self) -> Threads {
        match self.hash_threads {
            0 => Threads::of_cores(std::thread::available_parallelism().map_or(1, NonZero::get)),
            threads => Threads { near: threads.min(64), far: threads.min(64) },
        }
    }

    /// See [`Settings::failover_after_seconds`].
    pub fn failover_after(&self) -> Duration {
        Duration::from_secs(self.failover_after_seconds)
    }

    /// How the program logs.
    pub fn log_plan(&self) -> LogPlan<'_> {
        LogPlan {
            filter: &self.log,
            format: self.log_format,
            otlp_endpoint: &self.otlp_endpoint,
            service: "janus-client",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_file_is_valid_and_shows_every_key() {
        let text = include_str!("../client.example.toml");
        let settings: Settings = toml::from_str(text).unwrap();
        assert_eq!(settings.disk_specs().unwrap().len(), 2);
        settings.encoding().unwrap();
        settings.schedule.check().unwrap();
        assert_eq!(settings.notify, NotifySettings::default());
        let defaults = serde_json::to_value(Settings::default()).unwrap();
        assert_eq!(settings.pki, Pki::default());
        let tables = defaults.as_object().unwrap().values().filter_map(|value| value.as_object());
        for (key, value) in defaults.as_object().unwrap().iter().chain(tables.flatten()) {
            let line = match value.as_object() {
                Some(table) if table.is_empty() => format!("[pki.{key}."),
                Some(_) => format!("[{key}]"),
                None => format!("{key} = "),
            };
            assert!(text.lines().any(|l| l.trim_start_matches("# ").starts_with(&line)), "{key}");
        }
    }

    #[test]
    fn disks_have_names_or_paths() {
        let parse = |text| DiskSpec::parse(text).unwrap();
        assert_eq!(parse("/dev/sdb"), DiskSpec { name: None, path: "/dev/sdb".into() });
        assert_eq!(parse("/img/a=b"), DiskSpec { name: None, path: "/img/a=b".into() });
        assert_eq!(
            parse("data=/img/a=b"),
            DiskSpec { name: Some("data".parse().unwrap()), path: "/img/a=b".into() }
        );
        assert!(DiskSpec::parse("da ta=/x").is_err());
        assert!(DiskSpec::parse("data=").is_err());
    }

    #[test]
    fn missing_settings_name_the_way_out() {
        let empty = Settings::default();
        assert!(empty.checked_urls().unwrap_err().to_string().contains("urls = ["));
        assert!(empty.disk_specs().unwrap_err().to_string().contains("disks = ["));
        assert!(Settings { encoding: "gzip".into(), ..empty }.encoding().is_err());
    }
}
