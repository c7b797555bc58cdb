//! One source at work: it takes pieces, asks for what they need and it has, and has it written.
//!
//! Where a segment of a source is the wanted one, by its digest, all its blocks are. Else blocks are taken that have the
//! same hash in both tables. What is needed of a segment in which the target has data is told by the first bytes of block
//! hashes: where these can't tell two blocks apart the segment's digest shows it, and whole hashes are compared.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::Arc,
};

use janus_proto::{
    error::WireError,
    hash::zero_hash,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_len},
    pb::{BlockBatch, ErrorReason, ReadBlocksResponse},
};

use super::{
    DamageError, RestoreError,
    intake::{Intake, next_request},
    packing::Seen,
    part::{Piece, ranges},
    source::{Failure, Source, Verdict},
    target::TargetError,
    work::Work,
    writers::{Pending, WriteError, Written},
};
use crate::{link::LinkError, snapshot::opened::SegmentHashes};

/// Bytes of each hash that tell which blocks of a segment differ: of 16 million that do, one is not seen at first.
pub(super) const SHORT: usize = 3;
/// Messages of a piece that are being written.
const FLIGHT: usize = 16;

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

/// What a source is asked for.
#[derive(Default)]
struct Plan {
    blocks: Vec<u64>,
    /// Of segments that differ: what the wanted blocks are.
    checks: HashMap<u64, Arc<SegmentHashes>>,
}

