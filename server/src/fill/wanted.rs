//! Segments of stubs that somebody is reading now.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::ids::SnapshotId;

/// Readers that wait at once. Others go on without what they lack.
const MOST: usize = 256;
/// What couldn't be had is not looked for again before this: a restore reads many segments.
const AGAIN: Duration = Duration::from_secs(1);
/// And when nothing was heard in time.
const AGAIN_LATER: Duration = Duration::from_secs(30);

/// What readers wait for.
#[derive(Debug, Default)]
pub struct Wanted {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<(SnapshotId, u64)>,
    /// Stubs of which something was wanted in vain, and until when nothing else is.
    in_vain: HashMap<SnapshotId, Instant>,
}

impl Wanted {
    /// Waits until a segment of a stub was looked for, but not for longer than this. It may still not be here.
    pub fn fetch(&self, stub: SnapshotId, segment: u64, within: Duration) {
        let until = Instant::now() + within;
        let asked = (stub, segment);
        let mut state = self.lock();
        state.in_vain.retain(|_, until| *until > Instant::now());
        if state.queue.len() >= MOST || state.in_vain.contains_key(&stub) {
            return;
        }
        if !state.queue.contains(&asked) {
            state.queue.push_back(asked);
            self.changed.notify_all();
        }
        while state.queue.contains(&asked) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.queue.retain(|one| *one != asked);
                state.in_vain.insert(stub, Instant::now() + AGAIN_LATER);
                return;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A stub of which something is wanted.
    pub(super) fn stub(&self) -> Option<SnapshotId> {
        self.lock().queue.front().map(|(stub, _)| *stub)
    }

    /// A segment of this stub that is wanted. It stays so until it is [`Self::done`].
    pub(super) fn next(&self, stub: SnapshotId) -> Option<u64> {
        self.lock().queue.iter().find(|(of, _)| *of == stub).map(|(_, segment)| *segment)
    }

    /// It was looked for, and all of it is here or not.
    pub(super) fn done(&self, stub: SnapshotId, segment: u64, is_here: bool) {
        let mut state = self.lock();
        state.queue.retain(|one| *one != (stub, segment));
        match is_here {
            true => state.in_vain.remove(&stub),
            false => state.in_vain.insert(stub, Instant::now() + AGAIN),
        };
        self.changed.notify_all();
    }

    /// Nothing of a stub can be had now.
    pub(super) fn give_up(&self, stub: SnapshotId) {
        let mut state = self.lock();
        state.queue.retain(|(of, _)| *of != stub);
        state.in_vain.insert(stub, Instant::now() + AGAIN);
        self.changed.notify_all();
    }

    /// Waits until something is wanted, but not for longer than this.
    pub(super) fn wait(&self, within: Duration) {
        let state = self.lock();
        if state.queue.is_empty() {
            drop(self.changed.wait_timeout(state, within));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn who_waits_is_answered_by_whoever_looks_and_after_a_failure_nobody_waits_again() {
        let wanted = Arc::new(Wanted::default());
        let long = Duration::from_secs(60);
        for (is_done, waits_again) in [(Some(true), true), (Some(false), false), (None, false)] {
            let stub = SnapshotId::new();
            let waiting = wanted.clone();
            let reader = thread::spawn(move || waiting.fetch(stub, 7, long));
            while wanted.stub().is_none() {
                thread::yield_now();
            }
            assert_eq!((wanted.next(stub), wanted.next(SnapshotId::new())), (Some(7), None));
            match is_done {
                Some(is_here) => wanted.done(stub, 7, is_here),
                None => wanted.give_up(stub),
            }
            reader.join().unwrap();
            assert_eq!(wanted.stub(), None);
            let began = Instant::now();
            wanted.fetch(stub, 8, Duration::from_millis(20));
            assert_eq!(began.elapsed() >= Duration::from_millis(20), waits_again);
            assert_eq!(wanted.stub(), None, "who left wants nothing");
        }
    }
}
