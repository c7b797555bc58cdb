//! Chains as a whole, written and read back, and what damage does. Strategies and comparisons are those of VHDX.

use std::{convert::Infallible, fs, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::{
    image::{
        Format, Geometry, Identity, Image, ImageError, Kind, Layers, PAYLOAD_BYTES, Payload,
        Source, UNIT_BYTES,
        sample::Sample,
        vhdx::tests::{assert_reads_as_model, assert_whole_disk_reads_as_model, disks},
    },
    storage::{Access, Disk, File, temporary},
};

fn sample(folder: &Path, disk_bytes: u64) -> Sample {
    Sample::of(Format::Vhd, folder, Geometry { disk_bytes, logical_sector_bytes: 512 })
}

/// A base and a child with partial, full and absent blocks.
fn small_chain(folder: &Path) -> Sample {
    let mut sample = sample(folder, 7 << 20);
    sample.add(&(0..1000).map(|unit| (unit, 1)).collect());
    sample.add(&(500..1100).map(|unit| (unit, 2)).chain([(3, 0)]).collect());
    sample
}

fn opened(path: &Path) -> Result<Image, ImageError> {
    Image::open(Disk::default().open(path, Access::Read).unwrap())
}

fn writable(path: &Path) -> File {
    Disk::default().open(path, Access::Write).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn chains_read_as_what_was_written((geometry, links) in disks()) {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = sample(folder.path(), geometry.disk_bytes);
        for units in &links {
            sample.add(units);
            assert_whole_disk_reads_as_model(&sample);
        }
        for image in sample.open() {
            image.check_blocks().unwrap();
            assert_eq!(image.format(), Format::Vhd);
        }
    }
}

#[test]
fn a_large_sparse_disk_is_small() {
    let folder = tempfile::tempdir().unwrap();
    let mut sample = sample(folder.path(), MAX_BYTES);
    let last = MAX_BYTES / UNIT_BYTES - 1;
    sample.add(&[(0, 1), (last, 1)].into());
    sample.add(&[(1, 2), (last - 1, 3)].into());
    assert_reads_as_model(&sample);
    for (path, image) in sample.files.iter().rev().zip(sample.open()) {
        image.check_blocks().unwrap();
        // The table, and two blocks with a page of data and one of bitmap each.
        let allocated = fs::metadata(path).unwrap().blocks() * 512;
        assert!(allocated <= (4 << 20) + (64 << 10), "{allocated} bytes");
    }
}

#[test]
fn identity_parent_and_time_survive() {
    let folder = tempfile::tempdir().unwrap();
    let sample = small_chain(folder.path());
    let [child, base] = sample.open().try_into().unwrap();
    assert_eq!(child.geometry(), sample.geometry);
    assert_eq!((child.kind(), base.kind()), (Kind::Differencing, Kind::Dynamic));
    assert_eq!(child.parent(), Some(&base.as_parent("disk-0000.vhd")));
    // What the footer says is also the file's time.
    let modified = fs::metadata(&sample.files[0]).unwrap().modified().unwrap();
    assert_eq!(footer::time_stamp(modified), child.parent().unwrap().time_stamp);
}

#[test]
fn extents_name_parent_zero_and_file() {
    let folder = tempfile::tempdir().unwrap();
    let [child, base] = small_chain(folder.path()).open().try_into().unwrap();
    let sources = |image: &Image| {
        let kind = |source| match source {
            Source::Parent => 'p',
            Source::Zero => 'z',
            Source::File(at) if at.is_multiple_of(4096) => 'f',
            Source::File(at) => panic!("data at {at}"),
        };
        let extents = image.extents(0..8 << 20).unwrap();
        let pairs = extents.into_iter().map(|(range, source)| (range.end / 4096, kind(source)));
        pairs.collect::<Vec<_>>()
    };
    let expected = [
        (3, 'p'),
        (4, 'f'),
        (500, 'p'),
        (512, 'f'),
        (1024, 'f'),
        (1100, 'f'),
        (1792, 'p'),
        (2048, 'z'),
    ];
    assert_eq!(sources(&child), expected);
    assert_eq!(sources(&base), [(512, 'f'), (1024, 'f'), (2048, 'z')]);
}

#[test]
fn foreign_links_and_mixed_formats_are_refused() {
    let [folder, other_folder] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (sample, other) = (small_chain(folder.path()), small_chain(other_folder.path()));
    let image = |sample: &Sample, at: usize| Arc::new(opened(&sample.files[at]).unwrap());
    let wrong = Layers::new(vec![image(&sample, 1), image(&other, 0)]);
    assert!(matches!(wrong, Err(ImageError::WrongParent { .. })));
    let third_folder = tempfile::tempdir().unwrap();
    let mut vhdx = Sample::new(third_folder.path(), sample.geometry);
    vhdx.add(&[(0, 1)].into());
    Layers::new(vec![image(&sample, 1), image(&vhdx, 0)]).unwrap_err();
}

#[test]
fn every_truncation_of_the_structures_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = &small_chain(folder.path()).files[1];
    for length in [8191, 8192, 6144, 4096, 1536, 1535, 512, 511, 1, 0] {
        writable(path).set_len(length).unwrap();
        opened(path).unwrap_err();
    }
}

