//! Time that this server has seen pass, for what no clock may end.
//!
//! A wall clock can be set to any date. What counts here is how long this machine has been up: from start to start of the server
//! within one boot, sleep included. Of the time in which the machine is off nobody knows how long it was, so it doesn't count: a lock
//! may last longer by that, never shorter. `<image_path>/.clock.json` keeps the sum; a power cut costs what came after it was
//! written last, an hour at most. When it is lost, counting goes on from the highest count that a lock names.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::{
    chain::{
        FORMAT,
        store::{StoreError, read_or_put_aside, write},
    },
    storage::Disk,
};

const FILE: &str = ".clock.json";

/// Counts the time that passes.
pub struct Clock {
    storage: Disk,
    path: PathBuf,
    state: Mutex<Option<Seen>>,
}

/// A moment: how long the machine was up then, and what had been counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    format: u32,
    boot: String,
    up_ms: u64,
    seen_ms: u64,
}

impl Clock {
    /// The clock of the store at `root`. Nothing is read yet.
    pub fn new(storage: Disk, root: &Path) -> Self {
        Self { storage, path: root.join(FILE), state: Mutex::default() }
    }

    /// Milliseconds that were seen to pass; at least `least` when what was counted is lost. Reads a file the first time.
    pub fn seen_ms(&self, least: u64) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let known = match state.take() {
            Some(known) => Some(known),
            None => read_or_put_aside::<Seen>(&self.storage, &self.path).unwrap_or_else(|error| {
                tracing::error!(%error, "locks last longer: how much time has passed is not known any more");
                None
            }),
        };
        let seen_ms = self.count(known, least);
        let seen = self.now(seen_ms);
        *state = Some(seen);
        seen_ms
    }

    /// Keeps what was counted until now.
    ///
    /// # Errors
    /// As the file system says.
    pub fn save(&self, least: u64) -> Result<(), StoreError> {
        let seen_ms = self.seen_ms(least);
        write(&self.storage, &self.path, &self.now(seen_ms))
    }

    fn now(&self, seen_ms: u64) -> Seen {
        Seen { format: FORMAT, boot: self.storage.boot(), up_ms: self.storage.up_ms(), seen_ms }
    }

    fn count(&self, known: Option<Seen>, least: u64) -> u64 {
        let Some(known) = known else { return least };
        let boot = self.storage.boot();
        let passed = match !boot.is_empty() && known.boot == boot {
            true => self.storage.up_ms().saturating_sub(known.up_ms),
            false => 0,
        };
        known.seen_ms.saturating_add(passed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use super::*;

    #[test]
    fn time_passes_while_the_machine_is_up_and_is_kept_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let up = Arc::new(AtomicU64::new(1000));
        let clock = |boot: &str| {
            Clock::new(Disk::default().in_boot(boot).up_since(up.clone()), folder.path())
        };
        let first = clock("a");
        assert_eq!(first.seen_ms(0), 0);
        up.store(5000, Ordering::Relaxed);
        assert_eq!(first.seen_ms(0), 4000);
        first.save(0).unwrap();
        up.store(9000, Ordering::Relaxed);
        // Another process, the same boot: the time between counts.
        assert_eq!(clock("a").seen_ms(0), 8000);
        // A boot later: what was kept, and what is seen from now on.
        up.store(77, Ordering::Relaxed);
        let later = clock("b");
        assert_eq!(later.seen_ms(0), 4000);
        up.store(177, Ordering::Relaxed);
        assert_eq!(later.seen_ms(0), 4100);
        // Whoever sets the machine's own clock back gains nothing.
        up.store(0, Ordering::Relaxed);
        assert_eq!(later.seen_ms(0), 4100);
    }

    #[test]
    fn what_is_lost_is_counted_from_what_the_locks_know() {
        let folder = tempfile::tempdir().unwrap();
        let clock = || Clock::new(Disk::default(), folder.path());
        clock().save(500).unwrap();
        assert!(clock().seen_ms(0) >= 500);
        std::fs::write(folder.path().join(FILE), "nonsense").unwrap();
        assert_eq!(clock().seen_ms(700), 700);
    }
}
