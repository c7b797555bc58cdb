//! Small files that are replaced as a whole.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
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
