//! Names that must not meet in one folder: file systems that don't tell cases apart would mix `web` and `Web` up.
//!
//! A store may be moved to such a file system, or be read from one, so this holds on every file system. Who came first has
//! the name; what a store holds already goes on being backed up.

use std::collections::HashMap;

use janus_proto::ids::{DiskId, MachineKey};

use super::{Machine, RunError, WantedDisk};

/// Refuses a machine that is new here when its folder could be another's.
pub(super) fn check_machine<T>(
    known: &HashMap<MachineKey, T>,
    new: &MachineKey,
) -> Result<(), RunError> {
    if known.contains_key(new) {
        return Ok(());
    }
    let meets = |other: &&MachineKey| {
        let same_user = other.user().eq_ignore_ascii_case(new.user());
        let same_machine = other.machine().eq_ignore_ascii_case(new.machine());
        same_user && (other.user() != new.user() || same_machine)
    };
    match known.keys().filter(meets).min() {
        Some(other) => Err(RunError::NameTaken { new: new.to_string(), other: other.to_string() }),
        None => Ok(()),
    }
}

/// Refuses a disk that is new on its machine when its folder could be another disk's.
pub(super) fn check_disks(machine: &Machine, wanted: &[WantedDisk]) -> Result<(), RunError> {
    let snapshots = machine.snapshots();
    let known: Vec<&DiskId> = snapshots.iter().map(|held| &held.snapshot().disk).collect();
    for WantedDisk { disk: new, .. } in wanted.iter().filter(|w| !known.contains(&&w.disk)) {
        let meets = |other: &&&DiskId| other.as_str().eq_ignore_ascii_case(new.as_str());
        if let Some(other) = known.iter().find(meets) {
            let (new, other) = (new.to_string(), other.to_string());
            return Err(RunError::NameTaken { new, other });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_whose_folders_could_meet_are_refused() {
        let key = |text: &str| text.parse::<MachineKey>().unwrap();
        let known = HashMap::from([(key("alice/web"), ()), (key("bob/web"), ())]);
        for fine in ["alice/web", "alice/web2", "carol/web", "bob/Mail"] {
            check_machine(&known, &key(fine)).unwrap();
        }
        for (bad, other) in [("alice/Web", "alice/web"), ("BOB/x", "bob/web")] {
            let error = check_machine(&known, &key(bad)).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains(other), "{error}");
        }
    }
}
