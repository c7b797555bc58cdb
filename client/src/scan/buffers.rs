//! Message buffers that are used again: a fresh megabyte costs more page faults than hashing it costs time.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use janus_proto::model::MAX_BATCH_BYTES;

/// Most buffers kept for later.
const KEPT: usize = 32;

/// Buffers of [`MAX_BATCH_BYTES`].
#[derive(Debug, Clone, Default)]
pub struct Pool(Arc<Mutex<Vec<Box<[u8]>>>>);

impl Pool {
    /// A buffer with any content.
    pub fn take(&self) -> Buffer {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = kept.unwrap_or_else(|| vec![0; MAX_BATCH_BYTES].into_boxed_slice());
        Buffer { bytes, pool: self.clone() }
    }
}

/// A buffer, which goes back when it is dropped.
pub struct Buffer {
    /// Its bytes, [`MAX_BATCH_BYTES`] of them.
    pub bytes: Box<[u8]>,
    pool: Pool,
}

impl Buffer {
    /// The first `len` bytes as a message part, without a copy.
    pub fn into_bytes(self, len: usize) -> Bytes {
        Bytes::from_owner(self).slice(..len)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.bytes));
        }
    }
}
