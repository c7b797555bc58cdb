//! Manifests, tables and journals: files of the store itself.

use std::{path::Path, sync::Arc};

use janus_proto::{
    carried::{CarriedDisk, DiskEntry, Manifest},
    ids::{
        BackupId, BlockHash, DiskId, MachineKey, SEGMENT_BLOCKS, SessionId, SnapshotId,
        segment_count,
    },
    model::Extent,
};
use uuid::Uuid;

use super::Scratch;
use crate::{
    chain::{
        FORMAT, History, Origin, Run, Snapshot,
        store::{self, OpenRun},
        table::{SegmentBitmap, Table, TableHeader, TableStack, TableWriter},
    },
    session::journal::Journal,
    storage::Disk,
};

/// Most segments that are looked at: what comes after is read by the same code.
const MOST_SEGMENTS: u64 = 64;

/// Manifests of runs, committed and open.
pub fn fuzz_manifest(bytes: &[u8]) {
    let summed = store::with_sum(bytes.to_vec());
    for bytes in [bytes, &summed] {
        if let Ok(run) = store::parse::<Run>(Path::new("run"), bytes) {
            let ids: Vec<SnapshotId> = run.snapshots.iter().map(|snapshot| snapshot.id).collect();
            let mut history = History::default();
            history.add(Arc::new(run));
            for id in ids {
                let _ = history.chain(id);
            }
        }
        let _ = store::parse::<OpenRun>(Path::new("open"), bytes);
    }
}

/// Manifests of carried folders.
pub fn fuzz_carried(bytes: &[u8]) {
    let summed = store::with_sum(bytes.to_vec());
    for bytes in [bytes, &summed] {
        if let Ok(manifest) = Manifest::parse(Path::new("carried"), bytes) {
            let _ = (manifest.seal(), manifest.size_bytes());
            // None of its files is there, wherever it says that they are.
            for disk in &manifest.disks {
                let _ = CarriedDisk::open(&Disk::default(), Path::new("/proc/self/none"), disk);
            }
        }
    }
}

/// Hash tables.
pub fn fuzz_table(bytes: &[u8]) {
    let mut summed = bytes.to_vec();
    make_table_sums_right(&mut summed);
    for bytes in [bytes, &summed] {
        let Ok(file) = Scratch::new(bytes).and_then(|scratch| scratch.open()) else { return };
        let Ok(table) = Table::open(file) else { continue };
        let disk_bytes = table.header().disk_bytes;
        let Ok(stack) = TableStack::new(vec![Arc::new(table)], disk_bytes) else { continue };
        for segment in 0..segment_count(disk_bytes).min(MOST_SEGMENTS) {
            let _ = stack.segment(segment);
        }
    }
}

/// Index and header; pages have sums in the index, which a fuzzer would have to guess.
fn make_table_sums_right(bytes: &mut [u8]) {
    let number = |bytes: &[u8], at: usize| -> Option<usize> {
        let eight = bytes.get(at..at + 8)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(eight)).ok()
    };
    if bytes.len() < 160 {
        return;
    }
    if let Some(index) = number(bytes, 32).filter(|index| (160..=bytes.len()).contains(index)) {
        let (pages, entries) = bytes.split_at_mut(index);
        for entry in entries.chunks_exact_mut(56) {
            let page = number(entry, 8).and_then(|at| {
                let count = u32::from_le_bytes(entry[16..20].try_into().ok()?) as usize;
                pages.get(at..at.checked_add(128)?.checked_add(count.checked_mul(32)?)?)
            });
            if let Some(page) = page {
                let sum = crc32c::crc32c(page);
                entry[20..24].copy_from_slice(&sum.to_le_bytes());
            }
        }
        let sum = blake3::hash(&bytes[index..]);
        bytes[40..72].copy_from_slice(sum.as_bytes());
    }
    let sum = blake3::hash(&bytes[..128]);
    bytes[128..160].copy_from_slice(sum.as_bytes());
}

/// Journals of open sessions.
pub fn fuzz_session_journal(bytes: &[u8]) {
    let Some(header) = bytes.first_chunk::<40>() else { return };
    let session = Uuid::from_bytes(header[16..32].try_into().unwrap_or_default());
    let Ok(session) = session.to_string().parse::<SessionId>() else { return };
    let disk_bytes = u64::from_le_bytes(header[32..].try_into().unwrap_or_default());
    let mut summed = bytes.to_vec();
    make_journal_sums_right(&mut summed);
    for bytes in [bytes, &summed] {
        for synced_only in [false, true] {
            let Ok(file) = Scratch::new(bytes).and_then(|scratch| scratch.open()) else { return };
            let mut hashes = Vec::new();
            let journal = Journal::open(file, session, disk_bytes, synced_only, |record| {
                let blocks: u64 = record.extents.iter().map(|e| e.count.min(256)).sum();
                hashes.push((record.hashes_at, blocks));
            });
            let Ok(journal) = journal else { continue };
            for (at, blocks) in hashes {
                let _ = journal.hashes(at, blocks.min(256) as usize);
            }
        }
    }
}

