//! Folders of a store: nobody else reads them, and no two names share one.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use janus_proto::ids::BackupId;
use janus_server::{
    chain::store::{Store, StoreError},
    runs::{RunError, Runs, WantedDisk},
};

fn runs(folder: &Path) -> Runs {
    let (store, machines) = Store::open(folder, true).unwrap();
    Runs::new(store, machines, Duration::from_secs(60))
}

fn start(runs: &Runs, machine: &str, disk: &str) -> Result<(), RunError> {
    let (disk, size_bytes) = (disk.parse().unwrap(), 1 << 20);
    let wanted = [WantedDisk { disk, size_bytes, logical_sector_bytes: 512 }];
    runs.start(&machine.parse().unwrap(), BackupId::new(), &wanted, 0).map(drop)
}

fn assert_private(folder: &Path) {
    let mode = fs::metadata(folder).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700, "{}", folder.display());
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            assert_private(&entry.path());
        }
    }
}

#[test]
fn all_folders_are_their_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("not/there/yet");
    let runs = runs(&root);
    start(&runs, "alice/web", "disk").unwrap();
    assert_private(&folder.path().join("not"));
    assert!(root.join("alice/web/disk").is_dir());
}

#[test]
fn names_that_some_file_systems_take_for_one_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let runs = runs(folder.path());
    start(&runs, "alice/web", "disk").unwrap();
    for (machine, other) in [("alice/Web", "alice/web"), ("Alice/mail", "alice/web")] {
        let error = start(&runs, machine, "disk").unwrap_err();
        assert!(matches!(&error, RunError::NameTaken { other: o, .. } if o == other), "{error}");
        assert!(runs.machine(&machine.parse().unwrap()).is_none(), "{machine} left nothing");
        assert!(!folder.path().join(machine).exists());
    }
    start(&runs, "alice/mail", "disk").unwrap();
}

#[test]
fn a_store_of_the_other_setting_is_told_apart() {
    for separate in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (store, machines) = Store::open(folder.path(), separate).unwrap();
        let runs = Runs::new(store, machines, Duration::from_secs(60));
        start(&runs, "alice/web", "disk").unwrap();
        drop(runs);
        let error = Store::open(folder.path(), !separate).unwrap_err();
        assert!(matches!(error, StoreError::OtherLayout { .. }), "{error}");
        assert!(error.to_string().contains("rebuild"), "{error}");
        Store::open(folder.path(), separate).unwrap();
    }
}

#[test]
fn what_file_systems_keep_in_their_root_is_not_looked_into() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("lost+found/alice");
    fs::create_dir_all(&kept).unwrap();
    fs::write(kept.join(".machine.json"), "not ours").unwrap();
    let (_, machines) = Store::open(folder.path(), true).unwrap();
    assert!(machines.is_empty());
    assert_eq!(fs::read_to_string(kept.join(".machine.json")).unwrap(), "not ours");
}
