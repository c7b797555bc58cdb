//! The record beside each mirrored table: which snapshot it is of, and what it is a difference to.
//!
//! ```text
//! .mirror/<server>/<user>/<machine>/<disk>/<snapshot>.json          this record
//! .mirror/<server>/<user>/<machine>/<disk>/<snapshot>.<number>.table
//! ```
//!
//! It is JSON with a version and a sum, as all small files of the store. A table exists when its record does; a record names its
//! table by a number, so that a table which is replaced never meets the wrong record.

use std::path::{Path, PathBuf};

use janus_proto::{
    error::WireError,
    ids::{BlockHash, DiskId, MAX_DISK_BYTES, MachineKey, ServerId, SnapshotId},
    pb,
};
use prost::Message;
use serde::{Deserialize, Serialize};

use super::MirrorError;
use crate::{
    chain::store::{self, StoreError},
    storage::Disk,
};

/// Version of the records.
const FORMAT: u32 = 1;
/// Largest record: a description with the longest seal is far below.
const MOST_BYTES: u64 = 1 << 20;

/// A snapshot of another server as it has described it, with what we go by checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// The snapshot.
    pub id: SnapshotId,
    /// Its server.
    pub server: ServerId,
    /// Whose it is.
    pub machine: MachineKey,
    /// Which disk.
    pub disk: DiskId,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Names the whole content.
    pub digest: BlockHash,
    /// All of it.
    pub wire: pb::Snapshot,
}

impl TryFrom<pb::Snapshot> for Description {
    type Error = WireError;

    fn try_from(wire: pb::Snapshot) -> Result<Self, WireError> {
        if wire.size_bytes > MAX_DISK_BYTES {
            return Err(WireError::invalid("size_bytes", "too large".to_owned()));
        }
        Ok(Self {
            id: wire.snapshot_id.parse()?,
            server: wire.server_id.parse()?,
            machine: wire.machine.parse()?,
            disk: wire.disk_id.parse()?,
            size_bytes: wire.size_bytes,
            digest: BlockHash::from_wire("table_digest", &wire.table_digest)?,
            // Nobody has reached its server by reading this.
            wire: pb::Snapshot { reachable: false, ..wire },
        })
    }
}

impl Description {
    /// Where its files lie, below the folder of all.
    pub fn folder(&self) -> PathBuf {
        // Names hold no separators by their types; the machine's key has one, between user and machine.
        Path::new(self.server.as_str()).join(self.machine.as_str()).join(self.disk.as_str())
    }
}

/// When a snapshot was made, in milliseconds, as its id says: what is near in time is told by that, not by clocks of commits,
/// so that a simulation has one order of events.
pub fn made_ms(id: SnapshotId) -> u64 {
    id.as_bytes().iter().take(6).fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// What a record says.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The snapshot.
    pub description: Description,
    /// The table holds what differs from this one's; `None`: from zeros.
    pub base: Option<SnapshotId>,
    /// Number of the table's file.
    pub number: u32,
}

/// As it is written.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    format: u32,
    /// For people.
    machine: String,
    committed_ms: i64,
    /// The description as it came, in hex.
    snapshot: String,
    base: Option<SnapshotId>,
    table: u32,
}

impl Record {
    /// Name of the record's file.
    pub fn name(id: SnapshotId) -> String {
        format!("{id}.json")
    }

    /// Name of the table's file.
    pub fn table(&self) -> String {
        format!("{}.{}.table", self.description.id, self.number)
    }

    /// Reads the record at `path`; `None` when there is none.
    ///
    /// # Errors
    /// When it can't be read, is damaged, or of a newer version.
    pub fn read(storage: &Disk, path: &Path) -> Result<Option<Self>, MirrorError> {
        let bytes = storage.read(path, MOST_BYTES).map_err(MirrorError::io("read", path))?;
        bytes.map(|bytes| Self::parse(path, &bytes)).transpose()
    }

    /// The record in the bytes of the file at `path`.
    ///
    /// # Errors
    /// When they are not what a writer left there.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, MirrorError> {
        let damaged = |reason: String| StoreError::Damaged { path: path.to_owned(), reason };
        let written: Written = store::parse(path, bytes)?;
        let wire = hex::decode(&written.snapshot).map_err(|error| damaged(error.to_string()))?;
        let wire =
            pb::Snapshot::decode(wire.as_slice()).map_err(|error| damaged(error.to_string()))?;
        let description =
            Description::try_from(wire).map_err(|error| damaged(error.to_string()))?;
        if written.base == Some(description.id) {
            return Err(damaged("it is a difference to itself".into()).into());
        }
        Ok(Self { description, base: written.base, number: written.table })
    }

    /// The bytes of its file.
    ///
    /// # Errors
    /// None for what types allow.
    pub fn to_bytes(&self, path: &Path) -> Result<Vec<u8>, MirrorError> {
        let wire = &self.description.wire;
        let written = Written {
            format: FORMAT,
            machine: wire.machine.clone(),
            committed_ms: wire.committed_ms,
            snapshot: hex::encode(wire.encode_to_vec()),
            base: self.base,
            table: self.number,
        };
        let failed = |error: serde_json::Error| StoreError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let mut text = serde_json::to_vec_pretty(&written).map_err(failed)?;
        text.push(b'\n');
        Ok(store::with_sum(text))
    }

    /// Writes it, durably: from then on the table exists.
    ///
    /// # Errors
    /// As the file system says.
    pub fn write(&self, storage: &Disk, path: &Path) -> Result<(), MirrorError> {
        storage.replace(path, &self.to_bytes(path)?).map_err(MirrorError::io("write", path))
    }
}
