//! Who reads in order gets the next chunks fetched before it asks.

use std::ops::Range;

/// Readers in order that are told apart.
const MOST: usize = 8;
/// Chunks fetched ahead, at first and at most (8 MiB).
const FIRST: u64 = 4;
const FARTHEST: u64 = 128;
/// Who reads so little behind a reader is the same one, whose requests came out of order.
const NEAR: u64 = 256;

/// Readers, the one that read last at the end.
#[derive(Debug, Default)]
pub(super) struct Streams(Vec<Stream>);

#[derive(Debug)]
struct Stream {
    /// The chunk it read last.
    last: u64,
    ahead: u64,
}

impl Streams {
    /// The end of what should be fetched for a reader of `wanted`, on a disk of so many chunks.
    pub(super) fn ahead(&mut self, wanted: &Range<u64>, chunks: u64) -> u64 {
        let last = wanted.end.saturating_sub(1);
        // Asked for before, by who said what comes next, or by a larger read.
        let is_known = |stream: &Stream| last <= stream.last && stream.last - last < NEAR;
        if self.0.iter().any(is_known) {
            return wanted.end;
        }
        let goes_on =
            |stream: &Stream| (stream.last..=stream.last.saturating_add(1)).contains(&wanted.start);
        let ahead = match self.0.iter().position(goes_on) {
            Some(at) => (self.0.remove(at).ahead * 2).clamp(FIRST, FARTHEST),
            None => 0,
        };
        if self.0.len() >= MOST {
            self.0.remove(0);
        }
        self.0.push(Stream { last, ahead });
        wanted.end.saturating_add(ahead).min(chunks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reach_grows_with_each_step_in_order_and_not_by_others() {
        let mut streams = Streams::default();
        assert_eq!(streams.ahead(&(10..11), 1000), 11);
        assert_eq!(streams.ahead(&(10..11), 1000), 11);
        assert_eq!(streams.ahead(&(500..501), 1000), 501);
        assert_eq!(streams.ahead(&(11..12), 1000), 12 + 4);
        assert_eq!(streams.ahead(&(12..14), 1000), 14 + 8);
        // Out of order, or again: all that was asked for.
        assert_eq!(streams.ahead(&(13..14), 1000), 14);
        assert_eq!(streams.ahead(&(11..13), 1000), 13);
        for chunk in 14..40 {
            streams.ahead(&(chunk..chunk + 1), 1000);
        }
        assert_eq!(streams.ahead(&(40..41), 1000), 41 + 128);
        assert_eq!(streams.ahead(&(41..42), 100), 100);
        assert_eq!(streams.ahead(&(501..502), 1000), 502 + 4);
    }
}
