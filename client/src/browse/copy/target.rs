//! The folder that a copy is written into. Every path is taken from that folder's descriptor, and the kernel refuses to leave
//! it or to follow a link on the way (`openat2`): also when somebody else puts links there meanwhile.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat,
        fchmod, fchown, futimens, linkat, mkdirat, openat2, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};

use super::super::{BrowseError, Entry};

/// Why something can't be written.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The folder for the copy can't be had.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One thing can't be made.
    #[error("cannot be {doing}: {source}")]
    Make {
        /// What failed.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It is there, and nobody said that it may go.
    #[error("{} exists (--force replaces it)", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
}

impl TargetError {
    /// Nothing else can be written either.
    pub(super) fn is_final(&self) -> bool {
        let Self::Make { source, .. } = self else { return matches!(self, Self::Folder { .. }) };
        let errno = source.raw_os_error().map(Errno::from_raw_os_error);
        matches!(errno, Some(Errno::NOSPC | Errno::DQUOT | Errno::ROFS | Errno::IO))
    }
}

fn fails(doing: &'static str) -> impl Fn(Errno) -> TargetError {
    move |errno| TargetError::Make { doing, source: errno.into() }
}

/// Whose files the copies become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Those of the volume where that is permitted (root), else ours.
    IfPermitted,
    /// Those of the volume.
    Theirs,
    /// Ours.
    Ours,
}

impl Owner {
    fn is_wanted(self) -> bool {
        match self {
            Self::IfPermitted => rustix::process::geteuid().is_root(),
            Self::Theirs => true,
            Self::Ours => false,
        }
    }
}

/// The folder.
pub(super) struct Target {
    base: OwnedFd,
    /// For messages.
    shown: PathBuf,
    owner: Owner,
}

const WITHIN: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

impl Target {
    /// The folder `to`, and `own` as the name in it; where `to` is none, the folder that it is to be made in and its name. Empty: the
    /// copy goes into the folder itself.
    pub(super) fn open(
        to: &Path,
        own: &[u8],
        owner: Owner,
    ) -> Result<(Self, Vec<u8>), TargetError> {
        let (folder, name) = if to.is_dir() {
            (to, own.to_vec())
        } else {
            let folder = to.parent().filter(|parent| !parent.as_os_str().is_empty());
            let name = to.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
            (folder.unwrap_or(Path::new(".")), name)
        };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let base = rustix::fs::open(folder, flags, Mode::empty());
        let fails =
            |errno: Errno| TargetError::Folder { path: folder.to_owned(), source: errno.into() };
        let base = base.map_err(fails)?;
        Ok((Self { base, shown: folder.to_owned(), owner }, name))
    }

