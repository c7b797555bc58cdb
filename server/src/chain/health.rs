//! What is known of a machine's images: when each was last read and compared as a whole, and which blocks it has lost.
//!
//! `<machine>/.health.json` keeps it, old or new after a crash. Losing the file costs nothing but knowledge: the images are
//! checked again. Images are named by their data write id, which names their content, so what is known of an image never
//! counts for another one that took its file name.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
};

use janus_proto::ids::{DiskId, MachineKey, SnapshotId, block_count};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    FORMAT, Held, History, Snapshot,
    opened::open_table,
    ranges::{BlockRanges, segment_blocks},
    store::{StoreError, read, read_or_put_aside, write},
    stub,
};
use crate::storage::Disk;

const FILE: &str = ".health.json";
/// Damaged ranges kept of one image. With more the whole image counts as damaged.
pub const MAX_DAMAGED_RANGES: usize = 4096;
/// Damaged ranges kept of all images of a machine, so that the file stays short.
const MAX_KEPT_RANGES: usize = 64 * MAX_DAMAGED_RANGES / 2;

/// Damage of one image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Blocks of the disk that this image answers wrongly or not at all.
    pub blocks: BlockRanges,
    /// Why nothing may be built on this image any more; `None`: sending its damaged blocks again heals the chain.
    pub unusable: Option<String>,
}

impl Damage {
    /// True when nothing is wrong.
    pub fn is_none(&self) -> bool {
        self.blocks.is_empty() && self.unusable.is_none()
    }

    /// Adds what else was found.
    pub fn extend(&mut self, other: &Self) {
        self.blocks.extend(&other.blocks);
        if self.unusable.is_none() {
            self.unusable.clone_from(&other.unusable);
        }
    }

    /// Of an image that is lost as a whole.
    pub fn whole(snapshot: &Snapshot, reason: impl Into<String>) -> Self {
        let blocks = BlockRanges::all(block_count(snapshot.size_bytes));
        Self { blocks, unusable: Some(reason.into()) }
    }

    /// Makes too many ranges one.
    pub fn bound(&mut self, snapshot: &Snapshot, most: usize) {
        if self.blocks.len() > most {
            *self = Self::whole(snapshot, "it is damaged in too many places");
        }
    }
}

/// A check of an image that is not over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenCheck {
    /// Unix milliseconds of its begin.
    pub began_ms: i64,
    /// Segments below this one are done.
    pub next_segment: u64,
    /// What was found so far.
    pub found: Damage,
}

/// What is known of one image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageHealth {
    /// Unix milliseconds at which the newest check of all of it began; 0: it was never checked.
    pub proven_ms: i64,
    /// What is wrong with it.
    pub damage: Damage,
    /// How far a new check is.
    pub check: Option<OpenCheck>,
    /// Of a stub: the blocks that aren't here yet. A range may have blocks of zeros too, and none of them is damage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<BlockRanges>,
}

/// What is known of the images and snapshots of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// By the images' data write ids. Absent: nothing is known.
    pub images: BTreeMap<Uuid, ImageHealth>,
    /// Damaged blocks of each damaged snapshot.
    pub snapshots: BTreeMap<SnapshotId, u64>,
    /// Blocks that each incomplete snapshot lacks, since a stub of its chain does.
    pub incomplete: BTreeMap<SnapshotId, u64>,
}

#[derive(Serialize, Deserialize)]
struct HealthFile {
    format: u32,
    machine: MachineKey,
    images: BTreeMap<Uuid, ImageHealth>,
    snapshots: BTreeMap<SnapshotId, u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    incomplete: BTreeMap<SnapshotId, u64>,
}

impl Health {
    /// Reads what was known of the machine whose folder this is.
    ///
    /// # Errors
    /// When a newer program wrote it. Anything else that is wrong costs what was known.
    pub fn load(storage: &Disk, folder: &Path, machine: &MachineKey) -> Result<Self, StoreError> {
        match read_or_put_aside::<HealthFile>(storage, &folder.join(FILE)) {
            Ok(file) => Ok(Self::of(file, machine)),
            Err(error @ StoreError::Newer { .. }) => Err(error),
            Err(error) => {
                tracing::error!(%error, "what was known of the images is lost: they are checked again");
                Ok(Self::default())
            }
        }
    }

