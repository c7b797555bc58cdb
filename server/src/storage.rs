//! The durable file operations the store is built from.
//!
//! A file replaced by [`replace`] is the old one or the new one after any crash, never a mixture. Everything here
//! blocks: call it from threads meant for it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// Replaces `path` by `bytes`: write beside it, sync, rename, sync the folder.
///
/// # Errors
/// As the file system says; the old content stays then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = folder_of(path)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_os_string();
    name.push(".new");
    let fresh = folder.join(name);
    let mut file = File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    sync_folder(folder)
}

/// Makes renames and new files in `folder` durable.
///
/// # Errors
/// As the file system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a folder and those above it, durably, readable by the owner alone.
///
/// # Errors
/// As the file system says.
pub fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = folder_of(path)?;
    make_folder(parent)?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    sync_folder(parent)
}

/// Removes a file; that it is absent already is no error.
///
/// # Errors
/// As the file system says.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Free and total bytes of the file system that holds `path`.
///
/// # Errors
/// As the file system says.
pub fn space(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path)?;
    Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

/// Kind of the network file system that holds `path`, or will when it is made; `None`: a local one, as far as can be told.
///
/// # Errors
/// As the file system says.
pub fn network_file_system(path: &Path) -> io::Result<Option<&'static str>> {
    let absolute = std::path::absolute(path)?;
    let existing = absolute.ancestors().find(|folder| folder.exists()).unwrap_or(&absolute);
    // The type is of another width and sign on each architecture; the numbers have 32 bits.
    Ok(network_kind(rustix::fs::statfs(existing)?.f_type as u32))
}

/// By the numbers of `linux/magic.h` and statfs(2).
fn network_kind(magic: u32) -> Option<&'static str> {
    Some(match magic {
        0x0000_6969 => "NFS",
        0x0000_517B | 0xFF53_4D42 | 0xFE53_4D42 => "SMB",
        0x00C3_6400 => "Ceph",
        0x5346_414F | 0x6B41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x0102_1997 => "9P",
        0x4750_4653 => "GPFS",
        0x0BD0_0BD0 => "Lustre",
        _ => return None,
    })
}

/// True when the operation failed since the disk or a quota is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn folder_of(path: &Path) -> io::Result<&Path> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}

use std::os::unix::fs::DirBuilderExt as _;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_told_from_local_ones() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("not/there/yet");
        assert_eq!(network_file_system(&missing).unwrap(), None);
        assert_eq!((network_kind(0x6969), network_kind(0xFF53_4D42)), (Some("NFS"), Some("SMB")));
        assert_eq!(network_kind(0xEF53), None, "ext4");
    }
}
