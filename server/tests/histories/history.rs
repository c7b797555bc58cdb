//! A store, its model, and what each may say of the other after damage.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Add,
    path::Path,
    sync::Arc,
};

use janus_proto::{
    hash::zero_hash,
    ids::{BlockHash, SEGMENT_BLOCKS, SnapshotId, block_count, block_len},
};
use janus_server::{
    chain::{
        Held,
        opened::{OpenedSnapshot, Salvage, open_image},
        ranges::BlockRanges,
    },
    config::Settings,
    image::{Format, Source},
    retention::Retention,
    runs::{RunError, Wait, now_ms},
    storage::Disk,
    verify::{Way, check_image, pace::Limit},
};
use tokio_util::sync::CancellationToken;

use crate::{
    chains::{Content, Model, changed},
    harm::{Harm, Target},
    readers::{INSTALL_7Z, assert_same, libvhdi, run, seven_zip},
};

const BLOCK: usize = 4096;
/// Snapshots of a history that other programs read.
const MOST_READ: usize = 3;

/// What was done in histories.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub backups: usize,
    pub merges: usize,
    pub damages: usize,
    /// Snapshots with lost blocks, at the end of steps.
    pub with_losses: usize,
    pub healed: usize,
    pub read_by_others: usize,
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            backups: self.backups + other.backups,
            merges: self.merges + other.merges,
            damages: self.damages + other.damages,
            with_losses: self.with_losses + other.with_losses,
            healed: self.healed + other.healed,
            read_by_others: self.read_by_others + other.read_by_others,
        }
    }
}

pub struct History {
    model: Model,
    content: Content,
    pinned: BTreeSet<SnapshotId>,
    /// Snapshots that damage may have touched. `true`: every block of theirs is still right, since a backup brought what was
    /// lost, but images below them are damaged.
    touched: BTreeMap<SnapshotId, bool>,
    /// All damage was found by a check.
    is_known: bool,
    pub counts: Counts,
}

impl History {
    pub fn new(format: Format, folder: &Path) -> Self {
        Self {
            model: Model::of(format, folder),
            content: Arc::new(vec![0; 600 * BLOCK + 512]),
            pinned: BTreeSet::new(),
            touched: BTreeMap::new(),
            is_known: true,
            counts: Counts::default(),
        }
    }

    pub fn backup(&mut self, changes: &[(u64, u64, u64)], resize: Option<u64>) {
        let mut bytes = self.content.to_vec();
        bytes.resize(resize.map_or(bytes.len(), |blocks| blocks as usize * BLOCK + 512), 3);
        self.content = changed(&bytes, changes);
        let run = self.model.backup_on_damage(&[("sda", self.content.clone())]);
        let snapshot = &run.snapshots[0];
        let builds_on = snapshot.parent.filter(|parent| self.touched.contains_key(parent));
        if builds_on.is_some() {
            self.touched.insert(snapshot.id, self.is_known);
            self.counts.healed += usize::from(self.is_known);
        }
        self.counts.backups += 1;
    }

    pub fn drop_one(&mut self, which: usize) {
        let Some(held) = self.pick(which) else { return };
        let id = held.snapshot().id;
        if self.pinned.contains(&id) {
            return;
        }
        let dropped = self.model.runs.trash(&self.model.key, &[held.run.backup], "test", 0);
        let machine = self.model.runs.machine(&self.model.key).unwrap();
        let is_kept = machine.guarded().kept_by(held.run.backup).is_some();
        let is_refused = matches!(dropped, Err(RunError::KeptByAlarm { .. }));
        assert!(!is_kept || dropped.is_err(), "the last run before an alarm");
        assert!(dropped.is_ok() || is_refused || self.touched.contains_key(&id), "{dropped:?}");
        self.forget_dropped();
    }

    pub fn bring_back(&mut self, which: usize) {
        let trashed = self.model.runs.trashed(&self.model.key);
        let Some(trashed) = trashed.get(which % trashed.len().max(1)) else { return };
        let id = trashed.run.snapshots[0].id;
        match self.model.runs.restore_trashed(&self.model.key, trashed.run.backup) {
            Ok(_) => drop(self.model.live.insert(id)),
            Err(error) => {
                assert!(trashed.record.purging || self.touched.contains_key(&id), "{error}");
            }
        }
    }

    pub fn purge(&mut self) {
        let report = self.model.purge(true);
        self.counts.merges += report.merged;
        for (id, wait) in &report.waiting {
            let is_harmless = matches!(wait, Wait::Children(_));
            assert!(is_harmless || !self.touched.is_empty(), "{id}: {wait}");
        }
    }

    pub fn pin(&mut self, which: usize) {
        let Some(held) = self.pick(which) else { return };
        self.retention().pin(&held).unwrap();
        self.pinned.insert(held.snapshot().id);
    }

