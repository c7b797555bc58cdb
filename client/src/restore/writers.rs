//! Threads that unpack, check and write blocks while the next ones arrive. Whoever gave them something is told what came of
//! it: nothing counts before it was written.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use janus_proto::{
    ids::BLOCK_BYTES,
    model::{Batch, Extent},
    pb::BlockBatch,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::{
    DamageError,
    target::{Target, TargetError},
};

/// Messages waiting for each thread, 1 MiB each at most.
const QUEUED: usize = 4;

/// Why something was not written.
#[derive(Debug)]
pub(super) enum WriteError {
    Target(TargetError),
    Damage(DamageError),
    Ended,
}

/// What was written.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Extents with data; their blocks have `hashes`.
    pub(super) extents: Vec<Extent>,
    pub(super) hashes: Bytes,
    pub(super) bytes: u64,
}

enum Task {
    /// Of a disk of so many bytes. Extents of zeros are left to others.
    Blocks(BlockBatch, u64),
    Zeros(Vec<std::ops::Range<u64>>),
}

struct Job {
    task: Task,
    done: oneshot::Sender<Result<Written, WriteError>>,
}

/// Tells what came of a job.
pub(super) struct Pending(oneshot::Receiver<Result<Written, WriteError>>);

impl Pending {
    pub(super) async fn wait(self) -> Result<Written, WriteError> {
        self.0.await.unwrap_or(Err(WriteError::Ended))
    }
}

/// The threads; they end when this is dropped and nobody waits any more.
pub(super) struct Writers {
    queues: Vec<mpsc::Sender<Job>>,
    turn: AtomicUsize,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    pub(super) fn start(threads: usize, target: &Arc<Target>) -> Self {
        let (queues, threads) = (0..threads.clamp(1, 16))
            .map(|_| {
                let (sender, receiver) = mpsc::channel(QUEUED);
                let target = target.clone();
                (sender, tokio::task::spawn_blocking(move || work(receiver, &target)))
            })
            .unzip();
        Self { queues, turn: AtomicUsize::new(0), threads }
    }

    /// Gives the data of a message to a thread.
    pub(super) async fn write(&self, batch: BlockBatch, size_bytes: u64) -> Pending {
        self.queue(Task::Blocks(batch, size_bytes)).await
    }

    /// Has blocks made zeros.
    pub(super) async fn zero(&self, ranges: Vec<std::ops::Range<u64>>) -> Pending {
        self.queue(Task::Zeros(ranges)).await
    }

    async fn queue(&self, task: Task) -> Pending {
        let (done, pending) = oneshot::channel();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.queues.len();
        // Where the thread has ended, so has what it should have told.
        let _ = self.queues[turn].send(Job { task, done }).await;
        Pending(pending)
    }

    /// Waits for the end of all threads: nothing is written after that.
    pub(super) async fn finish(self) {
        drop(self.queues);
        for thread in self.threads {
            let _ = thread.await;
        }
    }
}

fn work(mut jobs: mpsc::Receiver<Job>, target: &Target) {
    while let Some(Job { task, done }) = jobs.blocking_recv() {
        // Nobody waits any more: what it is of was given up.
        if done.is_closed() {
            continue;
        }
        let result = match task {
            Task::Blocks(batch, size_bytes) => write(batch, target, size_bytes),
            Task::Zeros(ranges) => zero(&ranges, target),
        };
        let _ = done.send(result);
    }
}

fn zero(ranges: &[std::ops::Range<u64>], target: &Target) -> Result<Written, WriteError> {
    for range in ranges {
        target.zero(range.start, range.end - range.start).map_err(WriteError::Target)?;
    }
    Ok(Written::default())
}

fn write(batch: BlockBatch, target: &Target, size_bytes: u64) -> Result<Written, WriteError> {
    let batch =
        Batch::from_wire(size_bytes, batch).map_err(|error| WriteError::Damage(error.into()))?;
    batch.verify().map_err(|error| WriteError::Damage(error.into()))?;
    let mut written = Written::default();
    // Hashes are of what was sealed: those of the message stay.
    let batch = match target.seal() {
        Some(seal) => batch.changed(|first, data| seal.open(first * BLOCK_BYTES, data)),
        None => batch,
    };
    for piece in batch.pieces().filter(|piece| !piece.extent.zero) {
        target.write(piece.extent.first, piece.data).map_err(WriteError::Target)?;
        written.extents.push(piece.extent);
    }
    written.bytes = batch.data_len() as u64;
    written.hashes = Bytes::copy_from_slice(batch.hashes());
    Ok(written)
}
