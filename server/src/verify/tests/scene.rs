//! A store with one machine, written and read as its clients do, but without a network.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use janus_proto::{
    hash::{hash_blocks, segment_digest, table_digest, zero_hash},
    ids::{
        BLOCK_BYTES, BackupId, BlockHash, MachineKey, SEGMENT_BLOCKS, SnapshotId, block_count,
        block_len,
    },
    model::{Batch, Extent},
    pb,
};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    chain::{
        Held,
        health::Damage,
        opened::{OpenError, open_image, open_table},
        ranges::BlockRanges,
        store::Store,
    },
    image::Source,
    restore::blocks::send_blocks,
    runs::{CommitDisk, RunError, Runs, WantedDisk, Writer, now_ms},
    storage::Disk,
    verify::{CheckError, Pace, Way, check_image, pace::Limit},
};

pub const BLOCK: usize = BLOCK_BYTES as usize;
/// Two segments and a short one, with a short last block.
const DISK_BYTES: usize = (9 << 20) + 512;

/// Numbers that look random and repeat.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31) % end
    }
}

/// What was read of a snapshot.
pub struct Restored {
    pub bytes: Vec<u8>,
    pub lost: BlockRanges,
}

pub struct Scene {
    root: TempDir,
    runs: Runs,
    disk: Vec<u8>,
    /// Content of each snapshot.
    contents: BTreeMap<SnapshotId, Vec<u8>>,
}

impl Scene {
    pub const MACHINE: &str = "alice/laptop";

    fn open(root: TempDir, disk: Vec<u8>, contents: BTreeMap<SnapshotId, Vec<u8>>) -> Self {
        Self::open_on(Disk::default(), root, disk, contents)
    }

    fn open_on(
        storage: Disk,
        root: TempDir,
        disk: Vec<u8>,
        contents: BTreeMap<SnapshotId, Vec<u8>>,
    ) -> Self {
        let (store, machines) = Store::open_on(storage, root.path(), true).unwrap();
        let runs = Runs::new(store, machines, Duration::from_secs(60));
        Self { root, runs, disk, contents }
    }

    /// A base and two deltas.
    pub fn with_three_backups() -> Self {
        let mut scene = Self::open(folder(), vec![0; DISK_BYTES], BTreeMap::new());
        let last = block_count(DISK_BYTES as u64) - 1;
        for block in (0..40).chain(500..530).chain(1000..1060).chain(2000..2010).chain([last]) {
            scene.write(block, block);
        }
        scene.backup();
        scene.change(1);
        scene.backup();
        scene.change(2);
        // Some that held data, some that did not; zeros over data; a whole payload block.
        (300..310).for_each(|block| scene.write(block, block + 9));
        scene.disk[5 * BLOCK..7 * BLOCK].fill(0);
        (1536..2048).for_each(|block| scene.write(block, block + 3));
        scene.backup();
        scene
    }

    /// Its files, once more.
    pub fn copy(&self) -> TempDir {
        let copy = folder();
        let from = self.root.path().join(".");
        let done =
            Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(copy.path()).status();
        assert!(done.unwrap().success());
        copy
    }

    /// A server on a copy.
    pub fn reopened(&self, root: TempDir) -> Self {
        Self::open(root, self.disk.clone(), self.contents.clone())
    }

    pub fn restarted(self) -> Self {
        self.restarted_on(Disk::default())
    }

    pub fn restarted_on(self, storage: Disk) -> Self {
        self.runs.save_health();
        let Self { root, runs, disk, contents } = self;
        drop(runs);
        Self::open_on(storage, root, disk, contents)
    }

    pub fn folder(&self) -> PathBuf {
        self.root.path().join(Self::MACHINE)
    }

    fn key(&self) -> MachineKey {
        Self::MACHINE.parse().unwrap()
    }

    fn write(&mut self, block: u64, seed: u64) {
        let mut noise = Noise::new(seed);
        let start = block as usize * BLOCK;
        let end = (start + BLOCK).min(self.disk.len());
        self.disk[start..end].iter_mut().for_each(|byte| *byte = noise.below(256) as u8);
    }

    /// Overwrites some of the blocks with data.
    pub fn change(&mut self, seed: u64) {
        let mut noise = Noise::new(seed);
        for _ in 0..6 {
            let first = [0, 505, 1002][noise.below(3) as usize] + noise.below(20);
            (first..first + 1 + noise.below(3))
                .for_each(|block| self.write(block, seed << 32 | block));
        }
    }

