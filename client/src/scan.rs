//! Reads a disk, hashes it, and hands out what has to travel, segment by segment in ascending order.
//!
//! Worker threads take segments off a counter; at most [`WINDOW`] segments are between their start and their place
//! in the order, which bounds memory whatever the disk and the network do.

use std::{
    collections::BTreeMap,
    sync::{
        Condvar, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::Scope,
    time::Duration,
};

use janus_proto::{
    ids::{BlockHash, segment_count},
    ranges::Ranges,
};

use crate::{
    link::LinkError,
    packing::{Outgoing, Packing},
    reading::Reading,
    seal::DiskSeal,
    segment_bits::SegmentBits,
    source::{Source, SourceError},
};

mod worker;

/// Segments in flight, 4 MiB each at most.
pub const WINDOW: u64 = 16;
/// How often the consumer hears of a scan that has nothing to hand out.
const TICK: Duration = Duration::from_millis(500);

/// Why a scan ended early.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The disk can't be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The hash table can't be read: reconcile with the server and scan again.
    #[error("the hash cache can't be read: {0}")]
    Table(String),
    /// The server's hashes can't be read, where they stand for the table.
    #[error(transparent)]
    Link(#[from] Box<LinkError>),
    /// A block had changed that a change journal had promised to be unchanged: scan again without promises.
    #[error("byte {offset} has changed, and the change journal says nothing of it")]
    Missed {
        /// First byte of the block.
        offset: u64,
    },
    /// The consumer wanted no more.
    #[error("the scan was stopped")]
    Stopped,
    /// A message could not be built: a bug, kept from being a panic.
    #[error("a message is invalid: {0}")]
    Message(#[from] janus_proto::error::WireError),
}

/// The latest known hashes of the disk.
pub trait HashTable: Sync {
    /// Hashes of all blocks of a segment; `None` when all its blocks are zero.
    ///
    /// # Errors
    /// When the table is damaged, or can't be asked.
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, ScanError>;

    /// The segment's digest, where it is known and the hashes are costly: they are then asked for only when the digest of what
    /// was read is another, and the segment is read again.
    fn digest(&self, _segment: u64) -> Option<BlockHash> {
        None
    }
}

/// What is known of a disk of which nothing is.
pub struct Nothing;

impl HashTable for Nothing {
    fn segment(&self, _: u64) -> Result<Option<Vec<BlockHash>>, ScanError> {
        Ok(None)
    }
}

/// What the session holds before this scan's blocks arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionContent {
    /// Zeros: there is no head.
    Zeros,
    /// What the table says, but for the blocks that must be sent.
    Table,
}

/// Which segments to scan.
#[derive(Debug, Clone)]
pub enum Segments {
    /// From this one to the end.
    From(u64),
    /// These, ascending.
    List(Vec<u64>),
}

/// A scan to do.
pub struct ScanJob<'a> {
    /// The disk.
    pub source: &'a Source,
    /// What seals its blocks before they are hashed.
    pub seal: Option<&'a DiskSeal>,
    /// Its latest known hashes.
    pub table: &'a dyn HashTable,
    /// What the session holds.
    pub content: SessionContent,
    /// What is read, and what the rest is taken to be.
    pub reading: &'a Reading,
    /// Blocks of a segment to send whether they differ or not.
    pub must: &'a (dyn Fn(u64) -> SegmentBits + Sync),
    /// Which segments.
    pub segments: Segments,
    /// How data is packed.
    pub packing: &'a Packing,
    /// Worker threads.
    pub threads: Threads,
}

/// How many threads read and hash. What is in memory keeps a core busy with each of them; a disk is kept busy by reads
/// that wait in its queue while others' data is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads {
    /// From the start on; at least one.
    pub near: usize,
    /// Once a read waits for the disk.
    pub far: usize,
}

impl Threads {
    /// One for each core, and eight where reads wait, but no more than there are segments in flight.
    pub fn of_cores(cores: usize) -> Self {
        Self { near: cores, far: cores.max((8 * cores).min(WINDOW as usize)) }
    }

    /// Those for messages, of which several wait for each: some write while others check.
    pub fn for_messages(self) -> usize {
        self.far.min(2 * self.near)
    }
}

