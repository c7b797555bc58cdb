//! Where a disk is restored to: a new file beside its final name, a file in place, or a block device.
//!
//! A file that is replaced stays as it is until the new one is complete: what both have in common is copied here, not
//! fetched. A restore that ends early, however it does, leaves what it has written (`partial.rs`); the next one to the same
//! place goes on from there. Two restores to one place exclude each other.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use janus_proto::{direct::DirectFile, ids::BLOCK_BYTES};
use rustix::fs::{FallocateFlags, FlockOperation, RenameFlags};

use crate::source::{
    medium::{FileMedium, Medium},
    mounts, size_of, sysfs,
};

mod partial;

use self::partial::Partial;

/// Why the target can't be written.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Something is there already.
    #[error("{}: exists; choose another path, or --force to replace it", .0.display())]
    Exists(PathBuf),
    /// A device is overwritten only when asked for.
    #[error("{}: is a block device; all its data would be lost: --force if that is wanted", .0.display())]
    Device(PathBuf),
    /// Writing would destroy a file system in use.
    #[error("{}: is mounted at {mount}; unmount it first", path.display())]
    Mounted {
        /// The device.
        path: PathBuf,
        /// Where.
        mount: String,
    },
    /// The disk doesn't fit.
    #[error("{}: has {has} bytes, the disk needs {needs}", path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// Size of the disk.
        needs: u64,
    },
    /// Neither a file nor a device.
    #[error("{}: is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Another restore writes there.
    #[error("{}: another restore writes to it now ({} is locked)", path.display(), locked.display())]
    Busy {
        /// The target.
        path: PathBuf,
        /// The file that it holds.
        locked: PathBuf,
    },
    /// The system refused.
    #[error("{}: cannot be {doing}: {source}", path.display())]
    Io {
        /// File or device.
        path: PathBuf,
        /// What was wanted.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// How the target is to be treated.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// Replace a file, overwrite a device.
    pub(super) force: bool,
    /// Overwrite a file where it stands.
    pub(super) in_place: bool,
    /// Don't read what is there.
    pub(super) full: bool,
}

/// What the target holds before anything is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Zeros.
    Zeros,
    /// Something that is worth reading.
    Old,
    /// Something that isn't to be read.
    Unread,
}

/// A target opened for writing. All methods may be called by several threads at once.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    /// Where it is opened: the partial file, or the target itself.
    opened_at: PathBuf,
    file: DirectFile,
    size_bytes: u64,
    kind: Kind,
    force: bool,
    content: Content,
    /// The file that is replaced, where its blocks have to be copied one by one.
    base: Option<(File, PathBuf)>,
    is_changed: AtomicBool,
}

#[derive(Debug)]
enum Kind {
    Device,
    InPlace,
    New(Partial),
}

