//! Random histories: the invariant holds after every step, and every backup leaves the disk on the server.

use std::{fs, path::Path};

use janus_proto::ids::{BLOCK_BYTES, DiskId, block_count};
use proptest::{collection::vec, prelude::*};

use crate::cache::{
    CacheError, DiskCache, FreshReason, compact,
    tests::model::{Content, Until, World, back_up, reconcile, server},
};

#[derive(Clone, Debug)]
enum Step {
    /// The disk changes: from a place, so many blocks, to something or to zeros; every nth only.
    Write {
        at: u64,
        count: u64,
        every: u64,
        zero: bool,
    },
    BackUp {
        server: usize,
        until: Until,
    },
    /// The process dies; the directory as it is at this moment is opened.
    Crash,
    /// As `Crash`, in the middle of a run.
    CrashInRun {
        server: usize,
    },
    Reopen,
    Adopt {
        server: usize,
    },
    /// An open session's content of which half has arrived is compared with.
    AdoptSession {
        server: usize,
    },
    Resize {
        size: u64,
    },
    Forget {
        server: usize,
    },
    Compact,
    /// The cache folder of some time ago comes back.
    KeepCopy,
    RestoreCopy,
    Damage {
        file: usize,
        at: u64,
        how: Harm,
    },
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    Flip(u8),
    ZeroSector,
    Cut,
    Delete,
}

/// Blocks; the largest disk has 4.4 segments.
const MAX_BLOCKS: u64 = 4500;

fn steps() -> impl Strategy<Value = Step> {
    let count = prop_oneof![1..20u64, 200..300u64, 1000..2500u64];
    let harm = prop_oneof![
        (1..=255u8).prop_map(Harm::Flip),
        Just(Harm::ZeroSector),
        Just(Harm::Cut),
        Just(Harm::Delete)
    ];
    let until = prop_oneof![6 => Just(Until::Done), 1 => Just(Until::Half), 1 => Just(Until::ServerCommitted)];
    prop_oneof![
        8 => (0..MAX_BLOCKS, count, prop_oneof![Just(1u64), 2..9u64], prop::bool::weighted(0.2))
            .prop_map(|(at, count, every, zero)| Step::Write { at, count, every, zero }),
        10 => (0..3usize, until).prop_map(|(server, until)| Step::BackUp { server, until }),
        1 => Just(Step::Crash),
        1 => (0..3usize).prop_map(|server| Step::CrashInRun { server }),
        1 => Just(Step::Reopen),
        1 => (0..3usize).prop_map(|server| Step::Adopt { server }),
        1 => (0..3usize).prop_map(|server| Step::AdoptSession { server }),
        2 => prop_oneof![1..=MAX_BLOCKS * 8, (1..=MAX_BLOCKS).prop_map(|blocks| blocks * 8)].prop_map(|sectors| Step::Resize { size: sectors * 512 }),
        1 => (0..3usize).prop_map(|server| Step::Forget { server }),
        1 => Just(Step::Compact),
        1 => Just(Step::KeepCopy),
        1 => Just(Step::RestoreCopy),
        2 => (any::<usize>(), any::<u64>(), harm).prop_map(|(file, at, how)| Step::Damage { file, at, how }),
    ]
}

struct History {
    folder: tempfile::TempDir,
    cache: Option<DiskCache>,
    disk: Content,
    world: World,
    numbers: u32,
    copies: u32,
    has_copy: bool,
    /// Files were harmed since the cache was last empty: it may find out at any time.
    harmed: bool,
}

fn disk_id() -> DiskId {
    "disk".parse().unwrap()
}

