//! Chains as a whole, written and read back, and what damage does.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::{
    image::{Geometry, Identity, Image, ImageError, Kind, Layers, Source, sample::Sample},
    storage::{Access, Disk, File, Op, Verdict, Watcher, temporary},
};

const UNITS: u64 = PAYLOAD_BYTES / UNIT_BYTES;

pub(in crate::image) fn geometry(disk_bytes: u64, logical_sector_bytes: u32) -> Geometry {
    Geometry { disk_bytes, logical_sector_bytes }
}

fn open(path: &Path, access: Access) -> File {
    Disk::default().open(path, access).unwrap()
}

pub(in crate::image) fn layers(sample: &Sample) -> Layers {
    Layers::new(sample.open().into_iter().map(Arc::new).collect()).unwrap()
}

/// Reads the neighbourhood of every unit of the model, in pieces that don't fit any border.
pub(in crate::image) fn assert_reads_as_model(sample: &Sample) {
    let (layers, mut buffer) = (layers(sample), vec![0xee; 3 * UNIT_BYTES as usize + 1]);
    let size = layers.geometry().disk_bytes;
    let zeros = vec![0; UNIT_BYTES as usize];
    for &number in sample.model.keys() {
        let start = (number * UNIT_BYTES).saturating_sub(UNIT_BYTES + 7);
        let length = buffer.len().min((size - start) as usize);
        buffer.fill(0xee);
        layers.read_at(start, &mut buffer[..length]).unwrap();
        for (at, byte) in (start..).zip(&buffer[..length]) {
            let unit = sample.model.get(&(at / UNIT_BYTES)).unwrap_or(&zeros);
            assert_eq!(*byte, unit[(at % UNIT_BYTES) as usize], "byte {at}");
        }
    }
}

pub(in crate::image) fn assert_whole_disk_reads_as_model(sample: &Sample) {
    let layers = layers(sample);
    let mut disk = vec![0xee; layers.geometry().disk_bytes as usize];
    layers.read_at(0, &mut disk).unwrap();
    for (number, unit) in disk.chunks(UNIT_BYTES as usize).enumerate() {
        match sample.model.get(&(number as u64)) {
            Some(expected) => assert_eq!(unit, expected, "unit {number}"),
            None => assert!(unit.iter().all(|byte| *byte == 0), "unit {number}"),
        }
    }
}

/// Patterns of writes: lone units, long runs, zeros over data.
pub(in crate::image) fn changes(units: u64) -> impl Strategy<Value = BTreeMap<u64, u64>> {
    let run = (0..units, prop_oneof![Just(1), 1..20u64, Just(UNITS), 500..1500u64], 0..5u64);
    prop::collection::vec(run, 0..6).prop_map(move |runs| {
        let stretch = |(first, length, seed): (u64, u64, u64)| {
            (first..(first + length).min(units)).map(move |u| (u, seed))
        };
        runs.into_iter().flat_map(stretch).collect()
    })
}

pub(in crate::image) fn disks() -> impl Strategy<Value = (Geometry, Vec<BTreeMap<u64, u64>>)> {
    let size = prop_oneof![1..30_000u64, Just(4096), Just(2 * 4096), Just(3 * 4096 + 1)];
    (size, prop::sample::select(vec![512u32, 4096])).prop_flat_map(|(sectors, sector_bytes)| {
        let disk_bytes = sectors * 512;
        let links = prop::collection::vec(changes(disk_bytes.div_ceil(UNIT_BYTES)), 1..=5);
        (Just(geometry(disk_bytes, sector_bytes)), links)
    })
}

/// Counts what is read.
#[derive(Default)]
struct Reads(AtomicUsize);

impl Watcher for Reads {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        if let Op::Read { .. } = op {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Verdict::Go)
    }
}

