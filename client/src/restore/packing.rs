//! How blocks are asked for: by one encoding, or (`auto`) a little of them unpacked first, to see how fast the line is, and
//! the rest by the encoding that suits it. The server packs, so there is nothing to adapt on the way.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::pb::Encoding;
use tokio::sync::Notify;

use crate::packing::{self, Wish};

/// Blocks asked for to see how fast they come: 8 MiB.
const LOOK_BLOCKS: u64 = 2048;
/// Bytes from which something can be told.
const ENOUGH: u64 = 1 << 20;

/// What came of a request.
#[derive(Debug, Default)]
pub(super) struct Seen {
    bytes: u64,
    /// The first message says only how long it took to begin.
    first: Option<(Instant, u64)>,
    took: Duration,
}

impl Seen {
    /// A message has arrived.
    pub(super) fn message(&mut self, bytes: u64) {
        self.bytes += bytes;
        match self.first {
            Some((at, _)) => self.took = at.elapsed(),
            None => self.first = Some((Instant::now(), bytes)),
        }
    }

    /// Bytes for each second.
    fn rate(&self) -> Option<f64> {
        let bytes = self.bytes - self.first.map_or(0, |(_, bytes)| bytes);
        (bytes >= ENOUGH && !self.took.is_zero()).then(|| bytes as f64 / self.took.as_secs_f64())
    }
}

/// How the blocks of one source are packed.
#[derive(Debug)]
pub(super) struct Packing {
    state: Mutex<State>,
    decided: Notify,
}

#[derive(Debug, Clone, Copy)]
struct State {
    encoding: Encoding,
    /// Blocks of the next request, while nothing is decided.
    look: Option<u64>,
}

impl Packing {
    pub(super) fn new(wish: Wish) -> Self {
        let state = match wish {
            Wish::Auto => State { encoding: Encoding::None, look: Some(LOOK_BLOCKS) },
            Wish::Only(encoding) => State { encoding, look: None },
        };
        Self { state: Mutex::new(state), decided: Notify::new() }
    }

    pub(super) fn encoding(&self) -> Encoding {
        self.lock().encoding
    }

    /// Blocks that may be asked for at once.
    pub(super) fn most_blocks(&self) -> u64 {
        self.lock().look.unwrap_or(u64::MAX)
    }

    /// Waits until it is known how the rest is packed: two streams at once would each see half of the line.
    pub(super) async fn decided(&self) {
        loop {
            let mut decided = std::pin::pin!(self.decided.notified());
            decided.as_mut().enable();
            if self.lock().look.is_none() {
                return;
            }
            decided.await;
        }
    }

    pub(super) fn seen(&self, seen: &Seen) {
        let mut state = self.lock();
        let Some(look) = state.look else { return };
        match seen.rate() {
            Some(rate) => {
                *state = State { encoding: packing::for_line(rate), look: None };
                let encoding = packing::name(state.encoding);
                tracing::debug!(encoding, bytes_per_s = rate as u64, "how the rest is packed");
                self.decided.notify_waiters();
            }
            // Zeros don't travel, so nothing was learnt.
            None => state.look = Some(look.saturating_mul(4)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_grow_until_something_was_seen() {
        let packing = Packing::new(Wish::Auto);
        assert_eq!((packing.encoding(), packing.most_blocks()), (Encoding::None, 2048));
        packing.seen(&Seen::default());
        assert_eq!((packing.encoding(), packing.most_blocks()), (Encoding::None, 8192));
        let mut slow = Seen::default();
        slow.message(1 << 20);
        slow.message(1 << 20);
        slow.took = Duration::from_millis(400);
        packing.seen(&slow);
        assert_eq!((packing.encoding(), packing.most_blocks()), (Encoding::Zstd, u64::MAX));
        packing.decided().await;
        Packing::new(Wish::Only(Encoding::Lz4)).decided().await;
    }
}
