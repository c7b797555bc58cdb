use std::{collections::HashMap, fs::File, os::unix::fs::FileExt, path::PathBuf};

use janus_proto::{
    hash,
    ids::{BLOCK_BYTES, SEGMENT_BYTES, block_count},
    model::Batch,
};

use super::*;
use crate::config::DiskSpec;

#[derive(Default)]
struct Table(HashMap<u64, Vec<BlockHash>>);

impl HashTable for Table {
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, String> {
        Ok(self.0.get(&segment).cloned())
    }
}

fn disk(size: u64, writes: &[(u64, Vec<u8>)]) -> (tempfile::TempDir, Source) {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("disk.img");
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in writes {
        file.write_all_at(bytes, *offset).unwrap();
    }
    let spec = DiskSpec { name: Some("d".parse().unwrap()), path };
    (dir, Source::open(&spec, false).unwrap())
}

fn table_of(source: &Source) -> Table {
    let mut table = Table::default();
    let mut content = vec![0; source.size_bytes() as usize];
    source.read_at(0, &mut content).unwrap();
    for (segment, bytes) in content.chunks(SEGMENT_BYTES as usize).enumerate() {
        let mut hashes = vec![];
        hash::hash_blocks(bytes, &mut hashes);
        table.0.insert(segment as u64, hashes);
    }
    table
}

fn none(_: u64) -> SegmentBits {
    SegmentBits::default()
}

fn job<'a>(source: &'a Source, table: &'a Table, content: SessionContent) -> ScanJob<'a> {
    ScanJob {
        source,
        table,
        content,
        must: &none,
        segments: Segments::From(0),
        encoding: pb::Encoding::None,
        threads: 2,
    }
}

fn run(job: &ScanJob<'_>) -> Vec<Scanned> {
    let mut all = vec![];
    let end: Result<(), ()> = scan(job, |event| {
        if let Event::Scanned(scanned) = event {
            all.push(*scanned);
        }
        Ok(())
    })
    .unwrap();
    end.unwrap();
    all
}

