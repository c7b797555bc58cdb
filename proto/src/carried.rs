//! A machine's run in a folder that is carried by hand: all its disks, each as one image that needs no other.
//!
//! ```text
//! DIR/janus-backup.json         what is in it, with sizes and digests; its last line is its sum
//! DIR/<disk>.vhdx               the disk's content: a dynamic VHDX, which any reader of the format opens
//! DIR/<disk>.table              hashes of its blocks: see [`crate::table`]
//! DIR/janus-backup.unfinished   while it is written
//! ```
//!
//! Servers and clients write it ([`Claim`], [`DiskWriter`]), servers take it in ([`CarriedDisk`]). The disk that carries it may
//! have any file system: names are plain, nothing is shared, links are never made nor followed. The manifest comes last, so
//! that a folder without one was not finished. Whoever reads it believes nothing: each block is compared with its hash, all
//! hashes with the segments' digests, and these with the disk's digest in the manifest.

mod claim;
mod content;
mod writer;

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use self::{claim::Claim, content::CarriedDisk, writer::DiskWriter};
use crate::{
    ids::{BackupId, BlockHash, DiskId, MachineKey},
    image::ImageError,
    outside::{DiskFacts, RunFacts},
    storage::Disk,
    summed::{self, Unfit},
    table::TableError,
};

/// Version of the format; an older program refuses a newer one.
pub const FORMAT: u32 = 1;
/// Name of the manifest.
pub const MANIFEST: &str = "janus-backup.json";
/// Says that the folder is being written.
const UNFINISHED: &str = "janus-backup.unfinished";
/// What the manifest says it is.
const KIND: &str = "janus-carried-run";
/// Longest manifest that is read: 64 disks take less than 40 KiB.
const MAX_MANIFEST_BYTES: u64 = 1 << 20;

/// What can go wrong with a carried folder.
#[derive(Debug, thiserror::Error)]
pub enum CarriedError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file system doesn't hold such a file.
    #[error("{}: its file system holds no file this large (FAT32: 4 GiB): format the disk as exFAT, NTFS or ext4", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// There is none.
    #[error("{} holds no carried backup: there is no {MANIFEST} in it", path.display())]
    Absent {
        /// The folder.
        path: PathBuf,
    },
    /// Its writer has not come to the end.
    #[error("{} was not written to its end: run the command that wrote it again", path.display())]
    Unfinished {
        /// The folder.
        path: PathBuf,
    },
    /// Something is where the folder's files would be.
    #[error("{} is there already: choose an empty folder, or remove it", path.display())]
    Occupied {
        /// What is there.
        path: PathBuf,
    },
    /// Written by a newer version.
    #[error("{} has format {format}, this program knows {FORMAT}: use a newer one", path.display())]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
    /// It is not what a writer left there.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A block that is not what was backed up.
    #[error("{} is damaged at byte {offset}: block {block} of disk {disk} is not what was backed up", path.display())]
    Block {
        /// The image.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// The disk.
        disk: DiskId,
        /// The block.
        block: u64,
    },
    /// An image.
    #[error("image {}: {source}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// A table.
    #[error("table {}: {source}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: TableError,
    },
}

impl CarriedError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::FileTooLarge => Self::TooLarge { path },
            _ => Self::Io { action, path, source },
        }
    }

    fn image(path: &Path) -> impl FnOnce(ImageError) -> Self {
        let path = path.to_owned();
        move |error| match error {
            ImageError::Io { action, source } => Self::io(action, &path)(source),
            source => Self::Image { path, source },
        }
    }

    fn table(path: &Path) -> impl FnOnce(TableError) -> Self {
        let path = path.to_owned();
        move |error| match error {
            TableError::Io { action, source } => Self::io(action, &path)(source),
            source => Self::Table { path, source },
        }
    }

    fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), reason: reason.into() }
    }

    /// True when the files are to blame, not the moment: the disk that carries them may have been pulled out.
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}

