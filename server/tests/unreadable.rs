//! Folders that can't be read: the server starts, and names them; what they hold is left alone, all else goes on.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use janus_proto::ids::{BackupId, MachineKey};
use janus_server::{
    chain::store::{Store, StoreError},
    runs::{RunError, Runs, WantedDisk},
    storage::{Disk, Op, Verdict, Watcher},
};
use xtask::loopback::SmallFileSystem;

/// What a folder of another owner, or on a bad sector, is to the server.
#[derive(Debug)]
struct Locked(PathBuf, io::ErrorKind);

impl Watcher for Locked {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        let path = match op {
            Op::Open { file, .. } => &file.path,
            Op::List { path } if *path == self.0 => return Err(self.1.into()),
            Op::Look { path } | Op::List { path } | Op::MakeFolder { path } => *path,
            Op::Rename { from, .. } => *from,
            _ => return Ok(Verdict::Go),
        };
        match path.parent().is_some_and(|parent| parent.starts_with(&self.0)) {
            true => Err(self.1.into()),
            false => Ok(Verdict::Go),
        }
    }
}

fn open(root: &Path, disk: Disk) -> Runs {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match Store::open_on(disk.clone(), root, true) {
            // A program that another test starts has our lock, too, until it is another program.
            Err(StoreError::Locked { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => {
                let (store, machines) = opened.unwrap();
                return Runs::new(store, machines, Duration::from_secs(60));
            }
        }
    }
}

fn start(runs: &Runs, machine: &str, disks: &[&str]) -> Result<(), RunError> {
    let wanted = disks.iter().map(|disk| WantedDisk {
        disk: disk.parse().unwrap(),
        size_bytes: 1 << 20,
        logical_sector_bytes: 512,
    });
    let wanted: Vec<_> = wanted.collect();
    runs.start(&machine.parse().unwrap(), BackupId::new(), &wanted, 0).map(drop)
}

fn counters(runs: &Runs) -> Vec<(String, u64)> {
    runs.machines().iter().map(|one| (one.key.to_string(), one.use_counter())).collect()
}

/// A store with three machines of two users; one of them has two disks.
fn store() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let runs = open(folder.path(), Disk::default());
    start(&runs, "alice/web", &["sda", "sdb"]).unwrap();
    start(&runs, "alice/mail", &["sda"]).unwrap();
    start(&runs, "bob/web", &["sda"]).unwrap();
    folder
}

/// Starts a server to which a folder is locked; what it answers to starts of the three machines.
fn with_locked(below: &str, kind: io::ErrorKind) -> (Vec<Option<String>>, Vec<String>) {
    let folder = store();
    let before = counters(&open(folder.path(), Disk::default()));
    let locked = folder.path().join(below);
    let runs = open(folder.path(), Disk::watched(Arc::new(Locked(locked, kind))));
    let refused = |machine: &str, disks: &[&str]| match start(&runs, machine, disks) {
        Ok(()) | Err(RunError::LeaseHeld { .. }) => None,
        Err(error @ RunError::Store(StoreError::Faulty { .. })) => Some(error.to_string()),
        Err(error) => panic!("{machine}: {error}"),
    };
    let answers = vec![
        refused("alice/web", &["sda", "sdb"]),
        refused("alice/web", &["sdb"]),
        refused("alice/mail", &["sda"]),
        refused("bob/web", &["sda"]),
    ];
    let warnings = runs.warnings();
    drop(runs);
    // Nothing was lost by it.
    let after = counters(&open(folder.path(), Disk::default()));
    assert_eq!(after.len(), 3);
    assert!(before.iter().zip(&after).all(|(was, is)| was.0 == is.0 && was.1 <= is.1));
    (answers, warnings)
}

#[test]
fn one_machine_one_disk_or_one_user_is_refused_alone() {
    for kind in [io::ErrorKind::PermissionDenied, io::ErrorKind::Other] {
        for (locked, refused) in [
            ("alice/web/sda", [true, false, false, false]),
            ("alice/web", [true, true, false, false]),
            ("alice/web/.runs", [true, true, false, false]),
            ("alice", [true, true, true, false]),
        ] {
            let (answers, warnings) = with_locked(locked, kind);
            let are_refused: Vec<bool> = answers.iter().map(Option::is_some).collect();
            assert_eq!(are_refused, refused, "{locked}: {answers:?}");
            assert_eq!(warnings.len(), 1, "{locked}: {warnings:?}");
            let texts = answers.iter().flatten().chain(&warnings);
            for text in texts {
                assert!(text.contains(locked) && text.contains("restart the server"), "{text}");
            }
            println!("{}", warnings[0]);
        }
    }
}

#[test]
fn all_is_as_before_when_it_can_be_read_again() {
    let folder = store();
    let locked = Locked(folder.path().join("alice/web"), io::ErrorKind::PermissionDenied);
    let runs = open(folder.path(), Disk::watched(Arc::new(locked)));
    let key: MachineKey = "alice/web".parse().unwrap();
    assert!(matches!(runs.check_machine(&key), Err(StoreError::Faulty { .. })));
    assert_eq!(runs.machine(&key).unwrap().active().len(), 0);
    drop(runs);
    let runs = open(folder.path(), Disk::default());
    runs.check_machine(&key).unwrap();
    assert_eq!(runs.machine(&key).unwrap().active().len(), 1, "its open run goes on");
    assert!(runs.warnings().is_empty());
}

#[test]
fn as_root_a_store_that_is_mounted_read_only_is_named() {
    let small = SmallFileSystem::mount(32 << 20).unwrap();
    let root = small.folder().join("images");
    let runs = open(&root, Disk::default());
    start(&runs, "alice/web", &["sda"]).unwrap();
    assert!(runs.warnings().is_empty());
    let remount = |how: &str| {
        let mut mount = std::process::Command::new("mount");
        assert!(mount.args(["-o", how]).arg(small.folder()).status().unwrap().success());
    };
    // As a disk that fails gets under a running server.
    drop(runs.machine(&"alice/web".parse().unwrap()).unwrap().active());
    drop(runs);
    remount("remount,ro");
    let error = Store::open(&root, true).unwrap_err();
    println!("{error}");
    assert!(matches!(&error, StoreError::ReadOnly { path } if *path == root), "{error}");
    assert!(error.to_string().contains("mounted read-only"), "{error}");
    remount("remount,rw");
    let runs = open(&root, Disk::default());
    assert_eq!(counters(&runs), [("alice/web".to_owned(), 1)]);
}