#[test]
fn where_a_range_is_takes_three_reads_however_many_blocks_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(folder.path(), geometry(64 << 20, 512));
    sample.add(&(0..64 * 256).step_by(3).map(|unit| (unit, 1)).collect());
    sample.add(&(0..64 * 256).step_by(50).map(|unit| (unit, 2)).collect());
    assert_reads_as_model(&sample);
    let reads = Arc::new(Reads::default());
    let disk = Disk::watched(reads.clone());
    let image = Image::open(disk.open(&sample.files[1], Access::Read).unwrap()).unwrap();
    let before = reads.0.swap(0, Ordering::Relaxed);
    assert!(before > 0);
    let extents = image.extents(0..32 << 20).unwrap();
    assert_eq!(extents.iter().filter(|(_, from)| *from != Source::Parent).count(), 164);
    // The table's entries, the bitmap's own entry, and its bits.
    assert_eq!(reads.0.load(Ordering::Relaxed), 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn chains_read_as_what_was_written((geometry, links) in disks()) {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path(), geometry);
        for units in &links {
            sample.add(units);
            assert_whole_disk_reads_as_model(&sample);
        }
        for image in sample.open() {
            image.check_blocks().unwrap();
        }
    }

    #[test]
    fn damaged_structures_never_panic(
        flips in prop::collection::vec((0usize..5, 0u64..4096, any::<u8>()), 1..4),
        keep in prop::option::of(0u64..12 << 20),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let sample = small_chain(folder.path());
        let path = &sample.files[1];
        let file = open(path, Access::Write);
        for (region, at, byte) in flips {
            // Identifier, metadata table, metadata items, block table, sector bitmaps: what no checksum protects.
            let bitmap = file.metadata().unwrap().length_bytes - MIB;
            let start = [0, 2 * MIB, 2 * MIB + (64 << 10), 3 * MIB, bitmap][region];
            file.write_all_at(&[byte], start + at % [512, 256, 1024, 4096, 4096][region]).unwrap();
        }
        if let Some(length) = keep {
            file.set_len(length).unwrap();
        }
        read_everything(&sample);
    }
}

/// A base and a child with partial, full and absent blocks.
fn small_chain(folder: &Path) -> Sample {
    let mut sample = Sample::new(folder, geometry(7 << 20, 512));
    sample.add(&(0..1000).map(|unit| (unit, 1)).collect());
    sample.add(&(500..1100).map(|unit| (unit, 2)).chain([(3, 0)]).collect());
    sample
}

/// Reads all it can; errors are fine.
fn read_everything(sample: &Sample) {
    let image = |path: &PathBuf| VhdxImage::open(open(path, Access::Read));
    let images: Result<Vec<_>, _> = sample.files.iter().rev().map(image).collect();
    let Ok(images) = images else { return };
    let images: Vec<_> = images.into_iter().map(|image| Arc::new(Image::from(image))).collect();
    for image in &images {
        let _ = image.check_blocks();
        for piece in 0..8 {
            let _ = image.extents(piece << 20..(piece + 1) << 20);
        }
    }
    let Ok(layers) = Layers::new(images) else { return };
    let mut buffer = vec![0; 1 << 20];
    for piece in 0..8 {
        let _ = layers.read_at(piece << 20, &mut buffer);
    }
}

#[test]
fn every_truncation_of_the_structures_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let sample = small_chain(folder.path());
    let file = open(&sample.files[1], Access::Write);
    for length in [
        0,
        7,
        8,
        65536,
        100_000,
        131_071,
        200_000,
        300_000,
        MIB,
        2 * MIB,
        2 * MIB + 65_600,
        3 * MIB,
    ] {
        file.set_len(length).unwrap();
        VhdxImage::open(open(&sample.files[1], Access::Read)).unwrap_err();
    }
}

