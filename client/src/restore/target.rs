//! Where a disk is restored to: a new file beside its final name, or a block device.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use janus_proto::{direct::DirectFile, ids::BLOCK_BYTES};
use rustix::fs::{FallocateFlags, RenameFlags};

use crate::source::{mounts, size_of, sysfs};

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

/// A target opened for writing. All methods may be called by several threads at once.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    file: DirectFile,
    size_bytes: u64,
    /// Name until it is complete; `None`: a device.
    partial: Option<PathBuf>,
    force: bool,
}

impl Target {
    pub(super) fn open(path: &Path, size_bytes: u64, force: bool) -> Result<Self, TargetError> {
        match fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => {
                Self::device(path, meta.rdev(), size_bytes, force)
            }
            Ok(meta) if !meta.is_file() => Err(TargetError::Kind(path.into())),
            Ok(_) if !force => Err(TargetError::Exists(path.into())),
            Ok(_) => Self::new_file(path, size_bytes, force),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::new_file(path, size_bytes, force)
            }
            Err(source) => Err(io_error(path, "looked at", source)),
        }
    }

    fn new_file(path: &Path, size_bytes: u64, force: bool) -> Result<Self, TargetError> {
        let name = path
            .file_name()
            .ok_or_else(|| TargetError::Kind(path.into()))?
            .to_string_lossy()
            .into_owned();
        let partial =
            path.with_file_name(format!(".{name}.{}.partial", uuid::Uuid::now_v7().simple()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .map_err(|source| io_error(path, "created", source))?;
        let file = DirectFile::for_writing(file, &partial);
        let target = Self { path: path.into(), file, size_bytes, partial: Some(partial), force };
        target
            .file
            .file()
            .set_len(size_bytes)
            .map_err(|source| io_error(path, "made as large as the disk", source))?;
        Ok(target)
    }

    fn device(path: &Path, rdev: u64, size_bytes: u64, force: bool) -> Result<Self, TargetError> {
        if !force {
            return Err(TargetError::Device(path.into()));
        }
        if let Some(mount) = mounts::any_mount(&sysfs::Device::of(rdev).family()) {
            return Err(TargetError::Mounted { path: path.into(), mount });
        }
        // O_EXCL on a device: the kernel refuses while it is mounted or part of something else.
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
        let file = DirectFile::for_writing(file, path);
        Ok(Self { path: path.into(), file, size_bytes, partial: None, force })
    }

    pub(super) fn write(&self, first_block: u64, data: &[u8]) -> Result<(), TargetError> {
        self.file
            .write_all_at(data, first_block * BLOCK_BYTES)
            .map_err(|source| io_error(&self.path, "written", source))
    }

    /// Makes blocks zero; in a new file they are.
    pub(super) fn zero(&self, first_block: u64, block_count: u64) -> Result<(), TargetError> {
        if self.partial.is_some() || block_count == 0 {
            return Ok(());
        }
        let start = first_block * BLOCK_BYTES;
        let len = (block_count * BLOCK_BYTES).min(self.size_bytes.saturating_sub(start));
        match rustix::fs::fallocate(
            self.file.file(),
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            start,
            len,
        ) {
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

    /// Syncs, and gives a file its name.
    pub(super) fn publish(&self) -> Result<(), TargetError> {
        let failed = |source| io_error(&self.path, "completed", source);
        self.file.file().sync_all().map_err(failed)?;
        let Some(partial) = &self.partial else { return Ok(()) };
        let named = if self.force {
            fs::rename(partial, &self.path)
        } else {
            let cwd = rustix::fs::CWD;
            match rustix::fs::renameat_with(cwd, partial, cwd, &self.path, RenameFlags::NOREPLACE) {
                // Some network file systems have no such rename; a hard link refuses an existing name, too.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                    fs::hard_link(partial, &self.path)
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
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))
            .and_then(|folder| folder.sync_all())
            .map_err(failed)
    }
}

impl Drop for Target {
    /// Removes a file that was not completed; after publishing, the name is gone already.
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            let _ = fs::remove_file(partial);
        }
    }
}

fn io_error(path: &Path, doing: &'static str, source: io::Error) -> TargetError {
    TargetError::Io { path: path.into(), doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_only_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let names = || {
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>()
        };
        let target = Target::open(&path, 8192 + 512, false).unwrap();
        target.write(1, &[5; 4096]).unwrap();
        assert!(!path.exists());
        drop(target);
        assert!(names().is_empty());
        let target = Target::open(&path, 8192 + 512, false).unwrap();
        target.write(1, &[5; 4096]).unwrap();
        target.publish().unwrap();
        drop(target);
        assert_eq!(names(), ["disk.img"]);
        let content = fs::read(&path).unwrap();
        assert_eq!((content.len(), content[4095], content[4096], content[8192]), (8704, 0, 5, 0));
        assert!(matches!(Target::open(&path, 4096, false), Err(TargetError::Exists(_))));
        let target = Target::open(&path, 4096, true).unwrap();
        target.publish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    }

    #[test]
    fn a_name_taken_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let target = Target::open(&path, 4096, false).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(matches!(target.publish(), Err(TargetError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
