//! Loop devices and small file systems for tests of failing disks. Both need root.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::{disk, packages};

/// A file as a block device; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Attaches a file.
    ///
    /// # Errors
    /// When we aren't root or there is no free loop device.
    pub fn attach(file: &Path) -> Result<Self> {
        Self::attach_with_sectors(file, 512)
    }

    /// Attaches a file as a disk with logical sectors of this size.
    ///
    /// # Errors
    /// When we aren't root or there is no free loop device.
    pub fn attach_with_sectors(file: &Path, sector_bytes: u32) -> Result<Self> {
        require_root()?;
        let mut losetup = packages::command("losetup");
        losetup.args(["--find", "--show", "--sector-size", &sector_bytes.to_string()]).arg(file);
        Ok(Self(packages::output(&mut losetup)?.trim().into()))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = packages::output(packages::command("losetup").arg("--detach").arg(&self.0));
    }
}

/// What a small file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4: shares no blocks between files.
    Ext4,
    /// XFS, which shares them. At least 300 MiB.
    Xfs,
}

/// A mounted file system of a given size; unmounted and removed when dropped.
#[derive(Debug)]
pub struct SmallFileSystem {
    // In the order in which they must go: first the mount, then the device under it, then the files.
    mount: Mount,
    device: LoopDevice,
    image: PathBuf,
    _folder: TempDir,
}

#[derive(Debug)]
struct Mount(PathBuf);

impl SmallFileSystem {
    /// Makes an ext4 in a temporary folder and mounts it there.
    ///
    /// # Errors
    /// When we aren't root or a tool fails.
    pub fn mount(size_bytes: u64) -> Result<Self> {
        Self::mount_as(Kind::Ext4, size_bytes)
    }

    /// Makes a file system in a temporary folder and mounts it there.
    ///
    /// # Errors
    /// When we aren't root or a tool fails.
    pub fn mount_as(kind: Kind, size_bytes: u64) -> Result<Self> {
        Self::mount_in(&std::env::temp_dir(), kind, size_bytes)
    }

    /// Makes a file system in a new folder in `place` and mounts it there.
    ///
    /// # Errors
    /// When we aren't root or a tool fails.
    pub fn mount_in(place: &Path, kind: Kind, size_bytes: u64) -> Result<Self> {
        require_root()?;
        let folder = tempfile::Builder::new().prefix("janus-small-").tempdir_in(place)?;
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        fs::create_dir(&mount)?;
        disk::blank(&image, size_bytes)?;
        let (tools, program, arguments) = match kind {
            Kind::Ext4 => (packages::DISK_TOOLS, "mke2fs", "-q -t ext4 -m 0 -F"),
            Kind::Xfs => (packages::XFS_TOOLS, "mkfs.xfs", "-q -m reflink=1"),
        };
        packages::require(tools)?;
        packages::output(packages::command(program).args(arguments.split(' ')).arg(&image))?;
        let device = LoopDevice::attach(&image)?;
        packages::output(Command::new("mount").arg(device.path()).arg(&mount))?;
        Ok(Self { mount: Mount(mount), device, image, _folder: folder })
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.mount.0
    }

    /// From now on nothing can be written there.
    ///
    /// # Errors
    /// When somebody writes there now.
    pub fn make_read_only(&self) -> Result<()> {
        let mut command = Command::new("mount");
        packages::output(command.args(["-o", "remount,ro"]).arg(self.folder())).map(drop)
    }

    /// The disk loses all of it: what isn't in memory can't be read any more. Of what programs have written there nothing stays in
    /// memory.
    ///
    /// # Errors
    /// When a file can't be opened.
    pub fn lose_content(&self) -> Result<()> {
        rustix::fs::sync();
        for path in disk::files_below(self.folder())? {
            let file = fs::File::open(&path)?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(OpenOptions::new().write(true).open(&self.image)?.set_len(0)?)
    }

    /// Its block device, which is mounted.
    pub fn device(&self) -> &Path {
        self.device.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a program that still holds a file there must not leave the mount behind.
        let _ = packages::output(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

fn require_root() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test needs root: it uses loop devices");
    Ok(())
}
