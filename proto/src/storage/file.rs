//! An open file of the store.

use std::{
    fs, io, num::NonZeroU64, ops::Range, os::unix::fs::MetadataExt, path::Path, sync::Arc,
    time::SystemTime,
};

use crate::{buffers::Buffer, direct::DirectFile};
use rustix::{
    fs::{Advice, FallocateFlags, FlockOperation, SeekFrom, fadvise, fallocate, flock, seek},
    io::Errno,
};

use super::{Handle, Op, Verdict, Watcher, clone, disk};

/// Bytes that lie elsewhere and are read as a file is: see [`File::elsewhere`].
pub trait Elsewhere: std::fmt::Debug + Send + Sync {
    /// How many there are.
    fn length_bytes(&self) -> u64;

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    /// When they can't be had, with `InvalidData` when they are damaged.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A file that was opened by a [`super::Disk`]. Threads may use it at the same time.
#[derive(Debug)]
pub struct File {
    inner: Inner,
    handle: Handle,
    watcher: Option<Arc<dyn Watcher>>,
}

#[derive(Debug)]
enum Inner {
    Here(DirectFile),
    Elsewhere(Box<dyn Elsewhere>),
}

/// How large a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Its length.
    pub length_bytes: u64,
    /// What it occupies; less where it has holes. Blocks shared with other files count in each.
    pub allocated_bytes: u64,
    /// It is a folder.
    pub is_folder: bool,
    /// Time of the last change; the Unix epoch where the file system has none.
    pub modified: SystemTime,
}

impl From<fs::Metadata> for Metadata {
    fn from(metadata: fs::Metadata) -> Self {
        Self {
            length_bytes: metadata.len(),
            allocated_bytes: metadata.blocks() * 512,
            is_folder: metadata.is_dir(),
            modified: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

/// Whether a file system could share blocks between two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Cloning {
    /// The blocks are shared.
    Done,
    /// It can't, not these files or not this range: nothing has changed, copy instead.
    Unsupported,
}

impl File {
    pub(super) fn new(
        inner: DirectFile,
        handle: Handle,
        watcher: Option<Arc<dyn Watcher>>,
    ) -> Self {
        Self { inner: Inner::Here(inner), handle, watcher }
    }

    /// Bytes that lie elsewhere, as a file that can only be read. `path` is its name for people.
    pub fn elsewhere(path: std::path::PathBuf, bytes: Box<dyn Elsewhere>) -> Self {
        Self { inner: Inner::Elsewhere(bytes), handle: Handle { number: 0, path }, watcher: None }
    }

    fn here(&self) -> io::Result<&DirectFile> {
        match &self.inner {
            Inner::Here(file) => Ok(file),
            Inner::Elsewhere(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// True when its path still leads to it: nobody has removed, moved or replaced it.
    ///
    /// # Errors
    /// As the file system says.
    pub fn is_at_its_path(&self) -> io::Result<bool> {
        let own = self.here()?.file().metadata()?;
        match fs::symlink_metadata(self.path()) {
            Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Where it was opened. It may have another name by now.
    pub fn path(&self) -> &Path {
        &self.handle.path
    }

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    /// As the file system says, and `UnexpectedEof` when the file is shorter.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.ask(|file| Op::Read { file, offset, len: buffer.len() })?;
        match &self.inner {
            Inner::Here(file) => file.read_exact_at(buffer, offset),
            Inner::Elsewhere(bytes) => bytes.read_exact_at(buffer, offset),
        }
    }

    /// The range is read soon: the disk may begin now. Only ever a hint, so no watcher is asked.
    pub fn will_need(&self, offset: u64, len: u64) {
        if let (Some(len), Inner::Here(file)) = (NonZeroU64::new(len), &self.inner) {
            let _ = fadvise(file.file(), offset, Some(len), Advice::WillNeed);
        }
    }

    /// Writes all of `data` at byte `offset`.
    ///
    /// # Errors
    /// As the file system says; part of the data may then be written.
    pub fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if let Some(watcher) = &self.watcher {
            let op = Op::Write { file: &self.handle, offset, data };
            if let Verdict::Short { written, error } = watcher.before(&op)? {
                self.here()?.write_all_at(&data[..written.min(data.len())], offset)?;
                return Err(error);
            }
        }
        self.here()?.write_all_at(data, offset)
    }

    /// Cuts the file, or extends it by a hole.
    ///
    /// # Errors
    /// As the file system says.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.ask(|file| Op::SetLen { file, len })?;
        self.here()?.file().set_len(len)
    }

    /// Makes a range zero, without space where the file system can. The file's length stays.
    ///
    /// # Errors
    /// As the file system says.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.ask(|file| Op::Punch { file, offset, len })?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self.here()?.file(), flags, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                self.write_zeros(offset, len)
            }
            other => Ok(other?),
        }
    }

    /// Sets the time of the last change, for whoever compares it. Only ever a hint, so no watcher is asked.
    ///
    /// # Errors
    /// As the file system says.
    pub fn set_modified(&self, time: SystemTime) -> io::Result<()> {
        self.here()?.file().set_modified(time)
    }

    /// Makes content and length durable.
    ///
    /// # Errors
    /// As the file system says. It tells of a lost write once: what was written since the last sync that succeeded is then
    /// unknown.
    pub fn sync_data(&self) -> io::Result<()> {
        self.ask(|file| Op::SyncData { file })?;
        self.here()?.file().sync_data()
    }

    /// Makes content and all metadata durable.
    ///
    /// # Errors
    /// As [`Self::sync_data`].
    pub fn sync_all(&self) -> io::Result<()> {
        self.ask(|file| Op::SyncAll { file })?;
        self.here()?.file().sync_all()
    }

    /// Length and space.
    ///
    /// # Errors
    /// As the file system says.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.ask(|file| Op::Measure { file })?;
        match &self.inner {
            Inner::Here(file) => file.file().metadata().map(Metadata::from),
            Inner::Elsewhere(bytes) => Ok(Metadata {
                length_bytes: bytes.length_bytes(),
                allocated_bytes: bytes.length_bytes(),
                is_folder: false,
                modified: SystemTime::UNIX_EPOCH,
            }),
        }
    }

