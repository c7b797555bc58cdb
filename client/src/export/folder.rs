//! A folder for the socket of an export that has no other place.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    process::geteuid,
};

use super::ExportError;

const PREFIX: &str = "janus-export-";
const SOCKET: &str = "nbd.sock";

/// Ours alone; goes with its export.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// A new one where temporary files are. Those of exports that were killed go.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make() -> Result<Self, ExportError> {
        Self::make_in(&std::env::temp_dir())
    }

    fn make_in(parent: &Path) -> Result<Self, ExportError> {
        for_left_behind(parent, PREFIX, remove_if_dead);
        let path = parent.join(format!("{PREFIX}{}", uuid::Uuid::new_v4().simple()));
        let made = DirBuilder::new().mode(0o700).create(&path);
        let place = path.display().to_string();
        made.map(|()| Self(path)).map_err(|source| ExportError::Listen { place, source })
    }

    /// Where the socket is to be.
    pub fn socket(&self) -> PathBuf {
        self.0.join(SOCKET)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Its socket has gone before.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Hands over our user's folders in `parent` whose names begin with `prefix`, to be removed where who made them is dead. What can't
/// be looked at or removed stays.
pub fn for_left_behind(
    parent: &Path,
    prefix: &str,
    remove_if_dead: impl Fn(&Path) -> io::Result<()>,
) {
    let is_ours = |folder: &Path| {
        let meta = fs::symlink_metadata(folder);
        meta.is_ok_and(|meta| meta.is_dir() && meta.uid() == geteuid().as_raw())
    };
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    for folder in named.map(|entry| entry.path()).filter(|folder| is_ours(folder)) {
        let _ = remove_if_dead(&folder);
    }
}

fn remove_if_dead(folder: &Path) -> io::Result<()> {
    // Whoever makes a socket there holds this lock until it listens.
    let lock = File::open(folder)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    let socket = folder.join(SOCKET);
    match UnixStream::connect(&socket) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(socket)?;
            fs::remove_dir(folder)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn folders_of_exports_that_were_killed_go() {
        let parent = tempfile::tempdir().unwrap();
        let listening = Folder::make_in(parent.path()).unwrap();
        let listener = UnixListener::bind(listening.socket()).unwrap();
        let killed = Folder::make_in(parent.path()).unwrap();
        drop(UnixListener::bind(killed.socket()).unwrap());
        let young = Folder::make_in(parent.path()).unwrap();
        let others = parent.path().join("janus-export-notes");
        fs::write(&others, "mine").unwrap();
        let link = parent.path().join("janus-export-link");
        std::os::unix::fs::symlink(&killed.0, &link).unwrap();

        let new = Folder::make_in(parent.path()).unwrap();
        assert!(!killed.0.exists());
        let stay = [&listening.0, &young.0, &others, &new.0];
        assert!(stay.iter().all(|path| path.exists()) && link.is_symlink());
        drop(listener);
        fs::remove_file(listening.socket()).unwrap();
        let path = listening.0.clone();
        drop(listening);
        assert!(!path.exists());
    }
}
