//! How many bytes the requests of one connection hold: the next waits until there is room for it.

use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug)]
pub(super) struct Room {
    most: usize,
    held: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    pub(super) fn new(most: usize) -> Self {
        Self { most, held: Mutex::new(0), freed: Condvar::new() }
    }

    /// Waits for room. What is larger than all of it gets it alone.
    pub(super) fn take(&self, bytes: usize) -> Held<'_> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |held: &mut usize| *held > 0 && held.saturating_add(bytes) > self.most;
        let mut held = self.freed.wait_while(held, is_full).unwrap_or_else(PoisonError::into_inner);
        *held += bytes;
        Held { room: self, bytes }
    }
}

/// Room of one request, until it is answered.
#[derive(Debug)]
pub(super) struct Held<'a> {
    room: &'a Room,
    bytes: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *self.room.held.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.room.freed.notify_all();
    }
}
