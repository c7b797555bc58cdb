//! Asks for blocks, looks over what comes, and has it written; what was written is noted in the piece.

use std::{collections::VecDeque, ops::Range};

use janus_proto::{
    hash::zero_hash,
    ids::{BLOCK_BYTES, BlockHash, block_len},
    pb::ReadBlocksResponse,
};

use super::{
    super::{
        intake::{Intake, next_request},
        packing::Seen,
        part::{Piece, ranges},
        source::Source,
        work::Work,
        writers::{Pending, Written},
    },
    ServeError,
    plan::Plan,
};

/// Messages of a piece that are being written.
const FLIGHT: usize = 16;

/// What is being written, and the blocks that are zeros with it.
type Flight = VecDeque<(Pending, Vec<Range<u64>>)>;

impl Work {
    pub(super) async fn fetch(
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