#[test]
fn a_file_that_lost_its_end_is_read_as_far_as_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = &small_chain(folder.path()).files[0];
    let length = fs::metadata(path).unwrap().len();
    writable(path).set_len(length - 512).unwrap();
    let image = opened(path).unwrap();
    image.check_blocks().unwrap();
    writable(path).set_len(length - 513).unwrap();
    let image = opened(path).unwrap();
    // The last slot holds the disk's first block.
    assert!(matches!(image.extents(0..1), Err(ImageError::Damaged { .. })));
    image.extents(PAYLOAD_BYTES..2 * PAYLOAD_BYTES).unwrap();
}

#[test]
fn blocks_on_top_of_each_other_or_of_structures_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = &small_chain(folder.path()).files[0];
    let mut entry = [0; 4];
    writable(path).read_exact_at(&mut entry, 8192).unwrap();
    let first = u32::from_be_bytes(entry);
    // The same place, one that begins within it, the header, the table, the last footer, far outside.
    for (entry, found_by_reading) in [
        (first, false),
        (first - 1, false),
        (1, true),
        (16, true),
        (first + 1, false),
        (1 << 31, true),
    ] {
        writable(path).write_all_at(&entry.to_be_bytes(), 8192 + 4).unwrap();
        let image = opened(path).unwrap();
        assert!(matches!(image.check_blocks(), Err(ImageError::Damaged { .. })), "{entry}");
        assert_eq!(image.extents(PAYLOAD_BYTES..PAYLOAD_BYTES + 1).is_err(), found_by_reading);
    }
}

#[test]
fn a_repeated_commit_leaves_nothing_of_the_first() {
    let file = temporary();
    let geometry = Geometry { disk_bytes: 16 << 20, logical_sector_bytes: 512 };
    let layout = Layout::new(geometry, Kind::Differencing).unwrap();
    let identity = Identity { data_write: Uuid::new_v4(), virtual_disk: Uuid::new_v4() };
    let commit = |present: &[[u64; 8]], name: &str| {
        let parent = crate::image::Parent {
            data_write: Uuid::from_u128(9),
            file_name: name.into(),
            time_stamp: 5,
        };
        let blocks = (0..).zip(present).map(|(slot, present)| {
            Ok::<_, Infallible>(Payload { index: slot.into(), slot, present: *present })
        });
        let slots = present.len() as u32;
        write_structures(&file, &layout, &identity, Some(&parent), slots, blocks).unwrap();
    };
    let bytes = || {
        let mut bytes = vec![0; file.metadata().unwrap().length_bytes as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        // The time of the commit and the sums over it.
        let end = bytes.len() - 512;
        for at in [24, 64, end + 24, end + 64] {
            bytes[at..at + 4].fill(0);
        }
        bytes
    };
    commit(&[[1; 8]; 2], "b.vhd");
    let first = bytes();
    commit(&[[u64::MAX / 3; 8]; 5], "a-much-longer-name.vhd");
    layout.cut(&file, 2).unwrap();
    commit(&[[1; 8]; 2], "b.vhd");
    assert!(bytes() == first);
}

#[test]
fn a_fixed_image_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fixed.vhd");
    let file = Disk::default().open(&path, Access::CreateNew).unwrap();
    let disk_bytes = 3 * 4096;
    file.write_all_at(&[7; 3 * 4096], 0).unwrap();
    let footer = footer::Footer {
        disk_type: footer::DiskType::Fixed,
        disk_bytes,
        header_offset: u64::MAX,
        time_stamp: 1,
        unique_id: Uuid::from_u128(3),
        is_hidden: false,
    };
    file.write_all_at(&footer.encode(), disk_bytes).unwrap();
    let image = opened(&path).unwrap();
    assert_eq!(image.kind(), Kind::Dynamic);
    assert_eq!(
        image.extents(4096..4 * 4096).unwrap(),
        [(4096..disk_bytes, Source::File(4096)), (disk_bytes..4 * 4096, Source::Zero)]
    );
    let mut buffer = vec![0; 5000];
    Layers::new(vec![Arc::new(image)]).unwrap().read_at(100, &mut buffer).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 7));
    let longer = footer::Footer { disk_bytes: disk_bytes + 512, ..footer };
    file.write_all_at(&longer.encode(), disk_bytes).unwrap();
    opened(&path).unwrap_err();
}