    /// What was known, as far as it can be read now. Changes nothing.
    ///
    /// # Errors
    /// As [`Self::load`], and as the file system says.
    pub(super) fn read(
        storage: &Disk,
        folder: &Path,
        machine: &MachineKey,
    ) -> Result<Self, StoreError> {
        match read::<HealthFile>(storage, &folder.join(FILE)) {
            Ok(file) => Ok(Self::of(file, machine)),
            Err(StoreError::Damaged { .. }) => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// What a file says, if it is of this machine.
    fn of(file: Option<HealthFile>, machine: &MachineKey) -> Self {
        let own = file.filter(|file| file.machine == *machine);
        let known = own.map(|file| Self {
            images: file.images,
            snapshots: file.snapshots,
            incomplete: file.incomplete,
        });
        known.unwrap_or_default()
    }

    /// Keeps it.
    ///
    /// # Errors
    /// As the file system says.
    pub fn save(
        &self,
        storage: &Disk,
        folder: &Path,
        machine: &MachineKey,
    ) -> Result<(), StoreError> {
        let file = HealthFile {
            format: FORMAT,
            machine: machine.clone(),
            images: self.images.clone(),
            snapshots: self.snapshots.clone(),
            incomplete: self.incomplete.clone(),
        };
        write(storage, &folder.join(FILE), &file)
    }

    /// What is known of an image.
    pub fn image(&self, snapshot: &Snapshot) -> Option<&ImageHealth> {
        self.images.get(&snapshot.data_write)
    }

    /// Damage of an image, if it has any.
    pub fn damage(&self, snapshot: &Snapshot) -> Option<&Damage> {
        self.image(snapshot).map(|image| &image.damage).filter(|damage| !damage.is_none())
    }

    /// Blocks that a stub lacks; `None`: it is none.
    pub fn missing(&self, snapshot: &Snapshot) -> Option<&BlockRanges> {
        self.image(snapshot)?.missing.as_ref()
    }

    /// True when nothing is damaged, and nothing missing.
    pub fn is_whole(&self) -> bool {
        let is_whole = |image: &ImageHealth| image.damage.is_none() && image.missing.is_none();
        self.snapshots.is_empty()
            && self.incomplete.is_empty()
            && self.images.values().all(is_whole)
    }

    /// Finds stubs of which it isn't known what they lack: what was known is lost, or a crash came first. Disks that can't be read
    /// are left out.
    ///
    /// # Errors
    /// As the file system says.
    pub(super) fn look_for_stubs(
        &mut self,
        storage: &Disk,
        folder: &Path,
        history: &History,
        is_readable: &dyn Fn(&DiskId) -> bool,
    ) -> io::Result<()> {
        let mut found = Vec::new();
        for held in history.links() {
            let snapshot = held.snapshot();
            let is_known = snapshot.parent.is_some() || self.missing(snapshot).is_some();
            if !is_known && is_readable(&snapshot.disk) && stub::is_here(storage, folder, snapshot)?
            {
                found.push((snapshot.data_write, stub::all_blocks(storage, folder, snapshot)));
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        for (image, missing) in found {
            self.images.entry(image).or_default().missing = Some(missing);
        }
        self.count(storage, folder, history);
        Ok(())
    }

    /// Forgets images that are gone, and bounds what is kept of the others.
    pub fn tidy(&mut self, history: &History) {
        let held: BTreeMap<Uuid, Snapshot> = history
            .links()
            .map(|held| (held.snapshot().data_write, held.snapshot().clone()))
            .collect();
        self.images.retain(|image, _| held.contains_key(image));
        let mut kept = 0;
        for (image, known) in &mut self.images {
            let Some(snapshot) = held.get(image) else { continue };
            let most = MAX_DAMAGED_RANGES.min(MAX_KEPT_RANGES - kept);
            known.damage.bound(snapshot, most);
            if let Some(check) = &mut known.check {
                check.found.bound(snapshot, most);
            }
            if let Some(missing) = &mut known.missing {
                missing.coarsen(MAX_DAMAGED_RANGES);
            }
            kept = MAX_KEPT_RANGES.min(kept + known.damage.blocks.len());
        }
    }

    /// True when a manifest is missing that a snapshot needs, and that isn't counted yet.
    pub fn lacks_orphans(&self, history: &History) -> bool {
        history.newest_first().any(|held| {
            let parent = held.snapshot().parent;
            parent.is_some_and(|parent| history.link(parent).is_none())
                && !self.snapshots.contains_key(&held.snapshot().id)
        })
    }

    /// Counts the damaged and the missing blocks of all snapshots anew. Reads tables, but only of chains that aren't whole.
    pub fn count(&mut self, storage: &Disk, folder: &Path, history: &History) {
        self.incomplete = self.count_missing(storage, folder, history);
        let mut damaged: BTreeMap<SnapshotId, BlockRanges> = BTreeMap::new();
        // A chain of which a table or manifest is lost can't be opened, whatever newer links hold.
        let mut closed: BTreeSet<SnapshotId> = BTreeSet::new();
        for held in history.links_oldest_first() {
            let snapshot = held.snapshot();
            let is_closed_below = snapshot
                .parent
                .is_some_and(|parent| history.link(parent).is_none() || closed.contains(&parent));
            let blocks = if is_closed_below || self.has_lost_its_table(storage, folder, snapshot) {
                closed.insert(snapshot.id);
                BlockRanges::all(block_count(snapshot.size_bytes))
            } else {
                let below = snapshot.parent.and_then(|parent| damaged.get(&parent).cloned());
                self.seen_through(storage, folder, held, below.unwrap_or_default())
            };
            if !blocks.is_empty() {
                damaged.insert(snapshot.id, blocks);
            }
        }
        damaged.retain(|id, _| history.snapshot(*id).is_some());
        self.snapshots = damaged.into_iter().map(|(id, blocks)| (id, blocks.blocks())).collect();
    }

    fn count_missing(
        &self,
        storage: &Disk,
        folder: &Path,
        history: &History,
    ) -> BTreeMap<SnapshotId, u64> {
        let mut missing: BTreeMap<SnapshotId, BlockRanges> = BTreeMap::new();
        for held in history.links_oldest_first() {
            let snapshot = held.snapshot();
            let below = snapshot.parent.and_then(|parent| missing.get(&parent).cloned());
            let blocks = self.missing_through(storage, folder, held, below.unwrap_or_default());
            if !blocks.is_empty() {
                missing.insert(snapshot.id, blocks);
            }
        }
        missing.retain(|id, _| history.snapshot(*id).is_some());
        missing.into_iter().map(|(id, blocks)| (id, blocks.blocks())).collect()
    }

    /// Blocks that a snapshot lacks whose parent lacks these.
    pub fn missing_through(
        &self,
        storage: &Disk,
        folder: &Path,
        held: &Held,
        below: BlockRanges,
    ) -> BlockRanges {
        through(storage, folder, held, below, self.missing(held.snapshot()))
    }

    fn has_lost_its_table(&self, storage: &Disk, folder: &Path, snapshot: &Snapshot) -> bool {
        let is_unusable = self.damage(snapshot).is_some_and(|damage| damage.unusable.is_some());
        is_unusable && open_table(storage, folder, snapshot).is_err()
    }

    /// What will be known of a child's image once the image it builds on is merged into it.
    pub fn of_merge(
        &self,
        storage: &Disk,
        folder: &Path,
        link: &Snapshot,
        child: &Held,
    ) -> ImageHealth {
        let known = |snapshot| self.image(snapshot).cloned().unwrap_or_default();
        let (of_link, of_child) = (known(link), known(child.snapshot()));
        let blocks = self.seen_through(storage, folder, child, of_link.damage.blocks);
        let unusable = of_child.damage.unusable.or(of_link.damage.unusable);
        let proven_ms = of_link.proven_ms.min(of_child.proven_ms);
        ImageHealth { proven_ms, damage: Damage { blocks, unusable }, ..ImageHealth::default() }
    }

    /// Damaged blocks of the snapshot at the end of a chain, newest first.
    pub fn of_chain(&self, storage: &Disk, folder: &Path, chain: &[Held]) -> BlockRanges {
        let add = |below, held| self.seen_through(storage, folder, held, below);
        chain.iter().rev().fold(BlockRanges::default(), add)
    }

    /// The same of those that are missing, since a stub of the chain isn't full.
    pub fn missing_of_chain(&self, storage: &Disk, folder: &Path, chain: &[Held]) -> BlockRanges {
        let add = |below, held| self.missing_through(storage, folder, held, below);
        chain.iter().rev().fold(BlockRanges::default(), add)
    }

    /// Since when all images of a snapshot's chain are proven; 0: not all are.
    pub fn proven_ms(&self, history: &History, snapshot: SnapshotId) -> i64 {
        let chain = history.chain(snapshot).unwrap_or_default();
        let proven = |held: &Held| self.image(held.snapshot()).map_or(0, |image| image.proven_ms);
        chain.iter().map(proven).min().unwrap_or(0)
    }

    /// Why nothing may be built on this chain.
    pub fn unusable(&self, chain: &[Held]) -> Option<&str> {
        chain.iter().find_map(|held| self.damage(held.snapshot())?.unusable.as_deref())
    }

    /// Damaged blocks of a snapshot whose parent has these: without those that its own image holds, with those that this has
    /// lost.
    fn seen_through(
        &self,
        storage: &Disk,
        folder: &Path,
        held: &Held,
        below: BlockRanges,
    ) -> BlockRanges {
        let own = self.damage(held.snapshot()).map(|damage| &damage.blocks);
        through(storage, folder, held, below, own)
    }
}

/// What is wrong `below`, without the blocks that a snapshot's own image holds, with those that are wrong in that.
fn through(
    storage: &Disk,
    folder: &Path,
    held: &Held,
    mut below: BlockRanges,
    own: Option<&BlockRanges>,
) -> BlockRanges {
    if !below.is_empty() {
        take_own_out(storage, folder, held.snapshot(), &mut below);
    }
    if let Some(own) = own {
        below.extend(own);
    }
    below
}

/// Takes the blocks that an image holds out of `blocks`, as far as its table can be read.
fn take_own_out(storage: &Disk, folder: &Path, snapshot: &Snapshot, blocks: &mut BlockRanges) {
    let Ok(table) = open_table(storage, folder, snapshot) else { return };
    for (segment, _) in table.digests() {
        if blocks.intersects(&segment_blocks(segment))
            && let Ok(Some(page)) = table.page(segment)
        {
            blocks.remove_marked(segment, &page.present);
        }
    }
}
