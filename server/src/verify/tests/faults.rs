//! A check whose disk fails once, at every operation in turn: it may not come to an end, but it finds no damage that isn't
//! there.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::io::Errno;

use super::scene::Scene;
use crate::{
    storage::{Disk, Op, Verdict, Watcher},
    verify::CheckError,
};

/// Fails one operation after so many others.
struct FailOnce {
    left: AtomicU64,
    error: Errno,
}

/// Far from any operation.
const NEVER: u64 = u64::MAX / 2;

impl Watcher for FailOnce {
    fn before(&self, _: &Op<'_>) -> io::Result<Verdict> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => {
                self.left.store(NEVER, Ordering::Relaxed);
                Err(self.error.into())
            }
            _ => Ok(Verdict::Go),
        }
    }
}

#[test]
fn an_operation_that_fails_once_is_no_damage() {
    let mut scene = Scene::with_three_backups();
    let mut tried = 0;
    for error in [Errno::IO, Errno::MFILE] {
        let watcher = Arc::new(FailOnce { left: AtomicU64::new(NEVER), error });
        scene = scene.restarted_on(Disk::watched(watcher.clone()));
        for held in scene.snapshots() {
            for operation in 0.. {
                watcher.left.store(operation, Ordering::Relaxed);
                let checked = scene.check(&held);
                match checked {
                    Ok(found) => assert!(found.is_none(), "{error} at {operation}: {found:?}"),
                    Err(CheckError::Io(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                assert_eq!(scene.damaged_blocks(&scene.newest()), 0, "{error} at {operation}");
                if watcher.left.load(Ordering::Relaxed) < NEVER / 2 {
                    break; // It was not reached.
                }
                tried += 1;
            }
        }
    }
    eprintln!("{tried} operations failed");
    assert!(tried > 100);
}
