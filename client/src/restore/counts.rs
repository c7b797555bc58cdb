//! What a restore has done so far.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::part::Part;
use crate::progress::Progress;

#[derive(Debug)]
pub(super) struct Counts {
    progress: Arc<Progress>,
    read: AtomicU64,
    fetched: AtomicU64,
    written: AtomicU64,
    verified: AtomicU64,
    read_back: AtomicU64,
}

impl Counts {
    pub(super) fn new(progress: Arc<Progress>) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            progress,
            read: zero(),
            fetched: zero(),
            written: zero(),
            verified: zero(),
            read_back: zero(),
        }
    }

    /// Read of the target, or of the file that it replaces.
    pub(super) fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
        self.progress.read(bytes);
    }

    /// Came over the network, as packed.
    pub(super) fn fetched(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
        self.progress.fetched(bytes);
    }

    pub(super) fn written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Of a part that isn't complete yet so many bytes are there.
    pub(super) fn advance(&self, part: &mut Part, bytes: u64) {
        let more = bytes.min(part.bytes().saturating_sub(part.counted));
        part.counted += more;
        self.progress.advance(more);
    }

    /// A part has the digest that it should have.
    pub(super) fn verified(&self, part: &Part) {
        self.verified.fetch_add(part.bytes(), Ordering::Relaxed);
        self.progress.advance(part.bytes().saturating_sub(part.counted));
    }

    /// Blocks of a part that is not whole were compared one by one.
    pub(super) fn verified_blocks(&self, part: &Part, bytes: u64) {
        self.verified.fetch_add(bytes, Ordering::Relaxed);
        self.progress.advance(part.bytes().saturating_sub(part.counted));
    }

    /// Read again after it was written.
    pub(super) fn read_back(&self, bytes: u64) {
        self.read_back.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Read, fetched, written, verified and read back bytes.
    pub(super) fn all(&self) -> [u64; 5] {
        [&self.read, &self.fetched, &self.written, &self.verified, &self.read_back]
            .map(|count| count.load(Ordering::Relaxed))
    }
}
