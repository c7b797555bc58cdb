//! Where a disk, or a part of it, is restored to: a new file beside its final name, a file in place, or a block device.
//!
//! A target knows the disk's blocks by their numbers on the disk: what lies outside of its part is neither written nor read.
//! A file that is replaced stays as it is until the new one is complete: what both have in common is copied here, not
//! fetched. A restore that ends early, however it does, leaves what it has written (`partial.rs`); the next one to the same
//! place goes on from there. Two restores to one place exclude each other.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use janus_proto::{direct::DirectFile, ids::BLOCK_BYTES, image::ImageError};
use rustix::fs::{FallocateFlags, FlockOperation, RenameFlags};

use crate::{
    seal::DiskSeal,
    source::{
        medium::{FileMedium, Medium},
        mounts, size_of, sysfs,
    },
};

mod partial;
mod qcow2;

use self::partial::Partial;
use super::{format::TargetFormat, image_file::ImageFile, place::Place};

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
    /// An image that can't be made.
    #[error("{}: {source}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ImageError,
    },
    /// `qemu-img` is missing, or failed.
    #[error("{}: {reason}", path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// What it said, and the way out.
        reason: String,
    },
    /// A device is no image file.
    #[error("{}: is a block device; only files are written as images, so leave --format out", .0.display())]
    DeviceFormat(PathBuf),
    /// A folder.
    #[error("{path}: is a folder; name the file that the disk shall be, such as {path}/disk.raw", path = .0.display())]
    Folder(PathBuf),
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
    /// A device that something else holds.
    #[error(
        "{}: is in use: by another restore, as swap space, or as a part of LVM, RAID or ZFS", .0.display()
    )]
    InUse(PathBuf),
    /// A new file among devices would be none, and may lie in memory.
    #[error("{}: there is no such device; `lsblk` lists what there is", .0.display())]
    NoDevice(PathBuf),
    /// There is no place for a new file.
    #[error("{}: its folder does not exist; make it first", .0.display())]
    NoFolder(PathBuf),
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

/// What is at a path before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum There {
    Device,
    File,
    Nothing,
}

/// A target opened for writing. All methods may be called by several threads at once.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    /// Where it is opened: the partial file, or the target itself.
    opened_at: PathBuf,
    file: DirectFile,
    /// The bytes of the disk that it holds.
    window: Range<u64>,
    kind: Kind,
    force: bool,
    content: Content,
    /// The file that is replaced, where its blocks have to be copied one by one.
    base: Option<(File, PathBuf)>,
    is_changed: AtomicBool,
    /// The file that is replaced: its owner and mode are kept.
    like: Option<fs::Metadata>,
    /// What seals the disk: hashes are of what it makes of the target's content.
    seal: Option<Arc<DiskSeal>>,
}

#[derive(Debug)]
enum Kind {
    Device,
    InPlace,
    New(Partial),
    /// The same, of which another program makes a qcow2 in the end.
    Qcow2(Partial),
    Image(Partial, ImageFile),
}

