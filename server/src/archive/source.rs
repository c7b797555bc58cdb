//! An archived run, as the content of an import.

use janus_proto::{
    archive::{ArchiveError, Archived, Manifest},
    ids::{BackupId, BlockHash, DiskId, MachineKey},
};

use super::Archive;
use crate::carry::{CarryError, Content, NewDisk, NewRun};

/// A disk of an archived run.
struct Source {
    disk: Archived,
    digests: Vec<BlockHash>,
}

/// The run of a machine that is meant: the newest, or one by its id; of any server, if it isn't named.
///
/// # Errors
/// When there is none, or the store can't be asked.
pub fn choose(
    archive: &Archive,
    server: Option<&janus_proto::ids::ServerId>,
    machine: &MachineKey,
    run: Option<BackupId>,
) -> Result<Manifest, CarryError> {
    let (mut found, mut damaged) = (Vec::new(), None);
    for (server, machine) in archive.machines(server, Some(machine))? {
        for listed in archive.runs(&server, &machine)? {
            match listed.manifest {
                Ok(manifest) => found.push(manifest),
                Err(error) => damaged = Some(error),
            }
        }
    }
    let found = found.into_iter().filter(|manifest| run.is_none_or(|run| manifest.run == run));
    // Of the same run the manifest with all disks.
    let newest = found.max_by_key(|manifest| (manifest.committed_ms, manifest.disks.len()));
    match (newest, damaged) {
        (Some(manifest), _) => Ok(manifest),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err(ArchiveError::Missing {
            object: match run {
                Some(run) => format!("run {run} of {machine}"),
                None => format!("any run of {machine}"),
            },
        }
        .into()),
    }
}

/// Opens an archived run, or one disk of it, to be imported.
///
/// # Errors
/// When something of it can't be read, or is damaged.
pub fn open_run(
    archive: &Archive,
    manifest: &Manifest,
    only: Option<&DiskId>,
) -> Result<NewRun, CarryError> {
    let mut disks = Vec::new();
    for entry in manifest.disks.iter().filter(|entry| only.is_none_or(|only| *only == entry.disk)) {
        let (store, runtime) = (&archive.store, archive.runtime.handle());
        let disk = Archived::open(store, runtime, manifest, &entry.disk)?;
        let digests = disk.tables.segment_digests();
        let digests =
            digests.map_err(|source| CarryError::Table { disk: entry.disk.clone(), source })?;
        disks.push(NewDisk {
            disk: entry.disk.clone(),
            size_bytes: entry.size_bytes,
            logical_sector_bytes: entry.logical_sector_bytes,
            consistency: entry.consistency,
            skipped_bytes: entry.skipped_bytes,
            // Nobody knows before it is read: what is full then ends it as a client's backup.
            data_bytes: None,
            content: Box::new(Source { disk, digests }),
        });
    }
    if let (true, Some(only)) = (disks.is_empty(), only) {
        let object = format!("disk {only} of run {}", manifest.run);
        return Err(ArchiveError::Missing { object }.into());
    }
    Ok(NewRun {
        machine: manifest.machine.clone(),
        run: Some(manifest.run),
        taken_ms: manifest.committed_ms,
        seal: manifest.seal(),
        from: None,
        stubs: false,
        disks,
    })
}

impl Content for Source {
    fn digest(&self, segment: u64) -> Option<BlockHash> {
        self.digests.get(segment as usize).copied()
    }

    fn hashes(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, CarryError> {
        Ok(Some(self.disk.segment(segment)?))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        Ok(self.disk.read_at(offset, buffer)?)
    }

    fn wrong(&self, block: u64) -> CarryError {
        let entry = self.disk.entry();
        ArchiveError::Damaged {
            object: format!("image of disk {}", entry.disk),
            reason: format!(
                "block {block} doesn't have its hash: `janus-server archive verify` names the part"
            ),
        }
        .into()
    }
}
