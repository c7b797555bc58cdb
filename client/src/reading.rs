//! What of a disk a run reads, and what it takes the rest to be.
//!
//! A block is one of
//! - *zeros*: free space that is skipped by setting, a volume that was not chosen: it counts as zeros, unread;
//! - *free*: nothing uses it, and a journal reads the volume: what the servers have may stay;
//! - *promised*: a journal says that it has not changed: its known hash stands, unread;
//! - all others are read.
//!
//! Promises are audited: each run also reads a share of the promised blocks, in an order that is drawn once for each disk, so
//! that all of them have their turn in any `100 / audit_percent` runs; and every `full_compare_runs` runs or
//! `full_compare_days` days everything is read. A promised block whose hash turns out to be another ends all promises.

use std::sync::{Arc, OnceLock};

use janus_proto::ids::{BLOCK_BYTES, BlockHash, SEGMENT_BYTES};

use crate::{
    journal::{
        Changes, Distrust, Journal, JournalKind,
        memory::{Memory, VolumeCursor},
    },
    segment_bits::{SEGMENT_WORDS, SegmentBits, WORD_BLOCKS},
    volume::Volume,
};
use janus_proto::ranges::Ranges;

/// Name of the part that is all of the disk.
pub const WHOLE_DISK: &str = "the disk";
const DAY_SECONDS: i64 = 86_400;

/// How far journals are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Everything is compared after so many runs, 0: never for that reason.
    pub full_compare_runs: u32,
    /// Everything is compared after so many days, 0: never for that reason.
    pub full_compare_days: u32,
    /// Share of the promised blocks that each run reads: 0 to 100.
    pub audit_percent: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { full_compare_runs: 30, full_compare_days: 14, audit_percent: 1 }
    }
}

/// A part of the disk that has a change journal.
pub struct Journalled<'a> {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// As the user knows it.
    pub name: String,
    /// Its journal.
    pub journal: Box<dyn Journal + 'a>,
}

/// What a journal came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// The part of the disk, as the user knows it.
    pub name: String,
    /// Of which journal.
    pub kind: JournalKind,
    /// Bytes that need not be read, or why all are.
    pub unread: Result<u64, Distrust>,
}

/// A volume of the disk, and what is left out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surveyed {
    /// The volume.
    pub volume: Volume,
    /// What counts as zeros, and why.
    pub zeros: Zeros,
}

/// What of a volume counts as zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Zeros {
    /// Nothing: it wasn't asked for, or its file system is none that tells.
    Nothing,
    /// All of it, by the setting `skip_volumes`.
    All,
    /// So many bytes of free space.
    Free(u64),
    /// Nothing: why its free space isn't known.
    Unknown(String),
}

/// What a run reads of one disk.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    zeros: Ranges,
    free: Ranges,
    promised: Ranges,
    /// Where known zeros may be what skipped free space was counted as.
    doubts_zeros: bool,
    audit: Audit,
    /// Why nothing is promised, where a reason stands for the whole disk.
    pub distrust: Option<Distrust>,
    /// What came of each journal.
    pub heard: Vec<Heard>,
    /// The disk's volumes.
    pub volumes: Vec<Surveyed>,
    /// For the next run, when this one is committed.
    pub memory: Memory,
}

/// The known facts that a [`Reading`] is planned from.
pub struct Known<'a> {
    /// The disk.
    pub disk: &'a str,
    /// What the last committed run left, see [`Reading::memory`].
    pub memory: Option<Memory>,
    /// Size of the disk at that run and now, where they differ: what it left is forgotten then.
    pub resized: Option<(u64, u64)>,
    /// What hashes are of now, see [`Memory::kind`].
    pub kind: &'a str,
    /// Counts as zeros.
    pub zeros: Ranges,
    /// The disk's volumes.
    pub volumes: Vec<Surveyed>,
    /// Seconds of Unix time.
    pub now: i64,
}

impl Reading {
    /// Reads everything but holes.
    pub fn everything() -> Self {
        Self { distrust: Some(Distrust::NoJournal), ..Self::default() }
    }

