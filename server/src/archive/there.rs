//! What is there of an archive, by the names and sizes of its objects, and what of it nobody needs.

use std::collections::{BTreeMap, BTreeSet};

use janus_proto::{
    archive::{
        ArchiveError, DiskEntry, FileEntry, Link, Manifest, Path,
        index::Index,
        names::{Edition, FileName, MachinePlace},
        reader::fetch_index,
    },
    ids::{BackupId, DiskId, MachineKey, SnapshotId},
};

use super::Archive;
use crate::carry::CarryError;

/// Objects of an archive, with their sizes.
pub(super) type Objects = BTreeMap<Path, u64>;

/// A run that is there.
#[derive(Debug)]
pub(super) struct There {
    /// Its manifest's name.
    pub object: Path,
    /// What it says.
    pub manifest: Manifest,
}

/// The newest of them that has a disk comes last.
pub(super) fn entries<'a>(
    known: &'a [There],
    disk: &'a DiskId,
) -> impl DoubleEndedIterator<Item = &'a DiskEntry> {
    known.iter().filter_map(move |there| there.manifest.disk(disk))
}

/// Which edition of a snapshot is to be sent, over what is `below` it. The one that is there already if that lies over the same, so that
/// only what is missing of it is sent; `anew`, or over something else, one that nobody knows.
pub(super) fn edition(
    known: &[There],
    disk: &DiskId,
    snapshot: SnapshotId,
    below: Option<Edition>,
    anew: bool,
) -> Edition {
    let mut number = 0;
    for entry in entries(known, disk) {
        let under = entry.links.iter().skip(1).map(Some).chain([None]);
        for (link, under) in entry.links.iter().zip(under) {
            if link.snapshot != snapshot {
                continue;
            }
            if !anew && under.map(Link::edition) == below {
                return link.edition();
            }
            number = number.max(link.edition.saturating_add(1));
        }
    }
    Edition { snapshot, number }
}

impl Archive {
    /// The objects of a machine's disks.
    pub(super) fn objects(&self, place: &MachinePlace) -> Result<Objects, CarryError> {
        Ok(self.runtime.block_on(self.store.list(&place.disks))?.into_iter().collect())
    }

    /// True when all objects of a chain are there, as far as names and sizes tell.
    pub(super) fn is_there(
        &self,
        entry: &DiskEntry,
        place: &MachinePlace,
        objects: &Objects,
    ) -> Result<bool, CarryError> {
        for (name, file) in entry.files(place) {
            let Some(parts) = self.parts(&name, file, objects)? else { return Ok(false) };
            if !parts.iter().all(|(part, bytes)| objects.get(part) == Some(bytes)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The parts that a file has; `None`: its index is not there, or no good. The index is read only where other objects than its parts
    /// lie beside them, or some are missing.
    fn parts(
        &self,
        name: &FileName,
        file: &FileEntry,
        objects: &Objects,
    ) -> Result<Option<Objects>, CarryError> {
        let index = objects.get(&name.index(&file.index_sum)).copied();
        if index.is_none() || index != Index::encoded_bytes(file.length_bytes) {
            return Ok(None);
        }
        let listed: Objects =
            name.parts_in(objects).map(|(part, bytes)| (part.clone(), *bytes)).collect();
        if listed.values().sum::<u64>() == file.stored_bytes {
            return Ok(Some(listed));
        }
        match self.runtime.block_on(fetch_index(&self.store, name, file)) {
            Ok(index) => {
                let part = |number| {
                    Some((name.part(number, index.sum(number)?), index.part_bytes(number)))
                };
                Ok(Some((0..index.part_count()).filter_map(part).collect()))
            }
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the manifests of the oldest runs, so that of each disk the newest `keep` stay. Returns how many went.
    pub(super) fn thin(&self, known: &mut Vec<There>) -> Result<usize, CarryError> {
        known.sort_by_key(|there| there.manifest.committed_ms);
        let keep = self.rule.keep as usize;
        let mut kept: BTreeMap<DiskId, BTreeSet<BackupId>> = BTreeMap::new();
        let stays = |there: &There| {
            let run = there.manifest.run;
            let mut of_disk = |disk: &DiskId| {
                let kept = kept.entry(disk.clone()).or_default();
                kept.contains(&run) || kept.len() < keep && kept.insert(run)
            };
            // Each of its disks is counted.
            let disks = there.manifest.disks.iter();
            disks.filter(|entry| of_disk(&entry.disk)).count() > 0
        };
        let (stay, go): (Vec<_>, Vec<_>) = known.drain(..).rev().partition(stays);
        known.extend(stay.into_iter().rev());
        for there in &go {
            self.runtime.block_on(self.store.delete(&there.object))?;
        }
        Ok(go.len())
    }

    /// Removes the objects of a machine's disks that none of its runs needs.
    pub(super) fn clean(
        &self,
        place: &MachinePlace,
        objects: &Objects,
        known: &[There],
    ) -> Result<(), CarryError> {
        let entries = known.iter().flat_map(|there| &there.manifest.disks);
        // Most are in many chains.
        let files: BTreeMap<Path, (FileName, &FileEntry)> = entries
            .flat_map(|entry| entry.files(place))
            .map(|(name, file)| (name.index(&file.index_sum), (name, file)))
            .collect();
        let mut needed = BTreeSet::new();
        for (index, (name, file)) in files {
            match self.parts(&name, file, objects)? {
                Some(parts) => needed.extend(parts.into_keys()),
                // Which they are isn't known.
                None => needed.extend(name.parts_in(objects).map(|(part, _)| part.clone())),
            }
            needed.insert(index);
        }
        let is_ours = |object: &&Path| place.owner(object).is_some();
        for object in objects.keys().filter(|object| !needed.contains(*object)).filter(is_ours) {
            self.runtime.block_on(self.store.delete(object))?;
        }
        Ok(())
    }

    /// Removes a run of a machine, damaged or not, and what only it needed. Returns how many manifests went.
    ///
    /// # Errors
    /// When the store can't be asked.
    pub fn remove(&self, machine: &MachineKey, run: BackupId) -> Result<usize, CarryError> {
        let place = MachinePlace::new(self.store.prefix(), &self.own, machine);
        let (mut stay, mut damaged, mut gone) = (Vec::new(), 0, 0);
        for listed in self.runs(&self.own, machine)? {
            if place.is_of(&listed.object, run) {
                self.runtime.block_on(self.store.delete(&listed.object))?;
                gone += 1;
                continue;
            }
            match listed.manifest {
                Ok(manifest) => stay.push(There { object: listed.object, manifest }),
                Err(ArchiveError::Newer { .. } | ArchiveError::Damaged { .. }) => damaged += 1,
                Err(error) => return Err(error.into()),
            }
        }
        // What a manifest that can't be read needs isn't known.
        if gone > 0 && damaged == 0 {
            self.clean(&place, &self.objects(&place)?, &stay)?;
        }
        Ok(gone)
    }
}
