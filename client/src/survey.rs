//! What a disk's volumes say about reading it: which are left out, what is free, what has changed.

use std::collections::BTreeSet;

use janus_proto::{ids::DiskId, pb::Consistency};

use crate::{
    cache::DiskCache,
    fs::{self, FileSystemKind},
    journal::{memory::Memory, ntfs_usn::NtfsUsn},
    reading::{Journalled, Known, Planned, Policy, Reading, Surveyed, WHOLE_DISK, Zeros},
    seal::DiskSeal,
    source::{Source, view::View},
    volume::{self, Volume},
};
use janus_proto::ranges::Ranges;

/// What the user leaves out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Free space of file systems that tell.
    pub skip_free: bool,
    /// Volumes, by disk and number.
    pub skip_volumes: Vec<(DiskId, u32)>,
}

/// A choice that can't be followed.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// Volumes are to be left out, and where they are can't be told.
    #[error("skip_volumes: the volumes of disk {disk} can't be told: {what}")]
    Unknown {
        /// The disk.
        disk: DiskId,
        /// Why.
        what: String,
    },
    /// There is no such volume.
    #[error("skip_volumes: disk {disk} has no volume {number}; it has {known}")]
    NoVolume {
        /// The disk.
        disk: DiskId,
        /// As asked for.
        number: u32,
        /// Those that it has.
        known: String,
    },
}

impl Choice {
    /// Plans what to read of a disk, which is sealed by `seal`.
    ///
    /// # Errors
    /// When a volume to be left out doesn't exist.
    pub fn plan(
        &self,
        source: &Source,
        cache: Option<&DiskCache>,
        policy: Policy,
        seal: Option<&DiskSeal>,
    ) -> Result<Planned, SurveyError> {
        let disk = View::new(source, 0, source.size_bytes());
        let volumes = match volume::layout(&disk, source.sector_bytes()) {
            Ok(layout) => layout.volumes,
            Err(error) if self.numbers(source.disk_id()).is_empty() => {
                tracing::warn!(disk = %source.disk_id(), %error, "the disk is read as one piece");
                Vec::new()
            }
            Err(error) => {
                let what = error.to_string();
                return Err(SurveyError::Unknown { disk: source.disk_id().clone(), what });
            }
        };
        let left_out = self.left_out(source.disk_id(), &volumes)?;
        let views: Vec<_> =
            volumes.iter().map(|one| View::new(source, one.start, one.len)).collect();
        // Asked for free space, for changes, or for nothing: then it reads nothing.
        let usns: Vec<_> = views.iter().map(|view| NtfsUsn::new(view)).collect();
        let (mut zeros, mut surveyed) = (Ranges::new(), Vec::with_capacity(volumes.len()));
        for (volume, (view, usn)) in volumes.iter().zip(views.iter().zip(&usns)) {
            let (of_it, why) = match left_out.contains(&volume.number) {
                true => (volume.range().into(), Zeros::All),
                false => self.free(source, volume, view, usn),
            };
            zeros = zeros.union(&of_it);
            surveyed.push(Surveyed { volume: volume.clone(), zeros: why });
        }
        // What changes while it is read has no state that a journal could speak of.
        let is_still = source.consistency() != Consistency::Smeared;
        let journalled = |(volume, _): &(&Volume, &NtfsUsn<'_>)| {
            is_still
                && volume.file_system == Some(FileSystemKind::Ntfs)
                && !left_out.contains(&volume.number)
        };
        let journals = match source.journal() {
            // It speaks for all of the disk, and exactly.
            Some(journal) if is_still => {
                let (len, name) = (source.size_bytes(), WHOLE_DISK.into());
                vec![Journalled { start: 0, len, name, journal }]
            }
            _ => volumes
                .iter()
                .zip(&usns)
                .filter(journalled)
                .map(|(volume, usn)| Journalled {
                    start: volume.start,
                    len: volume.len,
                    name: volume.name(),
                    journal: Box::new(usn),
                })
                .collect(),
        };
        let known = Known {
            disk: source.disk_id().as_str(),
            memory: cache.and_then(|cache| Memory::parse(&cache.cursor())),
            resized: cache.and_then(DiskCache::resized_from).map(|old| (old, source.size_bytes())),
            kind: seal.map_or("", DiskSeal::kind),
            zeros,
            volumes: surveyed,
            now: time::OffsetDateTime::now_utc().unix_timestamp(),
        };
        let since = cache.and_then(DiskCache::cursor_digest);
        Ok(Planned::new(Reading::plan(known, &journals, policy), since))
    }

    fn numbers(&self, disk: &DiskId) -> BTreeSet<u32> {
        let of_it = self.skip_volumes.iter().filter(|(other, _)| other == disk);
        of_it.map(|(_, number)| *number).collect()
    }

    fn left_out(&self, disk: &DiskId, volumes: &[Volume]) -> Result<BTreeSet<u32>, SurveyError> {
        let numbers = self.numbers(disk);
        let is_missing = |number: &&u32| volumes.iter().all(|volume| volume.number != **number);
        match numbers.iter().find(is_missing) {
            None => Ok(numbers),
            Some(number) => {
                let known: Vec<_> = volumes.iter().map(|one| one.number.to_string()).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                Err(SurveyError::NoVolume { disk: disk.clone(), number: *number, known })
            }
        }
    }

    /// Free space of a volume, on the disk.
    fn free(
        &self,
        source: &Source,
        volume: &Volume,
        view: &View<'_>,
        usn: &NtfsUsn<'_>,
    ) -> (Ranges, Zeros) {
        if !self.skip_free || source.consistency() == Consistency::Smeared {
            return (Ranges::new(), Zeros::Nothing);
        }
        let free = match volume.file_system {
            Some(FileSystemKind::Ntfs) => usn.free().map(Some).map_err(ToString::to_string),
            Some(kind) => fs::free(kind, view).map_err(|error| error.to_string()),
            None => Ok(None),
        };
        match free {
            Ok(Some(free)) => {
                let free = Ranges::from(0..volume.len).intersect(&free);
                let bytes = free.total();
                (free.shift(volume.start), Zeros::Free(bytes))
            }
            Ok(None) => (Ranges::new(), Zeros::Nothing),
            Err(error) => {
                tracing::warn!(disk = %source.disk_id(), volume = volume.number, %error, "free space is backed up, too");
                (Ranges::new(), Zeros::Unknown(error))
            }
        }
    }
}
