//! Snapshots of LVM and ZFS that are made before a mounted disk is read, and removed afterwards.
//!
//! A snapshot is one point in time. While it is made, every file system on the disk that can be written to is frozen: by LVM itself
//! where it is directly on the volume, else by [`freeze`]. Where that fails it is as after a power cut, and is called so.
//! Nothing is logged while anything is frozen.
//!
//! Whoever has [`Snapshots`] must call [`Snapshots::remove`] when its devices are closed; dropped, they are removed, too. A client that is killed
//! leaves its snapshots behind; the next run of the same disk removes them. What isn't ours by name and mark is never removed.

use std::{
    fs::File,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use janus_proto::pb::Consistency;
use tokio_util::sync::CancellationToken;

use self::{
    freeze::{End, Freeze, Outcome, Target},
    program::{Line, ProgramError},
};
use crate::source::{
    mounts::{self, Writable},
    size_of, sysfs,
};

pub mod freeze;
mod fsfreeze;
mod lvm;
pub mod program;
pub mod watchdog;
mod zfs;

pub use self::lvm::SnapshotSize;

/// Begins the names of our snapshots.
const PREFIX: &str = "janus-";
/// How long a new snapshot may take to have a device.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);
const DEVICE_PAUSE: Duration = Duration::from_millis(20);
/// Tries to remove a snapshot: whoever looked at its device may need a moment to close it.
const REMOVALS: usize = 6;
const REMOVAL_PAUSE: Duration = Duration::from_millis(500);

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// What the disk is can't be told.
    #[error("{}: cannot tell whether it can have a snapshot: {source}; make_snapshots = false turns snapshots off", path.display())]
    Find {
        /// Path of the disk.
        path: PathBuf,
        /// Why.
        source: ProgramError,
    },
    /// It can't be made.
    #[error("{}: cannot make a snapshot: {source}; make_snapshots = false turns snapshots off", path.display())]
    Make {
        /// Path of the disk.
        path: PathBuf,
        /// Why.
        source: ProgramError,
    },
    /// It was made, and can't be read.
    #[error("{}: its snapshot {device} cannot be read: {reason}", path.display())]
    Device {
        /// Path of the disk.
        path: PathBuf,
        /// Where it should be.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It was stopped.
    #[error("interrupted; nothing was done")]
    Interrupted,
}

/// How snapshots are made.
#[derive(Debug, Clone)]
pub struct Wish {
    /// How much a snapshot of a thick volume of LVM can take up.
    pub size: SnapshotSize,
    /// A disk of which none can be made may be read while it changes.
    pub allow_live: bool,
}

/// A volume that can have snapshots.
#[derive(Debug)]
enum Volume {
    Lvm(lvm::Volume),
    Zfs(zfs::Volume),
}

/// A snapshot of ours.
#[derive(Debug)]
enum Snapshot {
    Lvm(lvm::Snapshot),
    Zfs(zfs::Snapshot),
}

/// What a disk is, as long as it can have a snapshot.
#[derive(Debug)]
struct Found {
    volume: Volume,
    /// Of a client that was killed.
    left: Vec<Snapshot>,
    /// File systems on it that can be written to; none: it needs no snapshot.
    mounted: Vec<Writable>,
    size_bytes: u64,
}

/// A disk that is read from a snapshot.
#[derive(Debug)]
pub struct Still {
    of: PathBuf,
    snapshot: Snapshot,
    device: PathBuf,
    consistency: Consistency,
}

impl Still {
    /// What is read in place of the disk.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// What it holds.
    pub fn consistency(&self) -> Consistency {
        self.consistency
    }
}

/// The snapshots of one run.
#[derive(Debug, Default)]
pub struct Snapshots(Vec<Still>);

impl Snapshots {
    /// Makes a snapshot of each of these disks that needs one and can have one; those that an earlier client left are
    /// removed first. Blocks, until what was begun is done also when `stop` asks; then, and when one fails, nothing stays.
    ///
    /// # Errors
    /// When one can't be made, unless a smeared copy will do.
    pub fn make<'a>(
        paths: impl IntoIterator<Item = &'a Path>,
        wish: &Wish,
        stop: &CancellationToken,
    ) -> Result<Self, SnapshotError> {
        let mut snapshots = Self::default();
        for path in paths {
            match snapshots.add(path, wish, stop) {
                Ok(()) => {}
                Err(error) if wish.allow_live && !stop.is_cancelled() => {
                    tracing::warn!(%error, "read without a snapshot, as allow_live says");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(snapshots)
    }

    /// The snapshot of the disk with this path.
    pub fn of(&self, path: &Path) -> Option<&Still> {
        self.0.iter().find(|still| still.of == path)
    }

    /// Says which snapshots were too small for what was written to their volumes meanwhile. Blocks.
    pub fn overflowed(&self) -> Option<String> {
        let full =
            |still: &&Still| matches!(&still.snapshot, Snapshot::Lvm(one) if one.has_overflowed());
        let names: Vec<_> = self.0.iter().filter(full).map(|still| still.snapshot.name()).collect();
        (!names.is_empty()).then(|| {
            format!("the snapshot {} has overflowed: set snapshot_size larger", names.join(", "))
        })
    }

    /// Removes them. One that can't be removed is an error in the log. Blocks.
    pub fn remove(mut self) {
        self.remove_all();
    }

    fn remove_all(&mut self) {
        while let Some(still) = self.0.pop() {
            still.snapshot.remove(REMOVALS);
        }
    }

    fn add(
        &mut self,
        path: &Path,
        wish: &Wish,
        stop: &CancellationToken,
    ) -> Result<(), SnapshotError> {
        let going = || if stop.is_cancelled() { Err(SnapshotError::Interrupted) } else { Ok(()) };
        going()?;
        let Some(found) = find(path)? else { return Ok(()) };
        found.left.iter().for_each(|left| {
            tracing::warn!(snapshot = left.name(), "an earlier client has left it; removing it");
            left.remove(1);
        });
        if found.mounted.is_empty() {
            return Ok(());
        }
        going()?;
        let snapshot = found.volume.snapshot(&new_name());
        let device = PathBuf::from(snapshot.device());
        let made = make(&found, &snapshot, &wish.size)
            .map_err(|source| SnapshotError::Make { path: path.to_owned(), source });
        let ready = made.and_then(|consistency| {
            let fails = |reason| SnapshotError::Device {
                path: path.to_owned(),
                device: device.display().to_string(),
                reason,
            };
            wait_for(&device, found.size_bytes).map_err(fails).map(|()| consistency)
        });
        match ready {
            Ok(consistency) => {
                self.0.push(Still { of: path.to_owned(), snapshot, device, consistency })
            }
            Err(error) => {
                // Some of it may be there.
                snapshot.try_remove();
                return Err(error);
            }
        }
        going()
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.remove_all();
    }
}

impl Volume {
    fn name(&self) -> String {
        match self {
            Self::Lvm(volume) => volume.name(),
            Self::Zfs(volume) => volume.name().to_owned(),
        }
    }

    fn snapshot(&self, name: &str) -> Snapshot {
        match self {
            Self::Lvm(volume) => Snapshot::Lvm(volume.snapshot(name)),
            Self::Zfs(volume) => Snapshot::Zfs(volume.snapshot(name)),
        }
    }

    /// Making a snapshot freezes this file system on it.
    fn freezes(&self, mounted: &Writable) -> bool {
        matches!(self, Self::Lvm(_)) && mounted.is_direct
    }
}

impl Snapshot {
    fn name(&self) -> String {
        match self {
            Self::Lvm(snapshot) => snapshot.name(),
            Self::Zfs(snapshot) => snapshot.name().to_owned(),
        }
    }

    fn device(&self) -> String {
        match self {
            Self::Lvm(snapshot) => snapshot.device(),
            Self::Zfs(snapshot) => snapshot.device(),
        }
    }

    fn make_line(&self, size: &SnapshotSize) -> Line {
        match self {
            Self::Lvm(snapshot) => lvm::make_line(snapshot, size),
            Self::Zfs(snapshot) => zfs::make_line(snapshot),
        }
    }

    fn remove_lines(&self) -> Vec<Line> {
        match self {
            Self::Lvm(snapshot) => vec![lvm::remove_line(snapshot)],
            Self::Zfs(snapshot) => zfs::remove_lines(snapshot),
        }
    }

    /// The last line removes what the snapshot is, and can't as long as something is left of it.
    fn try_remove(&self) -> Option<ProgramError> {
        self.remove_lines().iter().fold(None, |_, line| line.run().err())
    }

    fn remove(&self, tries: usize) {
        for left in (0..tries).rev() {
            let Some(error) = self.try_remove() else {
                tracing::info!(snapshot = self.name(), "the snapshot is removed");
                return;
            };
            if left > 0 {
                thread::sleep(REMOVAL_PAUSE);
                continue;
            }
            let lines: Vec<_> = self.remove_lines().iter().map(Line::to_string).collect();
            tracing::error!(
                snapshot = self.name(), %error,
                "THE SNAPSHOT STAYS and takes up space; the next backup of this disk tries again, or type: {}",
                lines.join("; ")
            );
        }
    }
}

fn new_name() -> String {
    format!("{PREFIX}{}", uuid::Uuid::now_v7().simple())
}

/// True when a backup would make a snapshot of this disk.
///
/// # Errors
/// When that can't be told.
pub fn is_possible(path: &Path) -> Result<bool, SnapshotError> {
    Ok(find(path)?.is_some_and(|found| !found.mounted.is_empty()))
}

/// What the disk at `path` is, when it can have a snapshot. What is missing or no device is found out by whoever opens it.
fn find(path: &Path) -> Result<Option<Found>, SnapshotError> {
    let Ok(meta) = std::fs::metadata(path) else { return Ok(None) };
    if !meta.file_type().is_block_device() {
        return Ok(None);
    }
    let device = sysfs::Device::of(meta.rdev());
    let mounted = mounts::writable(&device.family());
    let is_known = device.snapshots().is_some();
    if device.is_hardware() || !is_known && mounted.is_empty() {
        return Ok(None);
    }
    let fails = |source| SnapshotError::Find { path: path.to_owned(), source };
    let volume = match zfs::find(meta.rdev()).map_err(fails)? {
        Some((volume, left)) => {
            let left = left.into_iter().map(Snapshot::Zfs).collect();
            Some((Volume::Zfs(volume), left))
        }
        None => {
            let numbers = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
            lvm::find(numbers.0, numbers.1).map_err(fails)?.map(|(volume, left)| {
                (Volume::Lvm(volume), left.into_iter().map(Snapshot::Lvm).collect())
            })
        }
    };
    let size_bytes = || File::open(path).and_then(|file| size_of(&file, true)).unwrap_or(0);
    Ok(volume.map(|(volume, left)| Found { volume, left, mounted, size_bytes: size_bytes() }))
}

/// Makes a snapshot, with the file systems on its volume frozen meanwhile.
fn make(
    found: &Found,
    snapshot: &Snapshot,
    size: &SnapshotSize,
) -> Result<Consistency, ProgramError> {
    let ours = found.mounted.iter().filter(|mounted| !found.volume.freezes(mounted));
    let opened = ours.map(|mounted| (Target::open(mounted), mounted));
    let (mut targets, mut doubts) = (Vec::new(), Vec::new());
    // The one that was mounted last may be in a file of another one: it is frozen first.
    for (target, mounted) in opened.rev() {
        match target {
            Ok(target) => targets.push(target),
            Err(error) => doubts.push(format!("{}: {error}", mounted.mounts[0].1)),
        }
    }
    targets.iter().for_each(Target::sync);
    let (made, why) = while_frozen(targets, || snapshot.make_line(size).run());
    doubts.extend(why);
    made?;
    if let Snapshot::Zfs(zfs) = snapshot
        && let Some(line) = zfs::clone_line(zfs)
    {
        line.run()?;
    }
    let (volume, snapshot) = (found.volume.name(), snapshot.name());
    if doubts.is_empty() {
        tracing::info!(volume, snapshot, "read from a snapshot, made of frozen file systems");
        return Ok(Consistency::Frozen);
    }
    let doubts = doubts.join("; ");
    tracing::warn!(volume, snapshot, doubts, "read from a snapshot as after a power cut");
    Ok(Consistency::Crash)
}

/// Does `work` with these file systems frozen; what it gave, and why they were not all frozen until it was done.
fn while_frozen<T>(targets: Vec<Target>, work: impl FnOnce() -> T) -> (T, Vec<String>) {
    if targets.is_empty() {
        return (work(), Vec::new());
    }
    let mounts: Vec<_> = targets.iter().map(|target| target.mount.clone()).collect();
    let freeze = match Freeze::begin(freeze::own_program(), targets, watchdog::LIMIT) {
        Ok(freeze) => freeze,
        Err(error) => return (work(), vec![format!("the watchdog can't be started: {error}")]),
    };
    let outcomes = freeze.outcomes().to_vec();
    let made = work();
    let end = freeze.thaw();
    let failed = mounts.iter().zip(outcomes).filter(|(_, outcome)| *outcome != Outcome::Frozen);
    let mut doubts: Vec<_> = failed.map(|(mount, why)| format!("{mount}: {why}")).collect();
    match end {
        End::Told => {}
        End::Expired => doubts.push(format!(
            "the watchdog thawed after {} s, before the snapshot was there",
            watchdog::LIMIT.as_secs()
        )),
        End::Lost => doubts.push("the watchdog died or was silent".to_owned()),
    }
    (made, doubts)
}

/// Waits until the device of a snapshot is there.
fn wait_for(device: &Path, size_bytes: u64) -> Result<(), String> {
    let until = Instant::now() + DEVICE_PATIENCE;
    loop {
        let size = File::open(device).and_then(|file| size_of(&file, true));
        match size {
            Ok(size) if size == size_bytes => return Ok(()),
            _ if Instant::now() < until => thread::sleep(DEVICE_PAUSE),
            Ok(size) => return Err(format!("it has {size} bytes, the disk {size_bytes}")),
            Err(error) => return Err(error.to_string()),
        }
    }
}