#[test]
fn a_large_sparse_disk_crosses_chunk_borders() {
    for (sector_bytes, border) in [(512, 4u64 << 30), (4096, 32 << 30)] {
        let folder = tempfile::tempdir().unwrap();
        let mut sample =
            Sample::new(folder.path(), geometry(2 * border + (5 << 20) + 512, sector_bytes));
        let unit = border / UNIT_BYTES;
        let last = sample.geometry.disk_bytes / UNIT_BYTES;
        sample.add(&[(0, 1), (unit - 1, 1), (unit, 1), (unit + 1, 1), (last, 1)].into());
        sample.add(&[(unit - 1, 2), (unit, 2), (2 * unit, 2), (last, 3)].into());
        sample
            .add(&(unit..unit + UNITS).map(|unit| (unit, 4)).chain([(2 * unit - 1, 0)]).collect());
        assert_reads_as_model(&sample);
        for image in sample.open() {
            image.check_blocks().unwrap();
        }
        // 8 GiB of table, three bitmaps and a few blocks: sparse.
        let allocated = fs::metadata(&sample.files[1]).unwrap().blocks() * 512;
        assert!(allocated < 256 << 10, "{allocated} bytes");
    }
}

#[test]
fn an_unchanged_child_of_a_large_disk_is_tiny() {
    let folder = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(folder.path(), geometry(4 << 40, 512));
    sample.add(&[(77, 1), ((4 << 40) / UNIT_BYTES - 1, 2)].into());
    sample.add(&BTreeMap::new());
    assert_reads_as_model(&sample);
    let child = fs::metadata(&sample.files[1]).unwrap();
    // A page of table for each chunk, which names its bitmap.
    assert!(child.blocks() * 512 <= (1024 * 4096) + (64 << 10), "{} bytes", child.blocks() * 512);
}

#[test]
fn identity_parent_and_geometry_survive() {
    let folder = tempfile::tempdir().unwrap();
    let sample = small_chain(folder.path());
    let [child, base] = sample.open().try_into().unwrap();
    assert_eq!(child.geometry(), geometry(7 << 20, 512));
    assert_eq!(child.parent().unwrap().file_name, "disk-0000.vhdx");
    assert_eq!(child.parent().unwrap().data_write, base.data_write());
    assert_eq!(child.virtual_disk(), base.virtual_disk());
    assert_eq!((child.kind(), base.kind()), (Kind::Differencing, Kind::Dynamic));
}

#[test]
fn extents_name_parent_zero_and_file() {
    let folder = tempfile::tempdir().unwrap();
    let sample = small_chain(folder.path());
    let [child, base] = sample.open().try_into().unwrap();
    let sources = |image: &Image| {
        let extents = image.extents(0..8 << 20).unwrap();
        let kind = |source| match source {
            Source::Parent => 'p',
            Source::Zero => 'z',
            Source::File(_) => 'f',
        };
        extents
            .into_iter()
            .map(|(range, source)| (range.end / UNIT_BYTES, kind(source)))
            .collect::<Vec<_>>()
    };
    // Slots were taken from the disk's end backwards, so each block is a stretch of its own. The disk ends at unit 1792.
    assert_eq!(
        sources(&child),
        [
            (3, 'p'),
            (4, 'f'),
            (500, 'p'),
            (512, 'f'),
            (1024, 'f'),
            (1100, 'f'),
            (1792, 'p'),
            (2048, 'z')
        ]
    );
    assert_eq!(sources(&base), [(512, 'f'), (1024, 'f'), (2048, 'z')]);
}

#[test]
fn foreign_links_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let other_folder = tempfile::tempdir().unwrap();
    let (sample, other) = (small_chain(folder.path()), small_chain(other_folder.path()));
    let image = |sample: &Sample, at: usize| {
        Arc::new(Image::open(open(&sample.files[at], Access::Read)).unwrap())
    };
    let wrong = Layers::new(vec![image(&sample, 1), image(&other, 0)]);
    assert!(matches!(wrong, Err(ImageError::WrongParent { .. })));
    for images in [vec![], vec![image(&sample, 1)], vec![image(&sample, 0), image(&sample, 0)]] {
        assert!(matches!(Layers::new(images), Err(ImageError::BrokenChain { .. })));
    }
    Layers::new(vec![image(&sample, 0)]).unwrap().read_at((7 << 20) - 1, &mut [0; 2]).unwrap_err();
}

