//! Merges: a link goes out of a chain, and its one remaining trace is the child that took its blocks.
//!
//! The merged file is the link's file with the child's changed blocks over it. It carries the child's id and gets the child's
//! name, so nothing above needs a change: the child's manifest alone names another parent. Cost: what the child holds, not
//! what the link or the disk does.
//!
//! 1. [`Pair::prepare`] makes the merged files. Where the file system shares blocks between files, they are clones with names of
//!    their own, and link and child stay as they are. Else the link's own files take the blocks in: what the child covers
//!    changes there, what shows through the child never does, so the chain reads the same at every moment.
//! 2. An [`Intent`] says what is still to be done; once it is durable, the merge will happen.
//! 3. [`Switch::rename`] gives the files the child's id and names, then the manifests follow (`store/merges.rs`).
//!
//! A crash before 2 leaves a chain that reads as before, and files `*.merge.partial` that the next start removes. A crash
//! after it is finished at the next start. Every step may be repeated. Blocks that are copied are checked against their
//! hashes first: damage stops a merge, it never spreads.

use std::{
    io,
    ops::AddAssign,
    path::{Path, PathBuf},
};

use janus_proto::ids::{BLOCK_BYTES, SnapshotId};

use super::{
    Snapshot, stub,
    table::{self, Table, TableError},
};
use crate::{
    image::{Absorber, Image, ImageError, set_identity},
    storage::{Access, Cloning, Disk, File},
};

mod blocks;
mod intent;

pub use intent::{Ending, Intent, Switch};

/// Ending of merged files before they have their names.
pub const PARTIAL: &str = ".merge.partial";

/// Why a merge did not happen. The chain reads as before.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A stored block is not what was backed up; merging it would hide where it was.
    #[error(
        "block {block} of snapshot {snapshot} is damaged: its image can't be merged before that is healed"
    )]
    BlockDamaged {
        /// Whose image holds it.
        snapshot: SnapshotId,
        /// Number of the block.
        block: u64,
    },
    /// Image and table hold different blocks.
    #[error("image and table of snapshot {snapshot} hold different blocks in segment {segment}")]
    Disagree {
        /// Whose.
        snapshot: SnapshotId,
        /// Where.
        segment: u64,
    },
    /// An image.
    #[error("image {}: {source}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ImageError,
    },
    /// A table.
    #[error("table {}: {source}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TableError,
    },
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody wants to stop.
    #[error("stopped; it goes on from here next time")]
    Stopped,
}

impl MergeError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    fn image(path: &Path) -> impl Fn(ImageError) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Image { path: path.clone(), source }
    }

    fn table(path: &Path) -> impl Fn(TableError) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Table { path: path.clone(), source }
    }
}

/// How merged files are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As files that share their blocks with those of link and child.
    Clone,
    /// By writing into the link's files.
    InPlace,
}

/// A link and the child that takes its place, in a machine's folder.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// Where it lies.
    pub storage: &'a Disk,
    /// The machine's folder.
    pub folder: &'a Path,
    /// What goes.
    pub link: &'a Snapshot,
    /// What stays.
    pub child: &'a Snapshot,
}

/// What a merge moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes of blocks that were read, checked and written.
    pub copied_bytes: u64,
    /// Bytes of blocks that two files share now.
    pub shared_bytes: u64,
    /// Bytes written to the table.
    pub table_bytes: u64,
}

impl AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.copied_bytes += other.copied_bytes;
        self.shared_bytes += other.shared_bytes;
        self.table_bytes += other.table_bytes;
    }
}

