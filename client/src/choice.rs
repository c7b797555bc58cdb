//! Which parts of a disk travel: all of it, or chosen volumes, without or with the free space in them.
//!
//! The partition table and everything between volumes always travel, so that an image boots. What is left out counts as zeros.
//! Free space is left out only where it is proven: any doubt is a warning, and the whole volume travels.

use std::str::FromStr;

use janus_proto::ids::DiskId;

use crate::{
    fs::{self, FileSystemKind},
    ranges::Ranges,
    source::view::ReadAt,
    volume::{self, Volume, VolumeError, Window},
};

/// A volume as the settings name it: `DISK/NUMBER`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Id of its disk.
    pub disk: DiskId,
    /// Its number in the partition table.
    pub number: u32,
}

impl FromStr for VolumeSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (disk, number) = text.rsplit_once('/')?;
            let number = number.parse().ok().filter(|number| *number > 0)?;
            Some(Self { disk: disk.parse().ok()?, number })
        };
        parse().ok_or_else(|| format!("{text:?} is not DISK/NUMBER, such as system/1"))
    }
}

/// Why a choice can't be kept to.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// Its disk's volumes can't be told.
    #[error("disk {disk}: volumes are chosen, but {source}")]
    Layout {
        /// The disk.
        disk: String,
        /// Why.
        source: VolumeError,
    },
    /// It is not there.
    #[error("disk {disk} has no volume {number}; it has: {there}")]
    Missing {
        /// The disk.
        disk: String,
        /// The number.
        number: u32,
        /// Those that are there.
        there: String,
    },
    /// No disk has this id.
    #[error("volumes: {disk}/{number} is of no disk of this backup")]
    Nowhere {
        /// The disk.
        disk: String,
        /// The number.
        number: u32,
    },
}

/// What travels, of all disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Of the disks that are named here only these volumes; of others all.
    pub volumes: Vec<VolumeSpec>,
    /// Free space counts as zeros.
    pub skip_free: bool,
}

/// What of a disk counts as zeros.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The bytes.
    pub zeros: Ranges,
    /// Volumes that were not chosen.
    pub volumes: Vec<String>,
    /// Volumes whose free space travels all the same, and why.
    pub warnings: Vec<String>,
}

impl Choice {
    /// Refuses volumes of disks that are not there.
    ///
    /// # Errors
    /// Names the first of them.
    pub fn check<'a>(
        &self,
        disks: impl Iterator<Item = &'a DiskId> + Clone,
    ) -> Result<(), ChoiceError> {
        let is_nowhere = |spec: &&VolumeSpec| !disks.clone().any(|disk| *disk == spec.disk);
        match self.volumes.iter().find(is_nowhere) {
            None => Ok(()),
            Some(VolumeSpec { disk, number }) => {
                Err(ChoiceError::Nowhere { disk: disk.to_string(), number: *number })
            }
        }
    }

    /// What of `disk` counts as zeros. `is_still`: nobody writes to it while it is read; else no free space is believed,
    /// since it may be used by the time it would have been read.
    ///
    /// # Errors
    /// When volumes are chosen that can't be found.
    pub fn left_out(
        &self,
        id: &DiskId,
        disk: &dyn ReadAt,
        sector_bytes: u32,
        is_still: bool,
    ) -> Result<LeftOut, ChoiceError> {
        let chosen: Vec<_> =
            self.volumes.iter().filter(|spec| spec.disk == *id).map(|spec| spec.number).collect();
        let mut left_out = LeftOut::default();
        if chosen.is_empty() && !self.skip_free {
            return Ok(left_out);
        }
        let layout = match volume::layout(disk, sector_bytes) {
            Ok(layout) => layout,
            Err(source) if !chosen.is_empty() => {
                return Err(ChoiceError::Layout { disk: id.to_string(), source });
            }
            Err(error) => {
                left_out.warnings.push(format!("free space is not skipped: {error}"));
                return Ok(left_out);
            }
        };
        refuse_missing(id, &chosen, &layout.volumes)?;
        let mut parts = Vec::new();
        for volume in &layout.volumes {
            if !chosen.is_empty() && !chosen.contains(&volume.number) {
                parts.push(Ranges::from(volume.range()));
                left_out.volumes.push(volume.name());
            } else if self.skip_free && has_free_space(volume) {
                match free_space(disk, volume, is_still) {
                    Ok(free) => parts.push(free.shift(volume.start)),
                    Err(reason) => left_out
                        .warnings
                        .push(format!("{}: free space is not skipped: {reason}", volume.name())),
                }
            }
        }
        let mut zeros: Vec<_> = parts.iter().flat_map(Ranges::iter).collect();
        zeros.sort_unstable_by_key(|range| range.start);
        left_out.zeros = zeros.into_iter().collect();
        Ok(left_out)
    }
}

