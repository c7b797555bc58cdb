//! The manifest of an archived run: JSON, and a last line with its sum.

use std::collections::BTreeSet;

use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::{
    ArchiveError,
    index::Index,
    names::{Edition, FileName, Kind, MachinePlace},
};
use crate::{
    ids::{BackupId, BlockHash, DiskId, MachineKey, ServerId, SnapshotId},
    image::Format,
    outside::{self, DiskFacts},
    summed::{self, Unfit},
};

/// Version of the format; an older program refuses a newer one.
pub const FORMAT: u32 = 1;
const KIND: &str = "janus-archived-run";
/// Longest manifest that is read.
pub const MAX_MANIFEST_BYTES: u64 = 32 << 20;
/// Most images of a chain.
pub const MAX_LINKS: usize = 500;

/// A run that was archived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    kind: String,
    /// The server that archived it.
    pub server: ServerId,
    /// The run, as that server calls it; of one that came there by an import the run it was made of.
    pub run: BackupId,
    /// Whose it is.
    pub machine: MachineKey,
    /// Unix milliseconds: its content is of that time.
    pub committed_ms: i64,
    /// The client's opaque seal, as hexadecimal digits; may be empty.
    pub client_seal: String,
    /// Its disks.
    pub disks: Vec<DiskEntry>,
}

/// One disk of an archived run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskEntry {
    /// The disk.
    pub disk: DiskId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Names the whole content.
    pub table_digest: BlockHash,
    /// How the source was held still (number of `janus.v1.Consistency`).
    pub consistency: i32,
    /// Bytes that were counted as zeros unread.
    pub skipped_bytes: u64,
    /// Format of its images.
    pub format: Format,
    /// The images of its chain, the newest first, the base last.
    pub links: Vec<Link>,
}

/// An image of a chain, and the hashes of its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The snapshot that it makes of what is below it.
    pub snapshot: SnapshotId,
    /// Which of the images of this snapshot: 0, or of one that was sent anew its number.
    #[serde(default)]
    pub edition: u32,
    /// What a child names.
    pub data_write: uuid::Uuid,
    /// The same over a chain.
    pub virtual_disk: uuid::Uuid,
    /// The image.
    pub image: FileEntry,
    /// Its table.
    pub table: FileEntry,
}

/// A file that lies in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its length.
    pub length_bytes: u64,
    /// Bytes of its parts.
    pub stored_bytes: u64,
    /// BLAKE3 of its index, which has the sums of the parts.
    pub index_sum: BlockHash,
}

/// What a manifest says of its run.
#[derive(Debug, Clone)]
pub struct RunFacts {
    /// The server that archives it.
    pub server: ServerId,
    /// The run.
    pub run: BackupId,
    /// Whose it is.
    pub machine: MachineKey,
    /// Unix milliseconds.
    pub committed_ms: i64,
    /// The client's seal.
    pub seal: Vec<u8>,
}

impl Manifest {
    /// A manifest of this version.
    pub fn new(facts: RunFacts, disks: Vec<DiskEntry>) -> Self {
        let RunFacts { server, run, machine, committed_ms, seal } = facts;
        let client_seal = hex::encode(seal);
        Self {
            format: FORMAT,
            kind: KIND.into(),
            server,
            run,
            machine,
            committed_ms,
            client_seal,
            disks,
        }
    }

    /// The manifest in the bytes of `object`, if it is one that can be believed as far as it goes.
    ///
    /// # Errors
    /// When it is damaged, or of a newer version.
    pub fn parse(object: &str, bytes: &[u8]) -> Result<Self, ArchiveError> {
        let damaged = |reason: String| ArchiveError::damaged(object, reason);
        let manifest: Self = summed::parse(bytes, FORMAT).map_err(|unfit| match unfit {
            Unfit::Newer(format) => ArchiveError::Newer { object: object.to_owned(), format },
            Unfit::Damaged(reason) => damaged(reason),
        })?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// Bytes of the object that holds it.
    ///
    /// # Errors
    /// When it can't be written as JSON, or nobody would read it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| error.to_string())?;
        text.push(b'\n');
        let bytes = summed::with_sum(text);
        match bytes.len() as u64 <= MAX_MANIFEST_BYTES {
            true => Ok(bytes),
            false => Err("too long".into()),
        }
    }

    /// The client's seal.
    pub fn seal(&self) -> Vec<u8> {
        hex::decode(&self.client_seal).unwrap_or_default()
    }

    /// Where its machine is.
    pub fn place(&self, prefix: &Path) -> MachinePlace {
        MachinePlace::new(prefix, &self.server, &self.machine)
    }

    /// One of its disks.
    pub fn disk(&self, disk: &DiskId) -> Option<&DiskEntry> {
        self.disks.iter().find(|entry| entry.disk == *disk)
    }

    /// Checks what types can't.
    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT || self.kind != KIND {
            return Err(format!("it is no {KIND} of format {FORMAT}"));
        }
        let facts = outside::RunFacts {
            committed_ms: self.committed_ms,
            client_seal: &self.client_seal,
            disks: self.disks.iter().map(DiskEntry::facts).collect(),
        };
        facts.check()?;
        let check = |entry: &DiskEntry| {
            entry.check().map_err(|reason| format!("disk {}: {reason}", entry.disk))
        };
        self.disks.iter().try_for_each(check)
    }
}

impl Link {
    /// What its files are named by.
    pub fn edition(&self) -> Edition {
        Edition { snapshot: self.snapshot, number: self.edition }
    }
}

impl DiskEntry {
    /// The snapshot.
    pub fn snapshot(&self) -> Option<SnapshotId> {
        self.links.first().map(|link| link.snapshot)
    }

    /// Bytes of all parts of its chain.
    pub fn stored_bytes(&self) -> u64 {
        let files = self.links.iter().flat_map(|link| [&link.image, &link.table]);
        files.map(|file| file.stored_bytes).fold(0, u64::saturating_add)
    }

    /// The files of its chain, with their names.
    pub fn files<'a>(
        &'a self,
        place: &'a MachinePlace,
    ) -> impl Iterator<Item = (FileName, &'a FileEntry)> + 'a {
        self.links.iter().flat_map(move |link| {
            let name = |kind| place.file(&self.disk, link.edition(), kind);
            [(name(Kind::Image(self.format)), &link.image), (name(Kind::Table), &link.table)]
        })
    }

    fn facts(&self) -> DiskFacts<'_> {
        DiskFacts {
            disk: &self.disk,
            size_bytes: self.size_bytes,
            logical_sector_bytes: self.logical_sector_bytes,
            consistency: self.consistency,
        }
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_LINKS).contains(&self.links.len()) {
            return Err(format!("{} images, not 1 to {MAX_LINKS}", self.links.len()));
        }
        let mut snapshots = BTreeSet::new();
        for link in &self.links {
            if !snapshots.insert(link.snapshot) {
                return Err(format!("snapshot {} is named twice", link.snapshot));
            }
            for file in [&link.image, &link.table] {
                if Index::encoded_bytes(file.length_bytes).is_none() {
                    return Err(format!("a file of {} bytes", file.length_bytes));
                }
            }
        }
        Ok(())
    }
}
