use std::{collections::HashMap, fs::File, os::unix::fs::FileExt, path::PathBuf};

use janus_proto::{
    hash,
    ids::{BLOCK_BYTES, SEGMENT_BYTES, block_count},
    model::Batch,
    pb,
};

use super::*;
use crate::{config::DiskSpec, packing::Wish};
use janus_proto::ranges::Ranges;

#[derive(Default)]
struct Table(HashMap<u64, Vec<BlockHash>>);

impl HashTable for Table {
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, ScanError> {
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
    (dir, Source::open(&spec, None, false).unwrap())
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

/// Reads everything.
static ALL: std::sync::LazyLock<Reading> = std::sync::LazyLock::new(Reading::everything);
static UNPACKED: std::sync::LazyLock<Packing> = std::sync::LazyLock::new(Packing::off);

fn job<'a>(source: &'a Source, table: &'a Table, content: SessionContent) -> ScanJob<'a> {
    ScanJob {
        source,
        seal: None,
        table,
        content,
        reading: &ALL,
        must: &none,
        segments: Segments::From(0),
        packing: &UNPACKED,
        threads: Threads { near: 1, far: 3 },
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
        let packing = &Packing::new(Wish::Only(encoding));
        let scanned = run(&ScanJob { packing, ..job(&source, &table, SessionContent::Zeros) });
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

/// A table whose hashes are costly: who asks for them is counted.
struct Far(Table, std::sync::Mutex<Vec<u64>>);

impl HashTable for Far {
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, ScanError> {
        let hashes = self.0.segment(segment)?;
        self.1.lock().unwrap().extend(hashes.is_some().then_some(segment));
        Ok(hashes)
    }

    fn digest(&self, segment: u64) -> Option<BlockHash> {
        self.0.0.get(&segment).map(|hashes| hash::segment_digest(hashes))
    }
}

#[test]
fn hashes_that_are_costly_are_asked_for_only_where_a_segment_differs() {
    // Data before holes, in each segment: what is read twice meets them twice.
    let size = 4 * SEGMENT_BYTES + 4096;
    let writes = |first| [0, 1, 2, 3].map(|at| (at * SEGMENT_BYTES, noise(200_000, first + at)));
    let (_old_dir, old) = disk(size, &writes(0));
    let mut changed = writes(0);
    changed[2].1[70_000] ^= 1;
    let (_new_dir, new) = disk(size, &changed);
    let far = Far(table_of(&old), Default::default());
    let near = table_of(&old);
    let scanned = run(&ScanJob { table: &far, ..job(&new, &near, SessionContent::Table) });
    let digests: Vec<_> = scanned.iter().map(|scanned| scanned.digest).collect();
    let plain = run(&job(&new, &near, SessionContent::Table));
    for (segment, plain) in plain.iter().enumerate() {
        let zeros = hash::zero_segment_of(size, segment as u64);
        assert_eq!(digests[segment].unwrap_or(zeros), plain.digest.unwrap_or(zeros), "{segment}");
        assert_eq!(scanned[segment].sent, plain.sent);
    }
    let mut content = vec![0; size as usize];
    old.read_at(0, &mut content).unwrap();
    assert_eq!(apply(size, scanned, &mut content), 4096);
    let mut expected = vec![0; size as usize];
    new.read_at(0, &mut expected).unwrap();
    assert!(content == expected);
    let mut asked = far.1.into_inner().unwrap();
    asked.dedup();
    assert!(asked == [2] || asked == [2, 4], "{asked:?}");
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
    assert!(scanned.iter().map(|s| s.read.total()).sum::<u64>() <= 2 << 20);
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
    let source =
        Source::open(&DiskSpec { name: Some("d".parse().unwrap()), path }, None, false).unwrap();
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

/// Plans that the journal of a volume which is the whole disk would make.
mod readings {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        journal::{Answer, Changes, Journal, JournalKind, memory::Memory},
        reading::{Journalled, Known, Policy, Reading},
    };

    const SIZE: u64 = SEGMENT_BYTES + 40 * BLOCK_BYTES + 512;
    const BLOCKS: usize = 1065;

    struct Says(Changes);

    impl Journal for Says {
        fn kind(&self) -> JournalKind {
            JournalKind::NtfsUsn
        }

        fn changes(&self, _: Option<&[u8]>) -> Answer {
            Answer { changes: Ok(self.0.clone()), next: None }
        }
    }

    /// What is true of a block and what is said of it.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Kind {
        Promised,
        Changed,
        Free,
        Zeros,
    }

    fn bytes_of(kinds: &[Kind], kind: Kind) -> Ranges {
        let blocks = kinds.iter().enumerate().filter(|(_, other)| **other == kind);
        blocks
            .map(|(at, _)| at as u64 * BLOCK_BYTES..((at as u64 + 1) * BLOCK_BYTES).min(SIZE))
            .collect()
    }

    fn reading(kinds: &[Kind], skipped: bool) -> Reading {
        let changes =
            Changes { changed: bytes_of(kinds, Kind::Changed), free: bytes_of(kinds, Kind::Free) };
        let journal =
            Journalled { start: 0, len: SIZE, name: "d".into(), journal: Box::new(Says(changes)) };
        let memory = Some(Memory { skipped, ..Memory::default() });
        let zeros = bytes_of(kinds, Kind::Zeros);
        let known = Known {
            disk: "d",
            memory,
            resized: None,
            kind: "",
            zeros,
            volumes: Vec::new(),
            now: 0,
        };
        Reading::plan(known, &[journal], Policy { audit_percent: 10, ..Policy::default() })
    }

    fn content(bytes: &[u8]) -> Vec<u8> {
        let block = |byte: &u8| std::iter::repeat_n(*byte, BLOCK_BYTES as usize);
        bytes.iter().flat_map(block).take(SIZE as usize).collect()
    }

    /// Few values, so that blocks are often zeros and often equal; in runs, as disks have them.
    fn blocks() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec((0..3u8, 1..200usize), 12).prop_map(|runs| {
            let all = runs.into_iter().flat_map(|(byte, count)| std::iter::repeat_n(byte, count));
            all.chain(std::iter::repeat(1)).take(BLOCKS).collect()
        })
    }

    fn kinds() -> impl Strategy<Value = Vec<Kind>> {
        let kind = prop_oneof![
            Just(Kind::Promised),
            Just(Kind::Changed),
            Just(Kind::Free),
            Just(Kind::Zeros)
        ];
        prop::collection::vec((kind, 1..150usize), 20).prop_map(|runs| {
            let all = runs.into_iter().flat_map(|(kind, count)| std::iter::repeat_n(kind, count));
            all.chain(std::iter::repeat(Kind::Promised)).take(BLOCKS).collect()
        })
    }

    fn expect(kind: Kind, old: u8, now: u8, after: u8) -> bool {
        match kind {
            Kind::Zeros => after == 0,
            // Read for another reason or left as it was: both are right.
            Kind::Free => after == old || after == now,
            Kind::Promised | Kind::Changed => after == now,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_session_gets_what_the_plan_says(
            old in blocks(), new in blocks(), kinds in kinds(), must_word in any::<u64>(), from_zeros: bool, skipped: bool,
        ) {
            // A promised block has not changed; a zero one may have, when it was skipped before.
            let now: Vec<u8> = (0..BLOCKS).map(|at| match kinds[at] {
                Kind::Promised if !(skipped && old[at] == 0) => old[at],
                _ => new[at],
            }).collect();
            let (_old_dir, was) = disk(SIZE, &[(0, content(&old))]);
            let table = table_of(&was);
            let (_dir, source) = disk(SIZE, &[(0, content(&now))]);
            let reading = reading(&kinds, skipped);
            let must = move |segment: u64| { let mut bits = none(segment); bits[0] = must_word; bits };
            let from = if from_zeros { SessionContent::Zeros } else { SessionContent::Table };
            let scanned = run(&ScanJob { reading: &reading, must: &must, ..job(&source, &table, from) });
            // What must be sent, the session may hold anything of.
            let mut session = if from_zeros { vec![0; SIZE as usize] } else { content(&old) };
            for segment in 0..2 {
                for bit in (0..64).filter(|bit| must_word >> bit & 1 == 1) {
                    let at = ((segment * 1024 + bit) * BLOCK_BYTES as usize).min(SIZE as usize);
                    let end = (at + BLOCK_BYTES as usize).min(SIZE as usize);
                    session[at..end].fill(9);
                }
            }
            let digests: Vec<_> = scanned.iter().map(|s| s.digest).collect();
            apply(SIZE, scanned, &mut session);
            for (at, block) in session.chunks(BLOCK_BYTES as usize).enumerate() {
                prop_assert!(block.iter().all(|byte| *byte == block[0]), "block {at} is mixed");
                prop_assert!(expect(kinds[at], old[at], now[at], block[0]), "block {at}: {:?} {} {} {}", kinds[at], old[at], now[at], block[0]);
            }
            // The digests are those of what the session now holds.
            for (segment, bytes) in session.chunks(SEGMENT_BYTES as usize).enumerate() {
                let mut hashes = vec![];
                hash::hash_blocks(bytes, &mut hashes);
                prop_assert_eq!(digests[segment].unwrap_or_else(|| hash::zero_segment_of(SIZE, segment as u64)), hash::segment_digest(&hashes));
            }
        }

        #[test]
        fn a_broken_promise_that_is_seen_ends_the_scan(old in blocks(), at in 0..BLOCKS, audit: bool) {
            let mut now = old.clone();
            now[at] += 1;
            let (_old_dir, was) = disk(SIZE, &[(0, content(&old))]);
            let (_dir, source) = disk(SIZE, &[(0, content(&now))]);
            let table = table_of(&was);
            let reading = reading(&[Kind::Promised; BLOCKS], false);
            // Without this the audit may or may not look at it.
            let must = |segment: u64| { let mut bits = none(segment); if !audit { bits.fill(u64::MAX) }; bits };
            let ended = scan(&ScanJob { reading: &reading, must: &must, ..job(&source, &table, SessionContent::Table) }, |_| Ok::<_, ()>(()));
            let word = at / 64;
            let known = reading.segment(word as u64 / 16, SIZE).word(word % 16).known;
            let audited = known >> (at % 64) & 1 == 0;
            match ended {
                Err(ScanError::Missed { offset }) => prop_assert_eq!(offset, at as u64 * BLOCK_BYTES),
                Ok(_) => prop_assert!(audit && !audited),
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn a_sealed_disk_is_scanned_as_what_it_is_when_it_is_sealed() {
    let size = SEGMENT_BYTES + 7 * 4096 + 512;
    let writes = [
        (8192, noise(1_500_000, 1)),
        (SEGMENT_BYTES + 5000, noise(9000, 2)),
        (size - 100, vec![9; 100]),
    ];
    let (_dir, source) = disk(size, &writes);
    let key = std::sync::Arc::new(crate::seal::MasterKey::of([4; 32]));
    let sealer = crate::seal::Sealer::new(key, "a/b".parse().unwrap());
    let seal = sealer.disk(source.disk_id(), size).unwrap();
    let nothing = Table::default();
    let sealed = || ScanJob { seal: Some(&seal), ..job(&source, &nothing, SessionContent::Zeros) };
    let scanned = run(&sealed());
    let plain = run(&job(&source, &nothing, SessionContent::Zeros));
    // As much as of a plain disk travels, zeros stay zeros, and each block is another.
    let (mut content, mut clear) = (vec![0; size as usize], vec![0; size as usize]);
    assert_eq!(apply(size, scanned, &mut content), apply(size, plain, &mut clear));
    for (sealed, clear) in content.chunks(4096).zip(clear.chunks(4096)) {
        assert_eq!(hash::is_zero(sealed), hash::is_zero(clear));
        assert!(hash::is_zero(clear) || sealed != clear);
    }
    seal.open(0, &mut content);
    assert!(content == clear);
    // The second time nothing has changed by the hashes of what was sealed, and everything by those of the disk itself.
    let table = |content: &[u8]| {
        let mut table = Table::default();
        for (segment, bytes) in (0..).zip(content.chunks(SEGMENT_BYTES as usize)) {
            let mut hashes = vec![];
            hash::hash_blocks(bytes, &mut hashes);
            table.0.insert(segment, hashes);
        }
        table
    };
    let count = |table: &Table| {
        let job = ScanJob { table, content: SessionContent::Table, ..sealed() };
        run(&job).iter().map(|scanned| scanned.changes.len()).sum::<usize>()
    };
    let data = clear.chunks(4096).filter(|block| !hash::is_zero(block)).count();
    assert_eq!(count(&table(&clear)), data);
    seal.seal(0, &mut clear);
    assert_eq!(count(&table(&clear)), 0);
}
