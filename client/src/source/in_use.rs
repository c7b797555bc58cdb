//! Whether anything may write to a block device while it is read.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, io::Errno};

use super::{mounts, sysfs};

/// Who may write to it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Nobody: its file systems are unmounted or read-only. Programs that write to a device by themselves, as virtual machines do, are
    /// not seen.
    Nobody,
    /// Nobody that is seen; but it is swapped to, or has volumes that are active, which such programs like to use.
    Perhaps,
    /// A file system that is mounted here.
    Mounted(String),
    /// This device of it has an owner, and nothing tells which: a file system of a container, ZFS, a device that is exported.
    Unseen(PathBuf),
}

/// Who may write to `device`, which is at `path`.
pub(super) fn of(path: &Path, device: &sysfs::Device) -> Use {
    let family = device.family();
    if let Some(mount) = mounts::writable_mount(&family) {
        return Use::Mounted(mount);
    }
    // The kernel refuses where anything of it has an owner.
    if is_free(path) {
        return Use::Nobody;
    }
    let swaps = swaps();
    let mut found = Use::Nobody;
    for leaf in device.leaves() {
        if mounts::any_mount(&leaf.with_members()).is_some() {
            continue;
        }
        let is_swap = swaps.iter().any(|number| number == leaf.number());
        let node = leaf.node();
        if !is_swap && !node.as_deref().is_some_and(is_free) {
            return Use::Unseen(node.unwrap_or_else(|| path.to_owned()));
        }
        if is_swap || !leaf.is_hardware() {
            found = Use::Perhaps;
        }
    }
    found
}

fn is_free(device: &Path) -> bool {
    let flags = (OFlags::EXCL | OFlags::NONBLOCK).bits().cast_signed();
    match fs::OpenOptions::new().read(true).custom_flags(flags).open(device) {
        Ok(_) => true,
        // A part without content, as an extended partition that is too short to be opened.
        Err(error) => Errno::from_io_error(&error) == Some(Errno::NXIO),
    }
}

/// Numbers of the devices that are swapped to: proc_swaps(5).
fn swaps() -> Vec<String> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let paths = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let meta = paths.filter_map(|path| fs::metadata(path).ok());
    let devices = meta.filter(|meta| meta.file_type().is_block_device());
    devices.map(|meta| sysfs::number(meta.rdev())).collect()
}
