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
    pb::{Encoding, Snapshot},
};
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore},
};

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
mod zeros;

use self::{
    ahead::Streams,
    cache::{Cache, Chunk, State},
    filling::Filling,
    proof::Proof,
    zeros::Zeros,
};

/// What is fetched and kept as one.
const CHUNK_BLOCKS: u64 = 16;
const CHUNK_BYTES: u64 = CHUNK_BLOCKS * BLOCK_BYTES;
/// Fetches at the same time; each is one stream.
const FETCHES: usize = 8;

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
    /// A chunk has arrived, or failed.
    arrived: Notify,
    fetches: Semaphore,
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
            arrived: Notify::new(),
            fetches: Semaphore::new(FETCHES),
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
        let mut rest = buffer;
        let mut at = offset;
        if at < end {
            // All of it is asked for at once.
            self.ask_for(&(at / CHUNK_BYTES..(end - 1) / CHUNK_BYTES + 1));
        }
        while at < end {
            let chunk = at / CHUNK_BYTES;
            let content = self.chunk(chunk).await?;
            let within = (at % CHUNK_BYTES) as usize;
            let take = rest.len().min(CHUNK_BYTES as usize - within);
            let (now, later) = rest.split_at_mut(take);
            let copied = content.copy_to(now, within);
            copied.map_err(|lost| self.inner.lost_error(chunk, lost))?;
            (rest, at) = (later, at + take as u64);
        }
        Ok(())
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

    async fn chunk(&self, chunk: u64) -> io::Result<Arc<Chunk>> {
        loop {
            let arrived = self.inner.arrived.notified();
            let mut arrived = std::pin::pin!(arrived);
            // Before the cache is looked at: what arrives in between is not missed.
            arrived.as_mut().enable();
            if let Some(found) = self.look(chunk) {
                return found;
            }
            arrived.await;
        }
    }

    /// The chunk if it is there; it is fetched if nobody has asked for it, or it has gone again.
    fn look(&self, chunk: u64) -> Option<io::Result<Arc<Chunk>>> {
        let mut cache = lock(&self.inner.cache);
        let found = match cache.get(chunk) {
            Some(State::Ready(content)) => return Some(Ok(content.clone())),
            Some(State::Failed(kind, text)) => Some(Err(io::Error::new(*kind, text.clone()))),
            Some(State::Coming) => return None,
            None => None,
        };
        if found.is_some() {
            cache.forget(chunk);
            return found;
        }
        let missing = cache.take_missing(chunk..chunk + 1, chunk + 1);
        drop(cache);
        self.fetch(missing);
        None
    }

    /// Has chunks fetched that are not there, and what a reader in order asks for next.
    fn ask_for(&self, wanted: &Range<u64>) {
        let chunks = self.snapshot().size_bytes.div_ceil(CHUNK_BYTES);
        let ahead = lock(&self.inner.streams).ahead(wanted, chunks);
        let missing = lock(&self.inner.cache).take_missing(wanted.start..ahead, wanted.end);
        self.fetch(missing);
    }

    fn fetch(&self, missing: Vec<Range<u64>>) {
        for run in missing {
            self.runtime.spawn(Inner::fetch(self.inner.clone(), run));
        }
    }
}

impl Inner {
    async fn fetch(self: Arc<Self>, chunks: Range<u64>) {
        // Nobody closes it.
        let _permit = self.fetches.acquire().await;
        let blocks = block_count(self.opened.snapshot().size_bytes);
        let range = chunks.start * CHUNK_BLOCKS..(chunks.end * CHUNK_BLOCKS).min(blocks);
        let mut filling = Filling::new(chunks, blocks, |chunk, content| {
            lock(&self.cache).put(chunk, content);
            self.arrived.notify_waiters();
        });
        let read = async {
            if let Some((seal, proof)) = &self.seal {
                let segments = range.start / SEGMENT_BLOCKS..range.end.div_ceil(SEGMENT_BLOCKS);
                let segments: Vec<u64> = segments.collect();
                filling.sealed(seal.clone(), proof.of(&self.opened, &segments).await?);
            }
            self.opened.read_blocks(&[range], self.encoding, &mut filling).await
        };
        let read = read.await;
        let result = read.map_err(|error| (io_kind(&error), error.to_string()));
        match result.and_then(|()| filling.finish().map_err(|e| (io::ErrorKind::InvalidData, e))) {
            Ok(()) => {}
            Err((kind, text)) => {
                let mut cache = lock(&self.cache);
                for chunk in filling.left() {
                    cache.fail(chunk, kind, &text);
                }
                drop(cache);
                self.arrived.notify_waiters();
            }
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
        match self.snapshot().logical_sector_bytes {
            4096 => 4096,
            _ => 512,
        }
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