/// Gives each record that could be one its sum.
fn make_journal_sums_right(bytes: &mut [u8]) {
    let mut at = 40;
    while let Some(fixed) = bytes.get(at..at + 24) {
        let count = |place: usize| {
            fixed[place..place + 4].iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte))
        };
        let end = at + 24 + count(8).saturating_mul(16) + count(12).saturating_mul(32);
        if end.saturating_add(16) > bytes.len() {
            return;
        }
        let sum = blake3::hash(&bytes[at..end]);
        bytes[end..end + 16].copy_from_slice(&sum.as_bytes()[..16]);
        at = end + 16;
    }
}

/// A run with a base and a delta, and an open run.
pub(super) fn manifest_seeds() -> Vec<Vec<u8>> {
    let Ok(machine) = MachineKey::new("alice", "laptop") else { return Vec::new() };
    let Ok(disk) = "sda".parse::<DiskId>() else { return Vec::new() };
    let parent = SnapshotId::new();
    let snapshot = |id, parent| Snapshot {
        id,
        disk: disk.clone(),
        size_bytes: 1 << 30,
        logical_sector_bytes: 512,
        table_digest: BlockHash([7; 32]),
        parent,
        image: "sda/1.vhdx".into(),
        table: "sda/1.table".into(),
        data_write: Uuid::from_u128(5),
        virtual_disk: Uuid::from_u128(6),
        consistency: 1,
        skipped_bytes: 0,
        image_allocated_bytes: 4096,
        image_length_bytes: 1 << 20,
    };
    let run = Run {
        format: FORMAT,
        backup: BackupId::new(),
        machine: machine.clone(),
        committed_ms: 1,
        sequence: 1,
        use_counter: 3,
        client_seal: vec![1, 2],
        origin: Some(Origin { run: Some(BackupId::new()), taken_ms: 1, from: None }),
        snapshots: vec![snapshot(parent, None), snapshot(SnapshotId::new(), Some(parent))],
    };
    let open = OpenRun {
        format: FORMAT,
        backup: BackupId::new(),
        machine,
        epoch: 1,
        use_counter: 2,
        started_ms: 3,
        boot: "b".into(),
        origin: None,
        disks: Vec::new(),
    };
    [serde_json::to_vec(&run), serde_json::to_vec(&open)].into_iter().flatten().collect()
}

/// A run of two disks.
pub(super) fn carried_seeds() -> Vec<Vec<u8>> {
    let seed = || -> Option<Vec<u8>> {
        let entry = |name: &str| {
            Some(DiskEntry {
                disk: name.parse().ok()?,
                size_bytes: 1 << 30,
                logical_sector_bytes: 512,
                table_digest: BlockHash([7; 32]),
                consistency: 1,
                skipped_bytes: 0,
                data_bytes: 4096,
                image: format!("{name}.vhdx"),
                image_bytes: 6 << 20,
                table: format!("{name}.table"),
                table_bytes: 400,
            })
        };
        let machine = MachineKey::new("alice", "laptop").ok()?;
        let disks = vec![entry("sda")?, entry("sdb")?];
        serde_json::to_vec(&Manifest::new(BackupId::new(), machine, 1, &[1, 2], disks)).ok()
    };
    seed().into_iter().collect()
}

/// A table with a full and a sparse segment.
pub(super) fn table_seeds() -> Vec<Vec<u8>> {
    let seed = || -> Option<Vec<u8>> {
        let scratch = Scratch::new(&[]).ok()?;
        let header = TableHeader { snapshot: SnapshotId::new(), disk_bytes: (9 << 20) + 512 };
        let mut writer = TableWriter::create(scratch.open().ok()?, header).ok()?;
        let digest = BlockHash([1; 32]);
        let mut present = SegmentBitmap::default();
        (0..40).for_each(|block| present.insert(block * 7));
        writer.push(0, &present, &[BlockHash([2; 32]); 40], digest).ok()?;
        let mut present = SegmentBitmap::default();
        present.insert(1);
        writer.push(2, &present, &[BlockHash([3; 32])], digest).ok()?;
        writer.finish().ok()?;
        std::fs::read(scratch.path()).ok()
    };
    seed().into_iter().collect()
}

/// A journal with each kind of record.
pub(super) fn journal_seeds() -> Vec<Vec<u8>> {
    let seed = || -> Option<Vec<u8>> {
        let scratch = Scratch::new(&[]).ok()?;
        let mut journal = Journal::create(scratch.open().ok()?, SessionId::new(), 1 << 30).ok()?;
        let zero = Extent { first: 9, count: SEGMENT_BLOCKS, zero: true };
        journal.append(&[Extent { first: 3, count: 2, zero: false }, zero], &[7; 64], 5).ok()?;
        journal.append_synced(5).ok()?;
        journal.append(&[zero], &[], 10).ok()?;
        std::fs::read(scratch.path()).ok()
    };
    seed().into_iter().collect()
}
