//! Threads that unpack, check and write blocks while the next ones arrive.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use janus_proto::{model::Batch, pb::BlockBatch};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    DamageError,
    assembly::Zeros,
    target::{Target, TargetError},
};

/// Messages waiting for each thread, 1 MiB each at most.
const QUEUED: usize = 4;

/// Why a thread ended.
pub(super) enum WriterError {
    Target(TargetError),
    Damage(DamageError),
    Ended,
}

enum Job {
    Blocks(BlockBatch),
    Zeros(Zeros),
}

pub(super) struct Writers {
    queues: Vec<mpsc::Sender<Job>>,
    turn: AtomicUsize,
    threads: Vec<JoinHandle<Result<u64, WriterError>>>,
}

impl Writers {
    pub(super) fn start(threads: usize, target: &Arc<Target>, size_bytes: u64) -> Self {
        let (queues, threads) = (0..threads.clamp(1, 16))
            .map(|_| {
                let (sender, receiver) = mpsc::channel(QUEUED);
                let target = target.clone();
                (sender, tokio::task::spawn_blocking(move || work(receiver, &target, size_bytes)))
            })
            .unzip();
        Self { queues, turn: AtomicUsize::new(0), threads }
    }

    /// False when a thread has failed; [`Writers::finish`] says why.
    pub(super) async fn give(&self, gaps: Vec<Zeros>, batch: BlockBatch) -> bool {
        for gap in gaps {
            if !self.give_zeros(gap).await {
                return false;
            }
        }
        self.queue(Job::Blocks(batch)).await
    }

    pub(super) async fn give_zeros(&self, zeros: Zeros) -> bool {
        zeros.1 == 0 || self.queue(Job::Zeros(zeros)).await
    }

    async fn queue(&self, job: Job) -> bool {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.queues.len();
        self.queues[turn].send(job).await.is_ok()
    }

    /// Waits for all that was given; returns the bytes written.
    pub(super) async fn finish(&mut self) -> Result<u64, WriterError> {
        self.queues.clear();
        let mut result = Ok(0);
        for thread in self.threads.drain(..) {
            let written = thread.await.unwrap_or(Err(WriterError::Ended));
            result = match (result, written) {
                (Ok(sum), Ok(written)) => Ok(sum + written),
                (Err(first), _) | (Ok(_), Err(first)) => Err(first),
            };
        }
        result
    }
}

fn work(
    mut jobs: mpsc::Receiver<Job>,
    target: &Target,
    size_bytes: u64,
) -> Result<u64, WriterError> {
    let mut written = 0;
    while let Some(job) = jobs.blocking_recv() {
        match job {
            Job::Zeros((first, count)) => target.zero(first, count).map_err(WriterError::Target)?,
            Job::Blocks(batch) => written += write(batch, target, size_bytes)?,
        }
    }
    Ok(written)
}

fn write(batch: BlockBatch, target: &Target, size_bytes: u64) -> Result<u64, WriterError> {
    let batch =
        Batch::from_wire(size_bytes, batch).map_err(|error| WriterError::Damage(error.into()))?;
    batch.verify().map_err(|error| WriterError::Damage(error.into()))?;
    for piece in batch.pieces() {
        let result = if piece.extent.zero {
            target.zero(piece.extent.first, piece.extent.count)
        } else {
            target.write(piece.extent.first, piece.data)
        };
        result.map_err(WriterError::Target)?;
    }
    Ok(batch.data_len() as u64)
}