/// What is being written, and the blocks that are zeros with it.
type Flight = VecDeque<(Pending, Vec<Range<u64>>)>;

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
        match source.verdict(&error, self.failover_after) {
            Verdict::GivenUp => self.give_up(source, Failure::Link(error)),
            Verdict::Again(pause) => {
                tokio::select! {
                    biased;
                    () = self.queue.ended(source.number) => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
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

    /// Looks for what is needed and a source has.
    async fn plan(&self, source: &Source, piece: &mut Piece) -> Result<Plan, ServeError> {
        let (same, other): (Vec<_>, Vec<_>) = piece
            .parts
            .iter()
            .map(|part| part.segment)
            .partition(|segment| self.has_segment(source, *segment));
        let mut plan = Plan::default();
        self.plan_same(source, piece, &same, &mut plan).await?;
        let is_there = |segment: &u64| source.digest(*segment).is_some();
        let other: Vec<_> = other.into_iter().filter(is_there).collect();
        self.plan_other(source, piece, &other, &mut plan).await?;
        plan.blocks.sort_unstable();
        Ok(plan)
    }

    /// Segments that are the wanted ones: where the target has data, short hashes say what differs.
    async fn plan_same(
        &self,
        source: &Source,
        piece: &mut Piece,
        same: &[u64],
        plan: &mut Plan,
    ) -> Result<(), ServeError> {
        let compared: Vec<u64> = piece
            .parts
            .iter()
            .filter(|part| part.has_content && same.contains(&part.segment))
            .map(|part| part.segment)
            .collect();
        let hashes = match self.table.ask(&source.opened, &compared, SHORT).await {
            Ok(hashes) => hashes,
            // The blocks may be there all the same.
            Err(ServeError::Link(error)) if is_damage(&error) => Vec::new(),
            Err(error) => return Err(error),
        };
        let hashes: HashMap<_, _> = compared.into_iter().zip(hashes).collect();
        for part in piece.parts.iter().filter(|part| same.contains(&part.segment)) {
            plan.blocks.extend(part.needed(hashes.get(&part.segment).map(Arc::as_ref)));
        }
        Ok(())
    }

    /// Segments of another snapshot that differ: the blocks that are the same at the same place.
    async fn plan_other(
        &self,
        source: &Source,
        piece: &mut Piece,
        other: &[u64],
        plan: &mut Plan,
    ) -> Result<(), ServeError> {
        let holder = self.holder().filter(|_| self.queue.is_source(0));
        let wanted = self.table.of(holder, other).await;
        let known: Vec<u64> =
            other.iter().filter(|segment| wanted.contains_key(segment)).copied().collect();
        if known.is_empty() {
            return Ok(());
        }
        let theirs = source.opened.segment_hashes_once(&known, self.table.hash_bytes()).await?;
        for (segment, theirs) in known.into_iter().zip(theirs) {
            let Some(wanted) = wanted.get(&segment) else { continue };
            let Some(part) = piece.part_of(segment * SEGMENT_BLOCKS) else { continue };
            if wanted.is_whole() {
                part.prove(wanted);
            }
            let is_same = |block: &u64| {
                let place = (block % SEGMENT_BLOCKS) as usize;
                let (wanted, theirs) = (wanted.of(place), theirs.of(place));
                let known = wanted.len().min(theirs.len());
                known > 0 && wanted[..known] == theirs[..known]
            };
            plan.blocks.extend(part.needed(Some(wanted)).into_iter().filter(is_same));
            plan.checks.insert(segment, wanted.clone());
        }
        Ok(())
    }

    async fn fetch(
        &self,
        source: &Source,
        piece: &mut Piece,
        plan: Plan,
    ) -> Result<(), ServeError> {
        let mut left = ranges(plan.blocks.iter().copied());
        while !left.is_empty() {
            let request = next_request(&mut left, source.packing.most_blocks());
            let mut flight = Flight::new();
            let result = self.request(source, piece, &plan, &request, &mut flight).await;
            // What was written counts, whatever came after it.
            while let Some(landing) = flight.pop_front() {
                self.land(piece, &plan, landing).await?;
            }
            source.packing.seen(&result?);
        }
        Ok(())
    }

    async fn request(
        &self,
        source: &Source,
        piece: &mut Piece,
        plan: &Plan,
        asked: &[Range<u64>],
        flight: &mut Flight,
    ) -> Result<Seen, ServeError> {
        let (mut intake, mut seen) = (Intake::new(asked), Seen::default());
        let mut blocks = source.opened.blocks_once(asked, source.packing.encoding()).await?;
        while let Some(answer) = blocks.next().await? {
            source.is_there();
            let bytes = answer.batch.as_ref().map_or(0, |batch| batch.data.len() as u64);
            seen.message(bytes);
            self.counts.fetched(bytes);
            self.receive(source, piece, plan, answer, &mut intake, flight).await?;
            while flight.len() > FLIGHT {
                let Some(landing) = flight.pop_front() else { break };
                self.land(piece, plan, landing).await?;
            }
        }
        self.zeros(piece, plan, intake.rest(), flight).await?;
        Ok(seen)
    }

    /// Looks a message over and has it written.
    async fn receive(
        &self,
        source: &Source,
        piece: &mut Piece,
        plan: &Plan,
        answer: ReadBlocksResponse,
        intake: &mut Intake<'_>,
        flight: &mut Flight,
    ) -> Result<(), ServeError> {
        for range in &answer.damaged {
            let left_out = intake.lose(range)?;
            self.zeros(piece, plan, left_out, flight).await?;
        }
        let Some(batch) = answer.batch else { return Ok(()) };
        let zeros = intake.take(&batch)?;
        plan.check(&batch)?;
        self.zeros(piece, plan, zeros, flight).await?;
        if !batch.hashes.is_empty() {
            let pending = self.writers.write(batch, source.size_bytes()).await;
            flight.push_back((pending, Vec::new()));
        }
        Ok(())
    }

    /// Blocks that shall be zeros, where they aren't.
    async fn zeros(
        &self,
        piece: &mut Piece,
        plan: &Plan,
        zeros: Vec<Range<u64>>,
        flight: &mut Flight,
    ) -> Result<(), ServeError> {
        let mut left = Vec::new();
        for block in zeros.into_iter().flatten() {
            let hash = zero_hash(block_len(self.size_bytes, block));
            plan.check_block(block, &hash)?;
            match piece.part_of(block) {
                Some(part) if part.is_zero(block) => self.note(piece, plan, block, hash),
                Some(_) => left.push(block),
                None => {}
            }
        }
        if !left.is_empty() {
            let left = ranges(left);
            flight.push_back((self.writers.zero(left.clone()).await, left));
        }
        Ok(())
    }

    /// Waits until something is written, and takes note of it.
    async fn land(
        &self,
        piece: &mut Piece,
        plan: &Plan,
        (pending, zeros): (Pending, Vec<Range<u64>>),
    ) -> Result<(), ServeError> {
        let Written { extents, hashes, bytes } = pending.wait().await?;
        self.counts.written(bytes);
        let blocks = extents.iter().flat_map(|extent| extent.first..extent.end());
        for (block, hash) in blocks.zip(hashes.chunks_exact(BlockHash::LEN)) {
            self.note(piece, plan, block, BlockHash::from_wire("hashes", hash)?);
        }
        for block in zeros.into_iter().flatten() {
            self.note(piece, plan, block, zero_hash(block_len(self.size_bytes, block)));
        }
        Ok(())
    }

    fn note(&self, piece: &mut Piece, plan: &Plan, block: u64, hash: BlockHash) {
        let Some(part) = piece.part_of(block) else { return };
        let check = plan.checks.get(&part.segment);
        part.note(block, hash, check.is_none_or(|check| check.is_whole()));
        self.counts.advance(part, BLOCK_BYTES);
    }
}

impl Plan {
    /// A message's blocks are those that are wanted, as far as that is known of each.
    fn check(&self, batch: &BlockBatch) -> Result<(), ServeError> {
        if self.checks.is_empty() {
            return Ok(());
        }
        let extents = batch.extents.iter().filter(|extent| !extent.zero);
        // Numbers and hashes were looked at before.
        let blocks =
            extents.flat_map(|extent| extent.first_block..extent.first_block + extent.block_count);
        for (block, hash) in blocks.zip(batch.hashes.chunks_exact(BlockHash::LEN)) {
            self.check_block(block, &BlockHash::from_wire("hashes", hash)?)?;
        }
        Ok(())
    }

    fn check_block(&self, block: u64, hash: &BlockHash) -> Result<(), ServeError> {
        let wanted = self.checks.get(&(block / SEGMENT_BLOCKS));
        let place = (block % SEGMENT_BLOCKS) as usize;
        match wanted.is_none_or(|wanted| wanted.fits(place, hash)) {
            true => Ok(()),
            false => Err(DamageError::Foreign { block }.into()),
        }
    }
}

/// The server has something, but not whole.
fn is_damage(error: &LinkError) -> bool {
    error.reason() == Some(ErrorReason::StoreDamaged)
}