    /// The next range at or behind `offset` that is no hole; `None` when only a hole is left. Where the file system knows of no
    /// holes, all to the end.
    ///
    /// # Errors
    /// As the file system says.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.ask(|file| Op::Measure { file })?;
        let file = self.here()?.file();
        // Everything else names its offset, so moving the file's own disturbs nobody.
        let start = match seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let end = file.metadata()?.len();
                return Ok((offset < end).then_some(offset..end));
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Some(start..seek(file, SeekFrom::Hole(start))?))
    }

    /// Shares a range of another file, or with a `len` of 0 all to its end. Offsets are multiples of the file system's blocks,
    /// the length too unless it goes to the other file's end.
    ///
    /// # Errors
    /// As the file system says.
    pub fn clone_range(
        &self,
        offset: u64,
        from: &Self,
        from_offset: u64,
        len: u64,
    ) -> io::Result<Cloning> {
        let op = |file| Op::CloneRange { file, offset, from: &from.handle, from_offset, len };
        self.share(op, || {
            clone::range(self.here()?.file(), offset, from.here()?.file(), from_offset, len)
        })
    }

    /// Shares all of another file: content and length become its.
    ///
    /// # Errors
    /// As the file system says.
    pub fn clone_all(&self, from: &Self) -> io::Result<Cloning> {
        self.share(
            |file| Op::CloneAll { file, from: &from.handle },
            || Ok(rustix::fs::ioctl_ficlone(self.here()?.file(), from.here()?.file())?),
        )
    }

    /// Copies a range of another file by reading and writing; the way where nothing can be shared.
    ///
    /// # Errors
    /// As the file system says; part of the range may then be copied.
    pub fn copy_range(
        &self,
        offset: u64,
        from: &Self,
        from_offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let (mut buffer, mut done) = (Buffer::take(), 0);
        while done < len {
            let most = buffer.len() as u64;
            let piece = &mut buffer[..(len - done).min(most) as usize];
            from.read_exact_at(piece, from_offset + done)?;
            self.write_all_at(piece, offset + done)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Locks the file for this process, without waiting: false when another has it. The lock ends with the file.
    ///
    /// # Errors
    /// As the file system says.
    pub fn try_lock(&self) -> io::Result<bool> {
        match flock(self.here()?.file(), FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = [0; 1 << 16];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(zeros.len() as u64);
            self.here()?.write_all_at(&zeros[..piece as usize], offset + done)?;
            done += piece;
        }
        Ok(())
    }

    fn share<'a>(
        &'a self,
        op: impl FnOnce(&'a Handle) -> Op<'a>,
        clone: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Cloning> {
        let watcher = self.watcher.as_deref();
        let verdict = watcher.map_or(Ok(Verdict::Go), |watcher| watcher.before(&op(&self.handle)));
        or_unsupported(match verdict {
            Ok(Verdict::Go) => clone(),
            Ok(Verdict::Shared) => Ok(()),
            Ok(Verdict::Short { error, .. }) | Err(error) => Err(error),
        })
    }

    fn ask<'a>(&'a self, op: impl FnOnce(&'a Handle) -> Op<'a>) -> io::Result<()> {
        match self.watcher.as_deref() {
            Some(watcher) => disk::ask(Some(watcher), op(&self.handle)),
            None => Ok(()),
        }
    }
}

fn or_unsupported(cloned: io::Result<()>) -> io::Result<Cloning> {
    let refusals = [Errno::OPNOTSUPP, Errno::NOTTY, Errno::NOSYS, Errno::XDEV, Errno::INVAL];
    match cloned {
        Ok(()) => Ok(Cloning::Done),
        Err(error) => match Errno::from_io_error(&error) {
            Some(refusal) if refusals.contains(&refusal) => Ok(Cloning::Unsupported),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};

    /// Two files of a folder: 3 MiB and a bit of data, and an empty one.
    fn pair(folder: &Path) -> (Vec<u8>, File, File) {
        let storage = Disk::default();
        let data: Vec<u8> = (0..(3 << 20) + 77).map(|at| (at / 4096 + at / 99) as u8).collect();
        let from = storage.open_data(&folder.join("from"), Access::CreateNew).unwrap();
        from.write_all_at(&data, 0).unwrap();
        (data, from, storage.open_data(&folder.join("to"), Access::CreateNew).unwrap())
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().length_bytes as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn ranges_are_shared_or_refused_and_copied_either_way() {
        let folder = tempfile::tempdir().unwrap();
        let (data, from, to) = pair(folder.path());
        to.copy_range(5, &from, 4096, (2 << 20) + 9).unwrap();
        let copied = content(&to);
        assert!(copied[..5] == [0; 5] && copied[5..] == data[4096..4096 + (2 << 20) + 9]);
        to.set_len(0).unwrap();
        match to.clone_range(4096, &from, 8192, 1 << 20).unwrap() {
            Cloning::Done => assert!(content(&to)[4096..] == data[8192..8192 + (1 << 20)]),
            Cloning::Unsupported => assert!(content(&to).is_empty()),
        }
        match to.clone_all(&from).unwrap() {
            Cloning::Done => assert!(content(&to) == data),
            Cloning::Unsupported => assert!(content(&to).len() < data.len()),
        }
    }

    #[test]
    fn a_hole_reads_as_zeros_and_keeps_the_length() {
        let folder = tempfile::tempdir().unwrap();
        let (mut data, from, _) = pair(folder.path());
        from.punch(4096, 1 << 20).unwrap();
        from.punch(3 << 20, 4096).unwrap();
        data[4096..4096 + (1 << 20)].fill(0);
        data[3 << 20..].fill(0);
        assert!(content(&from) == data);
    }

    #[test]
    fn a_lock_is_held_until_its_file_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Disk::default().open(&folder.path().join("lock"), Access::Create).unwrap();
        let first = open();
        assert!(first.try_lock().unwrap() && !open().try_lock().unwrap());
        drop(first);
        assert!(open().try_lock().unwrap());
    }
}
