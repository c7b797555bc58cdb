//! Large reads and writes past the page cache.
//!
//! Backup data is not used again soon, and moving it through fresh pages of the cache costs more CPU time than receiving
//! and hashing it; it would also push out what other programs keep there. What a file has there already is read from it, and
//! small writes go there, where the system gathers them. Linux keeps both views of a file the same.
//!
//! Not so of a block device: what is cached of a disk, of a partition of it, and of the files on that is kept apart, so the first
//! of them stays as it was when something is written through another (`block/bdev.c`: each device has its own mapping). What the
//! cache has of a device when it is opened is therefore forgotten, and data is always read from the device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{Advice, OFlags, fadvise};

use crate::{buffers::Buffer, cached::cached_bytes};

/// What offsets, lengths and memory must be multiples of: no disk has larger sectors.
pub const ALIGN: usize = 4096;
/// Shorter writes go through the cache.
const LEAST_WRITTEN: usize = 64 << 10;
/// Shorter reads, too: who reads so little here and there may come again.
const LEAST_READ: usize = 128 << 10;

/// A file that is read and written past the page cache where that pays. Threads may use it at the same time.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    /// The same file, opened with `O_DIRECT`; `None` where the file system has no such thing.
    direct: Option<File>,
    /// A direct call was refused: the next ones would be, too.
    refused: AtomicBool,
    /// Its cache may be out of date.
    is_device: bool,
}

impl DirectFile {
    /// `file` was opened at `path` for reading.
    pub fn for_reading(file: File, path: &Path) -> Self {
        let is_device = forget_cached(&file);
        if !is_device && cached_bytes(&file, 0, ALIGN as u64).is_none() {
            let _ = fadvise(&file, 0, None, Advice::Sequential);
            return file.into();
        }
        // Reading ahead would put more and more into the cache, so that nothing was read past it.
        let _ = fadvise(&file, 0, None, Advice::Random);
        Self::new(file, OpenOptions::new().read(true), path, is_device)
    }

    /// `file` was opened at `path` for reading and writing.
    pub fn for_writing(file: File, path: &Path) -> Self {
        let is_device = forget_cached(&file);
        Self::new(file, OpenOptions::new().read(true).write(true), path, is_device)
    }

