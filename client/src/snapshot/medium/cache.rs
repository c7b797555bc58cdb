//! Chunks that were read, as many as memory may hold. Who has not been used since the last look goes first.

use std::{
    collections::{HashMap, VecDeque},
    io,
    ops::Range,
    sync::Arc,
};

use janus_proto::ids::BLOCK_BYTES;

use super::CHUNK_BLOCKS;

/// Fewest chunks that are kept: what is being fetched must have its place.
const FEWEST: u64 = 1024;

/// A chunk's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    /// `None`: all zeros.
    data: Option<Vec<u8>>,
    /// A bit for each block that the server has lost.
    lost: u16,
}

impl Chunk {
    pub(super) fn new(data: Option<Vec<u8>>, lost: u16) -> Self {
        Self { data, lost }
    }

    /// Copies from `within` on; what is lost of it is the error.
    pub(super) fn copy_to(&self, buffer: &mut [u8], within: usize) -> Result<(), Range<usize>> {
        let block = BLOCK_BYTES as usize;
        let end = within + buffer.len();
        let is_lost = |at: usize| self.lost >> at & 1 == 1;
        if let Some(first) = (within / block..end.div_ceil(block)).find(|at| is_lost(*at)) {
            let after = (first..CHUNK_BLOCKS as usize).find(|at| !is_lost(*at));
            return Err(first * block..after.unwrap_or(CHUNK_BLOCKS as usize) * block);
        }
        match &self.data {
            // The last chunk of a disk may be short; its reader has checked the size.
            Some(data) => match data.get(within..end) {
                Some(bytes) => buffer.copy_from_slice(bytes),
                None => return Err(within..end),
            },
            None => buffer.fill(0),
        }
        Ok(())
    }
}

/// What is known of a chunk.
#[derive(Debug)]
pub(super) enum State {
    /// It is on its way.
    Coming,
    Ready(Arc<Chunk>),
    /// It could not be read.
    Failed(io::ErrorKind, String),
}

struct Slot {
    state: State,
    is_used: bool,
}

pub(super) struct Cache {
    slots: HashMap<u64, Slot>,
    /// The chunks that have a slot, in the order in which they are looked at.
    order: VecDeque<u64>,
    most: usize,
}

impl Cache {
    pub(super) fn new(most_chunks: u64) -> Self {
        let most = usize::try_from(most_chunks.max(FEWEST)).unwrap_or(usize::MAX);
        Self { slots: HashMap::new(), order: VecDeque::new(), most }
    }

    pub(super) fn get(&mut self, chunk: u64) -> Option<&State> {
        let slot = self.slots.get_mut(&chunk)?;
        slot.is_used = true;
        Some(&slot.state)
    }

    /// True when all of them are here.
    pub(super) fn has(&self, mut chunks: Range<u64>) -> bool {
        let is_ready = |slot: &Slot| matches!(slot.state, State::Ready(_));
        chunks.all(|chunk| self.slots.get(&chunk).is_some_and(is_ready))
    }

    /// The runs of `range` that nobody has asked for yet; from now on they are coming. Those from `ahead` on are left for
    /// later where too few of them are missing.
    pub(super) fn take_missing(&mut self, range: Range<u64>, ahead: u64) -> Vec<Range<u64>> {
        let enough = range.end.saturating_sub(ahead) / 2;
        let mut runs: Vec<Range<u64>> = Vec::new();
        for chunk in range.filter(|chunk| !self.slots.contains_key(chunk)) {
            match runs.last_mut() {
                Some(run) if run.end == chunk => run.end += 1,
                _ => runs.push(chunk..chunk + 1),
            }
        }
        runs.retain(|run| run.start < ahead || run.end - run.start > enough);
        for chunk in runs.iter().cloned().flatten() {
            self.make_room();
            self.order.push_back(chunk);
            // What is fetched ahead must not be the first to go, among others that were used before.
            self.slots.insert(chunk, Slot { state: State::Coming, is_used: true });
        }
        runs
    }

