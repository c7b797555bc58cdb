//! Names of objects. They are made of ids and checked names; what a store lists is only ever compared with them.

use std::{collections::BTreeMap, fmt};

use object_store::path::Path;

use crate::{
    ids::{BackupId, BlockHash, DiskId, MachineKey, ServerId, SnapshotId},
    image::Format,
};

/// Digits of a part's number: enough for 64 TiB.
const PART_DIGITS: usize = 7;
/// Digits of a sum in a name.
const SUM_DIGITS: usize = 16;
/// Digits of a time in milliseconds, for the order of names.
const TIME_DIGITS: usize = 15;

/// Which of a snapshot's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The image.
    Image(Format),
    /// The hashes of its blocks.
    Table,
}

impl Kind {
    fn extension(self) -> &'static str {
        match self {
            Self::Image(format) => format.extension(),
            Self::Table => "table",
        }
    }
}

/// A snapshot as it lies in an archive. One that was sent anew, and then is another image, has another number, so that the files of
/// both can be told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edition {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// 0: the first one.
    pub number: u32,
}

/// As files are named.
impl fmt::Display for Edition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            0 => write!(f, "{}", self.snapshot),
            number => write!(f, "{}_{number}", self.snapshot),
        }
    }
}

/// Where a machine of a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachinePlace {
    /// Folder of the manifests.
    pub runs: Path,
    /// Folder of the disks' folders.
    pub disks: Path,
}

impl MachinePlace {
    /// Below the prefix of an archive.
    pub fn new(prefix: &Path, server: &ServerId, machine: &MachineKey) -> Self {
        let own = prefix.clone().join(server.as_str());
        let own = own.join(machine.user()).join(machine.machine());
        Self { runs: own.clone().join("runs"), disks: own.join("disks") }
    }

    /// The manifest of a run, or of one disk of it that was archived alone.
    pub fn manifest(&self, committed_ms: i64, run: BackupId, alone: Option<&DiskId>) -> Path {
        let committed_ms = committed_ms.max(0);
        let disk = alone.map(|disk| format!(".{disk}")).unwrap_or_default();
        self.runs.clone().join(format!("{committed_ms:0TIME_DIGITS$}-{run}{disk}.json"))
    }

    /// Whether this is the name of a manifest of a run, wholly or of one disk.
    pub fn is_of(&self, manifest: &Path, run: BackupId) -> bool {
        let name = manifest.prefix_match(&self.runs).and_then(|mut parts| parts.next());
        let name = name.as_ref().and_then(|name| name.as_ref().split_once('-'));
        name.is_some_and(|(_, rest)| rest.split('.').next() == Some(run.to_string().as_str()))
    }

    /// A file of a snapshot.
    pub fn file(&self, disk: &DiskId, edition: Edition, kind: Kind) -> FileName {
        let folder = self.disks.clone().join(disk.as_str());
        FileName { folder, name: format!("{edition}.{}", kind.extension()) }
    }

    /// The snapshot that an object below [`Self::disks`] belongs to, by its name.
    pub fn owner(&self, object: &Path) -> Option<SnapshotId> {
        let mut parts = object.prefix_match(&self.disks)?;
        let _disk = parts.next()?;
        parts.next()?.as_ref().split(['.', '_']).next()?.parse().ok()
    }
}

/// The beginning of a sum, as names have it.
fn digits(sum: &BlockHash) -> String {
    let mut digits = hex::encode(sum.0);
    digits.truncate(SUM_DIGITS);
    digits
}

/// The name of a file that lies in parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName {
    folder: Path,
    name: String,
}

impl FileName {
    /// The file's own name, that of an image or table.
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// The object with its index, which has this sum.
    pub fn index(&self, sum: &BlockHash) -> Path {
        self.folder.clone().join(format!("{}.index.{}", self.name, digits(sum)))
    }

    /// Of these objects those that are parts of it.
    pub fn parts_in<'a>(
        &self,
        objects: &'a BTreeMap<Path, u64>,
    ) -> impl Iterator<Item = (&'a Path, &'a u64)> + use<'a> {
        let first = self.folder.clone().join(format!("{}.", self.name));
        let own = first.clone();
        objects
            .range(first..)
            .take_while(move |(object, _)| object.as_ref().starts_with(own.as_ref()))
            .filter(|(object, _)| object.extension() == Some("zst"))
    }

    /// One of its parts. The sum in its name says, without reading it, whether it is the one that is meant.
    pub fn part(&self, number: u64, sum: &BlockHash) -> Path {
        let name = format!("{}.{number:0PART_DIGITS$}.{}.zst", self.name, digits(sum));
        self.folder.clone().join(name)
    }
}