impl Target {
    /// What is at `path`, where that may be written to as far as can be told without doing so.
    pub(super) fn look(path: &Path, place: &Place, wish: Wish) -> Result<There, TargetError> {
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return check_folder(path).map(|()| There::Nothing);
            }
            Err(source) => return Err(io_error(path, "looked at", source)),
        };
        if !meta.file_type().is_block_device() {
            return match meta.is_file() {
                false if meta.is_dir() => Err(TargetError::Folder(path.into())),
                false => Err(TargetError::Kind(path.into())),
                true if !wish.force => Err(TargetError::Exists(path.into())),
                true => Ok(There::File),
            };
        }
        if !wish.force {
            return Err(TargetError::Device(path.into()));
        }
        if let Some(mount) = mounts::any_mount(&sysfs::Device::of(meta.rdev()).family()) {
            return Err(TargetError::Mounted { path: path.into(), mount });
        }
        let measured = File::open(path).and_then(|file| size_of(&file, true));
        let has = measured.map_err(|source| io_error(path, "measured", source))?;
        match place.format {
            _ if has < place.bytes() => {
                Err(TargetError::TooSmall { path: path.into(), has, needs: place.bytes() })
            }
            TargetFormat::Raw => Ok(There::Device),
            _ => Err(TargetError::DeviceFormat(path.into())),
        }
    }

    /// Opens `path` for a snapshot with this id.
    pub(super) fn open(
        path: &Path,
        place: &Place,
        snapshot: &str,
        wish: Wish,
    ) -> Result<Self, TargetError> {
        // What a link leads to is replaced, not the link.
        let followed = match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_symlink() => {
                fs::canonicalize(path).map_err(|source| io_error(path, "followed", source))?
            }
            _ => path.to_owned(),
        };
        let path = followed.as_path();
        let there = Self::look(path, place, wish)?;
        match place.format {
            _ if there == There::Device => Self::device(path, place, wish),
            TargetFormat::Raw if there == There::File && wish.in_place => {
                Self::in_place(path, place, wish)
            }
            TargetFormat::Raw => Self::new_file(path, place, snapshot, wish, there == There::File),
            TargetFormat::Qcow2 => {
                qcow2::check(path)?;
                // What is there is no raw disk: nothing of it is of use.
                Self::new_file(path, place, snapshot, wish, false)
            }
            TargetFormat::Image(_) => Self::image(path, place, snapshot, wish),
        }
    }

    /// A new VHDX or VHD. What an earlier restore left of it is of no use: only its end says what is where.
    fn image(path: &Path, place: &Place, snapshot: &str, wish: Wish) -> Result<Self, TargetError> {
        let (mut partial, lock) = Partial::open(path, snapshot)?;
        partial.was_there = false;
        lock.set_len(0).map_err(|source| io_error(path, "emptied", source))?;
        let opened_at = partial.path.clone();
        let image = match ImageFile::on(&opened_at, place) {
            Ok(image) => image,
            Err(source) => {
                let _ = fs::remove_file(&opened_at);
                return Err(TargetError::Image { path: path.into(), source });
            }
        };
        Ok(Self {
            path: path.into(),
            file: DirectFile::for_writing(lock, &opened_at),
            opened_at,
            window: place.window.clone(),
            kind: Kind::Image(partial, image),
            force: wish.force,
            content: Content::Zeros,
            base: None,
            is_changed: AtomicBool::new(false),
            like: fs::metadata(path).ok(),
            seal: None,
        })
    }

    fn new_file(
        path: &Path,
        place: &Place,
        snapshot: &str,
        wish: Wish,
        replaces: bool,
    ) -> Result<Self, TargetError> {
        let old = match replaces {
            true => Some(open_old(path)?),
            false => None,
        };
        let (mut partial, file) = Partial::open(path, snapshot)?;
        if partial.was_there && !wish.full {
            let partial = partial.path.display();
            tracing::info!(%partial, "going on from what an earlier restore left");
        }
        let like = old.as_ref().and_then(|old| old.metadata().ok());
        let mut base = None;
        let content = match (old, wish.full) {
            (_, true) => {
                file.set_len(0).map_err(|source| io_error(path, "emptied", source))?;
                partial.was_there = false;
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
        file.set_len(place.bytes())
            .map_err(|source| io_error(path, "made as large as the disk", source))?;
        let opened_at = partial.path.clone();
        Ok(Self {
            path: path.into(),
            file: DirectFile::for_writing(file, &opened_at),
            opened_at,
            window: place.window.clone(),
            is_changed: AtomicBool::new(partial.was_there),
            kind: match place.format {
                TargetFormat::Qcow2 => Kind::Qcow2(partial),
                _ => Kind::New(partial),
            },
            force: wish.force,
            content,
            base,
            like,
            seal: None,
        })
    }

    fn in_place(path: &Path, place: &Place, wish: Wish) -> Result<Self, TargetError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| io_error(path, "opened for writing", source))?;
        partial::lock(&file, FlockOperation::NonBlockingLockExclusive, path, path)?;
        partial::look_around(path, None)?;
        file.set_len(place.bytes())
            .map_err(|source| io_error(path, "made as large as the disk", source))?;
        Ok(Self::existing(path, file, place, Kind::InPlace, wish))
    }

    fn device(path: &Path, place: &Place, wish: Wish) -> Result<Self, TargetError> {
        // O_EXCL on a device: the kernel refuses while it is mounted, part of something else, or restored to.
        let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(
                |source| match source.kind() {
                    io::ErrorKind::ResourceBusy => TargetError::InUse(path.into()),
                    _ => io_error(path, "opened for writing", source),
                },
            )?;
        Ok(Self::existing(path, file, place, Kind::Device, wish))
    }

    fn existing(path: &Path, file: File, place: &Place, kind: Kind, wish: Wish) -> Self {
        Self {
            path: path.into(),
            opened_at: path.into(),
            file: DirectFile::for_writing(file, path),
            window: place.window.clone(),
            kind,
            force: wish.force,
            content: if wish.full { Content::Unread } else { Content::Old },
            base: None,
            is_changed: AtomicBool::new(false),
            like: None,
            seal: None,
        }
    }

    /// The same for a disk that is sealed so.
    pub(super) fn sealed(mut self, seal: Option<Arc<DiskSeal>>) -> Self {
        self.seal = seal;
        self
    }

    /// What seals the disk.
    pub(super) fn seal(&self) -> Option<&Arc<DiskSeal>> {
        self.seal.as_ref()
    }

    /// What it holds before anything is written.
    pub(super) fn content(&self) -> Content {
        self.content
    }

    /// The bytes of the disk that it holds.
    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    fn bytes(&self) -> u64 {
        self.window.end - self.window.start
    }

    /// It goes on from what an earlier restore of the same snapshot left.
    pub(super) fn is_resumed(&self) -> bool {
        matches!(&self.kind, Kind::New(partial) | Kind::Qcow2(partial) if partial.was_there)
    }

    /// Where the result is so far, if that isn't under the name that was asked for.
    pub(super) fn partial(&self) -> Option<&Path> {
        match &self.kind {
            Kind::New(partial) | Kind::Qcow2(partial)
                if self.is_changed.load(Ordering::Relaxed) =>
            {
                Some(&partial.path)
            }
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
        medium(&self.opened_at, self.bytes(), is_device)
    }

    /// To read the file that is replaced: where this one holds zeros, that one's blocks may be what is wanted.
    pub(super) fn base(&self) -> Result<Option<Box<dyn Medium>>, TargetError> {
        let Some((file, path)) = &self.base else { return Ok(None) };
        let size = size_of(file, false).map_err(|source| io_error(path, "measured", source))?;
        medium(path, size, false).map(Some)
    }

    pub(super) fn write(&self, first_block: u64, data: &[u8]) -> Result<(), TargetError> {
        let start = first_block * BLOCK_BYTES;
        let Some(inside) = self.inside(start..start + data.len() as u64) else { return Ok(()) };
        let data = &data[(inside.start - start) as usize..(inside.end - start) as usize];
        let at = inside.start - self.window.start;
        self.is_changed.store(true, Ordering::Relaxed);
        let written = match &self.kind {
            Kind::Image(_, image) => image.write(at, data),
            _ => self.file.write_all_at(data, at),
        };
        written.map_err(|source| io_error(&self.path, "written", source))
    }

    /// The part of some bytes of the disk that is here.
    fn inside(&self, bytes: Range<u64>) -> Option<Range<u64>> {
        let inside = bytes.start.max(self.window.start)..bytes.end.min(self.window.end);
        (inside.start < inside.end).then_some(inside)
    }

    /// Makes blocks zero.
    pub(super) fn zero(&self, first_block: u64, block_count: u64) -> Result<(), TargetError> {
        let start = first_block * BLOCK_BYTES;
        let Some(inside) = self.inside(start..start + block_count * BLOCK_BYTES) else {
            return Ok(());
        };
        let (start, len) = (inside.start - self.window.start, inside.end - inside.start);
        self.is_changed.store(true, Ordering::Relaxed);
        if let Kind::Image(_, image) = &self.kind {
            let zeroed = image.zero(start, len);
            return zeroed.map_err(|source| io_error(&self.path, "written", source));
        }
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
        let partial = match &self.kind {
            Kind::Device | Kind::InPlace => return Ok(()),
            Kind::New(partial) => {
                self.name(&partial.path)?;
                partial
            }
            Kind::Image(partial, image) => {
                let finished = image.finish();
                finished
                    .map_err(|source| TargetError::Image { path: self.path.clone(), source })?;
                self.name(&partial.path)?;
                partial
            }
            Kind::Qcow2(partial) => {
                let made = qcow2::convert(&partial.path, &self.path)?;
                self.name(&made).inspect_err(|_| drop(fs::remove_file(&made)))?;
                fs::remove_file(&partial.path).map_err(failed)?;
                partial
            }
        };
        self.is_changed.store(false, Ordering::Relaxed);
        partial.remove_leftovers();
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))
            .and_then(|folder| folder.sync_all())
            .map_err(failed)
    }

    /// Gives a file the name that was asked for.
    fn name(&self, file: &Path) -> Result<(), TargetError> {
        if let Some(like) = &self.like {
            // Only root can give files away; who can't, owns the new one.
            let _ = std::os::unix::fs::chown(file, Some(like.uid()), Some(like.gid()));
            let _ = fs::set_permissions(file, like.permissions());
        }
        let named = if self.force {
            fs::rename(file, &self.path)
        } else {
            let cwd = rustix::fs::CWD;
            match rustix::fs::renameat_with(cwd, file, cwd, &self.path, RenameFlags::NOREPLACE) {
                // Some network file systems have no such rename; a hard link refuses an existing name, too.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                    fs::hard_link(file, &self.path).and_then(|()| fs::remove_file(file))
                }
                other => other.map_err(Into::into),
            }
        };
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => TargetError::Exists(self.path.clone()),
            _ => io_error(&self.path, "completed", error),
        })
    }
}

impl Drop for Target {
    /// A file in which nothing was written is of no use, nor is an image that has no end.
    fn drop(&mut self) {
        let is_changed = self.is_changed.load(Ordering::Relaxed);
        match &self.kind {
            Kind::New(partial) | Kind::Qcow2(partial) if !is_changed => {
                let _ = fs::remove_file(&partial.path);
            }
            Kind::Image(partial, ..) => {
                let _ = fs::remove_file(&partial.path);
            }
            _ => {}
        }
    }
}

/// Whether there is a folder for a new file, which is none of devices.
fn check_folder(path: &Path) -> Result<(), TargetError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let real = fs::canonicalize(folder.unwrap_or(Path::new(".")));
    let Ok(real) = real else { return Err(TargetError::NoFolder(path.into())) };
    match real.starts_with("/dev") && !real.starts_with("/dev/shm") {
        true => Err(TargetError::NoDevice(path.into())),
        false => Ok(()),
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
