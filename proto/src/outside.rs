//! What manifests of runs that lie outside of a store have in common: what is believed of them.

use std::collections::BTreeSet;

use crate::{
    ids::{DiskId, MAX_DISK_BYTES},
    pb::Consistency,
};

/// Most disks of a run.
const MAX_DISKS: usize = 64;
/// Longest seal of a client.
const MAX_SEAL_BYTES: usize = 64 << 10;

/// What a manifest says of a run.
pub(crate) struct RunFacts<'a> {
    /// Unix milliseconds.
    pub committed_ms: i64,
    /// The client's seal, as hexadecimal digits.
    pub client_seal: &'a str,
    /// Its disks.
    pub disks: Vec<DiskFacts<'a>>,
}

/// What it says of a disk.
pub(crate) struct DiskFacts<'a> {
    pub disk: &'a DiskId,
    pub size_bytes: u64,
    pub logical_sector_bytes: u32,
    /// Number of `janus.v1.Consistency`.
    pub consistency: i32,
}

impl RunFacts<'_> {
    /// Checks what types can't.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(1..=MAX_DISKS).contains(&self.disks.len()) {
            return Err(format!("{} disks, not 1 to {MAX_DISKS}", self.disks.len()));
        }
        if self.committed_ms < 0 {
            return Err(format!("time {}", self.committed_ms));
        }
        if self.client_seal.len() > 2 * MAX_SEAL_BYTES || hex::decode(self.client_seal).is_err() {
            return Err("its seal is none".into());
        }
        let mut names = BTreeSet::new();
        for disk in &self.disks {
            disk.check().map_err(|reason| format!("disk {}: {reason}", disk.disk))?;
            if !names.insert(disk.disk.as_str().to_ascii_lowercase()) {
                return Err(format!("disk {} is named twice", disk.disk));
            }
        }
        Ok(())
    }
}

impl DiskFacts<'_> {
    fn check(&self) -> Result<(), String> {
        let size = self.size_bytes;
        if size == 0 || size > MAX_DISK_BYTES || !size.is_multiple_of(512) {
            return Err(format!("a size of {size} bytes"));
        }
        if ![512, 4096].contains(&self.logical_sector_bytes) {
            return Err(format!("sectors of {} bytes", self.logical_sector_bytes));
        }
        if Consistency::try_from(self.consistency).is_err() {
            return Err(format!("consistency {}", self.consistency));
        }
        Ok(())
    }
}
