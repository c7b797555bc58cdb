//! How blocks are packed on their way: by one encoding, or by whichever brings most through (`auto`).
//!
//! Threads that read pack what they find; the end that sends says how long it waited for the line, and packs what was found
//! before the line turned out to be slow. Data that doesn't shrink travels as it is. Shared by all of a backup: what was learnt
//! outlives a lost connection. What the line brought through is where the next backup begins.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::{
    model::{self, Batch},
    pb::{BlockBatch, Encoding},
};

mod chooser;

pub use chooser::for_line;

use chooser::{Chooser, ENCODINGS, Stretch};

/// So many messages from one that is tried in part by all encodings to the next.
const TRY_EVERY: u64 = 8;
/// How much of it.
const TRY_BYTES: usize = 64 << 10;
/// Decisions come this often, and after this many messages.
const STRETCH: (Duration, u32) = (Duration::from_millis(500), 2);
/// After a change, what is still on its way in queues and buffers says nothing of the new encoding.
const ON_ITS_WAY: u64 = 12 << 20;

/// What the settings say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// By what is measured.
    Auto,
    /// Always this one.
    Only(Encoding),
}

impl Wish {
    /// The same, unless the data is sealed: nothing makes that any shorter.
    #[must_use]
    pub fn unless_sealed(self, is_sealed: bool) -> Self {
        if is_sealed { Self::Only(Encoding::None) } else { self }
    }
}

/// A message of blocks, ready to be sent.
#[derive(Debug)]
pub struct Outgoing {
    /// The message.
    pub batch: BlockBatch,
    /// Bytes of data before packing.
    pub raw_bytes: u64,
    /// Encoding that was tried on it: what doesn't shrink stays as it is.
    pub tried: Encoding,
}

/// What was packed by one encoding.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of data.
    pub raw_bytes: u64,
    /// Bytes that travelled for them.
    pub wire_bytes: u64,
}

/// What packing came to.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// What was asked for.
    pub wish: Wish,
    /// By encoding that was tried: none, LZ4, zstd.
    pub by: [(Encoding, Sent); 3],
}

impl Summary {
    /// The encoding of most of the data.
    pub fn mostly(&self) -> Encoding {
        let most = self.by.iter().rev().max_by_key(|(_, sent)| sent.raw_bytes);
        most.map_or(Encoding::None, |(encoding, _)| *encoding)
    }

    /// All together.
    pub fn total(&self) -> Sent {
        let add = |sum: Sent, (_, sent): &(_, Sent)| Sent {
            raw_bytes: sum.raw_bytes + sent.raw_bytes,
            wire_bytes: sum.wire_bytes + sent.wire_bytes,
        };
        self.by.iter().fold(Sent::default(), add)
    }
}

/// The packing of a backup.
#[derive(Debug)]
pub struct Packing {
    wish: Wish,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    current: Encoding,
    chooser: Chooser,
    packed: u64,
    sent: [Sent; 3],
    stretch: Measured,
    /// Bytes to pass before anything is measured.
    unmeasured: u64,
}

/// What was seen since the last decision.
#[derive(Debug)]
struct Measured {
    began: Instant,
    messages: u32,
    raw_bytes: u64,
    waited: Duration,
    wire_bytes: u64,
}

impl Measured {
    fn new(now: Instant) -> Self {
        Self { began: now, messages: 0, raw_bytes: 0, waited: Duration::ZERO, wire_bytes: 0 }
    }

    fn take(&mut self, sent: Sent, waited: Duration) {
        self.messages += 1;
        self.raw_bytes += sent.raw_bytes;
        self.wire_bytes += sent.wire_bytes;
        self.waited += waited;
    }

    fn stretch(&self, now: Instant) -> Option<Stretch> {
        let took = now - self.began;
        if took < STRETCH.0 || self.messages < STRETCH.1 {
            return None;
        }
        Some(Stretch {
            raw_rate: self.raw_bytes as f64 / took.as_secs_f64(),
            waiting: self.waited.as_secs_f64() / took.as_secs_f64(),
            // Of single messages it would say too little: buffers empty in bursts.
            line_rate: self.wire_bytes as f64 / took.as_secs_f64(),
        })
    }
}