/// Applies what would travel to `content`.
fn apply(size: u64, scanned: Vec<Scanned>, content: &mut [u8]) -> usize {
    let mut bytes = 0;
    let mut next = 0;
    for message in scanned.into_iter().flat_map(|s| s.messages) {
        let batch = Batch::from_wire(size, message.batch).unwrap();
        batch.verify().unwrap();
        bytes += batch.data_len();
        for piece in batch.pieces() {
            assert!(piece.extent.first >= next);
            next = piece.extent.end();
            let from = (piece.extent.first * BLOCK_BYTES) as usize;
            let to = ((piece.extent.end() * BLOCK_BYTES) as usize).min(content.len());
            if piece.extent.zero {
                content[from..to].fill(0);
            } else {
                content[from..to].copy_from_slice(piece.data);
            }
        }
    }
    bytes
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

#[test]
fn a_first_backup_sends_exactly_the_blocks_that_hold_data() {
    let size = 3 * SEGMENT_BYTES + 7 * 4096 + 512;
    let writes = [
        (0, noise(1_500_000, 1)),
        (2 * SEGMENT_BYTES + 5000, noise(9000, 2)),
        (size - 100, vec![9; 100]),
    ];
    let (_dir, source) = disk(size, &writes);
    for encoding in [pb::Encoding::None, pb::Encoding::Lz4, pb::Encoding::Zstd] {
        let table = Table::default();
        let scanned = run(&ScanJob { encoding, ..job(&source, &table, SessionContent::Zeros) });
        assert_eq!(scanned.iter().map(|s| s.segment).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let digests: Vec<_> = scanned
            .iter()
            .map(|s| s.digest.unwrap_or_else(|| hash::zero_segment_of(size, s.segment)))
            .collect();
        let mut content = vec![0; size as usize];
        let sent = apply(size, scanned, &mut content);
        assert!(sent < 1_600_000, "{sent}");
        let mut expected = vec![0; size as usize];
        source.read_at(0, &mut expected).unwrap();
        assert!(content == expected);
        let expected: Vec<_> =
            (0..4).map(|s| hash::segment_digest(table_of(&source).0.get(&s).unwrap())).collect();
        assert_eq!(digests, expected);
    }
}

#[test]
fn a_delta_turns_the_old_content_into_the_new() {
    let size = 5 * SEGMENT_BYTES + 4096 * 3;
    let (_old_dir, old) = disk(size, &[(0, noise(size as usize, 3))]);
    let mut content = vec![0; size as usize];
    old.read_at(0, &mut content).unwrap();
    let mut changed = content.clone();
    changed[4096 * 77..4096 * 79].fill(0);
    changed[4096 * 1000..4096 * 1001].fill(5);
    changed[(4 * SEGMENT_BYTES) as usize..]
        .copy_from_slice(&noise(SEGMENT_BYTES as usize + 4096 * 3, 4));
    let (_dir, new) = disk(size, &[(0, changed.clone())]);
    let table = table_of(&old);
    let scanned = run(&job(&new, &table, SessionContent::Table));
    let changes: usize = scanned.iter().map(|s| s.changes.len()).sum();
    assert_eq!(changes as u64, 3 + 1024 + 3);
    assert!(scanned[1].messages.is_empty());
    let sent = apply(size, scanned, &mut content);
    assert_eq!(sent as u64, 4096 * (1 + 1024 + 3));
    assert!(content == changed);
}

#[test]
fn must_send_blocks_travel_and_a_table_of_another_server_still_counts_for_changes() {
    let size = 2 * SEGMENT_BYTES;
    let (_dir, source) = disk(size, &[(0, noise(size as usize, 5))]);
    let table = table_of(&source);
    let must = |segment| {
        let mut bits = SegmentBits::default();
        bits[3] = if segment == 1 { 0b101 } else { 0 };
        bits
    };
    let scanned = run(&ScanJob { must: &must, ..job(&source, &table, SessionContent::Table) });
    let extents: Vec<_> =
        scanned.iter().flat_map(|s| &s.messages).flat_map(|m| m.batch.extents.clone()).collect();
    assert_eq!(extents.iter().map(|e| e.first_block).collect::<Vec<_>>(), [1024 + 192, 1024 + 194]);
    // No head there: everything travels, though the table knows it all and nothing is staged.
    let scanned = run(&job(&source, &table, SessionContent::Zeros));
    assert!(scanned.iter().all(|s| s.changes.is_empty() && s.messages.len() == 4));
}

#[test]
fn a_sparse_terabyte_is_scanned_in_no_time() {
    let (_dir, source) = disk(1 << 40, &[(700 << 30, noise(1 << 20, 6))]);
    let table = Table::default();
    let started = std::time::Instant::now();
    let scanned = run(&job(&source, &table, SessionContent::Zeros));
    assert_eq!(scanned.len(), 262_144);
    assert!(scanned.iter().map(|s| s.read_bytes).sum::<u64>() <= 2 << 20);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn a_scan_ends_when_the_consumer_wants_no_more_or_a_read_fails() {
    let size = 64 * SEGMENT_BYTES;
    let (dir, source) = disk(size, &[(0, noise(1 << 20, 7))]);
    let table = table_of(&source);
    let end = scan(&job(&source, &table, SessionContent::Table), |_| Err("enough")).unwrap();
    assert_eq!(end, Err("enough"));
    std::fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join("disk.img"))
        .unwrap()
        .set_len(SEGMENT_BYTES)
        .unwrap();
    let error =
        scan(&job(&source, &table, SessionContent::Table), |_| Ok::<_, ()>(())).unwrap_err();
    assert!(
        matches!(error, ScanError::Source(SourceError::Read { offset: SEGMENT_BYTES, .. })),
        "{error}"
    );
}

/// `JANUS_SCAN_FILE=path cargo test --release -p janus-client scan_speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn scan_speed() {
    let path = PathBuf::from(std::env::var("JANUS_SCAN_FILE").unwrap());
    let source = Source::open(&DiskSpec { name: Some("d".parse().unwrap()), path }, false).unwrap();
    let full = run(&job(&source, &Table::default(), SessionContent::Table));
    let mut table = Table::default();
    for scanned in &full {
        let mut hashes = vec![hash::zero_block(); 1024];
        scanned.changes.iter().for_each(|(place, hash)| hashes[*place as usize] = *hash);
        hashes.truncate(
            (block_count(source.size_bytes()) - scanned.segment * 1024).min(1024) as usize
        );
        table.0.insert(scanned.segment, hashes);
    }
    drop(full);
    for content in
        [SessionContent::Table, SessionContent::Table, SessionContent::Zeros, SessionContent::Zeros]
    {
        let started = std::time::Instant::now();
        let mut sent = 0;
        let end: Result<(), ()> = scan(&job(&source, &table, content), |event| {
            if let Event::Scanned(scanned) = event {
                sent += scanned.messages.iter().map(|m| m.raw_bytes).sum::<u64>();
            }
            Ok(())
        })
        .unwrap();
        end.unwrap();
        let rate =
            source.size_bytes() as f64 / started.elapsed().as_secs_f64() / f64::from(1 << 20);
        println!("{content:?}: {rate:.0} MiB/s, {} MiB would be sent", sent >> 20);
    }
}