    /// Asks the journals.
    pub fn plan(known: Known<'_>, journals: &[Journalled<'_>], policy: Policy) -> Self {
        let distrust = distrust(&known, journals, policy);
        let old = known.memory.unwrap_or_default();
        let zeros = known.zeros;
        let mut reading = Self {
            doubts_zeros: old.skipped,
            audit: Audit::of(&old, policy),
            distrust,
            memory: Memory {
                skipped: !zeros.is_empty(),
                kind: known.kind.to_owned(),
                ..old.without_cursors()
            },
            zeros,
            volumes: known.volumes,
            ..Self::default()
        };
        for part in journals {
            reading.ask(part, &old);
        }
        reading.promised = reading.promised.subtract(&reading.zeros);
        reading.free = reading.free.subtract(&reading.zeros);
        reading.memory.seed = reading.audit.seed;
        reading.memory.turn = reading.audit.turn + 1;
        if reading.promised.is_empty() {
            (reading.memory.runs, reading.memory.compared) = (0, known.now);
        } else {
            reading.memory.runs += 1;
        }
        reading
    }

    fn ask(&mut self, part: &Journalled<'_>, old: &Memory) {
        let (start, len, kind) = (part.start, part.len, part.journal.kind());
        let answer = part.journal.changes(old.cursor(start, len, kind));
        if let Some(cursor) = answer.next {
            self.memory.volumes.push(VolumeCursor { start, len, kind, cursor });
        }
        let changes = match (&self.distrust, old.other_len(start, len, kind)) {
            (Some(reason), _) => Err(reason.clone()),
            (None, Some(old)) => Err(Distrust::Resized { old, new: len }),
            (None, None) => answer.changes,
        };
        let unread = changes.map(|Changes { changed, free }| {
            let volume = Ranges::from(0..len);
            let promised = volume.subtract(&changed.union(&free)).shift(start);
            let free = volume.intersect(&free).subtract(&changed).shift(start);
            let unread = promised.total() + free.total();
            self.promised = self.promised.union(&promised);
            self.free = self.free.union(&free);
            unread
        });
        self.heard.push(Heard { name: part.name.clone(), kind, unread });
    }

    /// The same without promises: all is read that isn't zeros.
    pub fn without_promises(&self, reason: Distrust) -> Self {
        let unheard = |heard: &Heard| Heard { unread: Err(reason.clone()), ..heard.clone() };
        Self {
            free: Ranges::new(),
            promised: Ranges::new(),
            heard: self.heard.iter().map(unheard).collect(),
            distrust: Some(reason),
            ..self.clone()
        }
    }

    /// True when some block's known hash would stand.
    pub fn has_promises(&self) -> bool {
        !self.promised.is_empty() || !self.free.is_empty()
    }

    /// Which journal speaks for a part of the disk, or why it is compared as a whole.
    pub fn why(&self, name: &str) -> String {
        let speaks = |heard: &&Heard| heard.name == name || heard.name == WHOLE_DISK;
        match self.heard.iter().find(speaks).map(|heard| (&heard.unread, heard.kind)) {
            Some((Ok(_), kind)) => format!("journal {}", kind.id()),
            Some((Err(reason), _)) => format!("full compare: {reason}"),
            None => format!("full compare: {}", Distrust::NoJournal),
        }
    }

    /// Bytes that count as zeros.
    pub fn zero_bytes(&self) -> u64 {
        self.zeros.total()
    }

    /// What becomes of a segment's blocks.
    pub fn segment(&self, segment: u64, size_bytes: u64) -> SegmentReading {
        if self.zeros.is_empty() && !self.has_promises() {
            return SegmentReading::default();
        }
        let zeros = segment_bits(&self.zeros, segment, size_bytes);
        let free = segment_bits(&self.free, segment, size_bytes);
        let promised = segment_bits(&self.promised, segment, size_bytes);
        let mut known = SegmentBits::default();
        for (word, bits) in known.iter_mut().enumerate() {
            let audited = self.audit.has(segment * SEGMENT_WORDS as u64 + word as u64);
            *bits = free[word] | if audited { 0 } else { promised[word] };
        }
        SegmentReading { zeros, known, promised, doubts_zeros: self.doubts_zeros }
    }
}

/// The reading of one disk for one backup, over all its runs.
#[derive(Debug)]
pub struct Planned {
    reading: Arc<Reading>,
    /// The cache's cursor that its promises count from.
    since: Option<BlockHash>,
    /// Where and when a promise was found wrong.
    missed: OnceLock<(u64, i64)>,
}

impl Planned {
    /// `reading` was planned from the cursor with this digest.
    pub fn new(reading: Reading, since: Option<BlockHash>) -> Self {
        Self { reading: Arc::new(reading), since, missed: OnceLock::new() }
    }

    /// What to do now that the cache's cursor has this digest: promises count from one cursor only.
    pub fn now(&self, cursor: Option<BlockHash>) -> Arc<Reading> {
        let reason = match self.missed.get() {
            Some(&(offset, _)) => Distrust::Missed { offset },
            None if self.reading.has_promises() && cursor != self.since => Distrust::Reconciled,
            None => return self.reading.clone(),
        };
        Arc::new(self.reading.without_promises(reason))
    }

    /// A promise was wrong at byte `offset`: there are none from now on. `now` is in seconds of Unix time.
    pub fn miss(&self, offset: u64, now: i64) {
        // The first one is told: the second can't be of this plan's promises.
        let _ = self.missed.set((offset, now));
    }

