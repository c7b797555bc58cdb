//! `.NAME.<snapshot id>.partial`: what NAME will be once it is complete. It is locked while a restore writes to it, and is
//! found again by the next restore of the same snapshot to the same place.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::{TargetError, io_error};

const END: &str = ".partial";

/// The file that becomes the target.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) path: PathBuf,
    /// An earlier restore has left it.
    pub(super) was_there: bool,
    /// Of restores of other snapshots to the same place, which have ended.
    leftovers: Vec<PathBuf>,
}

impl Partial {
    /// Finds or makes the file for `target`, and locks it.
    pub(super) fn open(target: &Path, snapshot: &str) -> Result<(Self, File), TargetError> {
        let name = file_name(target)?;
        let path = target.with_file_name(format!(".{name}.{snapshot}{END}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let (file, was_there) = match options.clone().create_new(true).open(&path) {
            Ok(file) => (file, false),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let file = options.open(&path);
                (file.map_err(|source| io_error(&path, "opened", source))?, true)
            }
            Err(source) => return Err(io_error(target, "created", source)),
        };
        lock(&file, FlockOperation::NonBlockingLockExclusive, target, &path)?;
        check_ours(&file, &path)?;
        let leftovers = look_around(target, Some(&path)).inspect_err(|_| {
            if !was_there {
                let _ = fs::remove_file(&path);
            }
        })?;
        Ok((Self { path, was_there, leftovers }, file))
    }

    /// The target is complete: what was begun of it before is of no use any more.
    pub(super) fn remove_leftovers(&self) {
        for path in &self.leftovers {
            match fs::remove_file(path) {
                Ok(()) => {
                    tracing::info!(partial = %path.display(), "removed: left by a restore that did not end")
                }
                Err(error) => {
                    tracing::warn!(partial = %path.display(), %error, "a restore that did not end left this; remove it")
                }
            }
        }
    }
}

/// The file is still the one that has this name, and nobody else's.
fn check_ours(file: &File, path: &Path) -> Result<(), TargetError> {
    let looked =
        |result: io::Result<_>| result.map_err(|source| io_error(path, "looked at", source));
    let (opened, named) = (looked(file.metadata())?, looked(fs::symlink_metadata(path))?);
    let is_named = (opened.dev(), opened.ino()) == (named.dev(), named.ino());
    if !opened.is_file() || opened.uid() != rustix::process::geteuid().as_raw() {
        return Err(TargetError::Kind(path.into()));
    }
    // A restore that ended meanwhile gave it its name, or removed it.
    let busy = || TargetError::Busy { path: path.into(), locked: path.into() };
    is_named.then_some(()).ok_or_else(busy)
}

/// Partial files of the same target, but for `own`: those that nobody writes to. They are named, as they take space.
pub(super) fn look_around(target: &Path, own: Option<&Path>) -> Result<Vec<PathBuf>, TargetError> {
    let start = format!(".{}.", file_name(target)?);
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
    let entries = fs::read_dir(folder.unwrap_or(Path::new(".")));
    let entries = entries.map_err(|source| io_error(target, "created", source))?;
    let mut leftovers = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let id = name.strip_prefix(&start).and_then(|rest| rest.strip_suffix(END));
        let path = target.with_file_name(&name);
        if !id.is_some_and(is_id) || Some(&*path) == own {
            continue;
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
        let Ok(file) = options.open(&path) else { continue };
        if !file
            .metadata()
            .is_ok_and(|meta| meta.is_file() && meta.uid() == rustix::process::geteuid().as_raw())
        {
            continue;
        }
        lock(&file, FlockOperation::NonBlockingLockExclusive, target, &path)?;
        tracing::warn!(partial = %path.display(), "a restore of another snapshot to the same place did not end; its file is removed when this one is complete");
        leftovers.push(path);
    }
    Ok(leftovers)
}

/// A snapshot's id, or that of one of its volumes.
fn is_id(text: &str) -> bool {
    let (id, volume) = text.split_at_checked(36).unwrap_or_default();
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let is_volume = volume.is_empty() || volume.strip_prefix('-').is_some_and(is_number);
    uuid::Uuid::try_parse(id).is_ok() && is_volume
}

/// Locks until the file is closed.
pub(super) fn lock(
    file: &File,
    how: FlockOperation,
    target: &Path,
    locked: &Path,
) -> Result<(), TargetError> {
    match flock(file, how) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(TargetError::Busy { path: target.into(), locked: locked.into() })
        }
        // Some network file systems have no locks: then nobody is kept away.
        _ => Ok(()),
    }
}

fn file_name(target: &Path) -> Result<String, TargetError> {
    let name = target.file_name().ok_or_else(|| TargetError::Kind(target.into()))?;
    Ok(name.to_string_lossy().into_owned())
}