impl Pair<'_> {
    /// Bytes that merging needs before it frees any.
    ///
    /// # Errors
    /// When a table can't be read.
    pub fn needed_bytes(&self, way: Way) -> Result<u64, MergeError> {
        let (parent, child) = (self.open_table(self.link)?, self.open_table(self.child)?);
        let shared = (way == Way::Clone).then_some(blocks::LEAST_SHARED / BLOCK_BYTES);
        table::needed_bytes(&parent, &child, shared)
            .map_err(MergeError::table(&self.folder.join(&self.child.table)))
    }

    /// Whether the file system shares blocks between files here.
    ///
    /// # Errors
    /// As the file system says.
    pub fn can_clone(&self) -> Result<bool, MergeError> {
        // A name of its own: others may be merging.
        let name = format!("{}.{}", self.child.table, uuid::Uuid::now_v7().simple());
        let probe = self.partial(&name);
        let clone = self.clone_file(&self.folder.join(&self.link.table), &probe)?;
        self.storage.remove(&probe).map_err(MergeError::io("remove", &probe))?;
        Ok(clone.is_some())
    }

    /// Makes the merged files, synced. May take minutes; ends with `Stopped` soon after `stop` says true.
    ///
    /// # Errors
    /// As [`MergeError`] says. The chain reads as before.
    pub fn prepare(
        &self,
        way: Way,
        stop: &dyn Fn() -> bool,
    ) -> Result<(Switch, Moved), MergeError> {
        let made = self.make(way, stop);
        if made.is_err() {
            for name in [&self.child.image, &self.child.table] {
                let _ = self.storage.remove(&self.partial(name));
            }
        }
        made
    }

    fn make(&self, way: Way, stop: &dyn Fn() -> bool) -> Result<(Switch, Moved), MergeError> {
        let (parent, child) = (self.open_table(self.link)?, self.open_table(self.child)?);
        let (image, mut moved) = self.make_image(way, &child, stop)?;
        let image_from = image.file().path();
        let metadata = image.file().metadata().map_err(MergeError::io("read", image_from))?;
        let (table_from, table_header) = self.make_table(way, &parent, &child, &mut moved)?;
        let merged = Snapshot {
            parent: self.link.parent,
            image_length_bytes: metadata.length_bytes,
            image_allocated_bytes: metadata.allocated_bytes,
            ..self.child.clone()
        };
        // The names of new files must be there after a crash, or the intent would be taken for done.
        for path in [image_from, &table_from] {
            let folder = path.parent().unwrap_or(self.folder);
            self.storage.sync_folder(folder).map_err(MergeError::io("sync", folder))?;
        }
        let switch = Switch {
            merged,
            parent: image.parent().map(|parent| parent.data_write),
            image_from: self.relative(image_from),
            table_from: self.relative(&table_from),
            table_header: hex::encode(table_header),
        };
        Ok((switch, moved))
    }

    fn make_image(
        &self,
        way: Way,
        table: &Table,
        stop: &dyn Fn() -> bool,
    ) -> Result<(Absorber, Moved), MergeError> {
        let child_path = self.folder.join(&self.child.image);
        let file = self.storage.open_data(&child_path, Access::Read);
        let child = Image::open(file.map_err(MergeError::io("open", &child_path))?)
            .map_err(MergeError::image(&child_path))?;
        let link_path = self.link_path()?;
        let path = match way {
            Way::InPlace => link_path,
            Way::Clone => self.cloned(&link_path, &self.child.image)?,
        };
        // Through the cache: of many short writes, each to a place of its own, the system sends as many at once as the disk takes.
        let file = self.storage.open(&path, Access::Write);
        let file = file.map_err(MergeError::io("open", &path))?;
        let damaged = MergeError::image(&path);
        let least_bytes = self.link.image_length_bytes;
        let mut target = Absorber::open(file, least_bytes).map_err(&damaged)?;
        if (target.geometry(), target.format()) != (child.geometry(), child.format()) {
            let reason = "parent and child are of different disks".to_owned();
            return Err(damaged(ImageError::Impossible { reason }));
        }
        let mut source = blocks::Source {
            snapshot: self.child.id,
            disk_bytes: self.child.size_bytes,
            image: &child,
            table,
            path: &child_path,
            stop,
        };
        let moved = source.move_into(&mut target, &path, way)?;
        target.file().sync_all().map_err(MergeError::io("sync", &path))?;
        if way == Way::Clone {
            set_identity(target.file(), self.child.data_write).map_err(&damaged)?;
        }
        Ok((target, moved))
    }

    /// The link's image; of a stub too, when the child has all that it lacks.
    fn link_path(&self) -> Result<PathBuf, MergeError> {
        let path = self.folder.join(&self.link.image);
        let failed = MergeError::io("look for", &path);
        stub::place(self.storage, path).map_err(failed)
    }

    fn make_table(
        &self,
        way: Way,
        parent: &Table,
        child: &Table,
        moved: &mut Moved,
    ) -> Result<(PathBuf, Vec<u8>), MergeError> {
        let (link_path, partial) =
            (self.folder.join(&self.link.table), self.partial(&self.child.table));
        let synced = |file: &File, path| file.sync_all().map_err(MergeError::io("sync", path));
        if parent.is_worth_rewriting(child) {
            let file = self.create(&partial)?;
            let file = table::rewrite(file, parent, child).map_err(MergeError::table(&partial))?;
            synced(&file, &partial)?;
            let metadata = file.metadata().map_err(MergeError::io("read", &partial))?;
            moved.table_bytes += metadata.length_bytes;
            let header = Table::read_header(&file).map_err(MergeError::table(&partial))?;
            return Ok((partial, header.to_vec()));
        }
        let path = match way {
            Way::InPlace => link_path,
            Way::Clone => self.cloned(&link_path, &self.child.table)?,
        };
        let file = self.storage.open(&path, Access::Write);
        let file = file.map_err(MergeError::io("open", &path))?;
        let damaged = MergeError::table(&path);
        let appended = table::append(&file, parent, child).map_err(&damaged)?;
        moved.table_bytes += appended.written;
        synced(&file, &path)?;
        Ok((path, appended.header.to_vec()))
    }

    fn open_table(&self, snapshot: &Snapshot) -> Result<Table, MergeError> {
        let path = self.folder.join(&snapshot.table);
        let file = self.storage.open(&path, Access::Read);
        Table::open(file.map_err(MergeError::io("open", &path))?).map_err(MergeError::table(&path))
    }

    /// The partial file that becomes `name`, as a clone of the one at `from`.
    fn cloned(&self, from: &Path, name: &str) -> Result<PathBuf, MergeError> {
        let path = self.partial(name);
        let unsupported = || MergeError::io("clone", from)(io::ErrorKind::Unsupported.into());
        self.clone_file(from, &path)?.ok_or_else(unsupported)?;
        Ok(path)
    }

    /// Makes a file at `to` that shares all blocks with the one at `from`; `None` where the file system can't.
    fn clone_file(&self, from: &Path, to: &Path) -> Result<Option<()>, MergeError> {
        let source = self.storage.open(from, Access::Read).map_err(MergeError::io("open", from))?;
        let cloned = self.create(to)?.clone_all(&source);
        Ok(match cloned.map_err(MergeError::io("clone", from))? {
            Cloning::Done => Some(()),
            Cloning::Unsupported => None,
        })
    }

    fn create(&self, path: &Path) -> Result<File, MergeError> {
        let file =
            self.storage.open(path, Access::Create).map_err(MergeError::io("create", path))?;
        file.set_len(0).map_err(MergeError::io("cut", path))?;
        Ok(file)
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}{PARTIAL}"))
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(self.folder).unwrap_or(path).to_string_lossy().into_owned()
    }
}