    fn new(file: File, options: &mut OpenOptions, path: &Path, is_device: bool) -> Self {
        let direct = options.custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path);
        let direct = direct.ok().filter(|direct| is_same(&file, direct));
        Self { file, direct, refused: AtomicBool::new(false), is_device }
    }

    /// The file, for all but data.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// True when most of these bytes are known to be in memory, so that a read of them doesn't wait for the disk.
    pub fn is_in_memory(&self, offset: u64, len: usize) -> bool {
        self.cached(offset, len) == Some(true)
    }

    /// Fills `buffer` from byte `offset`. Past the cache when `buffer` starts where a page starts, as a [`Buffer`] does.
    ///
    /// # Errors
    /// As the file system says, and when the file is shorter.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let is_aligned = buffer.as_ptr().addr().is_multiple_of(ALIGN);
        let done = match self.direct(offset, buffer.len(), LEAST_READ) {
            Some(direct) if is_aligned && self.cached(offset, buffer.len()) == Some(false) => {
                let whole = buffer.len() - buffer.len() % ALIGN;
                self.read_direct(direct, &mut buffer[..whole], offset)?
            }
            _ => 0,
        };
        self.file.read_exact_at(&mut buffer[done..], offset + done as u64)
    }

    /// Writes all of `data` at byte `offset`.
    ///
    /// # Errors
    /// As the file system says; part of the data may then be written.
    pub fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        if let Some(direct) = self.direct(offset, data.len(), LEAST_WRITTEN) {
            let mut buffer = Buffer::take();
            for piece in data[..data.len() - data.len() % ALIGN].chunks(buffer.len()) {
                let copy = &mut buffer[..piece.len()];
                copy.copy_from_slice(piece);
                let written = self.write_direct(direct, copy, offset + done as u64)?;
                done += written;
                if written < piece.len() {
                    break;
                }
            }
        }
        self.file.write_all_at(&data[done..], offset + done as u64)
    }

    fn direct(&self, offset: u64, len: usize, least: usize) -> Option<&File> {
        let is_suitable = len >= least && offset.is_multiple_of(ALIGN as u64);
        self.direct.as_ref().filter(|_| is_suitable && !self.refused.load(Ordering::Relaxed))
    }

    /// Whether the cache holds most of these bytes as they are; `None` when it can't say.
    fn cached(&self, offset: u64, len: usize) -> Option<bool> {
        let len = len as u64;
        match self.is_device {
            true => Some(false),
            false => cached_bytes(&self.file, offset, len).map(|cached| cached > len / 2),
        }
    }

    fn read_direct(&self, direct: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.go_on(buffer.len(), |done| direct.read_at(&mut buffer[done..], offset + done as u64))
    }

    fn write_direct(&self, direct: &File, data: &[u8], offset: u64) -> io::Result<usize> {
        self.go_on(data.len(), |done| direct.write_at(&data[done..], offset + done as u64))
    }

    /// Repeats `step` until `len` bytes are done, or as many as go this way; the rest goes through the cache.
    fn go_on(
        &self,
        len: usize,
        mut step: impl FnMut(usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut done = 0;
        while done < len && done.is_multiple_of(ALIGN) {
            match step(done) {
                Ok(0) => break,
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_refusal(&error) => {
                    self.refused.store(true, Ordering::Relaxed);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl From<File> for DirectFile {
    /// All goes through the cache.
    fn from(file: File) -> Self {
        Self { file, direct: None, refused: AtomicBool::new(false), is_device: false }
    }
}

/// Forgets what the page cache has of a block device, after it was written; of anything else nothing, and answers false. Pages that a
/// file system on this very device uses stay: they are its own.
pub fn forget_cached(file: &File) -> bool {
    let is_device = file.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    if is_device {
        let _ = rustix::fs::fsync(file);
        let _ = fadvise(file, 0, None, Advice::DontNeed);
    }
    is_device
}

fn is_same(a: &File, b: &File) -> bool {
    let id = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino(), meta.rdev()));
    matches!((id(a), id(b)), (Ok(a), Ok(b)) if a == b)
}

/// The file system wants other alignments, or has no direct calls after all.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &tempfile::TempDir) -> DirectFile {
        let path = folder.path().join("file");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        DirectFile::for_writing(file, &path)
    }

    #[test]
    fn direct_and_cached_calls_see_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let written = file(&folder);
        let data: Vec<u8> =
            (0..LEAST_WRITTEN * 6 + 777).map(|i| (i / 99 + i / 4096) as u8).collect();
        let mut expected = vec![0; 3 << 20];
        // Over each other, off their places, with a short end, and behind the end of the file.
        for (at, from, len) in [
            (0, 0, LEAST_WRITTEN * 6 + 777),
            (4096, 5, LEAST_WRITTEN + 4096),
            (12_288, 7, 4096),
            (513, 0, LEAST_WRITTEN),
            (2 << 20, 3, LEAST_WRITTEN + 1),
        ] {
            written.write_all_at(&data[from..from + len], at as u64).unwrap();
            expected[at..at + len].copy_from_slice(&data[from..from + len]);
        }
        let len = written.file().metadata().unwrap().len() as usize;
        assert_eq!(len, (2 << 20) + LEAST_WRITTEN + 1);
        let whole = written.file().try_clone().unwrap();
        let mut found = vec![0; len];
        whole.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected[..len]);
        let mut buffer = Buffer::take();
        for drop_cache in [false, true] {
            whole.sync_all().unwrap();
            if drop_cache {
                rustix::fs::fadvise(&whole, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                // Part of what comes next is in the cache, part isn't.
                whole.read_exact_at(&mut found[..ALIGN], 1 << 20).unwrap();
            }
            for (at, into) in
                [(0, 0..LEAST_READ), (1 << 20, 0..1 << 20), (4096, 3..99_999), (1, 0..LEAST_READ)]
            {
                let len = into.len();
                written.read_exact_at(&mut buffer[into.clone()], at as u64).unwrap();
                assert!(buffer[into] == expected[at..at + len], "{len} bytes at {at}");
            }
        }
        let end = len as u64 - LEAST_READ as u64;
        assert!(written.read_exact_at(&mut buffer[..2 * LEAST_READ], end - end % 4096).is_err());
    }

    #[test]
    fn another_file_at_the_path_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let opened = File::create(&path).unwrap();
        std::fs::rename(&path, folder.path().join("moved")).unwrap();
        std::fs::write(&path, "other").unwrap();
        let written = DirectFile::for_writing(opened, &path);
        assert!(written.direct.is_none());
        written.write_all_at(&vec![1; LEAST_WRITTEN], 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"other");
    }
}