fn refuse_missing(id: &DiskId, chosen: &[u32], volumes: &[Volume]) -> Result<(), ChoiceError> {
    let numbers: Vec<_> = volumes.iter().map(|volume| volume.number).collect();
    match chosen.iter().find(|number| !numbers.contains(number)) {
        None => Ok(()),
        Some(number) => Err(ChoiceError::Missing {
            disk: id.to_string(),
            number: *number,
            there: match &*numbers {
                [] | [0] => "no partitions".into(),
                _ => numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
            },
        }),
    }
}

fn has_free_space(volume: &Volume) -> bool {
    use FileSystemKind::{Ext2, Ext3, Ext4, Ntfs, Xfs};
    matches!(volume.file_system, Some(Ext2 | Ext3 | Ext4 | Ntfs | Xfs))
}

fn free_space(disk: &dyn ReadAt, volume: &Volume, is_still: bool) -> Result<Ranges, String> {
    let Some(kind) = volume.file_system else { return Ok(Ranges::new()) };
    if !is_still {
        return Err("the disk is mounted writable".into());
    }
    let window = Window { disk, start: volume.start, len: volume.len };
    let free = fs::free(kind, &window).map_err(|error| error.to_string())?;
    Ok(free.intersect(&Ranges::from(0..volume.len)))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Volume 1: 1..9 MiB with an ext4; volume 2: 9..16 MiB, nothing that is known.
    fn disk() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("part");
        std::fs::File::create(&part).unwrap().set_len(8 * MIB).unwrap();
        let made =
            Command::new("mkfs.ext4").args(["-qF", "-b", "4096"]).arg(&part).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let mut disk = vec![0; 16 * MIB as usize];
        disk[MIB as usize..9 * MIB as usize].copy_from_slice(&std::fs::read(&part).unwrap());
        for (index, first, sectors) in [(0, 2048u32, 16384u32), (1, 18432, 14336)] {
            let at = 446 + index * 16;
            disk[at + 4] = 0x83;
            disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
            disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        }
        disk[510..512].copy_from_slice(&[0x55, 0xAA]);
        disk
    }

    fn choice(volumes: &[&str], skip_free: bool) -> Choice {
        let volumes = volumes.iter().map(|text| text.parse().unwrap()).collect();
        Choice { volumes, skip_free }
    }

    fn left_out(choice: &Choice, disk: &Vec<u8>, is_still: bool) -> Result<LeftOut, ChoiceError> {
        choice.left_out(&"system".parse().unwrap(), disk, 512, is_still)
    }

    #[test]
    fn volumes_that_are_not_chosen_are_zeros_and_gaps_travel() {
        let disk = disk();
        assert_eq!(left_out(&choice(&[], false), &disk, true).unwrap(), LeftOut::default());
        assert_eq!(
            left_out(&choice(&["other/1"], false), &disk, true).unwrap(),
            LeftOut::default()
        );
        let found = left_out(&choice(&["system/1"], false), &disk, true).unwrap();
        assert_eq!(found.zeros, Ranges::from(9 * MIB..16 * MIB));
        assert_eq!(found.volumes, ["volume 2"]);
        let error = left_out(&choice(&["system/7"], false), &disk, true).unwrap_err().to_string();
        assert_eq!(error, "disk system has no volume 7; it has: 1, 2");
    }

    #[test]
    fn free_space_is_left_out_only_of_what_is_still_and_clean() {
        let mut disk = disk();
        let free = left_out(&choice(&[], true), &disk, true).unwrap();
        assert!(free.zeros.total_bytes() > MIB && free.warnings.is_empty(), "{free:?}");
        assert_eq!(free.zeros.subtract(&Ranges::from(MIB..9 * MIB)), Ranges::new());
        let live = left_out(&choice(&[], true), &disk, false).unwrap();
        assert_eq!(live.zeros, Ranges::new());
        assert_eq!(
            live.warnings,
            ["volume 1: free space is not skipped: the disk is mounted writable"]
        );
        disk[MIB as usize + 1024 + 200] ^= 1;
        let damaged = left_out(&choice(&[], true), &disk, true).unwrap();
        assert_eq!((damaged.zeros, damaged.warnings.len()), (Ranges::new(), 1));
    }

    #[test]
    fn a_choice_of_an_unknown_disk_or_number_is_refused() {
        let disks = ["system".parse::<DiskId>().unwrap()];
        assert!(choice(&["system/1"], false).check(disks.iter()).is_ok());
        assert!(choice(&["sytem/1"], false).check(disks.iter()).is_err());
        for text in ["system", "system/", "system/0", "/1", "system/x"] {
            assert!(text.parse::<VolumeSpec>().is_err(), "{text}");
        }
    }
}
