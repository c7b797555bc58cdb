//! Small files that are replaced as a whole.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::io::Errno;

/// Whether the place is to blame, and not us: it is full, mounted read-only, its disk fails, or it is gone. Who only wants to
/// remember something there goes on without that.
pub(crate) fn takes_nothing(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    const GONE: [Errno; 6] = [
        Errno::NODEV,
        Errno::NXIO,
        Errno::NOMEDIUM,
        // Of a server of files, or of a program that serves them.
        Errno::STALE,
        Errno::REMOTEIO,
        Errno::NOTCONN,
    ];
    let is_gone = Errno::from_io_error(error).is_some_and(|errno| GONE.contains(&errno));
    let is_full =
        matches!(error.kind(), Kind::StorageFull | Kind::QuotaExceeded | Kind::ReadOnlyFilesystem);
    is_full || is_gone || is_unreadable(error)
}

/// Whether the disk has lost what is there: it can't be read, or the file system's own sums are wrong.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    const LOST: [Errno; 3] = [Errno::IO, Errno::UCLEAN, Errno::BADMSG];
    Errno::from_io_error(error).is_some_and(|errno| LOST.contains(&errno))
}

/// Opens a file whose only use is to be locked, and makes it when it is missing.
pub(crate) fn lock_file(path: &Path) -> io::Result<File> {
    match OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path) {
        // One that is there can be locked all the same.
        Err(error) if takes_nothing(&error) => File::open(path).map_err(|_| error),
        opened => opened,
    }
}

/// Makes a folder, with those above it, that other users can't look into. One that is there stays as it is.
pub(crate) fn private_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a file that only its owner may read, of these pieces. Its content is durable when it returns, its name isn't.
pub(crate) fn new_private(path: &Path, pieces: &[&[u8]]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    pieces.iter().try_for_each(|piece| file.write_all(piece))?;
    file.sync_all()
}

/// Makes the name of a file in its folder durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// Replaces a file: a crash leaves the old one or the new one. Durable when it returns.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_folder(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failing_disk_says_is_told_from_what_we_may_not() {
        let of = |errno: Errno| io::Error::from(errno);
        let lost = [Errno::IO, Errno::UCLEAN, Errno::BADMSG];
        assert!(lost.map(of).iter().all(|error| is_unreadable(error) && takes_nothing(error)));
        let away =
            [Errno::NODEV, Errno::NXIO, Errno::STALE, Errno::NOSPC, Errno::DQUOT, Errno::ROFS];
        assert!(away.map(of).iter().all(|error| !is_unreadable(error) && takes_nothing(error)));
        let ours = [Errno::ACCESS, Errno::PERM, Errno::NOENT, Errno::NOTDIR, Errno::NOMEM];
        assert!(ours.map(of).iter().all(|error| !takes_nothing(error)));
    }
}
