//! All file operations of the store, through one seam.
//!
//! [`Disk`] is what lies below the store: it opens [`File`]s and changes folders. Whoever touches a file of the store gets
//! it passed down, and uses nothing of `std::fs`; so a [`Watcher`] sees every operation before it is done and can make it fail,
//! as disks do. Without one the seam costs a comparison.
//!
//! What can be relied on after a crash of the machine: a file's content after [`File::sync_data`], a file's name after
//! [`Disk::sync_folder`]. A file replaced by [`Disk::replace`] is the old one or the new one, never a mixture. Everything here
//! blocks: call it from threads meant for it.

mod append;
mod clone;
mod disk;
mod file;
mod network;
mod watch;

use std::io;

pub use self::{
    append::Appender,
    disk::Disk,
    file::{Cloning, Elsewhere, File, Metadata},
    network::network_file_system,
    watch::{Access, Handle, Op, Verdict, Watcher},
};

/// True when the operation failed since the disk or a quota is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A file for tests that need no path. Large reads and writes of it go through the cache.
#[cfg(test)]
pub(crate) fn temporary() -> File {
    let folder = tempfile::tempdir().unwrap();
    Disk::default().open(&folder.path().join("file"), Access::CreateNew).unwrap()
}
