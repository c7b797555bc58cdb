//! A disk on which one operation goes wrong.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use janus_server::storage::{Disk, Op, Verdict, Watcher};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process ends before the operation.
    Kill,
    /// The process ends in the middle of it, if it is a write.
    Torn,
    /// It fails once, with this number of the system.
    Error(i32),
}

/// Counts the operations that change something, and spoils one of them.
pub struct Spoiler {
    fault: Fault,
    /// Number of the operation, from 1; 0 for none.
    at: u64,
    seen: AtomicU64,
    armed: AtomicBool,
    dead: AtomicBool,
}

impl Spoiler {
    /// A spoiler that does nothing before it is armed.
    pub fn new(fault: Fault, at: u64) -> Arc<Self> {
        let (seen, armed, dead) = (0.into(), false.into(), false.into());
        Arc::new(Self { fault, at, seen, armed, dead })
    }

    pub fn disk(self: &Arc<Self>) -> Disk {
        Disk::watched(self.clone())
    }

    pub fn arm(&self, armed: bool) {
        self.armed.store(armed, Ordering::Relaxed);
    }

    /// Changes seen while armed.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

impl Watcher for Spoiler {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        if self.dead.load(Ordering::Relaxed) {
            return Err(io::Error::other("the process has ended"));
        }
        if !self.armed.load(Ordering::Relaxed) || !op.is_change() {
            return Ok(Verdict::Go);
        }
        if self.seen.fetch_add(1, Ordering::Relaxed) + 1 != self.at {
            return Ok(Verdict::Go);
        }
        let (error, written) = match self.fault {
            Fault::Error(number) => (io::Error::from_raw_os_error(number), 1),
            Fault::Kill => (io::Error::other("the process ends"), 0),
            Fault::Torn => (io::Error::other("the process ends in a write"), 1),
        };
        let is_error = matches!(self.fault, Fault::Error(_));
        self.dead.store(!is_error, Ordering::Relaxed);
        match op {
            Op::Write { data, .. } if written > 0 => {
                // Whole sectors get to the disk, and not all of them.
                Ok(Verdict::Short { written: data.len() / 2 / 512 * 512, error })
            }
            _ => Err(error),
        }
    }
}
