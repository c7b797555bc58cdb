//! Section `[prove]`: which backups are read as a restore would read them, how far, and when.

use janus_proto::grants::Which;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    replicate::{Hours, which},
};

/// What is proven by itself, and what a proof is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prove {
    /// A backup is proven so often; 0: only when asked.
    pub every_seconds: u64,
    /// Part of the day, UTC, `HH:MM-HH:MM`; empty: always.
    pub hours: String,
    /// Of which machines: `*`, `USER/*` or `USER/MACHINE`.
    pub machines: Vec<String>,
    /// Read at most so fast; 0: no limit.
    pub mib_per_second: u32,
    /// Content of files that is read at most, of each file system.
    pub files_mib: u64,
    /// Which machines are also started: as `machines`.
    pub boot: Vec<String>,
    /// What a started machine says on its serial console when it is up.
    pub boot_pattern: String,
    /// It has so long to say it.
    pub boot_seconds: u64,
    /// Its memory.
    pub boot_memory_mib: u32,
    /// File with the firmware of machines that start by UEFI; empty: BIOS.
    pub boot_firmware: String,
}

impl Default for Prove {
    fn default() -> Self {
        Self {
            every_seconds: 0,
            hours: String::new(),
            machines: vec!["*".into()],
            mib_per_second: 50,
            files_mib: 1024,
            boot: Vec::new(),
            boot_pattern: "login:".into(),
            boot_seconds: 300,
            boot_memory_mib: 1024,
            boot_firmware: String::new(),
        }
    }
}

/// One line of help for each key.
pub const KEYS: &[(&str, &str)] = &[
    ("every_seconds", "Prove a backup so often: read it as a restore does; 0: only when asked"),
    ("hours", "Part of the day (UTC) for it, such as 22:00-06:00; empty: always"),
    ("machines", "Whose backups: *, USER/* or USER/MACHINE"),
    ("mib_per_second", "Read at most so fast; 0: no limit"),
    ("files_mib", "Read so much of the files of each file system at most"),
    ("boot", "Machines that are also started by QEMU: *, USER/* or USER/MACHINE"),
    ("boot_pattern", "What a started machine says on its serial console when it is up"),
    ("boot_seconds", "It has so long to say it"),
    ("boot_memory_mib", "Memory of a started machine"),
    ("boot_firmware", "Firmware file of machines that start by UEFI; empty: BIOS"),
];

impl Prove {
    /// Whose backups.
    ///
    /// # Errors
    /// Says what isn't one.
    pub fn machines(&self) -> Result<Vec<Which>, String> {
        whole_machines(&self.machines)
    }

    /// Which machines are started.
    ///
    /// # Errors
    /// Says what isn't one.
    pub fn boot(&self) -> Result<Vec<Which>, String> {
        whole_machines(&self.boot)
    }

    /// When.
    ///
    /// # Errors
    /// When that isn't a part of the day.
    pub fn hours(&self) -> Result<Hours, String> {
        self.hours.parse()
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let invalid = |key, reason| Err(ConfigError::Invalid { key, reason });
        if let Err(reason) = self.hours() {
            return invalid("prove.hours", reason);
        }
        if let Err(reason) = self.machines() {
            return invalid("prove.machines", reason);
        }
        if let Err(reason) = self.boot() {
            return invalid("prove.boot", reason);
        }
        if self.boot_pattern.is_empty() {
            return invalid("prove.boot_pattern", "is empty: nothing would be waited for".into());
        }
        if self.boot_seconds == 0 || self.boot_memory_mib == 0 {
            return invalid("prove", "boot_seconds and boot_memory_mib must be at least 1".into());
        }
        Ok(())
    }
}

/// A machine is proven when all its disks are.
fn whole_machines(texts: &[String]) -> Result<Vec<Which>, String> {
    let all = which(texts)?;
    match all.iter().find(|one| matches!(one, Which::Machine(_, Some(_)))) {
        Some(Which::Machine(machine, Some(disk))) => {
            Err(format!("{machine}/{disk} is a disk: name the machine {machine}"))
        }
        _ => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_key() {
        Prove::default().check().unwrap();
        let said = |change: fn(&mut Prove)| {
            let mut prove = Prove::default();
            change(&mut prove);
            prove.check().unwrap_err().to_string()
        };
        assert!(said(|prove| prove.hours = "night".into()).contains("prove.hours"));
        let disk = said(|prove| prove.machines = vec!["alice/laptop/sda".into()]);
        assert!(disk.contains("prove.machines") && disk.contains("alice/laptop"), "{disk}");
        assert!(said(|prove| prove.boot = vec!["alice".into()]).contains("prove.boot"));
        assert!(said(|prove| prove.boot_pattern.clear()).contains("prove.boot_pattern"));
        assert!(said(|prove| prove.boot_seconds = 0).contains("boot_seconds"));
    }
}