    pub fn resize(&mut self, more: usize) {
        self.disk.resize(self.disk.len() + more, 0);
    }

    /// Backs up as a client that knows what it has sent. A run that finds damage is begun again, as a client does.
    pub fn backup(&mut self) {
        for _ in 0..3 {
            match self.try_backup() {
                Ok(()) => return,
                Err(RunError::ChainDamaged { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("three runs were given up");
    }

    fn try_backup(&mut self) -> Result<(), RunError> {
        let (key, backup, size_bytes) = (self.key(), BackupId::new(), self.disk.len() as u64);
        let disk: janus_proto::ids::DiskId = "disk".parse().unwrap();
        let wanted = [WantedDisk { disk: disk.clone(), size_bytes, logical_sector_bytes: 512 }];
        let run = self.runs.start(&key, backup, &wanted, 0)?;
        let session = run.sessions()[0].clone();
        let head = session.head().map(|head| head.held.snapshot().id);
        let mut known = head.map(|head| self.contents[&head].clone()).unwrap_or_default();
        known.resize(self.disk.len(), 0);
        let resend: BlockRanges =
            session.resend().iter().fold(BlockRanges::default(), |mut all, range| {
                all.insert(range.first_block..range.first_block + range.block_count);
                all
            });
        let writer = Writer::new(run, session.disk.session, 1)?;
        for block in 0..block_count(size_bytes) {
            let bytes =
                block as usize * BLOCK..(block as usize * BLOCK + BLOCK).min(self.disk.len());
            if self.disk[bytes.clone()] != known[bytes.clone()] || resend.contains(block) {
                writer.apply(Some(&batch(size_bytes, block, &self.disk[bytes])), block)?;
            }
        }
        let digests: Vec<BlockHash> = self
            .disk
            .chunks(BLOCK * SEGMENT_BLOCKS as usize)
            .map(|segment| segment_digest(&hashes(segment)))
            .collect();
        let commit = CommitDisk {
            disk,
            expected_head: head,
            table_digest: table_digest(size_bytes, &digests),
            consistency: 1,
            skipped_bytes: 0,
        };
        let run = self.runs.commit(&key, backup, 1, &[commit], &[])?;
        self.contents.insert(run.snapshots[0].id, self.disk.clone());
        Ok(())
    }

    /// Newest first.
    pub fn snapshots(&self) -> Vec<Held> {
        self.runs.machine(&self.key()).unwrap().snapshots()
    }

    pub fn newest(&self) -> Held {
        self.snapshots()[0].clone()
    }

    pub fn content_of(&self, held: &Held) -> &[u8] {
        &self.contents[&held.snapshot().id]
    }

    pub fn wire(&self, held: &Held) -> pb::Snapshot {
        self.runs.to_wire(held, "a")
    }

    pub fn damaged_blocks(&self, held: &Held) -> u64 {
        self.wire(held).damaged_blocks
    }

    /// Checks all images; returns the bytes read.
    pub fn verify(&self) -> u64 {
        let limit = Limit::new(0, CancellationToken::new(), || false);
        for held in self.snapshots() {
            check_image(&self.runs, &held, Way::Anew(2), &limit).unwrap();
        }
        limit.read_bytes()
    }

    /// Checks one image, one operation after another.
    pub fn check(&self, held: &Held) -> Result<Damage, CheckError> {
        let limit = Limit::new(0, CancellationToken::new(), || false);
        check_image(&self.runs, held, Way::Anew(1), &limit)
    }

    pub fn scrub_next(&self) -> Option<Held> {
        self.runs.next_to_check(now_ms() - 1000 * 3600, &|_| false)
    }

    /// Checks the image that is next until so many bytes are read; returns how many were.
    pub fn scrub_some(&self, most: u64) -> u64 {
        let limit = Limit::new(0, CancellationToken::new(), || false);
        let held = self.scrub_next().unwrap();
        match check_image(&self.runs, &held, Way::GoOn, &Until { limit: &limit, most }) {
            Ok(_) | Err(CheckError::Stopped) => limit.read_bytes(),
            Err(error) => panic!("{error}"),
        }
    }

    /// Where the store is.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// What is lost of a snapshot, which is noted as the restore service does.
    pub fn meet_damage(&self, held: &Held) -> BlockRanges {
        let lost = self.restore(held).unwrap().lost;
        self.runs.note_lost(&self.runs.open_for_reading(held).unwrap(), &lost);
        lost
    }

    /// Reads a snapshot as the restore service does.
    pub fn restore(&self, held: &Held) -> Result<Restored, OpenError> {
        let opened = self.runs.open_for_reading(held)?;
        let size = held.snapshot().size_bytes;
        let (answers, mut stream) = mpsc::channel(1 << 14);
        let whole = std::iter::once(0..block_count(size)).collect::<Vec<_>>();
        send_blocks(&opened, &whole, pb::Encoding::None, true, None, &answers);
        drop(answers);
        let mut restored = Restored { bytes: vec![0; size as usize], lost: BlockRanges::default() };
        let mut next = 0;
        while let Some(answer) = stream.blocking_recv() {
            let answer = answer.unwrap();
            for range in &answer.damaged {
                assert!(range.first_block >= next, "in order");
                next = range.first_block + range.block_count;
                restored.lost.insert(range.first_block..next);
            }
            let Some(batch) = answer.batch else { continue };
            let batch = Batch::from_wire(size, batch).unwrap();
            batch.verify().unwrap();
            for piece in batch.pieces() {
                assert!(piece.extent.first >= next, "in order");
                next = piece.extent.end();
                let at = piece.extent.first as usize * BLOCK;
                restored.bytes[at..at + piece.data.len()].copy_from_slice(piece.data);
            }
        }
        assert_eq!(next, block_count(size), "all of it");
        Ok(restored)
    }

    /// Bytes of all blocks that the tables name.
    pub fn data_bytes(&self) -> u64 {
        let blocks = |held: &Held| {
            let table = open_table(&Disk::default(), &self.folder(), held.snapshot()).unwrap();
            let pages = table
                .digests()
                .map(|(segment, _)| table.page(segment).unwrap().unwrap().hashes.len());
            pages.sum::<usize>() as u64
        };
        self.snapshots().iter().map(blocks).sum::<u64>() * BLOCK_BYTES
    }

    pub fn segments_in(&self, table: &Path) -> u64 {
        let held =
            self.snapshots().into_iter().find(|held| Path::new(&held.snapshot().table) == table);
        open_table(&Disk::default(), &self.folder(), held.unwrap().snapshot())
            .unwrap()
            .digests()
            .count() as u64
    }

    /// Of the used bytes of an image those of its blocks' data, and those behind it.
    pub fn parts(&self, held: &Held, used: &[u64]) -> (Vec<u64>, Vec<u64>) {
        let image = open_image(&Disk::default(), &self.folder(), held.snapshot()).unwrap();
        let extents = image.extents(0..held.snapshot().size_bytes).unwrap();
        let data: Vec<_> = extents
            .iter()
            .filter_map(|(range, source)| match source {
                Source::File(at) => Some(*at..*at + (range.end - range.start)),
                _ => None,
            })
            .collect();
        let end = data.iter().map(|range| range.end).max().unwrap();
        let in_data = |at: &&u64| data.iter().any(|range| range.contains(at));
        (
            used.iter().filter(in_data).copied().collect(),
            used.iter().filter(|at| **at >= end).copied().collect(),
        )
    }
}

/// In memory where that can be: hundreds of stores are made and synced.
fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Stops after so many bytes.
struct Until<'a> {
    limit: &'a Limit<'a>,
    most: u64,
}

impl Pace for Until<'_> {
    fn take(&self, bytes: u64) -> Result<(), CheckError> {
        if self.limit.read_bytes() >= self.most {
            return Err(CheckError::Stopped);
        }
        self.limit.take(bytes)
    }
}

fn hashes(bytes: &[u8]) -> Vec<BlockHash> {
    let mut hashes = Vec::new();
    hash_blocks(bytes, &mut hashes);
    hashes
}

fn batch(size_bytes: u64, block: u64, bytes: &[u8]) -> Batch {
    let hash = hashes(bytes)[0];
    let zero = hash == zero_hash(block_len(size_bytes, block));
    let extents = vec![Extent { first: block, count: 1, zero }];
    let (hash, data) = if zero { (vec![], vec![]) } else { (hash.0.to_vec(), bytes.to_vec()) };
    Batch::new(size_bytes, extents, hash.into(), data.into()).unwrap()
}
