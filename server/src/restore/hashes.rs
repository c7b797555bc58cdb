//! Makes the stream of hashes, on a thread that may block. A receiver that has gone ends it.

use std::ops::Range;

use janus_proto::{
    asked::{self, by_segment},
    ids::{BlockHash, SEGMENT_BLOCKS},
    model::MAX_HASHES,
    pb,
};
use tokio::sync::mpsc::Sender;
use tonic::Status;

use super::{Content, too_short};

/// The receiver has gone: nobody wants the rest.
pub(super) struct Gone;

pub(super) type Answers<T> = Sender<Result<T, Status>>;

pub(super) fn send<T>(answers: &Answers<T>, answer: T) -> Result<(), Gone> {
    answers.blocking_send(Ok(answer)).map_err(|_| Gone)
}

/// What is asked for.
pub(super) struct Asked {
    pub(super) level: pb::HashLevel,
    pub(super) ranges: Vec<Range<u64>>,
    /// Bytes of each hash, 1 to 32.
    pub(super) hash_bytes: usize,
}

/// Sends the hashes of the ranges at one level.
pub(super) fn send_hashes(
    content: &Content,
    wanted: &Asked,
    answers: &Answers<pb::ReadHashesResponse>,
) {
    let sent = match wanted.level {
        pb::HashLevel::Segment => send_segment_digests(content, wanted, answers),
        _ => send_block_hashes(content, wanted, answers),
    };
    if let Err(Some(error)) = sent {
        let _ = answers.blocking_send(Err(error));
    }
}

fn send_segment_digests(
    content: &Content,
    wanted: &Asked,
    answers: &Answers<pb::ReadHashesResponse>,
) -> Result<(), Option<Status>> {
    for range in &wanted.ranges {
        for first in range.clone().step_by(MAX_HASHES) {
            let part = first..range.end.min(first + MAX_HASHES as u64);
            let digests = content.digests_in(part.clone()).map_err(|e| Some(e.into()))?;
            if digests.len() as u64 != part.end - part.start {
                return Err(Some(too_short()));
            }
            let answer = asked::hashes(first, &digests, wanted.hash_bytes);
            send(answers, answer).map_err(|Gone| None)?;
        }
    }
    Ok(())
}

fn send_block_hashes(
    content: &Content,
    wanted: &Asked,
    answers: &Answers<pb::ReadHashesResponse>,
) -> Result<(), Option<Status>> {
    for range in &wanted.ranges {
        let mut waiting: Vec<BlockHash> = Vec::new();
        let mut first = range.start;
        for part in by_segment(range.clone()) {
            let segment = part.start / SEGMENT_BLOCKS;
            let all = content.segment(segment).map_err(|e| Some(e.into()))?;
            let inside = (part.start % SEGMENT_BLOCKS) as usize..;
            let part_hashes =
                all.get(inside).and_then(|all| all.get(..(part.end - part.start) as usize));
            waiting.extend_from_slice(part_hashes.ok_or_else(|| Some(too_short()))?);
            if waiting.len() + SEGMENT_BLOCKS as usize > MAX_HASHES {
                send(answers, asked::hashes(first, &waiting, wanted.hash_bytes))
                    .map_err(|Gone| None)?;
                first = part.end;
                waiting.clear();
            }
        }
        if !waiting.is_empty() {
            send(answers, asked::hashes(first, &waiting, wanted.hash_bytes))
                .map_err(|Gone| None)?;
        }
    }
    Ok(())
}