impl History {
    fn new(size_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path(), &disk_id(), size_bytes).unwrap();
        assert_eq!(cache.fresh_reason(), Some(FreshReason::New));
        Self {
            folder,
            cache: Some(cache),
            disk: Content::zeros(size_bytes),
            world: World::default(),
            numbers: 0,
            copies: 0,
            has_copy: false,
            harmed: false,
        }
    }

    fn cache(&self) -> &DiskCache {
        self.cache.as_ref().unwrap()
    }

    fn open(&mut self) {
        self.cache = None;
        let cache = open(self.folder.path(), self.disk.size_bytes);
        match cache.fresh_reason() {
            None | Some(FreshReason::New) => {}
            Some(reason) => {
                assert!(self.harmed, "nothing was harmed: {reason}");
                self.harmed = false;
            }
        }
        self.cache = Some(cache);
    }

    /// Runs a step; damage that it meets is answered as a client does: reset, go on.
    fn run(&mut self, step: &Step) {
        if let Err(error) = self.take(step).and_then(|()| self.world.check(self.cache())) {
            assert!(
                self.harmed && matches!(error, CacheError::Damaged { .. }),
                "{error} ({error:?})"
            );
            self.cache().reset(&error).unwrap();
            self.harmed = false;
            self.world.check(self.cache()).unwrap();
        }
    }

    fn take(&mut self, step: &Step) -> Result<(), CacheError> {
        match *step {
            Step::Write { at, count, every, zero } => self.write(at, count, every, zero),
            Step::BackUp { server: number, until } => {
                let disk = self.disk.clone();
                let cache = self.cache().clone();
                back_up(&cache, &mut self.world, &server(number), &disk, until)?;
            }
            Step::Crash => self.crash(),
            Step::CrashInRun { server: number } => {
                let (disk, cache) = (self.disk.clone(), self.cache().clone());
                back_up(&cache, &mut self.world, &server(number), &disk, Until::Half)?;
                drop(cache);
                self.crash();
            }
            Step::Reopen => self.open(),
            Step::Adopt { server: number } => {
                let content = self.world.session(&server(number), self.disk.size_bytes);
                reconcile(
                    self.cache(),
                    &server(number),
                    self.world.heads.get(&server(number)).copied(),
                    &content,
                )?;
            }
            Step::AdoptSession { server: number } => self.adopt_session(number)?,
            Step::Resize { size } => {
                self.disk = self.disk.resized(size);
                self.open();
            }
            Step::Forget { server: number } => {
                self.cache().forget(&server(number))?;
                assert!(self.cache().must_send(&server(number)).is_everything());
            }
            Step::Compact => self.compact()?,
            Step::KeepCopy => {
                copy(&self.folder.path().join("disk"), &self.folder.path().join("kept"));
                self.has_copy = !self.harmed;
            }
            Step::RestoreCopy if self.has_copy => {
                self.cache = None;
                fs::remove_dir_all(self.folder.path().join("disk")).unwrap();
                copy(&self.folder.path().join("kept"), &self.folder.path().join("disk"));
                self.harmed = false;
                self.open();
            }
            Step::RestoreCopy => {}
            Step::Damage { file, at, how } => {
                self.cache = None;
                self.harmed |= harm(&self.folder.path().join("disk"), file, at, how);
                self.open();
            }
        }
        Ok(())
    }

    fn write(&mut self, at: u64, count: u64, every: u64, zero: bool) {
        let blocks = block_count(self.disk.size_bytes);
        self.numbers += 1;
        for block in (at..at + count).step_by(every as usize).filter(|block| *block < blocks) {
            self.disk.blocks[block as usize] = if zero { 0 } else { self.numbers };
        }
    }

    /// A session of which the client knows nothing any more: the head, and the first half of the disk as it is.
    fn adopt_session(&mut self, number: usize) -> Result<(), CacheError> {
        let id = server(number);
        let mut content = self.world.session(&id, self.disk.size_bytes);
        let half = content.blocks.len() / 2;
        content.blocks[..half].copy_from_slice(&self.disk.blocks[..half]);
        reconcile(self.cache(), &id, None, &content)?;
        assert_eq!(self.cache().head(&id), None);
        assert!(self.cache().must_send(&id).is_nothing());
        assert_eq!(self.cache().segment_digests()?, content.digests());
        Ok(())
    }

    fn compact(&mut self) -> Result<(), CacheError> {
        let cache = self.cache();
        let mut live = cache.shared.write();
        let live = &mut *live;
        compact::compact(&cache.shared.place, &mut live.engine, &mut live.state)
    }

    fn crash(&mut self) {
        self.copies += 1;
        let (from, to) = (
            self.folder.path().join("disk"),
            self.folder.path().join(format!("copy-{}", self.copies)),
        );
        copy(&from, &to);
        self.cache = None;
        fs::remove_dir_all(&from).unwrap();
        fs::rename(&to, &from).unwrap();
        self.open();
    }
}

/// Opens the cache. Another test of this process may be starting a child: until that has begun its own program it holds
/// a copy of every open file, and with it the lock that was just let go.
fn open(folder: &Path, size_bytes: u64) -> DiskCache {
    let mut tries = 0;
    loop {
        match DiskCache::open(folder, &disk_id(), size_bytes) {
            Err(CacheError::Busy { .. }) if tries < 200 => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// Replaces folder `to` by a copy of `from`.
pub(super) fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn files(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    let mut entries: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        match path.is_dir() {
            true if path.file_name().unwrap().to_string_lossy().starts_with("quarantine") => {}
            true => files(&path, found),
            false => found.push(path),
        }
    }
}

fn harm(folder: &Path, file: usize, at: u64, how: Harm) -> bool {
    let mut found = Vec::new();
    files(folder, &mut found);
    let path = &found[file % found.len()];
    let mut bytes = fs::read(path).unwrap();
    if bytes.is_empty() {
        return false;
    }
    let at = (at % bytes.len() as u64) as usize;
    match how {
        Harm::Flip(mask) => bytes[at] ^= mask,
        Harm::ZeroSector => {
            let first = at / 4096 * 4096;
            let end = bytes.len().min(first + 4096);
            bytes[first..end].fill(0);
        }
        Harm::Cut => bytes.truncate(at),
        Harm::Delete => {
            fs::remove_file(path).unwrap();
            return true;
        }
    }
    fs::write(path, bytes).unwrap();
    true
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if std::env::var_os("JANUS_SOAK").is_some() { 500 } else { 24 },
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_is_not_in_a_changed_set_is_in_the_head(
        blocks in 1..MAX_BLOCKS, odd in 0..8u64, steps in vec(steps(), 1..40),
    ) {
        let mut history = History::new(blocks * BLOCK_BYTES + odd * 512);
        for step in &steps {
            history.run(step);
        }
    }
}