    pub fn unpin(&mut self, which: usize) {
        let Some(held) = self.pick(which) else { return };
        self.retention().unpin(&held).unwrap();
        self.pinned.remove(&held.snapshot().id);
    }

    /// Carries a plan out that keeps two good runs and what is pinned.
    pub fn thin(&mut self) {
        let retention = self.retention();
        let Some(machine) = self.model.runs.machine(&self.model.key) else { return };
        let carried = retention.carry_out(&machine, true);
        assert!(carried.is_ok() || !self.touched.is_empty(), "{carried:?}");
        self.forget_dropped();
        let gone = self.pinned.iter().find(|id| !self.model.live.contains(id));
        assert_eq!(gone, None, "a pinned snapshot");
        self.purge();
    }

    /// Checks all images, as the background check does.
    pub fn verify(&mut self) {
        let begun_ms = now_ms();
        for checked in 0.. {
            let Some(held) = self.model.runs.next_to_check(begun_ms, &|_| false) else { break };
            let limit = Limit::new(0, CancellationToken::new(), || false);
            let found = check_image(&self.model.runs, &held, Way::GoOn, &limit).unwrap();
            let is_touched = self.touched.contains_key(&held.snapshot().id);
            assert!(is_touched || found.is_none(), "{}: {found:?}", held.snapshot().image);
            assert!(checked < 100, "the check has no end");
        }
        // Links whose merge has begun and waits are not looked at.
        let trashed = self.model.runs.trashed(&self.model.key);
        self.is_known |= !trashed.iter().any(|trashed| trashed.record.purging);
    }

    pub fn damage(&mut self, link: usize, target: Target, harm: Harm) {
        let Some(machine) = self.model.runs.machine(&self.model.key) else { return };
        let trashed = self.model.runs.trashed(&self.model.key);
        let trashed = trashed.iter().flat_map(|trashed| Held::all(&trashed.run));
        let links: Vec<Held> = machine.snapshots().into_iter().chain(trashed).collect();
        let Some(held) = links.get(link % links.len().max(1)) else { return };
        let (folder, snapshot) = (self.model.folder.join("user/machine"), held.snapshot());
        let file = match target {
            Target::Image => snapshot.image.clone(),
            Target::Table => snapshot.table.clone(),
            Target::Manifest => format!(".runs/{:08}.json", held.run.sequence),
        };
        let path = folder.join(file);
        if !path.exists() {
            return;
        }
        let is_data = is_data_of(&folder, held);
        let place = harm.happen(&path);
        let is_one_block = matches!(target, Target::Image) && place.is_some_and(is_data);
        let below = |held: &&Held| {
            let chain = machine.chain(held.snapshot().id);
            chain.is_none_or(|chain| chain.iter().any(|link| link.snapshot().id == snapshot.id))
        };
        let harmed: Vec<_> = links.iter().filter(below).map(|held| held.snapshot().id).collect();
        if is_one_block {
            harmed.iter().for_each(|id| self.assert_one_more_is_lost(*id));
        }
        self.touched.extend(harmed.into_iter().map(|id| (id, false)));
        self.is_known = false;
        self.counts.damages += 1;
    }

    /// Of a whole snapshot a damaged byte of data costs one block.
    fn assert_one_more_is_lost(&self, id: SnapshotId) {
        if self.model.live.contains(&id) && !self.touched.contains_key(&id) {
            let lost = self.lost_of(&self.model.runs.snapshot(id).unwrap()).unwrap();
            assert!(lost.blocks() <= 1, "{lost:?}");
        }
    }

    pub fn restart(&mut self) {
        self.model.runs.save_health();
        self.model.reopen();
    }

    /// All that is listed is right, or says what it has lost.
    pub fn check(&mut self) {
        let there = self.there();
        let ids: BTreeSet<_> = there.iter().map(|held| held.snapshot().id).collect();
        for id in ids.symmetric_difference(&self.model.live) {
            assert!(self.touched.contains_key(id), "{id}: listed or not, against the model");
        }
        for held in &there {
            let id = held.snapshot().id;
            match self.touched.get(&id) {
                None => self.model.check_opened(&self.model.open(id)),
                Some(true) => {
                    let lost = self.lost_of(held).unwrap_or_else(|error| panic!("{id}: {error}"));
                    assert!(lost.is_empty(), "{id}, which was healed: {lost:?}");
                }
                Some(false) => self.check_touched(held),
            }
        }
    }

