//! Chains as values: runs, their snapshots, and which one is a disk's head.
//!
//! A run manifest is the commit point of a run: the snapshots it names exist when it does. Everything here is plain
//! data; [`store`] keeps it on disk.

pub mod clocks;
pub mod gaps;
pub mod health;
mod history;
pub mod merge;
pub mod opened;
pub mod ranges;
pub mod retain;
pub mod store;
pub mod stub;

use std::sync::Arc;

use janus_proto::{
    ids::{BackupId, BlockHash, DiskId, MachineKey, SnapshotId},
    pb,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::history::History;
pub use janus_proto::table;

/// Version of the manifests; an older program refuses a newer one.
pub const FORMAT: u32 = 1;

/// One committed disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The disk.
    pub disk: DiskId,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Logical sector of the disk: 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Names the whole content.
    pub table_digest: BlockHash,
    /// What the image is a delta to; `None` for a base.
    pub parent: Option<SnapshotId>,
    /// Image file, relative to the machine's folder.
    pub image: String,
    /// Table file, relative to the machine's folder.
    pub table: String,
    /// DataWriteGuid of the image: what a child's locator names.
    pub data_write: Uuid,
    /// Page 83 id, the same over a chain.
    pub virtual_disk: Uuid,
    /// How the source was held still (number of `janus.v1.Consistency`).
    pub consistency: i32,
    /// Bytes that were counted as zeros unread.
    #[serde(default)]
    pub skipped_bytes: u64,
    /// Bytes the image occupies, and its length.
    pub image_allocated_bytes: u64,
    /// Length of the image file.
    pub image_length_bytes: u64,
}

/// One committed run: all its disks together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Version of this manifest.
    pub format: u32,
    /// The run.
    pub backup: BackupId,
    /// Whose it is.
    pub machine: MachineKey,
    /// Unix milliseconds by the server's clock, of an import those of its content. Which run is newer [`clocks`] says.
    pub committed_ms: i64,
    /// Place in the order of the machine's runs here, from 1.
    pub sequence: u64,
    /// Counter of its start, which tells the order of runs on several servers; 0: it has none, as imports.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub use_counter: u64,
    /// The client's opaque seal.
    #[serde(with = "hex_bytes")]
    pub client_seal: Vec<u8>,
    /// Of a run that was imported: where from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// One for each disk.
    pub snapshots: Vec<Snapshot>,
}

/// What an imported run was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The carried run; none where the image of another program was taken in.
    pub run: Option<BackupId>,
    /// Unix milliseconds: its content is of that time.
    pub taken_ms: i64,
    /// The server it came from, as it was named: by its name or URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

impl Run {
    /// True when it was made of a carried run, or is that one itself.
    pub fn is_made_of(&self, run: BackupId) -> bool {
        self.backup == run || self.origin.as_ref().and_then(|origin| origin.run) == Some(run)
    }

    /// Of what time its content is: that of an import may have come later.
    pub fn taken_ms(&self) -> i64 {
        self.origin.as_ref().map_or(self.committed_ms, |origin| origin.taken_ms)
    }
}

/// Why a run was dropped, kept beside its manifest in the trash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrashRecord {
    /// Version of this file.
    pub format: u32,
    /// The run.
    pub backup: BackupId,
    /// Unix milliseconds of the drop.
    pub trashed_ms: i64,
    /// Who or what dropped it, for people.
    pub reason: String,
    /// Until this time (Unix milliseconds) it can be brought back; afterwards it may be purged.
    pub purge_not_before_ms: i64,
    /// Its purge has begun: some of its images may be gone or changed, it can't be brought back.
    pub purging: bool,
}

/// A dropped run: no snapshot any more, but its images are still links of chains.
#[derive(Debug, Clone)]
pub struct TrashedRun {
    /// The run. A purge takes snapshots out of it one by one.
    pub run: Arc<Run>,
    /// When and why it was dropped.
    pub record: TrashRecord,
}

/// A snapshot with the run it belongs to.
#[derive(Debug, Clone)]
pub struct Held {
    /// The run.
    pub run: Arc<Run>,
    index: usize,
}

impl Held {
    /// All snapshots of a run.
    pub fn all(run: &Arc<Run>) -> impl Iterator<Item = Self> {
        let run = run.clone();
        (0..run.snapshots.len()).map(move |index| Self { run: run.clone(), index })
    }

    /// The snapshot itself.
    pub fn snapshot(&self) -> &Snapshot {
        &self.run.snapshots[self.index]
    }

    /// As the catalog shows it.
    ///
    /// `folder` is the machine's, below the image path; `committed_ms` the time that its place among the runs gives it.
    pub fn to_wire(&self, server_id: &str, folder: &str, committed_ms: i64) -> pb::Snapshot {
        let (snapshot, origin) = (self.snapshot(), self.run.origin.as_ref());
        let copied = origin.and_then(|origin| origin.run);
        pb::Snapshot {
            snapshot_id: snapshot.id.to_string(),
            server_id: server_id.to_owned(),
            machine: self.run.machine.to_string(),
            disk_id: snapshot.disk.to_string(),
            backup_id: self.run.backup.to_string(),
            committed_ms,
            use_counter: self.run.use_counter,
            size_bytes: snapshot.size_bytes,
            logical_sector_bytes: snapshot.logical_sector_bytes,
            table_digest: snapshot.table_digest.0.to_vec().into(),
            parent_snapshot_id: snapshot.parent.map(|id| id.to_string()).unwrap_or_default(),
            image: format!("{folder}/{}", snapshot.image),
            image_allocated_bytes: snapshot.image_allocated_bytes,
            image_length_bytes: snapshot.image_length_bytes,
            consistency: snapshot.consistency,
            skipped_bytes: snapshot.skipped_bytes,
            reachable: true,
            client_seal: self.run.client_seal.clone().into(),
            origin_backup_id: copied.map(|run| run.to_string()).unwrap_or_default(),
            taken_ms: origin.map_or(0, |origin| origin.taken_ms),
            ..Default::default()
        }
    }
}

// Serde gives a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
