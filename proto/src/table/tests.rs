//! Stacks of tables against a plain model, and what damage does.

use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::{
    hash::{hash_block, segment_digest, table_digest, zero_hash},
    ids::{SEGMENT_BYTES, block_len},
    storage::{Access, Disk, File},
};

fn temporary() -> File {
    let folder = tempfile::tempdir().unwrap();
    Disk::default().open(&folder.path().join("file"), Access::CreateNew).unwrap()
}

/// All block hashes of a disk.
fn zero_disk(disk_bytes: u64) -> Vec<BlockHash> {
    (0..block_count(disk_bytes)).map(|block| zero_hash(block_len(disk_bytes, block))).collect()
}

fn hash_of(seed: u32) -> BlockHash {
    hash_block(&seed.to_le_bytes())
}

/// Writes the table of `changes` and applies them to `model`.
fn write_table(disk_bytes: u64, changes: &BTreeMap<u64, u32>, model: &mut [BlockHash]) -> File {
    let header = TableHeader { snapshot: SnapshotId::new(), disk_bytes };
    let mut writer = TableWriter::create(temporary(), header).unwrap();
    let mut segments: BTreeMap<u64, SegmentBitmap> = BTreeMap::new();
    for (&block, &seed) in changes {
        segments
            .entry(block / SEGMENT_BLOCKS)
            .or_default()
            .insert((block % SEGMENT_BLOCKS) as usize);
        model[block as usize] = hash_of(seed);
    }
    for (segment, present) in segments {
        let first = (segment * SEGMENT_BLOCKS) as usize;
        let whole = &model[first..model.len().min(first + SEGMENT_BLOCKS as usize)];
        let hashes: Vec<_> = present.blocks().map(|block| whole[block]).collect();
        writer.push(segment, &present, &hashes, segment_digest(whole)).unwrap();
    }
    writer.finish().unwrap()
}

fn assert_reads_as(stack: &TableStack, model: &[BlockHash]) {
    let segments: Vec<_> = model.chunks(SEGMENT_BLOCKS as usize).collect();
    for (number, hashes) in segments.iter().enumerate() {
        assert_eq!(&stack.segment(number as u64).unwrap(), hashes, "segment {number}");
    }
    stack.segment(segments.len() as u64).unwrap_err();
    let digests: Vec<_> = segments.iter().map(|hashes| segment_digest(hashes)).collect();
    assert_eq!(stack.segment_digests().unwrap(), digests);
    assert_eq!(stack.table_digest().unwrap(), table_digest(stack.disk_bytes(), &digests));
}

fn disks() -> impl Strategy<Value = (u64, Vec<BTreeMap<u64, u32>>)> {
    let size = prop_oneof![
        Just(0),
        1..9u64,
        Just(SEGMENT_BYTES / 512),
        Just(SEGMENT_BYTES / 512 + 1),
        Just(SEGMENT_BYTES / 512 - 1),
        1..40_000u64
    ];
    size.prop_flat_map(|sectors| {
        let disk_bytes = sectors * 512;
        let run = (0..block_count(disk_bytes).max(1), 1..1500u64, any::<u32>());
        let changes = prop::collection::vec(run, 0..5).prop_map(move |runs| {
            let end = block_count(disk_bytes);
            let blocks = |(first, length, seed): (u64, u64, u32)| {
                (first..(first + length).min(end)).map(move |block| (block, seed ^ block as u32))
            };
            runs.into_iter().flat_map(blocks).collect()
        });
        (Just(disk_bytes), prop::collection::vec(changes, 0..5))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn stacks_read_as_what_was_written((disk_bytes, changes) in disks()) {
        let (mut model, mut tables) = (zero_disk(disk_bytes), Vec::new());
        for changes in &changes {
            let file = write_table(disk_bytes, changes, &mut model);
            tables.insert(0, Arc::new(Table::open(file).unwrap()));
            assert_reads_as(&TableStack::new(tables.clone(), disk_bytes).unwrap(), &model);
        }
        assert_reads_as(&TableStack::new(tables, disk_bytes).unwrap(), &model);
    }

    #[test]
    fn flips_and_truncations_are_errors(at in any::<prop::sample::Index>(), bit in 0..8u32, cut in any::<bool>()) {
        let disk_bytes = 5 * SEGMENT_BYTES + 512;
        let changes = [(0, 1), (5, 2), (1023, 3), (1024, 4), (5120, 5)].into();
        let file = write_table(disk_bytes, &changes, &mut zero_disk(disk_bytes));
        let length = file.metadata().unwrap().length_bytes;
        let place = at.index(length as usize) as u64;
        if cut {
            file.set_len(place).unwrap();
        } else {
            let mut byte = [0];
            file.read_exact_at(&mut byte, place).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << bit)], place).unwrap();
        }
        let read_all = || -> Result<(), TableError> {
            let table = Arc::new(Table::open(file)?);
            let stack = TableStack::new(vec![table], disk_bytes)?;
            (0..6).try_for_each(|segment| stack.segment(segment).map(drop))
        };
        prop_assert!(read_all().is_err());
    }
}

fn small_table() -> File {
    write_table(SEGMENT_BYTES, &[(7, 7)].into(), &mut zero_disk(SEGMENT_BYTES))
}