/// One segment, scanned.
#[derive(Debug, Default)]
pub struct Scanned {
    /// Its number.
    pub segment: u64,
    /// Its digest; `None`: all zero.
    pub digest: Option<BlockHash>,
    /// Blocks whose hash isn't the table's, by their place in the segment.
    pub changes: Vec<(u16, BlockHash)>,
    /// What has to travel, ascending.
    pub messages: Vec<Outgoing>,
    /// Blocks of the messages.
    pub sent: SegmentBits,
    /// What was read of the disk; holes cost nothing.
    pub read: Ranges,
}

/// What a scan hands to its consumer.
pub enum Event {
    /// The next segment in order.
    Scanned(Box<Scanned>),
    /// Nothing new for a while.
    Tick,
}

/// Scans; `sink` gets every segment of the job in order, on the calling thread, and ends the scan with `Err`.
///
/// # Errors
/// The first failure of a worker in segment order, or [`ScanError::Stopped`] when `sink` ended it.
pub fn scan<E>(
    job: &ScanJob<'_>,
    mut sink: impl FnMut(Event) -> Result<(), E>,
) -> Result<Result<(), E>, ScanError> {
    let window = Window::default();
    let tickets = match &job.segments {
        Segments::From(first) => segment_count(job.source.size_bytes()).saturating_sub(*first),
        Segments::List(list) => list.len() as u64,
    };
    // As many places as the window: a worker never waits here.
    let (done, results) = sync_channel(WINDOW as usize);
    let crew =
        Crew { job, tickets, next: AtomicU64::new(0), window: &window, is_whole: Once::new() };
    std::thread::scope(|scope| {
        for _ in 0..job.threads.near.max(1) {
            let (crew, done) = (&crew, done.clone());
            scope.spawn(move || crew.work(scope, &done));
        }
        drop(done);
        let _stop = StopOnDrop(&window);
        let mut waiting = BTreeMap::new();
        let mut wanted = 0;
        while wanted < tickets {
            match results.recv_timeout(TICK) {
                Ok((ticket, result)) => {
                    waiting.insert(ticket, result);
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(end) = sink(Event::Tick) {
                        return Ok(Err(end));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(ScanError::Stopped),
            }
            while let Some(result) = waiting.remove(&wanted) {
                if let Err(end) = sink(Event::Scanned(result?)) {
                    return Ok(Err(end));
                }
                wanted += 1;
                window.advance(wanted);
            }
        }
        Ok(Ok(()))
    })
}

type Ticket = (u64, Result<Box<Scanned>, ScanError>);

/// What the worker threads share.
struct Crew<'a> {
    job: &'a ScanJob<'a>,
    tickets: u64,
    next: AtomicU64,
    window: &'a Window,
    /// Done when those for reads that wait are there, too.
    is_whole: Once,
}

impl Crew<'_> {
    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, done: &SyncSender<Ticket>) {
        let mut worker = worker::Worker::new(self.job);
        loop {
            let ticket = self.next.fetch_add(1, Ordering::Relaxed);
            if ticket >= self.tickets || !self.window.wait_for(ticket) {
                return;
            }
            let segment = match &self.job.segments {
                Segments::From(first) => first + ticket,
                Segments::List(list) => list[ticket as usize],
            };
            if !self.is_whole.is_completed() && worker.waits_for(segment) {
                self.is_whole.call_once(|| self.complete(scope, done));
            }
            if done.send((ticket, worker.segment(segment))).is_err() {
                return;
            }
        }
    }

    fn complete<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, done: &SyncSender<Ticket>) {
        for _ in self.job.threads.near.max(1)..self.job.threads.far {
            let done = done.clone();
            scope.spawn(move || self.work(scope, &done));
        }
    }
}

/// How far the consumer is; workers wait when they are too far ahead.
#[derive(Default)]
struct Window {
    state: Mutex<WindowState>,
    moved: Condvar,
}

#[derive(Default)]
struct WindowState {
    consumed: u64,
    stopped: bool,
}

impl Window {
    /// True when the ticket may be worked on, false when the scan has ended.
    fn wait_for(&self, ticket: u64) -> bool {
        let mut state = self.lock();
        while !state.stopped && ticket >= state.consumed + WINDOW {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.stopped
    }

    fn advance(&self, consumed: u64) {
        self.lock().consumed = consumed;
        self.moved.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, WindowState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whatever way the consumer leaves, workers must not wait for it.
struct StopOnDrop<'a>(&'a Window);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lock().stopped = true;
        self.0.moved.notify_all();
    }
}

#[cfg(test)]
mod tests;
