//! Merges: a link goes out of a chain, and its one remaining trace is the child that took its blocks.
//!
//! The merged file is the link's file with the child's changed blocks over it. It carries the child's id and gets the child's
//! name, so nothing above needs a change: the child's manifest alone names another parent. Cost: what the child holds, not
//! what the link or the disk does.
//!
//! 1. [`prepare`] makes the merged files. Where the file system shares blocks between files, they are clones with names of
//!    their own, and link and child stay as they are. Else the link's own files take the blocks in: what the child covers
//!    changes there, what shows through the child never does, so the chain reads the same at every moment.
//! 2. An [`Intent`] says what is still to be done; once it is durable, the merge will happen.
//! 3. [`Switch::rename`] gives the files the child's id and names, then the manifests follow (`store/merges.rs`).
//!
//! A crash before 2 leaves a chain that reads as before, and files `*.merge.partial` that the next start removes. A crash
//! after it is finished at the next start. Every step may be repeated. Blocks that are copied are checked against their
//! hashes first: damage stops a merge, it never spreads.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::AddAssign,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use janus_proto::{
    direct::DirectFile,
    ids::{BLOCK_BYTES, SnapshotId},
};

use uuid::Uuid;

use super::{
    Snapshot,
    table::{self, Table, TableError},
};
use crate::{
    image::{
        ImageError,
        vhdx::{Absorber, VhdxImage, set_identity},
    },
    storage,
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
        let probe = self.partial(&self.child.table);
        let is_clone = clone(&self.folder.join(&self.link.table), &probe)?.is_some();
        storage::remove(&probe).map_err(MergeError::io("remove", &probe))?;
        Ok(is_clone)
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
                let _ = storage::remove(&self.partial(name));
            }
        }
        made
    }

    fn make(&self, way: Way, stop: &dyn Fn() -> bool) -> Result<(Switch, Moved), MergeError> {
        let (parent, child) = (self.open_table(self.link)?, self.open_table(self.child)?);
        let (image_from, file, parent_id, mut moved) = self.make_image(way, &child, stop)?;
        let metadata = file.metadata().map_err(MergeError::io("read", &image_from))?;
        let (table_from, table_header) = self.make_table(way, &parent, &child, &mut moved)?;
        let merged = Snapshot {
            parent: self.link.parent,
            image_length_bytes: metadata.len(),
            image_allocated_bytes: metadata.blocks() * 512,
            ..self.child.clone()
        };
        let image_from = self.relative(&image_from);
        let switch = Switch {
            merged,
            parent: parent_id,
            image_from,
            table_from: self.relative(&table_from),
            table_header: table_header.map(hex::encode),
        };
        Ok((switch, moved))
    }

    fn make_image(
        &self,
        way: Way,
        table: &Table,
        stop: &dyn Fn() -> bool,
    ) -> Result<(PathBuf, File, Option<Uuid>, Moved), MergeError> {
        let child_path = self.folder.join(&self.child.image);
        let file = File::open(&child_path).map_err(MergeError::io("open", &child_path))?;
        let child = VhdxImage::open(DirectFile::for_reading(file, &child_path))
            .map_err(MergeError::image(&child_path))?;
        let link_path = self.folder.join(&self.link.image);
        let (path, file) = match way {
            Way::InPlace => (link_path.clone(), open_for_writing(&link_path)?),
            Way::Clone => {
                let path = self.partial(&self.child.image);
                let file = clone(&link_path, &path)?.ok_or_else(|| {
                    MergeError::io("clone", &link_path)(io::ErrorKind::Unsupported.into())
                })?;
                (path, file)
            }
        };
        let damaged = MergeError::image(&path);
        let kept = file.try_clone().map_err(MergeError::io("open", &path))?;
        let mut target = Absorber::open(DirectFile::for_writing(file, &path)).map_err(&damaged)?;
        if target.image().geometry() != child.geometry() {
            let reason = "parent and child are of different disks".to_owned();
            return Err(damaged(ImageError::Impossible { reason }));
        }
        let parent = target.image().parent().map(|parent| parent.data_write);
        let mut source = blocks::Source {
            snapshot: self.child.id,
            disk_bytes: self.child.size_bytes,
            image: &child,
            table,
            path: &child_path,
            stop,
        };
        let moved = source.move_into(&mut target, &path, way)?;
        kept.sync_all().map_err(MergeError::io("sync", &path))?;
        if way == Way::Clone {
            set_identity(&kept, self.child.data_write).map_err(&damaged)?;
        }
        Ok((path, kept, parent, moved))
    }

    fn make_table(
        &self,
        way: Way,
        parent: &Table,
        child: &Table,
        moved: &mut Moved,
    ) -> Result<(PathBuf, Option<Vec<u8>>), MergeError> {
        let (link_path, partial) =
            (self.folder.join(&self.link.table), self.partial(&self.child.table));
        let synced = |file: &File, path| file.sync_all().map_err(MergeError::io("sync", path));
        if parent.is_worth_rewriting(child) {
            let file = create(&partial)?;
            let file = table::rewrite(file, parent, child).map_err(MergeError::table(&partial))?;
            synced(&file, &partial)?;
            moved.table_bytes += file.metadata().map_or(0, |metadata| metadata.len());
            return Ok((partial, None));
        }
        let (path, file) = match way {
            Way::InPlace => (link_path.clone(), open_for_writing(&link_path)?),
            Way::Clone => {
                let file = clone(&link_path, &partial)?.ok_or_else(|| {
                    MergeError::io("clone", &link_path)(io::ErrorKind::Unsupported.into())
                })?;
                (partial, file)
            }
        };
        let damaged = MergeError::table(&path);
        let appended = table::append(&file, parent, child).map_err(&damaged)?;
        moved.table_bytes += appended.written;
        synced(&file, &path)?;
        if way == Way::InPlace {
            return Ok((path, Some(appended.header.to_vec())));
        }
        Table::write_header(&file, &appended.header).map_err(&damaged)?;
        synced(&file, &path)?;
        Ok((path, None))
    }

    fn open_table(&self, snapshot: &Snapshot) -> Result<Table, MergeError> {
        let path = self.folder.join(&snapshot.table);
        let file = File::open(&path).map_err(MergeError::io("open", &path))?;
        Table::open(file).map_err(MergeError::table(&path))
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}{PARTIAL}"))
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(self.folder).unwrap_or(path).to_string_lossy().into_owned()
    }
}

fn open_for_writing(path: &Path) -> Result<File, MergeError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map_err(MergeError::io("open", path))
}

fn create(path: &Path) -> Result<File, MergeError> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
    file.map_err(MergeError::io("create", path))
}

/// A file at `to` that shares all blocks with the one at `from`; `None` where the file system can't.
fn clone(from: &Path, to: &Path) -> Result<Option<File>, MergeError> {
    use rustix::io::Errno;
    let source = File::open(from).map_err(MergeError::io("open", from))?;
    let file = create(to)?;
    match rustix::fs::ioctl_ficlone(&file, &source) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => {
            fs::remove_file(to).map_err(MergeError::io("remove", to))?;
            Ok(None)
        }
        Err(errno) => Err(MergeError::io("clone", from)(errno.into())),
    }
}
