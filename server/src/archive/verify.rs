//! All of an archive read again: manifests, parts by their sums, blocks by their hashes.

use std::collections::{BTreeMap, BTreeSet};

use janus_proto::{
    archive::{ArchiveError, Archived, Manifest, check::Check, runs::Listed},
    ids::{BlockHash, DiskId, MachineKey, ServerId, SnapshotId},
    table::TableStack,
};

use super::Archive;
use crate::carry::CarryError;

/// What came of it.
#[derive(Debug, Default)]
pub struct Verified {
    /// Runs that were looked at.
    pub runs: usize,
    /// Images that were read.
    pub images: usize,
    /// What is wrong.
    pub wrong: Vec<ArchiveError>,
}

impl Archive {
    /// Reads all that is there of a machine, or of one disk of it. `hear` gets the bytes of objects that were read and all, and
    /// answers whether to go on.
    ///
    /// # Errors
    /// When the store can't be asked, or it was stopped.
    pub fn verify(
        &self,
        server: &ServerId,
        machine: &MachineKey,
        only: Option<&DiskId>,
        hear: &dyn Fn(u64, u64) -> bool,
    ) -> Result<Verified, CarryError> {
        let mut verified = Verified::default();
        let mut manifests = Vec::new();
        for Listed { manifest, .. } in self.runs(server, machine)? {
            verified.runs += 1;
            match manifest {
                Ok(manifest) => manifests.push(manifest),
                Err(error) => verified.wrong.push(error),
            }
        }
        let total = stored(&manifests, only);
        let before = self.received_bytes();
        let (mut read, mut digests) = (BTreeSet::new(), BTreeMap::new());
        // The newest run of a chain has all its images.
        for manifest in manifests.iter().rev() {
            for entry in
                manifest.disks.iter().filter(|entry| only.is_none_or(|only| *only == entry.disk))
            {
                let place = manifest.place(self.store.prefix());
                let check = Check {
                    store: &self.store,
                    runtime: self.runtime.handle(),
                    place: &place,
                    entry,
                };
                for link in &entry.links {
                    if !read.insert(link.snapshot) {
                        continue;
                    }
                    verified.images += 1;
                    verified.wrong.extend(check.link(link)?);
                    if !hear((self.received_bytes() - before).min(total), total) {
                        return Err(CarryError::Stopped);
                    }
                }
                self.compare(manifest, &entry.disk, &mut digests, &mut verified)?;
            }
        }
        Ok(verified)
    }

    /// Compares what a manifest says of a disk with what its images and tables together are.
    fn compare(
        &self,
        manifest: &Manifest,
        disk: &DiskId,
        digests: &mut BTreeMap<SnapshotId, Option<BlockHash>>,
        verified: &mut Verified,
    ) -> Result<(), CarryError> {
        let Some(entry) = manifest.disk(disk) else { return Ok(()) };
        let Some(newest) = entry.snapshot() else { return Ok(()) };
        if let Some(known) = digests.get(&newest) {
            if known.is_some_and(|known| known != entry.table_digest) {
                let object = format!("manifest of run {}", manifest.run);
                let reason = format!("disk {disk} has other hashes");
                verified.wrong.push(ArchiveError::Damaged { object, reason });
            }
            return Ok(());
        }
        match Archived::open(&self.store, self.runtime.handle(), manifest, disk) {
            Ok(opened) => {
                for (at, link) in entry.links.iter().enumerate() {
                    let tables = opened.own_tables.get(at..).unwrap_or_default().to_vec();
                    let stack = TableStack::new(tables, entry.size_bytes);
                    digests
                        .insert(link.snapshot, stack.and_then(|stack| stack.table_digest()).ok());
                }
            }
            Err(error) if error.is_damage() => {
                // Named where the object was read.
                digests.extend(entry.links.iter().map(|link| (link.snapshot, None)));
                if verified.wrong.is_empty() {
                    verified.wrong.push(error);
                }
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// Bytes of all parts of these runs.
fn stored(manifests: &[Manifest], only: Option<&DiskId>) -> u64 {
    let entries = manifests.iter().flat_map(|manifest| &manifest.disks);
    let entries = entries.filter(|entry| only.is_none_or(|only| *only == entry.disk));
    let links = entries.flat_map(|entry| &entry.links);
    let files: BTreeMap<SnapshotId, u64> = links
        .map(|link| (link.snapshot, link.image.stored_bytes + link.table.stored_bytes))
        .collect();
    files.values().sum()
}
