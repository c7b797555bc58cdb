//! Tables of other servers' snapshots, mirrored here so that they are known when their server is away: what such a snapshot
//! consists of, and how much of it this server has at the same place.
//!
//! A task ([`follow`]) reads them through janus, newest first, and keeps them on a shelf ([`shelf`]) below the image path. They
//! are hints that can be read again: what is damaged or doesn't fit is dropped, never repaired. Only tables of disks that this
//! server has snapshots of itself are read: to others it could add nothing.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use janus_proto::ids::{MachineKey, SnapshotId};

use crate::{
    chain::{
        Held,
        store::StoreError,
        table::{TableError, TableStack},
    },
    config::Size,
    runs::Runs,
};

pub mod follow;
pub(crate) mod pull;
pub mod record;
pub mod share;
pub mod shelf;

use self::{
    record::Description,
    share::Share,
    shelf::{Kept, Shelf},
};

/// Why a mirrored table can't be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// It isn't here, or what it is a difference to isn't.
    #[error("the table of snapshot {id} is not mirrored here")]
    Unknown {
        /// The snapshot.
        id: SnapshotId,
    },
    /// A file failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A record is damaged, or of a newer version.
    #[error(transparent)]
    Record(#[from] StoreError),
    /// A table is damaged, or can't be.
    #[error(transparent)]
    Table(#[from] TableError),
    /// What came is not the snapshot's table.
    #[error("what came is not the table of snapshot {id}")]
    Foreign {
        /// The snapshot.
        id: SnapshotId,
    },
    /// There is no space for it.
    #[error("the space is low: mirrored tables leave the reserve alone")]
    Full,
}

impl MirrorError {
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// The files are to blame, not the moment.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Unknown { .. } | Self::Foreign { .. } | Self::Record(_) => true,
            Self::Table(TableError::Io { source, .. }) | Self::Io { source, .. } => {
                source.kind() == std::io::ErrorKind::NotFound
            }
            Self::Table(_) => true,
            Self::Full => false,
        }
    }
}

/// What is mirrored here, and what of it this server has.
pub struct Mirror {
    runs: Arc<Runs>,
    reserve: Size,
    shelf: Shelf,
}

/// The table of a snapshot that another server has.
#[derive(Debug)]
pub struct OpenedTable {
    /// The snapshot.
    pub description: Description,
    /// Its hashes.
    pub tables: TableStack,
}

impl Mirror {
    /// A mirror below the image path of these runs; empty until [`Mirror::load`].
    pub fn new(runs: Arc<Runs>, reserve: Size) -> Self {
        let shelf = Shelf::new(runs.store().storage().clone(), runs.store().root());
        Self { runs, reserve, shelf }
    }

    /// Reads what is there. Blocks.
    pub fn load(&self) {
        self.shelf.load();
    }

    /// Opens a mirrored table. Blocks.
    ///
    /// # Errors
    /// When it isn't here or is damaged.
    pub fn open(&self, id: SnapshotId) -> Result<OpenedTable, MirrorError> {
        let kept = self.shelf.get(id).ok_or(MirrorError::Unknown { id })?;
        let tables = self.shelf.open(id).inspect_err(|error| self.note(id, error))?;
        Ok(OpenedTable { description: kept.description.clone(), tables })
    }

    /// A table could not be read: it is looked over soon.
    pub fn doubt(&self, id: SnapshotId) {
        self.shelf.doubt(id);
    }

    fn note(&self, id: SnapshotId, error: &MirrorError) {
        if error.is_damage() {
            self.shelf.doubt(id);
        }
    }

    /// Whose snapshot a mirrored table is of.
    pub fn machine_of(&self, id: SnapshotId) -> Option<MachineKey> {
        self.shelf.get(id).map(|kept| kept.description.machine.clone())
    }

    /// The mirrored tables of a machine, newest first, with what this server has of each; `None` while that isn't known.
    pub fn of_machine(&self, machine: &MachineKey) -> Vec<(Description, Option<Arc<Share>>)> {
        let own = self.own(machine);
        let share = |kept: &Kept| {
            let considered = share::considered(&kept.description, &own);
            kept.share().filter(|share| share.considered == considered)
        };
        let all = self.shelf.of_machine(machine);
        all.iter().map(|kept| (kept.description.clone(), share(kept))).collect()
    }

    /// This server's own snapshots of a machine.
    fn own(&self, machine: &MachineKey) -> Vec<Held> {
        self.runs.machine(machine).map(|machine| machine.snapshots()).unwrap_or_default()
    }

    /// Tables of which it isn't known, or not any more, what this server has of them, the newest first.
    fn uncounted(&self) -> Vec<Arc<Kept>> {
        let mut own: BTreeMap<MachineKey, Vec<Held>> = BTreeMap::new();
        let mut all = self.shelf.all();
        all.retain(|kept| {
            let machine = &kept.description.machine;
            let own = own.entry(machine.clone()).or_insert_with(|| self.own(machine));
            let considered = share::considered(&kept.description, own);
            kept.share().is_none_or(|share| share.considered != considered)
        });
        all
    }

    /// Counts what this server has of a table. Blocks, for as long as it takes to read what differs.
    fn count(&self, kept: &Kept, is_over: &dyn Fn() -> bool) -> Result<(), MirrorError> {
        let Description { id, machine, .. } = &kept.description;
        let considered = share::considered(&kept.description, &self.own(machine));
        let own = self.runs.machine(machine);
        let own =
            own.map(|machine| self.runs.open_tables(&machine, &considered)).unwrap_or_default();
        let counted = self.shelf.open(*id).and_then(|table| {
            Ok(share::count(&table, &own, is_over)?.map(|counts| Share { considered, ..counts }))
        });
        if let Some(share) = counted.inspect_err(|error| self.note(*id, error))? {
            kept.set_share(share);
        }
        Ok(())
    }
}