    fn folder(&self, path: &Path) -> Result<OwnedFd, TargetError> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat2(&self.base, path, flags, Mode::empty(), WITHIN)
            .map_err(fails("reached without following links"))
    }

    /// The folder that something is to be made in, and its name.
    fn place<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), TargetError> {
        let name = path.file_name().ok_or_else(|| fails("made")(Errno::INVAL))?;
        Ok((self.folder(path.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Makes something; where that exists, it is removed first if `force`, unless it is a folder.
    fn make<T>(
        &self,
        path: &Path,
        doing: &'static str,
        force: bool,
        make: impl Fn(&OwnedFd, &OsStr) -> Result<T, Errno>,
    ) -> Result<T, TargetError> {
        let (folder, name) = self.place(path)?;
        match make(&folder, name) {
            Err(Errno::EXIST) if force => {
                unlinkat(&folder, name, AtFlags::empty()).map_err(fails("replaced"))?;
                make(&folder, name).map_err(fails(doing))
            }
            Err(Errno::EXIST) => Err(TargetError::Exists { path: self.shown.join(path) }),
            other => other.map_err(fails(doing)),
        }
    }

    /// Makes a folder for us alone, until it is finished; one that is there stays.
    pub(super) fn make_folder(&self, path: &Path, entry: &Entry) -> Result<(), TargetError> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let (folder, name) = self.place(path)?;
        match mkdirat(&folder, name, first_mode(entry, 0o700, 0o777)) {
            // If it is something else, or a link, it is refused here.
            Ok(()) | Err(Errno::EXIST) => self.folder(path).map(drop),
            Err(errno) => Err(fails("made")(errno)),
        }
    }

    /// Gives a folder its owner, mode and time.
    pub(super) fn finish_folder(&self, path: &Path, entry: &Entry) -> Result<(), TargetError> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        self.finish(&self.folder(path)?, entry)
    }

    pub(super) fn make_file(
        &self,
        path: &Path,
        entry: &Entry,
        force: bool,
    ) -> Result<Writing<'_>, TargetError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = first_mode(entry, 0o600, 0o666);
        let file = self
            .make(path, "made", force, |folder, name| openat2(folder, name, flags, mode, WITHIN))?;
        let (path, written, trouble) = (path.to_owned(), 0, None);
        Ok(Writing { target: self, path, file: file.into(), written, trouble })
    }

    /// Another name for a file that was copied before.
    pub(super) fn make_name(
        &self,
        first: &Path,
        path: &Path,
        force: bool,
    ) -> Result<(), TargetError> {
        let (first_folder, first_name) = self.place(first)?;
        self.make(path, "linked", force, |folder, name| {
            linkat(&first_folder, first_name, folder, name, AtFlags::empty())
        })
    }

    pub(super) fn make_link(
        &self,
        path: &Path,
        entry: &Entry,
        force: bool,
    ) -> Result<(), TargetError> {
        let target = OsStr::from_bytes(&entry.target);
        self.make(path, "linked", force, |folder, name| symlinkat(target, folder, name))?;
        let (folder, name) = self.place(path)?;
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        if let (true, Some((uid, gid))) = (self.owner.is_wanted(), owner_of(entry)) {
            let done = chownat(&folder, name, Some(uid), Some(gid), nofollow);
            done.map_err(fails("given to its owner"))?;
        }
        match times(entry) {
            Some(times) => utimensat(&folder, name, &times, nofollow).map_err(fails("dated")),
            None => Ok(()),
        }
    }

    fn finish(&self, file: impl AsFd, entry: &Entry) -> Result<(), TargetError> {
        let mut is_theirs = false;
        if let (true, Some((uid, gid))) = (self.owner.is_wanted(), owner_of(entry)) {
            fchown(&file, Some(uid), Some(gid)).map_err(fails("given to its owner"))?;
            is_theirs = true;
        }
        if let Some(mode) = entry.mode {
            // A program that runs as its owner must not run as somebody else.
            let mode = if is_theirs { mode & 0o7777 } else { mode & 0o1777 };
            fchmod(&file, Mode::from_raw_mode(mode)).map_err(fails("given its mode"))?;
        }
        match times(entry) {
            Some(times) => futimens(&file, &times).map_err(fails("dated")),
            None => Ok(()),
        }
    }
}

/// For us alone while its own mode is to come; else as usual.
fn first_mode(entry: &Entry, private: u32, usual: u32) -> Mode {
    Mode::from_raw_mode(if entry.mode.is_some() { private } else { usual })
}

fn owner_of(entry: &Entry) -> Option<(Uid, Gid)> {
    // The largest number would mean: leave as it is.
    let id = |id: Option<u32>| id.filter(|id| *id != u32::MAX);
    Some((Uid::from_raw(id(entry.uid)?), Gid::from_raw(id(entry.gid)?)))
}

fn times(entry: &Entry) -> Option<Timestamps> {
    let modified =
        Timespec { tv_sec: entry.modified_seconds?, tv_nsec: entry.modified_nanos.into() };
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    Some(Timestamps { last_access: omit, last_modification: modified })
}

/// A file that is being written.
pub(super) struct Writing<'t> {
    target: &'t Target,
    path: PathBuf,
    file: File,
    written: u64,
    trouble: Option<TargetError>,
}

impl Writing<'_> {
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), BrowseError> {
        if let Err(source) = self.file.write_all_at(bytes, offset) {
            let what = source.to_string();
            self.trouble = Some(TargetError::Make { doing: "written", source });
            return Err(BrowseError::Read { what });
        }
        self.written += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn written_bytes(&self) -> u64 {
        self.written
    }

    /// What went wrong in writing.
    pub(super) fn take_trouble(&mut self) -> Option<TargetError> {
        self.trouble.take()
    }

    pub(super) fn finish(self, entry: &Entry) -> Result<(), TargetError> {
        let sized = self.file.set_len(entry.size_bytes);
        sized.map_err(|source| TargetError::Make { doing: "made that long", source })?;
        self.target.finish(&self.file, entry)
    }

    /// Takes away what was begun.
    pub(super) fn remove(self) {
        let Ok((folder, name)) = self.target.place(&self.path) else { return };
        // Unless somebody has put something else there.
        let is_ours = || {
            let here = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            let ours = rustix::fs::fstat(&self.file).ok()?;
            Some((here.st_dev, here.st_ino) == (ours.st_dev, ours.st_ino))
        };
        if is_ours() == Some(true) {
            let _ = unlinkat(&folder, name, AtFlags::empty());
        }
    }
}
