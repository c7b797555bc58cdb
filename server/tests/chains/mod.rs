//! A store beside a model of what it must hold: backups made through [`Runs`], every snapshot's content kept in memory.

#![allow(dead_code)] // Each test file uses its own part.

pub mod faults;

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use janus_proto::{
    hash::{hash_block, hash_blocks, is_zero, segment_digest, table_digest},
    ids::{
        BLOCK_BYTES, BackupId, BlockHash, DiskId, MachineKey, SEGMENT_BYTES, SnapshotId,
        block_count,
    },
    model::{Batch, Extent},
};
use janus_server::{
    chain::{
        Run,
        opened::OpenedSnapshot,
        store::{Store, StoreError},
    },
    image::Format,
    runs::{ActiveRun, CommitDisk, PurgeOptions, PurgeReport, RunError, Runs, WantedDisk, Writer},
    storage::Disk,
};
use tokio_util::sync::CancellationToken;

/// Content of a disk.
pub type Content = Arc<Vec<u8>>;

/// A store of one machine and what it must hold.
pub struct Model {
    pub folder: PathBuf,
    pub format: Format,
    /// Logical sectors of the disks.
    pub sector_bytes: u32,
    pub key: MachineKey,
    pub runs: Arc<Runs>,
    /// Of every snapshot that was ever committed.
    pub contents: HashMap<SnapshotId, Content>,
    /// Snapshots that can be read.
    pub live: BTreeSet<SnapshotId>,
}

impl Model {
    /// A store in `folder`, which holds nothing yet.
    pub fn new(folder: &Path) -> Self {
        Self::of(format(), folder)
    }

    /// The same, with chains of this format.
    pub fn of(format: Format, folder: &Path) -> Self {
        let key = MachineKey::new("user", "machine").unwrap();
        let (contents, live) = (HashMap::new(), BTreeSet::new());
        let runs = open(Disk::default(), folder, format);
        Self { folder: folder.into(), format, sector_bytes: 512, key, runs, contents, live }
    }

    /// Closes the store and opens it again.
    pub fn reopen(&mut self) {
        self.reopen_on(Disk::default());
    }

    /// Closes the store and opens it again, on another disk.
    pub fn reopen_on(&mut self, storage: Disk) {
        self.close();
        self.runs = open(storage, &self.folder, self.format);
    }

    /// Closes the store that is open; its lock goes with it.
    pub fn close(&mut self) {
        let elsewhere = tempfile::tempdir().unwrap();
        self.runs = open(Disk::default(), elsewhere.path(), self.format);
    }

    /// A copy of the store in another folder, which is on `storage`.
    pub fn copy(&self, folder: &Path, storage: Disk) -> Self {
        let mut cp = std::process::Command::new("cp");
        cp.args(["-a", "--sparse=always"]).arg(self.folder.join(".")).arg(folder);
        assert!(cp.status().unwrap().success());
        Self {
            folder: folder.into(),
            key: self.key.clone(),
            format: self.format,
            sector_bytes: self.sector_bytes,
            runs: open(storage, folder, self.format),
            contents: self.contents.clone(),
            live: self.live.clone(),
        }
    }

    /// Opens a run with these disks and sends what differs from its start.
    pub fn send(&self, disks: &[(&str, Content)]) -> (Arc<ActiveRun>, Vec<CommitDisk>) {
        self.try_send(disks).unwrap()
    }

    /// The same, and what the head has lost.
    pub fn try_send(
        &self,
        disks: &[(&str, Content)],
    ) -> Result<(Arc<ActiveRun>, Vec<CommitDisk>), RunError> {
        let wanted: Vec<WantedDisk> = disks
            .iter()
            .map(|(name, content)| WantedDisk {
                disk: disk(name),
                size_bytes: content.len() as u64,
                logical_sector_bytes: self.sector_bytes,
            })
            .collect();
        let run = self.runs.start(&self.key, BackupId::new(), &wanted, 0)?;
        let epoch = run.record().epoch;
        let mut commits = Vec::new();
        for (session, (name, content)) in run.sessions().iter().zip(disks) {
            let writer = Writer::new(run.clone(), session.disk.session, epoch).unwrap();
            let mut digests = Vec::new();
            let lost = session.resend();
            let is_lost = |block: u64| {
                lost.iter().any(|r| (r.first_block..r.first_block + r.block_count).contains(&block))
            };
            for (segment, bytes) in (0..).zip(content.chunks(SEGMENT_BYTES as usize)) {
                let mut hashes = Vec::new();
                hash_blocks(bytes, &mut hashes);
                digests.push(segment_digest(&hashes));
                let known = session.segment(segment);
                let known = known.map_err(|error| self.runs.cannot_compare(session, error))?;
                for (index, hash) in hashes.iter().enumerate() {
                    let first = segment * 1024 + index as u64;
                    if known[index] != *hash || is_lost(first) {
                        writer.apply(Some(&one_block(content, first, hash)), 0)?;
                    }
                }
            }
            writer.apply(None, block_count(content.len() as u64))?;
            commits.push(CommitDisk {
                disk: disk(name),
                expected_head: session.disk.head,
                table_digest: table_digest(content.len() as u64, &digests),
                consistency: 0,
                skipped_bytes: 0,
            });
        }
        Ok((run, commits))
    }