impl Packing {
    /// By what the settings say.
    pub fn new(wish: Wish) -> Self {
        let current = match wish {
            Wish::Auto => Encoding::None,
            Wish::Only(encoding) => encoding,
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let state = State {
            current,
            chooser: Chooser::new(cores),
            packed: 0,
            sent: [Sent::default(); 3],
            stretch: Measured::new(Instant::now()),
            unmeasured: 0,
        };
        Self { wish, state: Mutex::new(state) }
    }

    /// Nothing is packed.
    pub fn off() -> Self {
        Self::new(Wish::Only(Encoding::None))
    }

    /// A run begins, or goes on, on a server that reads these encodings.
    pub fn begin(&self, known: &[Encoding]) {
        let mut state = self.lock();
        state.chooser.allow(known);
        state.current = match self.wish {
            Wish::Auto => state.chooser.current(),
            Wish::Only(encoding) if known.contains(&encoding) => encoding,
            Wish::Only(_) => Encoding::None,
        };
        state.stretch = Measured::new(Instant::now());
    }

    /// What follows travels by another line, or by the first one; `rate` is what that brought through earlier, in bytes a second.
    pub fn expect_line(&self, rate: Option<f64>) {
        self.lock().chooser.expect_line(rate);
    }

    /// True while it is unknown whether the line is worth packing for: little should be on its way then, since what is can't be
    /// packed any more.
    pub fn is_new_to_line(&self) -> bool {
        self.wish == Wish::Auto && self.lock().chooser.is_new_to_line()
    }

    /// What this line brings through, in bytes a second, once enough has travelled to tell.
    pub fn line(&self) -> Option<f64> {
        self.lock().chooser.line()
    }

    /// Packs a message.
    pub fn pack(&self, batch: Batch) -> Outgoing {
        let raw_bytes = batch.data_len() as u64;
        let (encoding, is_tried) = {
            let mut state = self.lock();
            state.packed += 1;
            (state.current, self.wish == Wish::Auto && state.packed % TRY_EVERY == 1)
        };
        let batch = batch.into_wire(Encoding::None);
        if is_tried {
            self.try_all(&batch.data);
        }
        self.packed(Outgoing { batch, raw_bytes, tried: Encoding::None }, encoding)
    }

    /// Packs a message again that was found before the line turned out to be slow.
    pub fn pack_late(&self, message: Outgoing) -> Outgoing {
        let encoding = self.lock().current;
        match message.tried {
            Encoding::None | Encoding::Unspecified => self.packed(message, encoding),
            _ => message,
        }
    }

    fn packed(&self, mut message: Outgoing, encoding: Encoding) -> Outgoing {
        if encoding == Encoding::None || message.raw_bytes == 0 {
            return message;
        }
        let began = Instant::now();
        message.tried = encoding;
        message.batch = model::pack(message.batch, encoding);
        let packed = message.batch.data.len();
        self.note(encoding, message.raw_bytes as usize, packed, began.elapsed());
        message
    }

    /// Learns what the encodings would do to data like this, from the middle of it.
    fn try_all(&self, data: &[u8]) {
        let start = data.len().saturating_sub(TRY_BYTES) / 2;
        let part = &data[start..(start + TRY_BYTES).min(data.len())];
        for encoding in ENCODINGS.into_iter().skip(1) {
            let began = Instant::now();
            let packed = model::packed_len(encoding, part);
            self.note(encoding, part.len(), packed, began.elapsed());
        }
    }

    fn note(&self, encoding: Encoding, raw: usize, packed: usize, took: Duration) {
        self.lock().chooser.note(encoding, raw, packed, took.as_secs_f64());
    }

    /// A message went out after it had waited for the line, and for the limit of the settings, for so long.
    pub fn sent(&self, message: (Encoding, Sent), waited: Duration) {
        let now = Instant::now();
        let mut state = self.lock();
        let (tried, sent) = message;
        if let Some(at) = ENCODINGS.iter().position(|known| *known == tried) {
            state.sent[at].raw_bytes += sent.raw_bytes;
            state.sent[at].wire_bytes += sent.wire_bytes;
        }
        if self.wish != Wish::Auto {
            return;
        }
        if state.unmeasured > 0 {
            state.unmeasured = state.unmeasured.saturating_sub(sent.wire_bytes);
            state.stretch = Measured::new(now);
            return;
        }
        state.stretch.take(sent, waited);
        let Some(stretch) = state.stretch.stretch(now) else { return };
        state.stretch = Measured::new(now);
        let before = state.current;
        state.current = state.chooser.decide(stretch);
        if state.current != before {
            state.unmeasured = ON_ITS_WAY;
            let mib = |rate: f64| (rate / f64::from(1 << 20) * 10.0).round() / 10.0;
            tracing::debug!(
                encoding = name(state.current),
                before = name(before),
                waiting = stretch.waiting,
                line_mib_per_s = mib(stretch.line_rate),
                data_mib_per_s = mib(stretch.raw_rate),
                "packing changes"
            );
        }
    }

    /// What it came to so far.
    pub fn summary(&self) -> Summary {
        let sent = self.lock().sent;
        Summary { wish: self.wish, by: [0, 1, 2].map(|at| (ENCODINGS[at], sent[at])) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An encoding as users write it.
pub fn name(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::None | Encoding::Unspecified => "none",
        Encoding::Lz4 => "lz4",
        Encoding::Zstd => "zstd",
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::{hash, model::Extent};

    use super::*;

    const ALL: [Encoding; 3] = ENCODINGS;

    fn batch(data: Vec<u8>) -> Batch {
        let size = data.len() as u64;
        let mut hashes = Vec::new();
        hash::hash_blocks(&data, &mut hashes);
        let extents = vec![Extent { first: 0, count: size / 4096, zero: false }];
        let hashes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
        Batch::new(size, extents, hashes.into(), data.into()).unwrap()
    }

    fn text() -> Batch {
        let lines = (0..20_000).map(|line| format!("line {line} of a log\n"));
        let mut data = lines.collect::<String>().into_bytes();
        data.resize(data.len() / 4096 * 4096, 0);
        batch(data)
    }

    fn noise() -> Batch {
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        batch((0..256 << 10).map(|_| next()).collect())
    }

    #[test]
    fn what_does_not_shrink_travels_as_it_is() {
        let packing = Packing::new(Wish::Only(Encoding::Zstd));
        packing.begin(&ALL);
        let (text, noise) = (packing.pack(text()), packing.pack(noise()));
        assert_eq!(text.batch.encoding(), Encoding::Zstd);
        assert!((text.batch.data.len() as u64) < text.raw_bytes / 2);
        assert_eq!((noise.batch.encoding(), noise.tried), (Encoding::None, Encoding::Zstd));
        assert_eq!(noise.batch.data.len() as u64, noise.raw_bytes);
    }

    #[test]
    fn what_the_server_can_not_read_is_not_sent() {
        let packing = Packing::new(Wish::Only(Encoding::Zstd));
        packing.begin(&[Encoding::None, Encoding::Lz4]);
        assert_eq!(packing.pack(text()).batch.encoding(), Encoding::None);
    }

    #[test]
    fn what_was_found_before_a_line_was_slow_is_packed_late() {
        let packing = Packing::new(Wish::Auto);
        packing.begin(&ALL);
        let early = packing.pack(text());
        assert_eq!(early.batch.encoding(), Encoding::None);
        let sent = Sent { raw_bytes: 1 << 20, wire_bytes: 1 << 20 };
        for _ in 0..6 {
            let pause = Duration::from_millis(200);
            std::thread::sleep(pause);
            packing.sent((Encoding::None, sent), pause);
        }
        let late = packing.pack_late(early);
        assert_eq!(late.batch.encoding(), Encoding::Zstd);
        let summary = packing.summary();
        assert_eq!((summary.mostly(), summary.total().raw_bytes), (Encoding::None, 6 << 20));
    }
}
