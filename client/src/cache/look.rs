//! What lies in a cache folder, told without opening a database: nothing is changed, and a backup may be under way.

use std::{fs, io, path::Path};

use janus_proto::ids::{BlockHash, DiskId, ServerId};
use serde::Serialize;

use super::{CacheError, FreshReason, Head, engine::allocated, manifest, place};

/// The cache of one disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The disk.
    pub disk_id: DiskId,
    /// Size of the disk in the last backup; 0 where nothing can be told.
    pub size_bytes: u64,
    /// Grows with each backup.
    pub generation: u64,
    /// Bytes of hashes that count.
    pub hash_bytes: u64,
    /// Layers that they lie in.
    pub layers: usize,
    /// What all of it takes on the file system, what was moved aside too.
    pub allocated_bytes: u64,
    /// Change journals can be asked what changed since.
    pub has_cursor: bool,
    /// What each server is known to have.
    pub servers: Vec<KnownServer>,
    /// A damaged database was moved aside earlier.
    pub was_damaged: bool,
    /// Why nothing of it counts.
    pub problem: Option<String>,
}

/// A server's newest snapshot of the disk, as this machine knows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KnownServer {
    /// The server.
    pub server: ServerId,
    /// What it has.
    #[serde(flatten)]
    pub head: Head,
    /// Blocks changed since; `None`: an older program didn't say.
    pub changed_blocks: Option<u64>,
}

/// All caches in a folder, by the names of their disks.
///
/// # Errors
/// `Io` when a folder can't be read; that there is none is no error.
pub fn summaries(folder: &Path) -> Result<Vec<Summary>, CacheError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(place::at(folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(place::at(folder))?;
        let disk = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(disk) = disk.filter(|_| entry.path().join(place::LOCK).is_file()) {
            found.push(Summary::of(disk, &entry.path())?);
        }
    }
    found.sort_by(|one, other| one.disk_id.cmp(&other.disk_id));
    Ok(found)
}

impl Summary {
    fn of(disk_id: DiskId, folder: &Path) -> Result<Self, CacheError> {
        let mut summary = Self {
            disk_id,
            size_bytes: 0,
            generation: 0,
            hash_bytes: 0,
            layers: 0,
            // A backup may be removing files.
            allocated_bytes: allocated(folder).unwrap_or(0),
            has_cursor: false,
            servers: Vec::new(),
            was_damaged: place::has_quarantine(folder)?,
            problem: None,
        };
        let Some(bytes) = place::read_current(folder)? else {
            summary.problem = Some("no backup has been remembered yet".into());
            return Ok(summary);
        };
        match manifest::parse(&bytes) {
            Ok(manifest) => summary.take(manifest),
            Err(FreshReason::Newer(format)) => {
                summary.problem = Some(format!("a newer program wrote it (format {format})"));
            }
            Err(reason) => summary.problem = Some(reason.to_string()),
        }
        Ok(summary)
    }

    fn take(&mut self, manifest: manifest::Manifest) {
        self.size_bytes = manifest.size_bytes;
        self.generation = manifest.generation;
        let hashes: u64 = manifest.layers.iter().map(|layer| layer.hashes).sum();
        self.hash_bytes = hashes.saturating_mul(BlockHash::LEN as u64);
        self.layers = manifest.layers.len();
        self.has_cursor = !manifest.cursor.is_empty();
        let known = manifest.servers.into_iter().map(|(server, stored)| KnownServer {
            server,
            head: stored.head,
            changed_blocks: stored.changed_blocks,
        });
        self.servers = known.collect();
    }
}