    pub(super) fn put(&mut self, chunk: u64, content: Chunk) {
        if let Some(slot) = self.slots.get_mut(&chunk) {
            slot.state = State::Ready(Arc::new(content));
        }
    }

    pub(super) fn fail(&mut self, chunk: u64, kind: io::ErrorKind, text: &str) {
        if let Some(slot) = self.slots.get_mut(&chunk) {
            slot.state = State::Failed(kind, text.to_owned());
        }
    }

    /// The next one who asks has it fetched again.
    pub(super) fn forget(&mut self, chunk: u64) {
        self.slots.remove(&chunk);
        self.order.retain(|other| *other != chunk);
    }

    /// Lets chunks go until there is room for one more; those that are coming stay.
    fn make_room(&mut self) {
        let mut looks = 2 * self.order.len();
        while self.order.len() >= self.most && looks > 0 {
            looks -= 1;
            let Some(chunk) = self.order.pop_front() else { return };
            match self.slots.get_mut(&chunk) {
                Some(slot) if slot.is_used || matches!(slot.state, State::Coming) => {
                    slot.is_used = false;
                    self.order.push_back(chunk);
                }
                _ => {
                    self.slots.remove(&chunk);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(cache: &mut Cache, range: Range<u64>, ahead: u64) -> Vec<(u64, u64)> {
        cache.take_missing(range, ahead).into_iter().map(|run| (run.start, run.end)).collect()
    }

    fn ready(cache: &mut Cache, chunks: Range<u64>) {
        for chunk in chunks {
            cache.take_missing(chunk..chunk + 1, chunk + 1);
            cache.put(chunk, Chunk::new(None, 0));
        }
    }

    #[test]
    fn what_was_used_outlives_what_was_not() {
        let mut cache = Cache::new(0);
        ready(&mut cache, 0..FEWEST);
        assert_eq!(missing(&mut cache, 5000..5001, 5001), [(5000, 5001)]);
        assert!(matches!(cache.get(3), Some(State::Ready(_))));
        ready(&mut cache, 6000..6100);
        assert!(cache.get(3).is_some() && cache.get(0).is_none() && cache.get(4).is_none());
        assert!(matches!(cache.get(5000), Some(State::Coming)));
        assert!(cache.slots.len() <= FEWEST as usize && cache.order.len() == cache.slots.len());
    }

    #[test]
    fn what_was_fetched_ahead_is_there_when_its_reader_comes() {
        let mut cache = Cache::new(0);
        for chunk in 0..3 * FEWEST {
            ready(&mut cache, chunk..chunk + 1);
            // One that is always 128 chunks behind.
            let behind = chunk.saturating_sub(128);
            assert!(cache.get(behind).is_some(), "{behind} went before it was used");
        }
    }

    #[test]
    fn what_is_ahead_is_fetched_in_large_runs_only() {
        let mut cache = Cache::new(0);
        assert_eq!(missing(&mut cache, 0..9, 1), [(0, 9)]);
        assert_eq!(missing(&mut cache, 1..10, 2), []);
        assert_eq!(missing(&mut cache, 5..14, 6), [(9, 14)]);
        assert_eq!(missing(&mut cache, 13..15, 15), [(14, 15)]);
    }

    #[test]
    fn what_is_lost_is_an_error_and_the_rest_is_not() {
        let mut data = vec![1; 16 * 4096];
        data[4096] = 7;
        let chunk = Chunk::new(Some(data), 0b0110_0000);
        let mut buffer = [0; 8192];
        assert_eq!(chunk.copy_to(&mut buffer, 4096), Ok(()));
        assert_eq!(buffer[0], 7);
        assert_eq!(chunk.copy_to(&mut buffer, 4 * 4096), Err(5 * 4096..7 * 4096));
        assert_eq!(chunk.copy_to(&mut buffer[..1], 7 * 4096 - 1), Err(6 * 4096..7 * 4096));
        assert_eq!(chunk.copy_to(&mut buffer, 7 * 4096), Ok(()));
        assert_eq!(Chunk::new(Some(vec![1; 512]), 0).copy_to(&mut buffer[..513], 0), Err(0..513));
    }
}
