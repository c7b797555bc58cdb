//! How a disk is asked for: all of it at once by one encoding, or (`auto`) a little of it unpacked first, to see how fast the
//! line is, and the rest by the encoding that suits it. The server packs, so there is nothing to adapt on the way.

use std::time::{Duration, Instant};

use janus_proto::pb::Encoding;

use crate::packing::{self, Wish};

/// Blocks asked for to see how fast they come: 8 MiB.
const LOOK_BLOCKS: u64 = 2048;
/// Bytes from which something can be told.
const ENOUGH: u64 = 1 << 20;

/// What came of a piece.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Bytes that travelled.
    pub(super) bytes: u64,
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

/// Where the pieces end, and how they are packed.
pub(super) struct Pieces {
    pub(super) encoding: Encoding,
    total: u64,
    /// Blocks of the next piece; `None`: all that is left.
    look: Option<u64>,
}

impl Pieces {
    pub(super) fn new(wish: Wish, total: u64) -> Self {
        match wish {
            Wish::Auto => Self { encoding: Encoding::None, total, look: Some(LOOK_BLOCKS) },
            Wish::Only(encoding) => Self { encoding, total, look: None },
        }
    }

    pub(super) fn end(&self, first: u64) -> u64 {
        self.look.map_or(self.total, |blocks| first.saturating_add(blocks).min(self.total))
    }

    pub(super) fn seen(&mut self, seen: &Seen) {
        let Some(look) = self.look else { return };
        match seen.rate() {
            Some(rate) => {
                self.encoding = packing::for_line(rate);
                self.look = None;
                let encoding = packing::name(self.encoding);
                tracing::debug!(encoding, bytes_per_s = rate as u64, "how the rest is packed");
            }
            // Zeros don't travel, so nothing was learnt.
            None => self.look = Some(look.saturating_mul(4)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_grow_until_something_was_seen() {
        let mut pieces = Pieces::new(Wish::Auto, 1 << 20);
        assert_eq!((pieces.encoding, pieces.end(0)), (Encoding::None, 2048));
        pieces.seen(&Seen::default());
        assert_eq!((pieces.encoding, pieces.end(2048)), (Encoding::None, 2048 + 8192));
        let mut slow = Seen::default();
        slow.message(1 << 20);
        slow.message(1 << 20);
        slow.took = Duration::from_millis(400);
        pieces.seen(&slow);
        assert_eq!((pieces.encoding, pieces.end(10_240)), (Encoding::Zstd, 1 << 20));
        assert_eq!(Pieces::new(Wish::Only(Encoding::Lz4), 9).end(3), 9);
    }
}
