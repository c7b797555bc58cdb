//! Real file systems in image files, and what is in them.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use janus_client::{
    browse::{Bounds, BrowseError, Volume, volume::Window},
    fs::FileSystemKind,
    source::medium::{FileMedium, Medium},
};
use janus_proto::direct::DirectFile;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::tree::{self, Abilities, Truths};

const UNIX: Abilities = Abilities { unix: true, links: true, holes: true, time_step: 1 };

/// One kind of file system, and how it is made.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub name: &'static str,
    pub kind: FileSystemKind,
    pub make: &'static str,
    pub mib: u64,
    /// Options of mount; empty: mtools instead.
    pub mount: &'static [&'static str],
    pub abilities: Abilities,
}

pub const EXT4: Plan = Plan {
    name: "ext4",
    kind: FileSystemKind::Ext4,
    make: "mkfs.ext4 -q -F",
    mib: 256,
    mount: &["-o", "loop"],
    abilities: UNIX,
};
pub const EXT3: Plan =
    Plan { name: "ext3", kind: FileSystemKind::Ext3, make: "mkfs.ext3 -q -F -I 256", ..EXT4 };
pub const XFS: Plan =
    Plan { name: "XFS", kind: FileSystemKind::Xfs, make: "mkfs.xfs -q -f", mib: 320, ..EXT4 };
pub const BTRFS: Plan =
    Plan { name: "btrfs", kind: FileSystemKind::Btrfs, make: "mkfs.btrfs -q -f", mib: 320, ..EXT4 };
pub const BTRFS_ZSTD: Plan =
    Plan { name: "btrfs with zstd", mount: &["-o", "loop,compress-force=zstd"], ..BTRFS };
pub const NTFS: Plan = Plan {
    name: "NTFS",
    kind: FileSystemKind::Ntfs,
    make: "mkntfs -q -F -Q",
    mib: 256,
    mount: &["-t", "ntfs-3g", "-o", "compression,streams_interface=windows"],
    abilities: Abilities { unix: false, links: true, holes: true, time_step: 100 },
};
pub const FAT: Plan = Plan {
    name: "FAT32",
    kind: FileSystemKind::Fat,
    make: "mkfs.vfat -F 32 -s 1",
    mib: 128,
    mount: &[],
    abilities: Abilities { unix: false, links: false, holes: false, time_step: 2_000_000_000 },
};
pub const FAT16: Plan = Plan { name: "FAT16", make: "mkfs.vfat -F 16", ..FAT };

/// An image file with a tree of files.
pub struct Image {
    pub plan: Plan,
    pub folder: TempDir,
    pub path: PathBuf,
    pub truths: Truths,
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    let done = command.args(arguments).env("MTOOLS_SKIP_CHECK", "1").env("TZ", "UTC").output();
    let done = done.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

impl Image {
    /// An empty file system.
    pub fn blank(plan: Plan) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        File::create(&path).unwrap().set_len(plan.mib << 20).unwrap();
        let (program, arguments) = plan.make.split_once(' ').unwrap();
        let arguments: Vec<_> = arguments.split(' ').chain([path.to_str().unwrap()]).collect();
        run(program, &arguments);
        Self { plan, folder, path, truths: Truths::new() }
    }

    /// One with about `count` files.
    pub fn filled(plan: Plan, count: usize) -> Self {
        Self::filled_with(plan, |root| tree::fill(root, count, plan.abilities, 7))
    }

    pub fn filled_with(plan: Plan, fill: impl FnOnce(&Path)) -> Self {
        let mut image = Self::blank(plan);
        image.change(|root| {
            fill(root);
            tree::truths(root, plan.abilities)
        });
        image
    }

    /// Changes what is in it; `change` tells what is there then.
    pub fn change(&mut self, change: impl FnOnce(&Path) -> Truths) {
        if self.plan.mount.is_empty() {
            let stage = self.folder.path().join("stage");
            fs::create_dir_all(&stage).unwrap();
            self.truths = change(&stage);
            let paths = fs::read_dir(&stage).unwrap().map(|one| one.unwrap().path());
            let paths: Vec<_> = paths.map(|path| path.to_str().unwrap().to_owned()).collect();
            let image = self.path.to_str().unwrap();
            let mut arguments = vec!["-s", "-p", "-m", "-Q", "-i", image];
            arguments.extend(paths.iter().map(String::as_str));
            run("mcopy", &[&arguments[..], &["::/"]].concat());
            // As mtools dates folders when it makes them.
            self.truths
                .values_mut()
                .filter(|one| one.kind == 'd')
                .for_each(|one| one.modified = (0, 0));
            return;
        }
        let mount = self.mount();
        self.truths = change(&mount.0);
    }

    pub fn mount(&self) -> Mounted {
        let at = self.folder.path().join("mount");
        fs::create_dir_all(&at).unwrap();
        let paths = [self.path.to_str().unwrap(), at.to_str().unwrap()];
        run("mount", &[self.plan.mount, &paths].concat());
        Mounted(at)
    }

    pub fn volume(&self) -> Volume {
        open(&self.path, self.plan.kind, Bounds::default()).unwrap()
    }
}

/// Unmounts when it is dropped.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..100 {
            if Command::new("umount").arg(&self.0).output().unwrap().status.success() {
                // ntfs-3g writes its last words after umount has returned.
                while run("ps", &["-eo", "args"]).contains(&format!("ntfs-3g {}", self.0.display()))
                {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("{} stays mounted", self.0.display());
    }
}

pub fn medium(path: &Path) -> Arc<dyn Medium> {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    Arc::new(FileMedium::new(DirectFile::for_reading(file, path), len, 512, false))
}

pub fn open(path: &Path, kind: FileSystemKind, bounds: Bounds) -> Result<Volume, BrowseError> {
    let medium = medium(path);
    let range = 0..medium.size_bytes();
    open_medium(medium, range, kind, bounds)
}

pub fn open_medium(
    medium: Arc<dyn Medium>,
    range: std::ops::Range<u64>,
    kind: FileSystemKind,
    bounds: Bounds,
) -> Result<Volume, BrowseError> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_janus-client"));
    Volume::open(program, Window { medium, range }, kind, bounds, CancellationToken::new())
}

/// Bytes that a file takes up.
pub fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}
