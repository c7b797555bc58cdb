//! Segments of stubs that somebody is reading now.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::ids::SnapshotId;

/// Readers that wait at once. Others go on without what they lack.
const MOST: usize = 256;

/// What readers wait for.
#[derive(Debug, Default)]
pub struct Wanted {
    queue: Mutex<VecDeque<(SnapshotId, u64)>>,
    changed: Condvar,
}

impl Wanted {
    /// Waits until a segment of a stub was looked for, but not for longer than this. It may still not be here.
    pub fn fetch(&self, stub: SnapshotId, segment: u64, within: Duration) {
        let until = Instant::now() + within;
        let asked = (stub, segment);
        let mut queue = self.lock();
        if queue.len() >= MOST {
            return;
        }
        if !queue.contains(&asked) {
            queue.push_back(asked);
            self.changed.notify_all();
        }
        while queue.contains(&asked) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queue.retain(|one| *one != asked);
                return;
            }
            queue =
                self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A stub of which something is wanted.
    pub(super) fn stub(&self) -> Option<SnapshotId> {
        self.lock().front().map(|(stub, _)| *stub)
    }

    /// A segment of this stub that is wanted. It stays so until it is [`Self::done`].
    pub(super) fn next(&self, stub: SnapshotId) -> Option<u64> {
        self.lock().iter().find(|(of, _)| *of == stub).map(|(_, segment)| *segment)
    }

    /// It was looked for.
    pub(super) fn done(&self, stub: SnapshotId, segment: u64) {
        self.lock().retain(|one| *one != (stub, segment));
        self.changed.notify_all();
    }

    /// Nothing more of a stub can be had now.
    pub(super) fn give_up(&self, stub: SnapshotId) {
        self.lock().retain(|(of, _)| *of != stub);
        self.changed.notify_all();
    }

    /// Waits until something is wanted, but not for longer than this.
    pub(super) fn wait(&self, within: Duration) {
        let queue = self.lock();
        if queue.is_empty() {
            drop(self.changed.wait_timeout(queue, within));
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(SnapshotId, u64)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn who_waits_is_answered_by_whoever_looks_or_gives_up() {
        let wanted = Arc::new(Wanted::default());
        let stub = SnapshotId::new();
        for ends in [true, false] {
            let waiting = wanted.clone();
            let reader = thread::spawn(move || waiting.fetch(stub, 7, Duration::from_secs(60)));
            while wanted.stub().is_none() {
                thread::yield_now();
            }
            assert_eq!((wanted.next(stub), wanted.next(SnapshotId::new())), (Some(7), None));
            if ends {
                wanted.done(stub, 7)
            } else {
                wanted.give_up(stub)
            }
            reader.join().unwrap();
            assert_eq!(wanted.stub(), None);
        }
        let began = Instant::now();
        wanted.fetch(stub, 1, Duration::from_millis(20));
        assert!(began.elapsed() >= Duration::from_millis(20));
        assert_eq!(wanted.stub(), None, "who left wants nothing");
    }
}