    /// For the next run, as the cache keeps it; empty when there is nothing to remember.
    pub fn cursor(&self) -> Vec<u8> {
        let memory = &self.reading.memory;
        match self.missed.get() {
            Some(&(offset, now)) => {
                let known = memory.without_cursors();
                Memory { missed: Some((offset, now)), runs: 0, compared: now, ..known }.to_bytes()
            }
            None if memory.is_worthless() => Vec::new(),
            None => memory.to_bytes(),
        }
    }
}

/// A segment's blocks, a bit for each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentReading {
    zeros: SegmentBits,
    /// Keep their known hash, unless the server lacks them.
    pub known: SegmentBits,
    promised: SegmentBits,
    doubts_zeros: bool,
}

impl SegmentReading {
    /// Those of one word.
    pub fn word(&self, word: usize) -> PieceReading {
        PieceReading {
            zeros: self.zeros[word],
            known: self.known[word],
            promised: self.promised[word],
            doubts_zeros: self.doubts_zeros,
        }
    }
}

/// 64 blocks, a bit for each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PieceReading {
    /// Count as zeros.
    pub zeros: u64,
    /// Keep their known hash, unless the server lacks them.
    pub known: u64,
    /// Have not changed, as a journal says; also those that are audited.
    pub promised: u64,
    /// See [`Memory::skipped`].
    pub doubts_zeros: bool,
}

/// Bits of the blocks of a segment that are in a set of bytes wholly, of a disk of `size_bytes`.
fn segment_bits(set: &Ranges, segment: u64, size_bytes: u64) -> SegmentBits {
    let mut bits = SegmentBits::default();
    let start = segment * SEGMENT_BYTES;
    let end = (start + SEGMENT_BYTES).min(size_bytes);
    for range in set.behind(start).take_while(|range| range.start < end) {
        let from = (range.start.max(start) - start).div_ceil(BLOCK_BYTES);
        // A short last block is whole, too.
        let to = match range.end >= end {
            true => (end - start).div_ceil(BLOCK_BYTES),
            false => (range.end - start) / BLOCK_BYTES,
        };
        for block in from..to {
            bits[(block / WORD_BLOCKS) as usize] |= 1 << (block % WORD_BLOCKS);
        }
    }
    bits
}

/// Why no journal is to be believed, if so.
fn distrust(known: &Known<'_>, journals: &[Journalled<'_>], policy: Policy) -> Option<Distrust> {
    if journals.is_empty() {
        return Some(Distrust::NoJournal);
    }
    let Some(memory) = &known.memory else {
        let resized = |(old, new)| Distrust::Resized { old, new };
        return Some(known.resized.map_or(Distrust::NoCursor, resized));
    };
    if let Some((offset, at)) = memory.missed {
        let date = time::OffsetDateTime::from_unix_timestamp(at).map(|at| at.date().to_string());
        let (date, disk) = (date.unwrap_or_default(), known.disk.to_owned());
        return Some(Distrust::Off { offset, date, disk });
    }
    // A known hash that stands for what wasn't read would bring a block of another kind into the snapshot.
    if memory.kind != known.kind {
        return Some(Distrust::OtherKind);
    }
    let Policy { full_compare_runs: runs, full_compare_days: days, .. } = policy;
    let age = known.now - memory.compared;
    // A clock that went back says nothing about the age.
    let too_old = days > 0 && !(0..i64::from(days) * DAY_SECONDS).contains(&age);
    let too_many = runs > 0 && memory.runs + 1 >= runs;
    (too_old || too_many).then_some(Distrust::Due { runs, days })
}

/// Which pieces of 64 blocks are read though promised.
#[derive(Debug, Clone, Copy, Default)]
struct Audit {
    seed: u64,
    turn: u32,
    /// Turns until every piece has been read once; 0: no audits.
    turns: u32,
}

impl Audit {
    fn of(memory: &Memory, policy: Policy) -> Self {
        let turns = 100u32
            .checked_div(policy.audit_percent)
            .unwrap_or(0)
            .max(u32::from(policy.audit_percent > 0));
        // The order stays the same: in a new one a block could wait nearly twice as long for its turn.
        let drawn = || uuid::Uuid::new_v4().as_u64_pair().1 | 1;
        let seed = if memory.seed == 0 { drawn() } else { memory.seed };
        Self { seed, turn: if memory.turn >= turns { 0 } else { memory.turn }, turns }
    }

    fn has(self, piece: u64) -> bool {
        self.turns > 0 && mix(self.seed ^ piece) % u64::from(self.turns) == u64::from(self.turn)
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on all of `x`.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
