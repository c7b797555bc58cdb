//! Chunks that were read, as many as memory may hold. Who has not been used since the last look goes first.

use std::{
    collections::{HashMap, VecDeque},
    io,
    ops::Range,
    sync::Arc,
};

use janus_proto::ids::BLOCK_BYTES;
use tokio::sync::oneshot;

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

/// What came of a chunk that was waited for.
type Outcome = Result<Arc<Chunk>, (io::ErrorKind, String)>;

/// A chunk that somebody wants.
#[derive(Debug)]
pub(super) enum Wanted {
    Here(Arc<Chunk>),
    Coming(oneshot::Receiver<Outcome>),
}

impl Wanted {
    /// The chunk, once it is here.
    pub(super) async fn arrive(self) -> io::Result<Arc<Chunk>> {
        let coming = match self {
            Self::Here(content) => return Ok(content),
            Self::Coming(coming) => coming,
        };
        match coming.await {
            Ok(outcome) => outcome.map_err(|(kind, text)| io::Error::new(kind, text)),
            Err(_) => Err(io::Error::other("reading was stopped")),
        }
    }
}

enum State {
    /// On its way to those who wait for it.
    Coming(Vec<oneshot::Sender<Outcome>>),
    Ready(Arc<Chunk>),
}

struct Slot {
    state: State,
    is_used: bool,
}

impl Slot {
    fn wanted(&mut self) -> Wanted {
        self.is_used = true;
        match &mut self.state {
            State::Ready(content) => Wanted::Here(content.clone()),
            State::Coming(waiting) => {
                let (tell, told) = oneshot::channel();
                waiting.push(tell);
                Wanted::Coming(told)
            }
        }
    }
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

    /// All of these, and the runs of them that are to be fetched now, since nobody has asked for them yet.
    pub(super) fn want(&mut self, chunks: Range<u64>) -> (Vec<Wanted>, Vec<Range<u64>>) {
        let mut runs = Vec::new();
        let wanted = chunks.map(|chunk| {
            if let Some(slot) = self.slots.get_mut(&chunk) {
                return slot.wanted();
            }
            add(&mut runs, chunk);
            self.insert(chunk).wanted()
        });
        (wanted.collect(), runs)
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
        range
            .filter(|chunk| !self.slots.contains_key(chunk))
            .for_each(|chunk| add(&mut runs, chunk));
        runs.retain(|run| run.start < ahead || run.end - run.start > enough);
        for chunk in runs.iter().cloned().flatten() {
            self.insert(chunk);
        }
        runs
    }

    /// It is coming now.
    fn insert(&mut self, chunk: u64) -> &mut Slot {
        self.make_room();
        self.order.push_back(chunk);
        // What is fetched ahead must not be the first to go, among others that were used before.
        let slot = Slot { state: State::Coming(Vec::new()), is_used: true };
        self.slots.entry(chunk).insert_entry(slot).into_mut()
    }

    pub(super) fn put(&mut self, chunk: u64, content: Chunk) {
        let Some(slot) = self.slots.get_mut(&chunk) else { return };
        let content = Arc::new(content);
        if let State::Coming(waiting) =
            std::mem::replace(&mut slot.state, State::Ready(content.clone()))
        {
            waiting.into_iter().for_each(|one| drop(one.send(Ok(content.clone()))));
        }
    }

    /// All who wait for it are told; the next one who asks has it fetched again.
    pub(super) fn fail(&mut self, chunk: u64, kind: io::ErrorKind, text: &str) {
        let Some(slot) = self.slots.remove(&chunk) else { return };
        self.order.retain(|other| *other != chunk);
        if let State::Coming(waiting) = slot.state {
            waiting.into_iter().for_each(|one| drop(one.send(Err((kind, text.to_owned())))));
        }
    }

    /// Lets chunks go until there is room for one more; those that are coming stay.
    fn make_room(&mut self) {
        let mut looks = 2 * self.order.len();
        while self.order.len() >= self.most && looks > 0 {
            looks -= 1;
            let Some(chunk) = self.order.pop_front() else { return };
            match self.slots.get_mut(&chunk) {
                Some(slot) if slot.is_used || matches!(slot.state, State::Coming(_)) => {
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

fn add(runs: &mut Vec<Range<u64>>, chunk: u64) {
    match runs.last_mut() {
        Some(run) if run.end == chunk => run.end += 1,
        _ => runs.push(chunk..chunk + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_here(cache: &mut Cache, chunk: u64) -> bool {
        cache.slots.get_mut(&chunk).is_some_and(|slot| matches!(slot.wanted(), Wanted::Here(_)))
    }

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
        assert!(is_here(&mut cache, 3));
        ready(&mut cache, 6000..6100);
        assert!(is_here(&mut cache, 3) && !is_here(&mut cache, 0) && !is_here(&mut cache, 4));
        assert!(matches!(cache.slots[&5000].state, State::Coming(_)));
        assert!(cache.slots.len() <= FEWEST as usize && cache.order.len() == cache.slots.len());
    }

    #[test]
    fn what_was_fetched_ahead_is_there_when_its_reader_comes() {
        let mut cache = Cache::new(0);
        for chunk in 0..3 * FEWEST {
            ready(&mut cache, chunk..chunk + 1);
            // One that is always 128 chunks behind.
            let behind = chunk.saturating_sub(128);
            assert!(is_here(&mut cache, behind), "{behind} went before it was used");
        }
    }

    #[tokio::test]
    async fn all_who_wait_are_told_and_what_failed_is_fetched_again() {
        let mut cache = Cache::new(0);
        cache.take_missing(0..4, 4);
        let runs = |fetched: Vec<Range<u64>>| -> Vec<(u64, u64)> {
            fetched.into_iter().map(|run| (run.start, run.end)).collect()
        };
        let (first, fetched) = cache.want(2..5);
        assert_eq!(runs(fetched), [(4, 5)]);
        let (second, fetched) = cache.want(3..4);
        assert_eq!(runs(fetched), []);
        cache.put(2, Chunk::new(None, 0));
        cache.fail(3, io::ErrorKind::NotConnected, "gone");
        cache.put(4, Chunk::new(None, 0));
        let mut kinds = Vec::new();
        for one in first.into_iter().chain(second) {
            kinds.push(one.arrive().await.err().map(|error| error.kind()));
        }
        let failed = Some(io::ErrorKind::NotConnected);
        assert_eq!(kinds, [None, failed, None, failed]);
        // Nobody waited for this one: no error is kept for whoever comes later.
        cache.fail(0, io::ErrorKind::NotConnected, "gone");
        let (wanted, fetched) = cache.want(0..5);
        assert_eq!(runs(fetched), [(0, 1), (3, 4)]);
        // As when the program ends.
        drop(cache);
        for one in wanted {
            let _ = one.arrive().await;
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
