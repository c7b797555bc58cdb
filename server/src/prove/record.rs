//! What was proven of a machine, and when.
//!
//! `<machine>/.proofs.json` keeps it, old or new after a crash. Losing the file costs knowledge alone: the machine counts as
//! never proven. What was proven of a store's original says nothing of its copy, so it counts for one store generation.

use std::{collections::BTreeSet, path::Path};

use janus_proto::ids::{BackupId, DiskId, MachineKey, SnapshotId, StoreGeneration};
use serde::{Deserialize, Serialize};

use crate::{
    chain::{
        FORMAT,
        store::{StoreError, read_or_put_aside, write},
    },
    storage::Disk,
};

const FILE: &str = ".proofs.json";
/// Proofs that are kept.
const MOST: usize = 64;
/// Bytes of a record, about: of older proofs less is kept where there are more. The store reads files of up to 4 MiB.
const MOST_BYTES: usize = 1 << 20;
/// What is said of one disk; more is counted.
const MOST_SAID: usize = 20;
/// Bytes of one line: paths of a volume may be much longer.
const LONGEST: usize = 1000;

/// What was found out of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The run.
    pub backup: BackupId,
    /// Unix milliseconds of its commit.
    pub committed_ms: i64,
    /// Unix milliseconds at which the proof began and ended.
    pub began_ms: i64,
    /// See there.
    pub ended_ms: i64,
    /// All disks of the run were read.
    pub is_whole: bool,
    /// What was found out of each.
    pub disks: Vec<DiskProof>,
    /// Whether the machine was started.
    pub boot: Boot,
}

/// What was found out of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskProof {
    /// Which.
    pub disk: DiskId,
    /// Its snapshot.
    pub snapshot: SnapshotId,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Of them not zeros: these were read and compared.
    pub read_bytes: u64,
    /// Blocks that are not what was backed up.
    pub lost_blocks: u64,
    /// Its volumes.
    pub volumes: Vec<VolumeProof>,
    /// What speaks against a restore.
    pub failures: Said,
    /// What an administrator should know beside that.
    pub warnings: Said,
}

/// What was found out of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeProof {
    /// How messages name it.
    pub name: String,
    /// Its file system; empty: none that is known.
    pub file_system: String,
    /// Folders that were listed.
    pub folders: u64,
    /// Names of files in them.
    pub files: u64,
    /// Bytes of these files, as their folders have it.
    pub file_bytes: u64,
    /// Files that were read to their end, and what was read of files.
    pub files_read: u64,
    /// See there.
    pub read_bytes: u64,
    /// Why it was not read, or not all of its names were; empty: they were.
    pub not_read: String,
}

/// Lines for people, a few of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// The first ones.
    pub lines: Vec<String>,
    /// How many others there were.
    pub more: u64,
}

impl Said {
    /// One more.
    pub fn say(&mut self, line: impl Into<String>) {
        if self.lines.len() == MOST_SAID {
            self.more += 1;
            return;
        }
        let mut line: String = line.into();
        if line.len() > LONGEST {
            let end = (0..=LONGEST).rev().find(|at| line.is_char_boundary(*at));
            line.truncate(end.unwrap_or(0));
            line.push('…');
        }
        self.lines.push(line);
    }

    /// True when nothing was said.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.lines.len() as u64 + self.more
    }

    /// All lines, with one that counts the rest.
    pub fn all(&self) -> impl Iterator<Item = String> + '_ {
        let more = (self.more > 0).then(|| format!("and {} more", self.more));
        self.lines.iter().cloned().chain(more)
    }
}

/// Whether a machine was started from its backup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Boot {
    /// That was not wanted.
    #[default]
    NotWanted,
    /// It said what was waited for.
    Booted {
        /// After so long.
        milliseconds: u64,
    },
    /// It did not.
    Failed {
        /// What it did.
        why: String,
    },
    /// It could not be tried.
    NotTried {
        /// Why.
        why: String,
    },
}

impl Proof {
    /// The first thing that speaks against a restore.
    pub fn failure(&self) -> Option<&str> {
        let of_disks = self.disks.iter().find_map(|disk| disk.failures.lines.first());
        of_disks.map(String::as_str).or(match &self.boot {
            Boot::Failed { why } => Some(why),
            _ => None,
        })
    }

    /// Only what decides how its machine stands stays.
    fn forget_details(&mut self) {
        for disk in &mut self.disks {
            disk.volumes.clear();
            for said in [&mut disk.failures, &mut disk.warnings] {
                said.more += said.lines.len().saturating_sub(1) as u64;
                said.lines.truncate(1);
            }
        }
    }

