//! Buffers of one message's data that are used again: a fresh megabyte costs more page faults than hashing it costs time.
//! They start where a page starts, so that [`crate::direct`] can read into them and write out of them.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;

use crate::{direct::ALIGN, model::MAX_BATCH_BYTES};

/// Most buffers kept for later.
const KEPT: usize = 32;

static POOL: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// [`MAX_BATCH_BYTES`] bytes; the memory goes back to a pool when it is dropped.
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// A buffer with any content.
    pub fn take() -> Self {
        let kept = POOL.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = kept.unwrap_or_else(|| vec![0; MAX_BATCH_BYTES + ALIGN]);
        let start = memory.as_ptr().addr().wrapping_neg() % ALIGN;
        Self { memory, start }
    }

    /// The first `len` bytes as a message part, without a copy.
    pub fn into_bytes(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + MAX_BATCH_BYTES]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + MAX_BATCH_BYTES]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.memory));
        }
    }
}