    fn check_touched(&mut self, held: &Held) {
        let lost = self.lost_of(held);
        let count = lost.as_ref().map_or(u64::MAX, BlockRanges::blocks);
        self.counts.with_losses += usize::from(count > 0);
        let machine = self.model.runs.machine(&self.model.key).unwrap();
        let found = machine.health_of(held.snapshot().id).0;
        if self.is_known {
            assert!(count == u64::MAX || count <= found, "{count} lost, {found} found");
            assert!(count == 0 || found > 0, "{lost:?} lost, nothing found");
        }
    }

    /// The blocks of a snapshot that are said to be lost; the others are right. An error: it can't be opened.
    fn lost_of(&self, held: &Held) -> Result<BlockRanges, String> {
        let opened = self.model.runs.open_for_reading(held).map_err(|error| error.to_string())?;
        let content = &self.model.contents[&held.snapshot().id];
        assert_eq!(content.len() as u64, held.snapshot().size_bytes);
        let mut lost = BlockRanges::default();
        let mut salvage = Salvage::new(&opened);
        let mut buffer = vec![0; BLOCK];
        let blocks = block_count(content.len() as u64);
        for segment in 0..blocks.div_ceil(SEGMENT_BLOCKS) {
            let first = segment * SEGMENT_BLOCKS;
            let end = blocks.min(first + SEGMENT_BLOCKS);
            for (block, hash) in (first..end).zip(hashes_of(&opened, segment)) {
                let Some(hash) = hash else {
                    lost.insert(block..block + 1);
                    continue;
                };
                let bytes = &mut buffer[..block_len(content.len() as u64, block)];
                let is_zero = hash == zero_hash(bytes.len());
                match is_zero || salvage.read(block, hash, bytes) {
                    true if is_zero => bytes.fill(0),
                    true => {}
                    false => {
                        lost.insert(block..block + 1);
                        continue;
                    }
                }
                let at = block as usize * BLOCK;
                assert!(*bytes == content[at..at + bytes.len()], "block {block} is wrong");
            }
        }
        Ok(lost)
    }

    /// 7-Zip and libvhdi read what no damage has touched.
    pub fn read_by_others(&mut self) {
        let folder = self.model.folder.join("user/machine");
        let machine = self.model.runs.machine(&self.model.key).unwrap();
        let whole = self.there().into_iter().map(|held| held.snapshot().id);
        let whole: Vec<_> = whole.filter(|id| !self.touched.contains_key(id)).collect();
        for id in whole.into_iter().take(MOST_READ) {
            let chain = machine.chain(id).unwrap();
            let files: Vec<_> =
                chain.iter().rev().map(|held| folder.join(&held.snapshot().image)).collect();
            // Images are made of whole blocks.
            let mut content = self.model.contents[&id].to_vec();
            content.resize(content.len().next_multiple_of(BLOCK), 0);
            let leaf = files.last().unwrap();
            assert_same(&run(&mut seven_zip(leaf), INSTALL_7Z).stdout, &content, "7z");
            assert_same(&libvhdi(&files, ""), &content, "libvhdi");
            self.counts.read_by_others += 1;
        }
    }

    fn there(&self) -> Vec<Held> {
        let machine = self.model.runs.machine(&self.model.key);
        machine.map(|machine| machine.snapshots()).unwrap_or_default()
    }

    fn pick(&self, which: usize) -> Option<Held> {
        let there = self.there();
        there.get(which % there.len().max(1)).cloned()
    }

    fn forget_dropped(&mut self) {
        for trashed in self.model.runs.trashed(&self.model.key) {
            trashed.run.snapshots.iter().for_each(|snapshot| {
                self.model.live.remove(&snapshot.id);
            });
        }
    }

    fn retention(&self) -> Retention {
        let mut settings = Settings::default();
        let rules = &mut settings.retention;
        (rules.keep_all_days, rules.daily, rules.weekly, rules.monthly) = (0, 0, 0, 0);
        rules.at_least = 2;
        Retention::new(self.model.runs.clone(), settings)
    }
}

/// The hashes of a segment, those that tables which can be read name.
fn hashes_of(opened: &OpenedSnapshot, segment: u64) -> Vec<Option<BlockHash>> {
    match opened.tables.segment(segment) {
        Ok(hashes) => hashes.into_iter().map(Some).collect(),
        Err(_) => opened.tables.known(segment),
    }
}

/// Which places of an image hold data of the disk.
fn is_data_of(folder: &Path, held: &Held) -> impl Fn(u64) -> bool + use<> {
    let image = open_image(&Disk::default(), folder, held.snapshot());
    let extents = image.ok().and_then(|image| image.extents(0..held.snapshot().size_bytes).ok());
    let extents = extents.unwrap_or_default();
    move |place| {
        extents.iter().any(|(range, source)| match source {
            Source::File(at) => (*at..*at + (range.end - range.start)).contains(&place),
            _ => false,
        })
    }
}