impl Target {
    /// Opens `path` for a snapshot with this id.
    pub(super) fn open(
        path: &Path,
        size_bytes: u64,
        snapshot: &str,
        wish: Wish,
    ) -> Result<Self, TargetError> {
        match fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => {
                Self::device(path, meta.rdev(), size_bytes, wish)
            }
            Ok(meta) if !meta.is_file() => Err(TargetError::Kind(path.into())),
            Ok(_) if !wish.force => Err(TargetError::Exists(path.into())),
            Ok(_) if wish.in_place => Self::in_place(path, size_bytes, wish),
            Ok(_) => Self::new_file(path, size_bytes, snapshot, wish, true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::new_file(path, size_bytes, snapshot, wish, false)
            }
            Err(source) => Err(io_error(path, "looked at", source)),
        }
    }

    fn new_file(
        path: &Path,
        size_bytes: u64,
        snapshot: &str,
        wish: Wish,
        replaces: bool,
    ) -> Result<Self, TargetError> {
        let old = match replaces {
            true => Some(open_old(path)?),
            false => None,
        };
        let (partial, file) = Partial::open(path, snapshot)?;
        let mut base = None;
        let content = match (old, wish.full) {
            (_, true) => {
                file.set_len(0).map_err(|source| io_error(path, "emptied", source))?;
                Content::Zeros
            }
            (Some(old), _) => {
                // A clone costs nothing and is begun anew only where nothing was done yet.
                let is_clone = !partial.was_there && rustix::fs::ioctl_ficlone(&file, &old).is_ok();
                base = (!is_clone).then(|| (old, path.to_path_buf()));
                Content::Old
            }
            (None, _) if partial.was_there => Content::Old,
            (None, _) => Content::Zeros,
        };
        file.set_len(size_bytes)
            .map_err(|source| io_error(path, "made as large as the disk", source))?;
        let opened_at = partial.path.clone();
        Ok(Self {
            path: path.into(),
            file: DirectFile::for_writing(file, &opened_at),
            opened_at,
            size_bytes,
            is_changed: AtomicBool::new(partial.was_there),
            kind: Kind::New(partial),
            force: wish.force,
            content,
            base,
        })
    }

    fn in_place(path: &Path, size_bytes: u64, wish: Wish) -> Result<Self, TargetError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| io_error(path, "opened for writing", source))?;
        partial::lock(&file, FlockOperation::NonBlockingLockExclusive, path, path)?;
        partial::look_around(path, None)?;
        file.set_len(size_bytes)
            .map_err(|source| io_error(path, "made as large as the disk", source))?;
        Ok(Self::existing(path, file, size_bytes, Kind::InPlace, wish))
    }

    fn device(path: &Path, rdev: u64, size_bytes: u64, wish: Wish) -> Result<Self, TargetError> {
        if !wish.force {
            return Err(TargetError::Device(path.into()));
        }
        if let Some(mount) = mounts::any_mount(&sysfs::Device::of(rdev).family()) {
            return Err(TargetError::Mounted { path: path.into(), mount });
        }
        // O_EXCL on a device: the kernel refuses while it is mounted, part of something else, or restored to.
        let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| io_error(path, "opened for writing", source))?;
        let has = size_of(&file, true).map_err(|source| io_error(path, "measured", source))?;
        if has < size_bytes {
            return Err(TargetError::TooSmall { path: path.into(), has, needs: size_bytes });
        }
        Ok(Self::existing(path, file, size_bytes, Kind::Device, wish))
    }

    fn existing(path: &Path, file: File, size_bytes: u64, kind: Kind, wish: Wish) -> Self {
        Self {
            path: path.into(),
            opened_at: path.into(),
            file: DirectFile::for_writing(file, path),
            size_bytes,
            kind,
            force: wish.force,
            content: if wish.full { Content::Unread } else { Content::Old },
            base: None,
            is_changed: AtomicBool::new(false),
        }
    }

    /// What it holds before anything is written.
    pub(super) fn content(&self) -> Content {
        self.content
    }

    /// Size of the disk.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// It goes on from what an earlier restore of the same snapshot left.
    pub(super) fn is_resumed(&self) -> bool {
        matches!(&self.kind, Kind::New(partial) if partial.was_there)
    }

    /// Where the result is so far, if that isn't under the name that was asked for.
    pub(super) fn partial(&self) -> Option<&Path> {
        match &self.kind {
            Kind::New(partial) if self.is_changed.load(Ordering::Relaxed) => Some(&partial.path),
            _ => None,
        }
    }

    /// What was written is not to be kept: where there is no space left it only would be in the way.
    pub(super) fn discard(&self) {
        self.is_changed.store(false, Ordering::Relaxed);
    }

    /// To read what it holds.
    pub(super) fn medium(&self) -> Result<Box<dyn Medium>, TargetError> {
        let is_device = matches!(self.kind, Kind::Device);
        medium(&self.opened_at, self.size_bytes, is_device)
    }

    /// To read the file that is replaced: where this one holds zeros, that one's blocks may be what is wanted.
    pub(super) fn base(&self) -> Result<Option<Box<dyn Medium>>, TargetError> {
        let Some((file, path)) = &self.base else { return Ok(None) };
        let size = size_of(file, false).map_err(|source| io_error(path, "measured", source))?;
        medium(path, size, false).map(Some)
    }

    pub(super) fn write(&self, first_block: u64, data: &[u8]) -> Result<(), TargetError> {
        self.is_changed.store(true, Ordering::Relaxed);
        self.file
            .write_all_at(data, first_block * BLOCK_BYTES)
            .map_err(|source| io_error(&self.path, "written", source))
    }

    /// Makes blocks zero.
    pub(super) fn zero(&self, first_block: u64, block_count: u64) -> Result<(), TargetError> {
        let start = first_block * BLOCK_BYTES;
        let len = (block_count * BLOCK_BYTES).min(self.size_bytes.saturating_sub(start));
        if len == 0 {
            return Ok(());
        }
        self.is_changed.store(true, Ordering::Relaxed);
        let how = match self.kind {
            Kind::Device => FallocateFlags::ZERO_RANGE,
            _ => FallocateFlags::PUNCH_HOLE,
        };
        match rustix::fs::fallocate(self.file.file(), how | FallocateFlags::KEEP_SIZE, start, len) {
            Ok(()) => Ok(()),
            Err(_) => self.write_zeros(start, len),
        }
    }

    fn write_zeros(&self, start: u64, len: u64) -> Result<(), TargetError> {
        let zeros = vec![0; 1 << 20];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(zeros.len() as u64);
            self.file
                .file()
                .write_all_at(&zeros[..piece as usize], start + done)
                .map_err(|source| io_error(&self.path, "written", source))?;
            done += piece;
        }
        Ok(())
    }

    /// Syncs, so that what is read from now on is what the disk has.
    pub(super) fn sync(&self) -> Result<(), TargetError> {
        let failed = |source| io_error(&self.path, "completed", source);
        self.file.file().sync_all().map_err(failed)?;
        let _ = rustix::fs::fadvise(self.file.file(), 0, None, rustix::fs::Advice::DontNeed);
        Ok(())
    }

    /// Syncs, and gives a file its name.
    pub(super) fn publish(&self) -> Result<(), TargetError> {
        let failed = |source| io_error(&self.path, "completed", source);
        self.file.file().sync_all().map_err(failed)?;
        let Kind::New(partial) = &self.kind else { return Ok(()) };
        let named = if self.force {
            fs::rename(&partial.path, &self.path)
        } else {
            let cwd = rustix::fs::CWD;
            let renamed = rustix::fs::renameat_with(
                cwd,
                &partial.path,
                cwd,
                &self.path,
                RenameFlags::NOREPLACE,
            );
            match renamed {
                // Some network file systems have no such rename; a hard link refuses an existing name, too.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                    fs::hard_link(&partial.path, &self.path)
                        .and_then(|()| fs::remove_file(&partial.path))
                }
                other => other.map_err(Into::into),
            }
        };
        match named {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(TargetError::Exists(self.path.clone()));
            }
            named => named.map_err(failed)?,
        }
        self.is_changed.store(false, Ordering::Relaxed);
        partial.remove_leftovers();
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))
            .and_then(|folder| folder.sync_all())
            .map_err(failed)
    }
}

impl Drop for Target {
    /// A file in which nothing was written is of no use.
    fn drop(&mut self) {
        if let Kind::New(partial) = &self.kind
            && !self.is_changed.load(Ordering::Relaxed)
        {
            let _ = fs::remove_file(&partial.path);
        }
    }
}

/// Opens the file that is replaced; nobody may write to it in place meanwhile.
fn open_old(path: &Path) -> Result<File, TargetError> {
    let old = File::open(path).map_err(|source| io_error(path, "opened", source))?;
    partial::lock(&old, FlockOperation::NonBlockingLockShared, path, path)?;
    Ok(old)
}

fn medium(path: &Path, size_bytes: u64, device: bool) -> Result<Box<dyn Medium>, TargetError> {
    let file = File::open(path).map_err(|source| io_error(path, "opened", source))?;
    let file = DirectFile::for_reading(file, path);
    Ok(Box::new(FileMedium::new(file, size_bytes, 512, device)))
}

pub(super) fn io_error(path: &Path, doing: &'static str, source: io::Error) -> TargetError {
    TargetError::Io { path: path.into(), doing, source }
}

#[cfg(test)]
mod tests;