    /// How many warnings there were.
    pub fn warnings(&self) -> u64 {
        let of_disks: u64 = self.disks.iter().map(|disk| disk.warnings.count()).sum();
        of_disks + u64::from(matches!(self.boot, Boot::NotTried { .. }))
    }
}

/// How a machine stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Unix milliseconds at which the newest proof of a whole run that went well began; 0: there was none.
    pub proven_ms: i64,
    /// When that run was committed.
    pub proven_backup_ms: i64,
    /// When the newest proof of all began; 0: there was none.
    pub tried_ms: i64,
    /// Why a restore would fail, as far as the newest proofs know; empty: it would not.
    pub failure: String,
    /// Warnings of the newest proof.
    pub warnings: u64,
}

/// The proofs of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proofs(Vec<Proof>);

#[derive(Serialize, Deserialize)]
struct ProofFile {
    format: u32,
    machine: MachineKey,
    generation: StoreGeneration,
    proofs: Vec<Proof>,
}

impl Proofs {
    /// Reads what was proven of the machine whose folder this is.
    ///
    /// # Errors
    /// When a newer program wrote it. Anything else that is wrong costs what was known.
    pub fn load(
        storage: &Disk,
        folder: &Path,
        machine: &MachineKey,
        generation: StoreGeneration,
    ) -> Result<Self, StoreError> {
        match read_or_put_aside::<ProofFile>(storage, &folder.join(FILE)) {
            Ok(file) => {
                let is_own =
                    |file: &ProofFile| file.machine == *machine && file.generation == generation;
                Ok(file.filter(is_own).map(|file| Self(file.proofs)).unwrap_or_default())
            }
            Err(error @ StoreError::Newer { .. }) => Err(error),
            Err(error) => {
                tracing::error!(%error, %machine, "what was proven is lost: the machine counts as never proven");
                Ok(Self::default())
            }
        }
    }

    /// Keeps them.
    ///
    /// # Errors
    /// As the file system says.
    pub fn save(
        &self,
        storage: &Disk,
        folder: &Path,
        machine: &MachineKey,
        generation: StoreGeneration,
    ) -> Result<(), StoreError> {
        let (machine, proofs) = (machine.clone(), self.0.clone());
        write(
            storage,
            &folder.join(FILE),
            &ProofFile { format: FORMAT, machine, generation, proofs },
        )
    }

    /// One more. The newest ones stay, and the newest of a whole run that went well.
    pub fn add(&mut self, proof: Proof) {
        self.0.push(proof);
        while self.0.len() > MOST {
            let last_good = self.0.iter().rposition(is_good);
            self.0.remove(usize::from(last_good == Some(0)));
        }
        for place in 0..self.0.len() {
            if self.bytes() <= MOST_BYTES {
                break;
            }
            self.0[place].forget_details();
        }
    }

    fn bytes(&self) -> usize {
        serde_json::to_vec(&self.0).map_or(usize::MAX, |bytes| bytes.len())
    }

    /// All, the newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = &Proof> {
        self.0.iter().rev()
    }

    /// When a run was tried last; 0: never.
    pub fn tried_ms(&self, backup: BackupId) -> i64 {
        self.newest_first().find(|proof| proof.backup == backup).map_or(0, |proof| proof.began_ms)
    }

    /// Since when a snapshot is proven; 0: it isn't, or its newest proof failed.
    pub fn proven_ms(&self, snapshot: SnapshotId) -> i64 {
        let of = |proof: &Proof| {
            let disk = proof.disks.iter().find(|disk| disk.snapshot == snapshot)?;
            Some(if disk.failures.is_empty() { proof.began_ms } else { 0 })
        };
        self.newest_first().find_map(of).unwrap_or(0)
    }

    /// How the machine stands.
    pub fn standing(&self) -> Standing {
        let good = self.newest_first().find(|proof| is_good(proof));
        let newest = self.newest_first().next();
        Standing {
            proven_ms: good.map_or(0, |proof| proof.began_ms),
            proven_backup_ms: good.map_or(0, |proof| proof.committed_ms),
            tried_ms: newest.map_or(0, |proof| proof.began_ms),
            failure: self.failure().unwrap_or_default(),
            warnings: newest.map_or(0, Proof::warnings),
        }
    }

    /// A proof of one disk takes nothing back that is known of the others.
    fn failure(&self) -> Option<String> {
        let mut seen: BTreeSet<&DiskId> = BTreeSet::new();
        for proof in self.newest_first() {
            for disk in &proof.disks {
                if seen.insert(&disk.disk) && !disk.failures.is_empty() {
                    return disk.failures.lines.first().cloned();
                }
            }
            if proof.is_whole {
                return match &proof.boot {
                    Boot::Failed { why } => Some(why.clone()),
                    _ => None,
                };
            }
        }
        None
    }
}

