//! Small files that are replaced as a whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Whether the place is to blame, and not us: it is full, mounted read-only, or its disk fails. Who only wants to remember
/// something there goes on without that.
pub(crate) fn takes_nothing(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    const EIO: i32 = 5;
    let kind = error.kind();
    matches!(kind, Kind::StorageFull | Kind::QuotaExceeded | Kind::ReadOnlyFilesystem)
        || error.raw_os_error() == Some(EIO)
}

/// Opens a file whose only use is to be locked, and makes it when it is missing.
pub(crate) fn lock_file(path: &Path) -> io::Result<File> {
    match OpenOptions::new().write(true).create(true).truncate(false).open(path) {
        // One that is there can be locked all the same.
        Err(error) if takes_nothing(&error) => File::open(path).map_err(|_| error),
        opened => opened,
    }
}

/// Replaces a file: a crash leaves the old one or the new one. Durable when it returns.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
