//! File systems of a disk, opened and read: the readers are those of `janus-client ls` and `cp`, in a process of their own.
//!
//! What a reader finds wrong while all hashes are right was wrong when it was backed up: that is a warning, since a restore
//! gives back what was there. Files that lost blocks belong to are failures.

use std::{collections::HashSet, sync::Arc};

use janus_client::{
    browse::{
        BrowseError, Entry, Kind, PlaceError, Volume, place, shown,
        volume::{Bounds, Window},
    },
    source::medium::Medium,
    volume::{self, VolumeError},
};
use janus_proto::{chance, pb::Consistency};
use tokio_util::sync::CancellationToken;

use super::{
    ProveError,
    record::{DiskProof, VolumeProof},
};

/// Names that are looked at in one volume.
const MOST_NAMES: u64 = 2_000_000;
/// Folders in folders, as the longest paths have.
const LONGEST_PATH: usize = 4096;

/// How a disk is looked into.
pub struct Look<'a> {
    /// Its bytes.
    pub medium: Arc<dyn Medium>,
    /// How it was held still when it was backed up.
    pub consistency: Consistency,
    /// Content of files that is read of each volume.
    pub most_bytes: u64,
    /// Ends it.
    pub stop: &'a CancellationToken,
    /// Hears how far it is.
    pub tell: &'a dyn Fn(&VolumeProof),
}

impl Look<'_> {
    /// Opens all volumes and reads their files, and says in `proof` what came of it.
    ///
    /// # Errors
    /// `Stopped`.
    pub fn through(&self, proof: &mut DiskProof) -> Result<(), ProveError> {
        let layout = match place::layout(&self.medium) {
            Ok(layout) => layout,
            Err(error) => {
                self.check()?;
                match error {
                    PlaceError::Layout(VolumeError::Io(error)) => {
                        proof.failures.say(format!("its partitions can't be read: {error}"));
                    }
                    error => proof.warnings.say(format!("{error}; {}", self.blame())),
                }
                return Ok(());
            }
        };
        for volume in &layout.volumes {
            let looked = self.volume(volume, proof)?;
            proof.volumes.push(looked);
        }
        Ok(())
    }

    fn volume(
        &self,
        of: &volume::Volume,
        proof: &mut DiskProof,
    ) -> Result<VolumeProof, ProveError> {
        let file_system = of.file_system.map(|kind| kind.to_string()).unwrap_or_default();
        let mut looked = VolumeProof { name: of.name(), file_system, ..VolumeProof::default() };
        let Some(kind) = of.file_system else {
            looked.not_read = "nothing that is known here".into();
            return Ok(looked);
        };
        let window = Window { medium: self.medium.clone(), range: of.range() };
        // This program, also when its file has been replaced by a newer one.
        let program = "/proc/self/exe".into();
        match Volume::open(program, window, kind, Bounds::default(), self.stop.clone()) {
            Ok(volume) => {
                let budget = self.most_bytes;
                Walk { look: self, volume, looked: &mut looked, proof, budget }.run()?;
            }
            Err(BrowseError::Unsupported { .. }) => {
                looked.not_read = "not a file system that can be looked into".into();
            }
            Err(error) => {
                self.check()?;
                looked.not_read = "it can't be opened".into();
                self.say(&looked, b"", &error, proof);
            }
        }
        Ok(looked)
    }

    /// Says what is wrong with something of a volume.
    fn say(&self, of: &VolumeProof, path: &[u8], error: &BrowseError, proof: &mut DiskProof) {
        let place = format!("{} ({})", of.name, of.file_system);
        let place = if path.is_empty() { place } else { format!("{place} {}", shown(path)) };
        match error {
            BrowseError::Read { what } => {
                proof.failures.say(format!("{place} can't be read: {what}"));
            }
            BrowseError::Start { .. } => proof.warnings.say(format!("{place}: {error}")),
            error => proof.warnings.say(format!("{place}: {error}; {}", self.blame())),
        }
    }

    /// Where it went wrong, when the hashes are right.
    fn blame(&self) -> &'static str {
        match self.consistency {
            Consistency::Smeared => {
                "its disk was written to while it was backed up (smeared), which a freeze or a snapshot of it avoids"
            }
            _ => "it was so when it was backed up, check it at its source",
        }
    }

    fn check(&self) -> Result<(), ProveError> {
        if self.stop.is_cancelled() { Err(ProveError::Stopped) } else { Ok(()) }
    }
}

/// A walk through all folders, in an order that chance makes: which files are read while there is room for them is another
/// each time.
struct Walk<'a, 'l> {
    look: &'a Look<'l>,
    volume: Volume,
    looked: &'a mut VolumeProof,
    proof: &'a mut DiskProof,
    /// Bytes that may still be read.
    budget: u64,
}

