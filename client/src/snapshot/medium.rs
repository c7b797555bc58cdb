//! A snapshot's bytes at any offset. What was read is kept in bounded memory, what comes next is fetched ahead of who reads in
//! order, each block is compared with its hash, and a link that breaks is waited for as a restore does.

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use janus_proto::{
    ids::{BLOCK_BYTES, SEGMENT_BLOCKS, block_count},
    image::sector_bytes,
    pb::{Encoding, Snapshot},
};
use tokio::runtime::Handle;

use super::{Opened, ReadError};
use crate::{
    packing::Wish,
    seal::DiskSeal,
    source::{
        medium::{Medium, Stretch},
        view::ReadAt,
    },
};

mod ahead;
mod cache;
mod filling;
mod proof;
mod queue;
mod zeros;

use self::{
    ahead::Streams,
    cache::{Cache, Chunk},
    filling::Filling,
    proof::Proof,
    queue::Queue,
    zeros::Zeros,
};

/// What is fetched and kept as one.
const CHUNK_BLOCKS: u64 = 16;
const CHUNK_BYTES: u64 = CHUNK_BLOCKS * BLOCK_BYTES;
/// Chunks of a large read that are waited for together: 2 MiB.
const TOGETHER: usize = 32;

/// A snapshot as a disk. Clones share everything.
#[derive(Clone)]
pub struct SnapshotMedium {
    inner: Arc<Inner>,
    runtime: Handle,
}

struct Inner {
    opened: Opened,
    /// Of a sealed snapshot: what opens its blocks, and what they must be.
    seal: Option<(Arc<DiskSeal>, Proof)>,
    encoding: Encoding,
    cache: Mutex<Cache>,
    streams: Mutex<Streams>,
    queue: Mutex<Queue>,
    zeros: Zeros,
}

impl std::fmt::Debug for SnapshotMedium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.opened.fmt(f)
    }
}

impl SnapshotMedium {
    /// Reads `opened`, whose blocks `seal` opens, and keeps up to `memory_bytes` of it. `runtime` makes the calls; the methods of [`Medium`] block, so
    /// they must not be called by its own workers.
    pub fn new(
        opened: Opened,
        seal: Option<Arc<DiskSeal>>,
        packing: Wish,
        memory_bytes: u64,
        runtime: Handle,
    ) -> Self {
        let encoding = match packing.unless_sealed(seal.is_some()) {
            // Who reads here and there waits for each answer: packing costs less than it saves only on slow lines.
            Wish::Auto => Encoding::None,
            Wish::Only(encoding) => encoding,
        };
        let zeros = Zeros::new(opened.snapshot().size_bytes);
        let seal = seal.map(|seal| (seal, Proof::default()));
        let inner = Inner {
            opened,
            seal,
            encoding,
            cache: Mutex::new(Cache::new(memory_bytes / CHUNK_BYTES)),
            streams: Mutex::default(),
            queue: Mutex::default(),
            zeros,
        };
        Self { inner: Arc::new(inner), runtime }
    }

    /// What it is.
    pub fn snapshot(&self) -> &Snapshot {
        self.inner.opened.snapshot()
    }

    /// Its handle on its server.
    pub fn opened(&self) -> &Opened {
        &self.inner.opened
    }

    /// Gives the handle back; without this it expires by itself.
    pub async fn close(&self) {
        self.inner.opened.close().await;
    }

    /// Data received so far, as packed.
    pub fn fetched_bytes(&self) -> u64 {
        self.inner.opened.fetched_bytes()
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] past the end; else when the server can't be reached for as long as it is waited
    /// for, or has lost a part of this.
    pub async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let size_bytes = self.snapshot().size_bytes;
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= size_bytes);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        if offset == end {
            return Ok(());
        }
        // All of it is asked for at once.
        let chunks = offset / CHUNK_BYTES..(end - 1) / CHUNK_BYTES + 1;
        self.ask_for(&chunks);
        let (mut rest, mut at) = (buffer, offset);
        for first in chunks.clone().step_by(TOGETHER) {
            let some = first..(first + TOGETHER as u64).min(chunks.end);
            for (chunk, content) in some.clone().zip(self.arrived(some).await?) {
                let within = (at % CHUNK_BYTES) as usize;
                let take = rest.len().min(CHUNK_BYTES as usize - within);
                let (now, later) = rest.split_at_mut(take);
                let copied = content.copy_to(now, within);
                copied.map_err(|lost| self.inner.lost_error(chunk, lost))?;
                (rest, at) = (later, at + take as u64);
            }
        }
        Ok(())
    }

    /// All of these chunks, once they are here.
    async fn arrived(&self, chunks: Range<u64>) -> io::Result<Vec<Arc<Chunk>>> {
        let (wanted, missing) = lock(&self.inner.cache).want(chunks);
        self.fetch(missing);
        let mut here = Vec::with_capacity(wanted.len());
        // The last one first: when it is here, most of the others are, and nobody is woken for each.
        for one in wanted.into_iter().rev() {
            here.push(one.arrive().await?);
        }
        here.reverse();
        Ok(here)
    }

    /// What needs no waiting is answered without the runtime.
    fn wait_for<T>(&self, answer: impl Future<Output = T>) -> T {
        let mut answer = std::pin::pin!(answer);
        // It may find that it has to connect, which needs a runtime around it.
        let runtime = self.runtime.enter();
        match answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => answer,
            Poll::Pending => {
                drop(runtime);
                self.runtime.block_on(answer)
            }
        }
    }

    /// Has chunks fetched that are not there, and what a reader in order asks for next.
    fn ask_for(&self, wanted: &Range<u64>) {
        let chunks = self.snapshot().size_bytes.div_ceil(CHUNK_BYTES);
        let ahead = lock(&self.inner.streams).ahead(wanted, chunks);
        let missing = lock(&self.inner.cache).take_missing(wanted.start..ahead, wanted.end);
        self.fetch(missing);
    }

    fn fetch(&self, missing: Vec<Range<u64>>) {
        let fetchers = lock(&self.inner.queue).add(missing);
        for _ in 0..fetchers {
            self.runtime.spawn(Inner::fetch_all(self.inner.clone()));
        }
    }
}

