//! One source at work: it takes pieces, asks for what they need and it has, and has it written.
//!
//! Where a segment of a source is the wanted one, by its digest, all its blocks are. Else blocks are taken that have the
//! same hash in both tables. What is needed of a segment in which the target has data is told by the first bytes of block
//! hashes: where these can't tell two blocks apart the segment's digest shows it, and whole hashes are compared.

use janus_proto::{
    error::WireError,
    ids::{BlockHash, SEGMENT_BLOCKS},
    pb::ErrorReason,
};

use super::{
    DamageError, RestoreError,
    part::Piece,
    source::{Failure, Source},
    target::TargetError,
    work::Work,
    writers::WriteError,
};
use crate::link::LinkError;

mod fetch;
mod plan;

use self::plan::Plan;

/// Bytes of each hash that tell which blocks of a segment differ: of 65,000 that do, one is not seen at first.
pub(super) const SHORT: usize = 2;

/// Why a source could not do what it was to do.
#[derive(Debug)]
pub(super) enum ServeError {
    Link(LinkError),
    Damage(DamageError),
    Target(TargetError),
    Ended,
}

impl From<LinkError> for ServeError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<DamageError> for ServeError {
    fn from(error: DamageError) -> Self {
        Self::Damage(error)
    }
}

impl From<WireError> for ServeError {
    fn from(error: WireError) -> Self {
        Self::Damage(error.into())
    }
}

impl From<WriteError> for ServeError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Target(error) => Self::Target(error),
            WriteError::Damage(error) => Self::Damage(error),
            WriteError::Ended => Self::Ended,
        }
    }
}

impl Work {
    /// Takes pieces until there are no more for this source.
    pub(super) async fn lane(&self, source: &Source) -> Result<(), RestoreError> {
        while let Some(mut piece) = self.queue.take(source.number).await {
            let served = self.serve(source, &mut piece).await;
            self.settle(&mut piece);
            match piece.parts.is_empty() {
                true => self.queue.done(),
                false => {
                    if served.is_ok() {
                        piece.note_tried(source.number);
                    }
                    self.queue.give_back(piece);
                }
            }
            match served {
                Ok(()) => source.is_there(),
                Err(ServeError::Link(error)) => self.pause(source, error).await,
                Err(ServeError::Damage(error)) => self.give_up(source, Failure::Damage(error)),
                Err(ServeError::Target(error)) => return Err(error.into()),
                Err(ServeError::Ended) => return Err(RestoreError::Interrupted),
            }
        }
        Ok(())
    }

    /// Waits after a failure, or gives a source up.
    pub(super) async fn pause(&self, source: &Source, error: LinkError) {
        let Some(pause) = source.pause(&error, self.failover_after) else {
            return self.give_up(source, Failure::Link(error));
        };
        tokio::select! {
            biased;
            () = self.queue.ended(source.number) => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    fn give_up(&self, source: &Source, failure: Failure) {
        source.fail(failure);
        self.queue.retire(source.number);
    }

    /// Takes out of a piece what is complete.
    fn settle(&self, piece: &mut Piece) {
        piece.parts.retain(|part| {
            let is_whole = self.table.digest(part.segment) == Some(&part.digest());
            if is_whole {
                self.counts.verified(part);
            }
            !is_whole
        });
    }

    /// Does what a source can do for a piece.
    async fn serve(&self, source: &Source, piece: &mut Piece) -> Result<(), ServeError> {
        let plan = self.plan(source, piece).await?;
        self.fetch(source, piece, plan).await?;
        self.settle(piece);
        let doubtful: Vec<u64> = piece
            .parts
            .iter()
            .map(|part| part.segment)
            .filter(|segment| self.has_segment(source, *segment))
            .collect();
        if doubtful.is_empty() {
            return Ok(());
        }
        self.serve_doubtful(source, piece, &doubtful).await
    }

    /// Compares whole hashes of segments that are not what they should be though nothing seemed to be missing, or of which
    /// the source has lost something.
    async fn serve_doubtful(
        &self,
        source: &Source,
        piece: &mut Piece,
        doubtful: &[u64],
    ) -> Result<(), ServeError> {
        let whole = match self.table.ask(&source.opened, doubtful, BlockHash::LEN).await {
            Ok(whole) => whole,
            // Only the digest is known, which doesn't say which block is wrong.
            Err(ServeError::Link(error)) if is_damage(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut plan = Plan::default();
        for (segment, hashes) in doubtful.iter().zip(whole) {
            let Some(part) = piece.part_of(segment * SEGMENT_BLOCKS) else { continue };
            part.doubt();
            part.prove(&hashes);
            plan.blocks.extend(part.needed(None));
            plan.checks.insert(*segment, hashes);
        }
        self.fetch(source, piece, plan).await
    }

    /// True when a source's segment is the wanted one.
    fn has_segment(&self, source: &Source, segment: u64) -> bool {
        let wanted = self.table.digest(segment);
        wanted.is_some() && source.digest(segment) == wanted
    }
}

/// The server has something, but not whole.
fn is_damage(error: &LinkError) -> bool {
    error.reason() == Some(ErrorReason::StoreDamaged)
}
