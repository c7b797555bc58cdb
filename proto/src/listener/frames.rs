//! A connection's HTTP/2 frames, looked at as they come in: when the peer has begun to speak, and whether it sends so many frames
//! that carry nothing that it is slowed down.
//!
//! What h2 itself ends is left to it (resets before a call was looked at, endless header blocks, empty DATA). It answers pings and
//! settings, and takes streams that are reset a little later, for ever: that costs a core for each connection. So frames without data
//! are paid for from a budget that all connections of a caller share, and whoever has spent it is read more slowly.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::budget::Budget;
use crate::channel::Observer;

/// `PRI * HTTP/2.0` and what follows it.
const PREFACE_BYTES: usize = 24;
const HEAD_BYTES: usize = 9;
const DATA: u8 = 0;
const RST_STREAM: u8 = 3;
/// DATA frames below this cost as others do: they may be as many.
const SMALL_DATA_BYTES: usize = 64;
/// A stream that is taken back has cost a call.
const RESET_COST: u64 = 16;

/// Where in the peer's frames the next byte belongs.
struct Frames {
    /// Bytes of the preface, or of a payload, that come before the next head.
    skip: usize,
    head: [u8; HEAD_BYTES],
    have: usize,
}

impl Frames {
    const fn new() -> Self {
        Self { skip: PREFACE_BYTES, head: [0; HEAD_BYTES], have: 0 }
    }

    /// Takes what was read: whether a frame's head was whole with it, and what its frames cost.
    fn take(&mut self, mut bytes: &[u8]) -> (bool, u64) {
        let (mut began, mut cost) = (false, 0);
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return (began, cost);
            }
            let taken = (HEAD_BYTES - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEAD_BYTES {
                let [a, b, c, kind, ..] = self.head;
                let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                cost += cost_of(kind, len);
                (began, self.skip, self.have) = (true, len, 0);
            }
        }
    }
}

/// What a frame costs: about one for each, more where much is to be unpacked or undone.
fn cost_of(kind: u8, len: usize) -> u64 {
    match kind {
        DATA if len >= SMALL_DATA_BYTES => 0,
        RST_STREAM => RESET_COST,
        _ => 1 + len as u64 / 1024,
    }
}

/// Set when the peer's first frame is there.
#[derive(Debug, Clone, Default)]
pub(super) struct Began(Arc<AtomicBool>);

impl Began {
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts the frames of a connection, and slows down who sends too many.
pub(super) struct Counting {
    frames: Frames,
    began: Began,
    budget: Option<Arc<Budget>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Counting {
    /// Without a budget nobody is slowed down.
    pub fn new(budget: Option<Arc<Budget>>) -> Self {
        Self { frames: Frames::new(), began: Began::default(), budget, pause: None }
    }

    pub fn began(&self) -> Began {
        self.began.clone()
    }
}

impl Observer for Counting {
    fn before(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        Poll::Ready(Ok(()))
    }

    fn heard(&mut self, bytes: &[u8]) {
        let (began, cost) = self.frames.take(bytes);
        if began {
            self.began.0.store(true, Ordering::Relaxed);
        }
        let wait = self.budget.as_ref().filter(|_| cost > 0).and_then(|budget| budget.pay(cost));
        self.pause = wait.map(|wait| Box::pin(sleep_until(Instant::now() + wait)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, len: usize) -> Vec<u8> {
        let mut bytes = (len as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, 0, 0, 0, 0, 1]);
        bytes.resize(HEAD_BYTES + len, 0);
        bytes
    }

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let ping = 6;
        let sent = [
            vec![0; PREFACE_BYTES],
            frame(4, 0),
            frame(ping, 8),
            frame(DATA, 70_000),
            frame(DATA, 1),
            frame(1, 5000),
            frame(RST_STREAM, 4),
        ]
        .concat();
        for piece in [1, 7, 9, 24, 1000, sent.len()] {
            let mut frames = Frames::new();
            let taken: Vec<_> = sent.chunks(piece).map(|bytes| frames.take(bytes)).collect();
            let cost: u64 = taken.iter().map(|(_, cost)| cost).sum();
            assert_eq!(cost, 1 + 1 + 1 + 5 + RESET_COST, "pieces of {piece}");
            let began = taken.iter().position(|(began, _)| *began).unwrap();
            assert_eq!(began, (PREFACE_BYTES + HEAD_BYTES - 1) / piece);
        }
    }
}