impl Inner {
    /// Fetches until nothing waits for it.
    async fn fetch_all(self: Arc<Self>) {
        while let Some(runs) = self.next() {
            self.fetch(&runs).await;
        }
    }

    fn next(&self) -> Option<Vec<Range<u64>>> {
        lock(&self.queue).take()
    }

    /// Fetches runs of chunks, ascending, by one call.
    async fn fetch(&self, runs: &[Range<u64>]) {
        let blocks = block_count(self.opened.snapshot().size_bytes);
        let ranges: Vec<_> = runs
            .iter()
            .map(|run| run.start * CHUNK_BLOCKS..(run.end * CHUNK_BLOCKS).min(blocks))
            .collect();
        let mut filling = Filling::new(runs.iter().cloned().flatten(), blocks, |chunk, content| {
            lock(&self.cache).put(chunk, content);
        });
        let read = async {
            if let Some((seal, proof)) = &self.seal {
                let mut segments: Vec<u64> = ranges
                    .iter()
                    .flat_map(|range| {
                        range.start / SEGMENT_BLOCKS..range.end.div_ceil(SEGMENT_BLOCKS)
                    })
                    .collect();
                segments.dedup();
                filling.sealed(seal.clone(), proof.of(&self.opened, &segments).await?);
            }
            self.opened.read_blocks(&ranges, self.encoding, &mut filling).await
        };
        let read = read.await;
        let result = read.map_err(|error| (io_kind(&error), error.to_string()));
        let filled =
            result.and_then(|()| filling.finish().map_err(|e| (io::ErrorKind::InvalidData, e)));
        if let Err((kind, text)) = filled {
            let mut cache = lock(&self.cache);
            filling.left().for_each(|chunk| cache.fail(chunk, kind, &text));
        }
    }

    fn lost_error(&self, chunk: u64, lost: Range<usize>) -> io::Error {
        let start = chunk * CHUNK_BYTES;
        let Snapshot { snapshot_id, server_id, .. } = self.opened.snapshot();
        io::Error::other(format!(
            "bytes {}-{} of snapshot {snapshot_id} are lost on server {server_id}",
            start + lost.start as u64,
            start + lost.end as u64 - 1
        ))
    }
}

fn io_kind(error: &ReadError) -> io::ErrorKind {
    match error {
        ReadError::Link(_) => io::ErrorKind::NotConnected,
        ReadError::Damaged { .. } => io::ErrorKind::InvalidData,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Medium for SnapshotMedium {
    fn size_bytes(&self) -> u64 {
        self.snapshot().size_bytes
    }

    fn sector_bytes(&self) -> u32 {
        sector_bytes(self.snapshot().logical_sector_bytes)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.wait_for(self.read(buffer, offset))
    }

    /// What can't be told counts as data.
    fn stretch(&self, offset: u64) -> Stretch {
        let inner = &self.inner;
        let proof = inner.seal.as_ref().map(|(_, proof)| proof);
        self.wait_for(inner.zeros.stretch(&inner.opened, proof, offset))
    }

    fn expect(&self, range: Range<u64>) {
        let end = range.end.min(self.size_bytes());
        if range.start < end {
            self.ask_for(&(range.start / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES)));
        }
    }

    fn is_near(&self, range: Range<u64>) -> bool {
        let chunks = range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES);
        lock(&self.inner.cache).has(chunks)
    }
}

impl ReadAt for SnapshotMedium {
    fn len(&self) -> u64 {
        self.size_bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        Medium::read_exact_at(self, buffer, offset)
    }
}