/// Puts a right sum under a changed header.
fn change_header(file: &File, at: usize, bytes: &[u8]) {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).unwrap();
    header[at..at + bytes.len()].copy_from_slice(bytes);
    let sum = blake3::hash(&header[..HEADER_FIELDS]);
    header[HEADER_FIELDS..].copy_from_slice(sum.as_bytes());
    file.write_all_at(&header, 0).unwrap();
}

#[test]
fn a_newer_version_is_refused_as_such() {
    let file = small_table();
    change_header(&file, 8, &3u32.to_le_bytes());
    let error = Table::open(file).unwrap_err();
    assert!(matches!(error, TableError::NewerVersion { found: 3 }), "{error}");
    let other = temporary();
    other.write_all_at(&[b'x'; 300], 0).unwrap();
    assert!(matches!(Table::open(other).unwrap_err(), TableError::Damaged { .. }));
}

#[test]
fn a_header_that_promises_a_huge_index_costs_nothing() {
    let file = small_table();
    let pages = 1u64 << 24;
    change_header(&file, 16, &MAX_DISK_BYTES.to_le_bytes());
    change_header(&file, 24, &pages.to_le_bytes());
    let index_offset = u64::from_le_bytes({
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 32).unwrap();
        bytes
    });
    file.set_len(index_offset + pages * ENTRY_BYTES as u64).unwrap();
    assert!(matches!(Table::open(file).unwrap_err(), TableError::Damaged { .. }));
}

#[test]
fn the_header_names_the_snapshot_and_pages_are_where_they_differ() {
    let header = TableHeader { snapshot: SnapshotId::new(), disk_bytes: 3 * SEGMENT_BYTES };
    let mut writer = TableWriter::create(temporary(), header).unwrap();
    let mut present = SegmentBitmap::default();
    present.insert(64);
    writer.push(0, &SegmentBitmap::default(), &[], hash_of(0)).unwrap();
    writer.push(1, &present, &[hash_of(1)], hash_of(2)).unwrap();
    let table = Table::open(writer.finish().unwrap()).unwrap();
    assert_eq!(table.header(), header);
    assert_eq!(table.page(0).unwrap(), None);
    assert_eq!(table.page(1).unwrap(), Some(Page { present, hashes: vec![hash_of(1)] }));
    assert_eq!(table.digests().collect::<Vec<_>>(), [(1, hash_of(2))]);
    // The digest isn't that of the content.
    TableStack::new(vec![Arc::new(table)], header.disk_bytes).unwrap().segment(1).unwrap_err();
}

#[test]
fn a_table_missing_in_between_is_noticed() {
    let (mut model, disk_bytes) = (zero_disk(SEGMENT_BYTES), SEGMENT_BYTES);
    let mut table = |changes: &[(u64, u32)]| {
        Arc::new(
            Table::open(write_table(disk_bytes, &changes.iter().copied().collect(), &mut model))
                .unwrap(),
        )
    };
    let (base, _middle, newest) = (table(&[(1, 1)]), table(&[(2, 2)]), table(&[(3, 3)]));
    TableStack::new(vec![newest.clone(), base], disk_bytes).unwrap().segment(0).unwrap_err();
    TableStack::new(vec![newest], disk_bytes + 512).unwrap_err();
}

#[test]
fn impossible_segments_are_refused() {
    let header = TableHeader { snapshot: SnapshotId::new(), disk_bytes: SEGMENT_BYTES + 512 };
    let mut writer = TableWriter::create(temporary(), header).unwrap();
    let (mut first, mut second) = (SegmentBitmap::default(), SegmentBitmap::default());
    first.insert(0);
    second.insert(1);
    let hash = hash_of(1);
    writer.push(1, &second, &[hash], hash).unwrap_err();
    writer.push(2, &first, &[hash], hash).unwrap_err();
    writer.push(u64::MAX, &first, &[hash], hash).unwrap_err();
    writer.push(0, &first, &[], hash).unwrap_err();
    writer.push(1, &first, &[hash], hash).unwrap();
    writer.push(1, &first, &[hash], hash).unwrap_err();
    writer.push(0, &first, &[hash], hash).unwrap_err();
    Table::open(writer.finish().unwrap()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn merged_tables_read_as_the_two_did((disk_bytes, links) in disks()) {
        let mut model = zero_disk(disk_bytes);
        let Some((first, later)) = links.split_first() else { return Ok(()) };
        let parent = write_table(disk_bytes, first, &mut model);
        for changes in later {
            let before = model.clone();
            let child = Table::open(write_table(disk_bytes, changes, &mut model)).unwrap();
            let old = Table::open(same(&parent)).unwrap();
            // Twice, the second time over what the first has left.
            append(&parent, &old, &child).unwrap();
            let appended = append(&parent, &old, &child).unwrap();
            let unchanged = Arc::new(Table::open(same(&parent)).unwrap());
            assert_reads_as(&TableStack::new(vec![unchanged], disk_bytes).unwrap(), &before);
            let rewritten = rewrite(temporary(), &old, &child).unwrap();
            Table::write_header(&parent, &appended.header).unwrap();
            for file in [same(&parent), rewritten] {
                let merged = Table::open(file).unwrap();
                prop_assert_eq!(merged.header(), child.header());
                let merged = TableStack::new(vec![Arc::new(merged)], disk_bytes).unwrap();
                assert_reads_as(&merged, &model);
            }
        }
    }
}

/// A copy of a table's file.
fn same(file: &File) -> File {
    let mut bytes = vec![0; file.metadata().unwrap().length_bytes as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let copy = temporary();
    copy.write_all_at(&bytes, 0).unwrap();
    copy
}