/// A run that is carried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    kind: String,
    /// The run, as its server or client calls it.
    pub run: BackupId,
    /// Whose it is.
    pub machine: MachineKey,
    /// Unix milliseconds: its content is of that time.
    pub committed_ms: i64,
    /// The client's opaque seal, as hexadecimal digits; may be empty.
    pub client_seal: String,
    /// All its disks.
    pub disks: Vec<DiskEntry>,
}

/// One disk of a carried run.
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
    /// Bytes that aren't zero, in whole blocks: what taking it in may need.
    pub data_bytes: u64,
    /// Name of the image.
    pub image: String,
    /// Its length.
    pub image_bytes: u64,
    /// Name of the table.
    pub table: String,
    /// Its length.
    pub table_bytes: u64,
}

impl Manifest {
    /// A manifest of this version.
    pub fn new(
        run: BackupId,
        machine: MachineKey,
        committed_ms: i64,
        client_seal: &[u8],
        disks: Vec<DiskEntry>,
    ) -> Self {
        let client_seal = hex::encode(client_seal);
        Self { format: FORMAT, kind: KIND.into(), run, machine, committed_ms, client_seal, disks }
    }

    /// Reads the manifest of a folder.
    ///
    /// # Errors
    /// When there is none, it can't be read, or is damaged.
    pub fn read(storage: &Disk, folder: &Path) -> Result<Self, CarriedError> {
        let path = folder.join(MANIFEST);
        let there = |path: &Path| storage.exists(path).map_err(CarriedError::io("look for", path));
        if !there(&path)? {
            let path = folder.to_owned();
            return Err(match there(&folder.join(UNFINISHED))? {
                true => CarriedError::Unfinished { path },
                false => CarriedError::Absent { path },
            });
        }
        let file = storage.open_regular(&path).map_err(CarriedError::io("open", &path))?;
        let length = file.metadata().map_err(CarriedError::io("read", &path))?.length_bytes;
        if length > MAX_MANIFEST_BYTES {
            return Err(CarriedError::damaged(&path, "too long"));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(CarriedError::io("read", &path))?;
        Self::parse(&path, &bytes)
    }

    /// The manifest in the bytes of the file at `path`, if it is one that can be believed as far as it goes.
    ///
    /// # Errors
    /// When it is damaged, or of a newer version.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CarriedError> {
        let damaged = |reason: String| CarriedError::damaged(path, reason);
        let manifest: Self = summed::parse(bytes, FORMAT).map_err(|unfit| match unfit {
            Unfit::Newer(format) => CarriedError::Newer { path: path.to_owned(), format },
            Unfit::Damaged(reason) => damaged(reason),
        })?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// Bytes of the file that holds it.
    fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(summed::with_sum(text))
    }

    /// The client's seal.
    pub fn seal(&self) -> Vec<u8> {
        hex::decode(&self.client_seal).unwrap_or_default()
    }

    /// Bytes of all disks.
    pub fn size_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add)
    }

    /// Checks what types can't.
    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT || self.kind != KIND {
            return Err(format!("it is no {KIND} of format {FORMAT}"));
        }
        let facts = RunFacts {
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

impl DiskEntry {
    fn facts(&self) -> DiskFacts<'_> {
        DiskFacts {
            disk: &self.disk,
            size_bytes: self.size_bytes,
            logical_sector_bytes: self.logical_sector_bytes,
            consistency: self.consistency,
        }
    }

    fn check(&self) -> Result<(), String> {
        // Names are given, not chosen: none leads out of the folder.
        let (image, table) = names(&self.disk);
        match self.image == image && self.table == table {
            true => Ok(()),
            false => Err(format!("its files are {:?} and {:?}", self.image, self.table)),
        }
    }
}

/// Names of a disk's image and table.
fn names(disk: &DiskId) -> (String, String) {
    (format!("{disk}.vhdx"), format!("{disk}.table"))
}

#[cfg(test)]
mod tests;