impl Walk<'_, '_> {
    fn run(mut self) -> Result<(), ProveError> {
        let mut folders: Vec<Vec<u8>> = vec![b"/".to_vec()];
        // Folders that contain themselves would have no end.
        let mut seen: HashSet<(u64, u64)> = HashSet::new();
        while let Some(folder) = take_one(&mut folders) {
            self.look.check()?;
            let mut entries = match self.volume.list(&folder) {
                Ok(entries) => entries,
                Err(error) => {
                    self.failed(&folder, &error)?;
                    continue;
                }
            };
            self.looked.folders += 1;
            while let Some(entry) = take_one(&mut entries) {
                if self.looked.files + self.looked.folders >= MOST_NAMES {
                    self.looked.not_read = format!(
                        "it has more than {MOST_NAMES} names, of which these were looked at"
                    );
                    return Ok(());
                }
                let path = joined(&folder, &entry.name);
                if !entry.problem.is_empty() {
                    let what = entry.problem.clone();
                    self.failed(&path, &BrowseError::Damaged { what })?;
                }
                match entry.kind() {
                    Kind::Folder
                        if path.len() <= LONGEST_PATH
                            && entry.id().is_none_or(|id| seen.insert(id)) =>
                    {
                        folders.push(path);
                    }
                    Kind::File => self.file(&path, &entry)?,
                    _ => {}
                }
            }
            (self.look.tell)(self.looked);
        }
        Ok(())
    }

    fn file(&mut self, path: &[u8], entry: &Entry) -> Result<(), ProveError> {
        self.looked.files += 1;
        self.looked.file_bytes = self.looked.file_bytes.saturating_add(entry.size_bytes);
        let end = entry.size_bytes.min(self.budget);
        if end == 0 && entry.size_bytes > 0 {
            return Ok(());
        }
        match self.volume.read(path, "", 0..end, &mut |_| Ok(())) {
            Ok(reached) => {
                self.budget -= reached.min(self.budget);
                self.looked.read_bytes += reached;
                if reached == entry.size_bytes {
                    self.looked.files_read += 1;
                } else if reached < end {
                    let what = format!("it ends at byte {reached} of {}", entry.size_bytes);
                    self.failed(path, &BrowseError::Damaged { what })?;
                }
                (self.look.tell)(self.looked);
                Ok(())
            }
            Err(error) => self.failed(path, &error),
        }
    }

    fn failed(&mut self, path: &[u8], error: &BrowseError) -> Result<(), ProveError> {
        self.look.check()?;
        match error {
            // Encrypted files of Windows and the like: nobody reads them without their key.
            BrowseError::Unsupported { what } if self.looked.not_read.is_empty() => {
                self.looked.not_read = format!("not all of its files: {what}");
            }
            BrowseError::Unsupported { .. } => {}
            error => self.look.say(self.looked, path, error, self.proof),
        }
        Ok(())
    }
}

fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = folder.to_vec();
    if !path.ends_with(b"/") {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Takes one of them by chance.
fn take_one<T>(of: &mut Vec<T>) -> Option<T> {
    (!of.is_empty()).then(|| of.swap_remove(below(of.len())))
}

/// A number below `end`, each as likely.
pub(super) fn below(end: usize) -> usize {
    (chance::between(0.0..end as f64) as usize).min(end.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use std::io;

    use janus_client::source::medium::Stretch;
    use janus_proto::ids::SnapshotId;

    use super::*;
    use crate::prove::record::Said;

    #[derive(Debug)]
    struct Unreadable;

    impl Medium for Unreadable {
        fn size_bytes(&self) -> u64 {
            1 << 20
        }

        fn sector_bytes(&self) -> u32 {
            512
        }

        fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Err(io::Error::other("block 0 is lost"))
        }

        fn stretch(&self, _: u64) -> Stretch {
            Stretch { end: 1 << 20, hole: false }
        }
    }

    fn with(consistency: Consistency, look: impl FnOnce(&Look<'_>, &mut DiskProof)) -> DiskProof {
        let mut proof = DiskProof {
            disk: "sda".parse().unwrap(),
            snapshot: SnapshotId::new(),
            size_bytes: 1 << 20,
            read_bytes: 0,
            lost_blocks: 0,
            volumes: Vec::new(),
            failures: Said::default(),
            warnings: Said::default(),
        };
        let stop = CancellationToken::new();
        let medium = Arc::new(Unreadable);
        look(&Look { medium, consistency, most_bytes: 0, stop: &stop, tell: &|_| {} }, &mut proof);
        proof
    }

    #[test]
    fn damage_of_a_file_system_is_a_warning_that_says_when_its_disk_was_smeared() {
        let volume = VolumeProof {
            name: "volume 1".into(),
            file_system: "ext4".into(),
            ..VolumeProof::default()
        };
        let damaged = BrowseError::Damaged { what: "no such inode".into() };
        let said = |consistency| {
            with(consistency, |look, proof| look.say(&volume, b"/etc", &damaged, proof))
        };
        let smeared = said(Consistency::Smeared);
        assert!(smeared.failures.is_empty());
        let line = &smeared.warnings.lines[0];
        assert!(line.contains("volume 1 (ext4) /etc") && line.contains("smeared"), "{line}");
        let line = said(Consistency::Crash).warnings.lines[0].clone();
        assert!(line.contains("when it was backed up") && !line.contains("smeared"), "{line}");
    }

    #[test]
    fn what_lost_blocks_hit_is_a_failure() {
        let proof = with(Consistency::Smeared, |look, proof| look.through(proof).unwrap());
        assert!(proof.warnings.is_empty());
        assert!(proof.failures.lines[0].contains("block 0 is lost"), "{:?}", proof.failures);
    }

    #[test]
    fn things_are_taken_by_chance_and_all_of_them() {
        let mut all: Vec<u32> = (0..100).collect();
        let mut taken = Vec::new();
        while let Some(one) = take_one(&mut all) {
            taken.push(one);
        }
        assert_ne!(taken, (0..100).collect::<Vec<_>>());
        taken.sort_unstable();
        assert_eq!(taken, (0..100).collect::<Vec<_>>());
    }
}
