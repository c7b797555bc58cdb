//! Volumes of ZFS (zvols): which one a device is, and command lines for their snapshots.
//!
//! A snapshot has no device of its own where `snapdev` hides it, so it is read through a clone of it, beside the volume. Names
//! of both begin with `janus-`, and a snapshot of ours has a property of ours; nothing else is ever removed.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use super::program::{Line, ProgramError};

/// Property of our snapshots.
const PROPERTY: &str = "janus-backup:snapshot";
/// Where links to the devices of volumes are.
const LINKS: &str = "/dev/zvol";
/// Folders below each other in which they are looked for.
const MAX_DEPTH: u32 = 50;

/// A volume: `POOL/…/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Volume(String);

/// A snapshot of ours, with its clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// `POOL/…/VOLUME@NAME`.
    name: String,
    /// `POOL/…/NAME`; `None` when there is none.
    clone: Option<String>,
}

impl Volume {
    /// `POOL/…/NAME`.
    pub(super) fn name(&self) -> &str {
        &self.0
    }

    /// The snapshot of it that [`make_line`] makes.
    pub(super) fn snapshot(&self, name: &str) -> Snapshot {
        Snapshot { name: format!("{}@{name}", self.0), clone: self.clone_name(name) }
    }

    /// A volume is never the pool itself.
    fn clone_name(&self, name: &str) -> Option<String> {
        self.0.rsplit_once('/').map(|(parent, _)| format!("{parent}/{name}"))
    }
}

impl Snapshot {
    /// `POOL/…/VOLUME@NAME`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Device of its clone.
    pub(super) fn device(&self) -> String {
        format!("{LINKS}/{}", self.clone.as_deref().unwrap_or_default())
    }
}

/// Makes the snapshot: the moment for which the file systems on the volume are frozen.
pub(super) fn make_line(snapshot: &Snapshot) -> Line {
    let property = format!("{PROPERTY}=yes");
    Line::new("zfs", "snapshot -o", &[&property, &snapshot.name])
}

/// Makes its clone, whose partitions nobody looks for.
pub(super) fn clone_line(snapshot: &Snapshot) -> Option<Line> {
    let clone = snapshot.clone.as_deref()?;
    Some(Line::new("zfs", "clone -o readonly=on -o volmode=dev", &[&snapshot.name, clone]))
}

/// Removes clone and snapshot; never what somebody else has made of them, so that they stay then.
pub(super) fn remove_lines(snapshot: &Snapshot) -> Vec<Line> {
    let names = snapshot.clone.iter().chain([&snapshot.name]);
    names.map(|name| Line::new("zfs", "destroy", &[name])).collect()
}

fn list_line(volume: &Volume) -> Line {
    let columns = format!("name,{PROPERTY},clones");
    Line::new("zfs", "list -H -t snapshot -d 1 -o", &[&columns, &volume.0])
}

/// The volume with this device number, and snapshots of it that an earlier client has left; `None` when it is none.
///
/// # Errors
/// When ZFS can't tell.
pub(super) fn find(rdev: u64) -> Result<Option<(Volume, Vec<Snapshot>)>, ProgramError> {
    let Some(name) = link_of(Path::new(LINKS), "", rdev, 0) else { return Ok(None) };
    let volume = Volume(name);
    let left = left_in(&volume, &list_line(&volume).run()?);
    Ok(Some((volume, left)))
}

fn link_of(folder: &Path, name: &str, rdev: u64, depth: u32) -> Option<String> {
    if depth > MAX_DEPTH {
        return None;
    }
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let Ok(own) = entry.file_name().into_string() else { continue };
        let full = if name.is_empty() { own } else { format!("{name}/{own}") };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if let Some(found) = link_of(&entry.path(), &full, rdev, depth + 1) {
                return Some(found);
            }
        } else if !full.contains('@')
            && fs::metadata(entry.path())
                .is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == rdev)
        {
            return Some(full);
        }
    }
    None
}

fn left_in(volume: &Volume, listing: &str) -> Vec<Snapshot> {
    listing.lines().filter_map(|line| left(volume, line)).collect()
}

fn left(volume: &Volume, line: &str) -> Option<Snapshot> {
    let mut columns = line.split('\t');
    let (name, ours, clones) = (columns.next()?, columns.next()?, columns.next()?);
    let (of, own) = name.split_once('@')?;
    if of != volume.0 || !own.starts_with(super::PREFIX) || ours != "yes" {
        return None;
    }
    let clone = volume.clone_name(own).filter(|clone| clones.split(',').any(|one| one == clone));
    Some(Snapshot { name: name.to_owned(), clone })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let snapshot = Volume("tank/vm/disk".into()).snapshot("janus-1");
        assert_eq!(snapshot.device(), "/dev/zvol/tank/vm/janus-1");
        let made = [make_line(&snapshot), clone_line(&snapshot).unwrap()].map(|l| l.to_string());
        assert_eq!(
            made,
            [
                "zfs snapshot -o janus-backup:snapshot=yes tank/vm/disk@janus-1",
                "zfs clone -o readonly=on -o volmode=dev tank/vm/disk@janus-1 tank/vm/janus-1",
            ]
        );
        let removed = remove_lines(&snapshot).iter().map(Line::to_string).collect::<Vec<_>>();
        assert_eq!(removed, ["zfs destroy tank/vm/janus-1", "zfs destroy tank/vm/disk@janus-1"]);
        let volume = Volume("tank/vm/disk".into());
        assert_eq!(
            list_line(&volume).to_string(),
            "zfs list -H -t snapshot -d 1 -o name,janus-backup:snapshot,clones tank/vm/disk"
        );
    }

    #[test]
    fn only_our_snapshots_are_left_overs_and_only_our_clones_go_with_them() {
        let volume = Volume("tank/disk".into());
        let left = left_in(
            &volume,
            "tank/disk@nightly\t-\t\n\
             tank/disk@janus-mine\t-\t\n\
             tank/disk@janus-1\tyes\ttank/janus-1,tank/mine\n\
             tank/disk@janus-2\tyes\t\n\
             tank/disk@nightly2\tyes\ttank/janus-9\n",
        );
        let clone = |n: &str| Some(format!("tank/{n}"));
        assert_eq!(
            left,
            [
                Snapshot { name: "tank/disk@janus-1".into(), clone: clone("janus-1") },
                Snapshot { name: "tank/disk@janus-2".into(), clone: None },
            ]
        );
        assert_eq!(remove_lines(&left[1]).len(), 1);
    }

    #[test]
    fn what_has_no_link_is_no_volume() {
        assert_eq!(find(u64::MAX).unwrap(), None);
    }
}
