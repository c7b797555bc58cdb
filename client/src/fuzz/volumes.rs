//! Whole volumes and disks, as [`super::sparse`] has them.

use janus_proto::ranges::Ranges;

use super::{Sparse, sums};
use crate::{
    fs::{self, FileSystemKind},
    journal::{Answer, Journal, ntfs_usn::NtfsUsn},
    source::{gpt, view::ReadAt},
    volume,
};

/// An NTFS volume: its free space, and its journal from a cursor of its own.
pub fn fuzz_ntfs(bytes: &[u8]) {
    let volume = Sparse::decode(bytes);
    free(FileSystemKind::Ntfs, &volume);
    let journal = NtfsUsn::new(&volume);
    let first = journal.changes(None);
    volume.assert_bounded();
    if let Some(cursor) = &first.next {
        let Answer { changes, .. } = journal.changes(Some(cursor));
        volume.assert_bounded();
        if let Ok(changes) = changes {
            assert_within(&changes.changed, &volume);
            assert_within(&changes.free, &volume);
        }
    }
}

/// A volume of ext2, ext3 or ext4.
pub fn fuzz_ext4(bytes: &[u8]) {
    let mut volume = Sparse::decode(bytes);
    free(FileSystemKind::Ext4, &volume);
    sums::make_ext4_right(&mut volume);
    free(FileSystemKind::Ext4, &volume);
}

/// A volume of XFS.
pub fn fuzz_xfs(bytes: &[u8]) {
    let mut volume = Sparse::decode(bytes);
    free(FileSystemKind::Xfs, &volume);
    sums::make_xfs_right(&mut volume);
    free(FileSystemKind::Xfs, &volume);
}

/// A disk: GPT, MBR or none, and what its volumes hold.
pub fn fuzz_partitions(bytes: &[u8]) {
    let mut disk = Sparse::decode(bytes);
    for _ in 0..2 {
        for sector_bytes in [512, 4096] {
            if let Ok(layout) = volume::layout(&disk, sector_bytes) {
                let mut parts: Vec<_> = layout.volumes.iter().map(volume::Volume::range).collect();
                parts.sort_unstable_by_key(|range| range.start);
                assert!(parts.iter().all(|range| range.end <= disk.len()), "{layout:?}");
                assert!(parts.windows(2).all(|two| two[0].end <= two[1].start), "{layout:?}");
            }
            let _ = gpt::disk_guid(&disk, sector_bytes);
            disk.assert_bounded();
        }
        sums::make_gpt_right(&mut disk);
    }
}

fn free(kind: FileSystemKind, volume: &Sparse) {
    if let Ok(Some(free)) = fs::free(kind, volume) {
        assert_within(&free, volume);
    }
    volume.assert_bounded();
}

fn assert_within(ranges: &Ranges, volume: &Sparse) {
    assert!(ranges.iter().all(|range| range.end <= volume.len()), "past {}", volume.len());
}