fn is_good(proof: &Proof) -> bool {
    proof.is_whole && proof.failure().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(began_ms: i64, disks: &[(&str, bool)], is_whole: bool) -> Proof {
        let disks = disks.iter().map(|(name, is_good)| {
            let mut failures = Said::default();
            if !is_good {
                failures.say(format!("{name} at {began_ms}"));
            }
            DiskProof {
                disk: name.parse().unwrap(),
                snapshot: SnapshotId::new(),
                size_bytes: 4096,
                read_bytes: 0,
                lost_blocks: 0,
                volumes: Vec::new(),
                failures,
                warnings: Said::default(),
            }
        });
        Proof {
            backup: BackupId::new(),
            committed_ms: began_ms - 1,
            began_ms,
            ended_ms: began_ms,
            is_whole,
            disks: disks.collect(),
            boot: Boot::NotWanted,
        }
    }

    fn standing(proofs: &[Proof]) -> Standing {
        let mut all = Proofs::default();
        proofs.iter().cloned().for_each(|proof| all.add(proof));
        all.standing()
    }

    #[test]
    fn a_machine_is_proven_by_a_whole_run_and_failed_by_any_disk() {
        assert_eq!(standing(&[]), Standing::default());
        let good = proof(10, &[("a", true), ("b", true)], true);
        let stands = standing(std::slice::from_ref(&good));
        assert_eq!((stands.proven_ms, stands.proven_backup_ms, &*stands.failure), (10, 9, ""));
        let stands = standing(&[good.clone(), proof(20, &[("a", true)], false)]);
        assert_eq!((stands.proven_ms, stands.tried_ms), (10, 20), "one disk is not the machine");
        let bad = proof(20, &[("a", false)], false);
        let other = proof(30, &[("b", true)], false);
        let stands = standing(&[good.clone(), bad.clone(), other.clone()]);
        assert_eq!((stands.proven_ms, &*stands.failure), (10, "a at 20"));
        let healed = proof(40, &[("a", true), ("b", true)], true);
        assert_eq!(standing(&[good.clone(), bad, other, healed]).failure, "");
        let boot = Boot::Failed { why: "silence".into() };
        let stands = standing(&[good.clone(), Proof { boot, ..proof(50, &[("a", true)], true) }]);
        assert_eq!((stands.proven_ms, &*stands.failure), (10, "silence"));
    }

    #[test]
    fn the_last_good_proof_is_never_pushed_out() {
        let mut all = Proofs::default();
        all.add(proof(1, &[("a", true)], true));
        (2..200).for_each(|at| all.add(proof(at, &[("a", false)], true)));
        assert_eq!((all.0.len(), all.standing().proven_ms), (MOST, 1));
        assert_eq!(all.0[1].began_ms, 200 - MOST as i64 + 1);
    }

    #[test]
    fn a_record_stays_short_however_much_is_said() {
        let mut all = Proofs::default();
        for at in 1..=80 {
            let mut long = proof(at, &[("a", false), ("b", false), ("c", true)], true);
            for disk in &mut long.disks {
                (0..100).for_each(|_| disk.failures.say("ü".repeat(5000)));
                disk.volumes = vec![VolumeProof::default(); 128];
            }
            all.add(long);
            assert!(all.bytes() <= MOST_BYTES);
        }
        let newest = all.newest_first().next().unwrap();
        let failures = &newest.disks[0].failures;
        assert_eq!((failures.lines.len(), failures.count()), (MOST_SAID, 101));
        assert_eq!((newest.disks[0].volumes.len(), all.0[0].disks[0].failures.count()), (128, 101));
        assert_eq!(all.standing().failure, "a at 80");
    }

    #[test]
    fn a_damaged_or_foreign_record_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, machine) = (Disk::default(), "alice/laptop".parse().unwrap());
        let (own, other) = (StoreGeneration::new(), StoreGeneration::new());
        let mut proofs = Proofs::default();
        proofs.add(proof(10, &[("a", true)], true));
        proofs.save(&storage, folder.path(), &machine, own).unwrap();
        let load =
            |generation| Proofs::load(&storage, folder.path(), &machine, generation).unwrap();
        assert_eq!(load(own), proofs);
        assert_eq!(load(other), Proofs::default(), "of a copy");
        let file = folder.path().join(FILE);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(load(own), Proofs::default());
        assert!(!file.exists(), "it is put aside");
    }
}