#[test]
fn blocks_on_top_of_each_other_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let sample = small_chain(folder.path());
    let file = open(&sample.files[0], Access::Write);
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, 3 * MIB).unwrap();
    file.write_all_at(&entry, 3 * MIB + 8).unwrap();
    assert!(VhdxImage::open(file).unwrap().check_blocks().is_err());
    // On top of the metadata, behind the end of the file, a state that doesn't exist, a child's state in a base.
    for entry in [(2 * MIB) | 6, (1 << 40) | 6, 5, (4 * MIB) | 7] {
        let file = open(&sample.files[0], Access::Write);
        file.write_all_at(&entry.to_le_bytes(), 3 * MIB).unwrap();
        VhdxImage::open(file).unwrap().extents(0..4096).unwrap_err();
    }
}

#[test]
fn a_repeated_commit_leaves_nothing_of_the_first() {
    let file = temporary();
    let layout = Layout::new(geometry(16 << 20, 512), Kind::Differencing).unwrap();
    let identity = Identity { data_write: Uuid::new_v4(), virtual_disk: Uuid::new_v4() };
    let parent = crate::image::Parent {
        data_write: Uuid::new_v4(),
        file_name: "a-very-long-name.vhdx".into(),
        time_stamp: 0,
    };
    let commit = |present: &[[u64; 8]], name: &str| {
        let parent = crate::image::Parent { file_name: name.into(), ..parent.clone() };
        let blocks = (0..).zip(present).map(|(slot, present)| {
            Ok::<_, Infallible>(Payload { index: slot.into(), slot, present: *present })
        });
        write_structures(&file, &layout, &identity, Some(&parent), present.len() as u32, blocks)
            .unwrap();
    };
    let bytes = || {
        let mut bytes = vec![0; file.metadata().unwrap().length_bytes as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    commit(&[[1; 8]; 2], "b.vhdx");
    let first = bytes();
    commit(&[[u64::MAX / 3; 8]; 5], "a-much-longer-name.vhdx");
    // As a session does that goes on after a crash: what lay behind its slots goes away before they are used.
    layout.cut(&file, 2).unwrap();
    commit(&[[1; 8]; 2], "b.vhdx");
    assert!(bytes() == first);
}

#[test]
fn a_listed_slot_of_a_base_counts_whatever_its_units_say() {
    let file = temporary();
    let layout = Layout::new(geometry(16 << 20, 512), Kind::Dynamic).unwrap();
    let identity = Identity { data_write: Uuid::new_v4(), virtual_disk: Uuid::new_v4() };
    file.write_all_at(&[7; 4096], layout.slot_offset(0) + 4096).unwrap();
    let blocks = [Ok::<_, Infallible>(Payload { index: 3, slot: 0, present: [0; 8] })];
    write_structures(&file, &layout, &identity, None, 1, blocks).unwrap();
    let extents = VhdxImage::open(file).unwrap().extents(6 << 20..8 << 20).unwrap();
    assert_eq!(extents, [(6 << 20..8 << 20, Source::File(layout.slot_offset(0)))]);
}

#[test]
fn impossible_lists_are_refused() {
    let layout = Layout::new(geometry(16 << 20, 512), Kind::Dynamic).unwrap();
    let identity = Identity { data_write: Uuid::new_v4(), virtual_disk: Uuid::new_v4() };
    let write = |slots, blocks: Vec<(u64, u32)>| {
        let blocks = blocks
            .into_iter()
            .map(|(index, slot)| Ok::<_, Infallible>(Payload { index, slot, present: [1; 8] }));
        write_structures(&temporary(), &layout, &identity, None, slots, blocks)
    };
    write(8, vec![(0, 1), (7, 0)]).unwrap();
    for (slots, blocks) in [
        (9, vec![]),
        (1, vec![(0, 1)]),
        (2, vec![(8, 0)]),
        (2, vec![(1, 0), (0, 1)]),
        (2, vec![(0, 0), (1, 0)]),
    ] {
        assert!(matches!(write(slots, blocks), Err(ImageError::Impossible { .. })));
    }
    let failing = [Err(std::io::Error::other("list"))];
    let file = temporary();
    assert!(matches!(
        write_structures(&file, &layout, &identity, None, 0, failing),
        Err(ImageError::Blocks(_))
    ));
}