    /// Commits a run that was sent.
    pub fn commit(
        &mut self,
        run: &ActiveRun,
        commits: &[CommitDisk],
        disks: &[(&str, Content)],
    ) -> Arc<Run> {
        self.try_commit(run, commits, disks).unwrap()
    }

    fn try_commit(
        &mut self,
        run: &ActiveRun,
        commits: &[CommitDisk],
        disks: &[(&str, Content)],
    ) -> Result<Arc<Run>, RunError> {
        let epoch = run.record().epoch;
        let run = self.runs.commit(&self.key, run.backup, epoch, commits, b"")?;
        for (snapshot, (_, content)) in run.snapshots.iter().zip(disks) {
            assert_eq!(Format::of_name(&snapshot.image), Some(self.format));
            assert_eq!(snapshot.logical_sector_bytes, self.sector_bytes);
            self.contents.insert(snapshot.id, content.clone());
            self.live.insert(snapshot.id);
        }
        Ok(run)
    }

    /// One whole backup on a store that may be damaged: a run that finds damage is begun again, as clients do.
    pub fn backup_on_damage(&mut self, disks: &[(&str, Content)]) -> Arc<Run> {
        for _ in 0..4 {
            let sent = self.try_send(disks);
            match sent.and_then(|(run, commits)| self.try_commit(&run, &commits, disks)) {
                Ok(run) => return run,
                Err(RunError::ChainDamaged { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("four runs were given up");
    }

    /// One whole backup.
    pub fn backup(&mut self, disks: &[(&str, Content)]) -> Arc<Run> {
        let (run, commits) = self.send(disks);
        self.commit(&run, &commits, disks)
    }

    /// Drops a run; its time to go has come. Noise over what could be packed looks like an attack: an operator says it isn't one.
    pub fn trash(&mut self, run: &Run) {
        let drop = || self.runs.trash(&self.key, &[run.backup], "test", 0);
        let dropped = drop();
        if let Err(RunError::KeptByAlarm { .. }) = dropped {
            self.runs.clear_alarms(&self.runs.machine(&self.key).unwrap()).unwrap();
            drop().unwrap();
        } else {
            dropped.unwrap();
        }
        for snapshot in &run.snapshots {
            self.live.remove(&snapshot.id);
        }
    }

    /// Brings a run back.
    pub fn restore(&mut self, run: &Run) {
        self.runs.restore_trashed(&self.key, run.backup).unwrap();
        self.live.extend(run.snapshots.iter().map(|snapshot| snapshot.id));
    }

    /// Purges all of the trash that can go.
    pub fn purge(&self, copy: bool) -> PurgeReport {
        let options = PurgeOptions { now_ms: i64::MAX, reserve_bytes: 0, copy };
        self.runs.purge_due(&self.key, &options, &CancellationToken::new())
    }

    /// Purges; nothing may have to wait.
    pub fn purge_all(&self, copy: bool) -> PurgeReport {
        let report = self.purge(copy);
        assert_eq!(report.waiting, []);
        assert_eq!(self.runs.trashed(&self.key).len(), 0);
        report
    }

    /// No file is left that no snapshot needs.
    pub fn assert_clean(&self) {
        let mut expected = BTreeSet::from([".machine.json".to_owned()]);
        for held in self.runs.machine(&self.key).unwrap().snapshots() {
            let snapshot = held.snapshot();
            expected.extend([snapshot.image.clone(), snapshot.table.clone()]);
            expected.insert(format!(".runs/{:08}.json", held.run.sequence));
        }
        let mut files = self.files();
        // What is known of the images, and of alarms, belongs to none of them, and its next write ends one that was cut off.
        let known = [".health.json", ".changes.json", ".guard.json"];
        files.retain(|name| !known.iter().any(|known| name.starts_with(known)));
        assert_eq!(files, expected);
    }

    /// The run of a snapshot.
    pub fn run_of(&self, id: SnapshotId) -> Arc<Run> {
        self.runs.snapshot(id).unwrap().run
    }

    /// Opens a snapshot.
    pub fn open(&self, id: SnapshotId) -> OpenedSnapshot {
        self.runs.open_snapshot(&self.runs.snapshot(id).unwrap()).unwrap()
    }

    /// Compares every snapshot with the model: ids, bytes, hashes, digests.
    pub fn check(&self) {
        let machine = self.runs.machine(&self.key);
        let there = machine.map(|machine| machine.snapshots()).unwrap_or_default();
        let ids: BTreeSet<_> = there.iter().map(|held| held.snapshot().id).collect();
        assert_eq!(ids, self.live, "the catalog");
        for id in ids {
            self.check_opened(&self.open(id));
        }
    }

    /// Compares a snapshot that was opened, maybe long ago, with the model.
    pub fn check_opened(&self, opened: &OpenedSnapshot) {
        let snapshot = opened.held.snapshot();
        let content = &self.contents[&snapshot.id];
        let mut bytes = vec![0xee; content.len()];
        opened.read_at(0, &mut bytes).unwrap();
        let differs = bytes.chunks(4096).zip(content.chunks(4096)).position(|(a, b)| a != b);
        assert_eq!(differs, None, "first block of {} that differs", snapshot.image);
        for (segment, part) in (0..).zip(content.chunks(SEGMENT_BYTES as usize)) {
            let mut hashes = Vec::new();
            hash_blocks(part, &mut hashes);
            assert!(opened.tables.segment(segment).unwrap() == hashes, "segment {segment}");
        }
        assert_eq!(opened.tables.table_digest().unwrap(), snapshot.table_digest);
    }

    /// Files of the machine's folder, relative to it.
    pub fn files(&self) -> BTreeSet<String> {
        let root = self.folder.join("user/machine");
        let mut found = BTreeSet::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
                match entry.path() {
                    path if path.is_dir() => folders.push(path),
                    path => {
                        let relative = path.strip_prefix(&root).unwrap();
                        found.insert(relative.to_string_lossy().into_owned());
                    }
                }
            }
        }
        found
    }
}

fn open(storage: Disk, folder: &Path, format: Format) -> Arc<Runs> {
    let is_locked = |error: &StoreError| matches!(error, StoreError::Locked { .. });
    let opened = unlocked(|| Store::open_on(storage.clone(), folder, true), is_locked);
    let (store, machines) = opened.unwrap();
    let runs = Runs::new(store, machines, Duration::from_secs(60));
    Arc::new(runs.with_new_chains(format))
}

/// Does what needs a store's lock. A program that another test starts has our lock, too, until it has begun.
pub fn unlocked<T, E>(
    work: impl Fn() -> Result<T, E>,
    is_locked: impl Fn(&E) -> bool,
) -> Result<T, E> {
    for _ in 0..100 {
        match work() {
            Err(error) if is_locked(&error) => std::thread::sleep(Duration::from_millis(50)),
            done => return done,
        }
    }
    panic!("it stays locked");
}

/// A store with `links` runs of one disk, each with a change of its own.
pub fn chain(folder: &Path, links: u64) -> (Model, Vec<Arc<Run>>) {
    let mut model = Model::new(folder);
    let mut content = changed(&vec![0; (5 << 20) + 512], &[(0, 700, 1)]);
    let mut runs = vec![model.backup(&[("sda", content.clone())])];
    for link in 1..links {
        content = changed(&content, &[(link * 31, 40, link + 1), (link * 100, 3, 0)]);
        runs.push(model.backup(&[("sda", content.clone())]));
    }
    (model, runs)
}

/// Format of the store's chains: test programs called `vhd_…` are the same tests with the other one.
fn format() -> Format {
    if env!("CARGO_CRATE_NAME").starts_with("vhd_") { Format::Vhd } else { Format::Vhdx }
}

pub fn disk(name: &str) -> DiskId {
    name.parse().unwrap()
}

/// Content of `seed`, random to any compressor; the same for the same seed.
pub fn block(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// `content` with some blocks changed: (first block, count, seed), seed 0 for zeros.
pub fn changed(content: &[u8], changes: &[(u64, u64, u64)]) -> Content {
    let mut bytes = content.to_vec();
    for &(first, count, seed) in changes {
        for number in first..first + count {
            let at = (number * BLOCK_BYTES) as usize;
            let Some(target) = bytes.get_mut(at..) else { continue };
            let len = target.len().min(BLOCK_BYTES as usize);
            match seed {
                0 => target[..len].fill(0),
                _ => target[..len].copy_from_slice(&block(seed << 32 | number)[..len]),
            }
        }
    }
    Arc::new(bytes)
}

fn one_block(content: &[u8], first: u64, hash: &BlockHash) -> Batch {
    let at = (first * BLOCK_BYTES) as usize;
    let data = &content[at..content.len().min(at + BLOCK_BYTES as usize)];
    assert_eq!(hash_block(data), *hash);
    let zero = is_zero(data);
    let extents = vec![Extent { first, count: 1, zero }];
    let parts = if zero { (Bytes::new(), Bytes::new()) } else { (copy(&hash.0), copy(data)) };
    Batch::new(content.len() as u64, extents, parts.0, parts.1).unwrap()
}

fn copy(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
