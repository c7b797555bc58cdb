//! A request under way, and what has come of its answer. Every number of the server is checked here.

use std::{ops::Range, time::Instant};

use super::{
    NbdError,
    stream::Stream,
    wire::{be16, be32, be64, chunk},
};
use janus_proto::ranges::Ranges;

/// Longest chunk that isn't data: QEMU sends at most 1 MiB of extents.
const MAX_CHUNK_BYTES: u32 = 2 << 20;
/// Shortest piece of data a server may cut an answer into, but for a few.
const MIN_PIECE_BYTES: u32 = 512;

/// A part of the export and the flags that one context gives it.
pub(super) type Extent = (Range<u64>, u32);
/// For each context its extents, ascending and without gaps from the start of the range that was asked for.
pub(super) type Extents = Vec<(u32, Vec<Extent>)>;

#[derive(Debug)]
pub(super) struct Pending {
    offset: u64,
    len: u32,
    ask: Ask,
    chunks: u32,
    /// The server could not do it: an errno.
    failed: Option<u32>,
}

#[derive(Debug)]
enum Ask {
    Read { data: Vec<u8>, got: Ranges },
    Status { end: u64, contexts: Vec<u32>, got: Extents },
}

impl Pending {
    /// A read that fills `data`.
    pub(super) fn read(offset: u64, data: Vec<u8>) -> Self {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        Self { offset, len, ask: Ask::Read { data, got: Ranges::new() }, chunks: 0, failed: None }
    }

    /// A question to `contexts` about an export that ends at `end`.
    pub(super) fn status(offset: u64, len: u32, end: u64, contexts: Vec<u32>) -> Self {
        let ask = Ask::Status { end, contexts, got: Vec::new() };
        Self { offset, len, ask, chunks: 0, failed: None }
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// The whole answer of a server without structured replies.
    pub(super) fn take_simple(
        &mut self,
        errno: u32,
        stream: &Stream,
        until: Instant,
    ) -> Result<(), NbdError> {
        if errno != 0 {
            self.failed = Some(errno);
            return Ok(());
        }
        let Ask::Read { data, got } = &mut self.ask else {
            return Err(NbdError::Protocol("a simple reply to a block status".into()));
        };
        stream.read(data, until)?;
        got.push(0..u64::from(self.len));
        Ok(())
    }

    /// One chunk; true when it was the last.
    pub(super) fn take_chunk(
        &mut self,
        flags: u16,
        kind: u16,
        length: u32,
        stream: &Stream,
        until: Instant,
    ) -> Result<bool, NbdError> {
        self.chunks += 1;
        if self.chunks > self.len / MIN_PIECE_BYTES + 64 {
            return Err(NbdError::Protocol("no end of chunks for one request".into()));
        }
        let is_last = flags & chunk::DONE != 0;
        match (kind, &mut self.ask) {
            (chunk::NONE, _) if length == 0 && is_last => {}
            (chunk::OFFSET_DATA, Ask::Read { data, got })
                if length > 8 && length - 8 <= self.len =>
            {
                let at = u64::from_be_bytes(stream.array(until)?);
                let place = place(got, self.offset, self.len, at, length - 8)?;
                stream.read(&mut data[place], until)?;
            }
            (chunk::OFFSET_HOLE, Ask::Read { data, got }) if length == 12 => {
                let hole: [u8; 12] = stream.array(until)?;
                let place = place(got, self.offset, self.len, be64(&hole, 0), be32(&hole, 8))?;
                data[place].fill(0);
            }
            (chunk::BLOCK_STATUS, Ask::Status { end, contexts, got })
                if (12..=MAX_CHUNK_BYTES).contains(&length) && length % 8 == 4 =>
            {
                let mut bytes = vec![0; length as usize];
                stream.read(&mut bytes, until)?;
                let id = be32(&bytes, 0);
                if !contexts.contains(&id) || got.iter().any(|(known, _)| *known == id) {
                    return Err(NbdError::Protocol(
                        "the status of a context that was not asked".into(),
                    ));
                }
                let asked = self.offset..self.offset + u64::from(self.len);
                got.push((id, extents(&bytes[4..], asked, *end)?));
            }
            (kind, _)
                if kind & chunk::ERROR_BIT != 0 && (6..=MAX_CHUNK_BYTES).contains(&length) =>
            {
                let mut bytes = vec![0; length as usize];
                stream.read(&mut bytes, until)?;
                let (errno, words) = (be32(&bytes, 0), u32::from(be16(&bytes, 4)));
                if errno == 0 || words > length - 6 {
                    return Err(NbdError::Protocol("an error without a reason".into()));
                }
                self.failed.get_or_insert(errno);
            }
            _ => {
                return Err(NbdError::Protocol(format!(
                    "a chunk of type {kind} and {length} bytes"
                )));
            }
        }
        Ok(is_last)
    }

    /// The data, when all of it has come.
    pub(super) fn take_data(&mut self) -> Result<Vec<u8>, NbdError> {
        let len = u64::from(self.len);
        match (&mut self.ask, self.failed) {
            (_, Some(errno)) => Err(NbdError::Failed(errno)),
            (Ask::Read { data, got }, None) if got.total() == len => Ok(std::mem::take(data)),
            _ => Err(NbdError::Protocol("an answer without all of the data".into())),
        }
    }

    /// The extents, when all contexts have told them.
    pub(super) fn take_extents(&mut self) -> Result<Extents, NbdError> {
        match (&mut self.ask, self.failed) {
            (_, Some(errno)) => Err(NbdError::Failed(errno)),
            (Ask::Status { contexts, got, .. }, None) if got.len() == contexts.len() => {
                Ok(std::mem::take(got))
            }
            _ => Err(NbdError::Protocol("an answer without all contexts".into())),
        }
    }
}

/// Where in the buffer a piece belongs that is in the range, not empty, and has not come before.
fn place(
    got: &mut Ranges,
    offset: u64,
    len: u32,
    at: u64,
    piece: u32,
) -> Result<Range<usize>, NbdError> {
    let start = at.checked_sub(offset);
    let place = start.map(|start| start..start.saturating_add(u64::from(piece)));
    let before = got.total();
    match place {
        Some(place) if piece > 0 && place.end <= u64::from(len) => {
            got.insert(place.clone());
            if got.total() != before + u64::from(piece) {
                return Err(NbdError::Protocol("the same data twice".into()));
            }
            Ok(place.start as usize..place.end as usize)
        }
        _ => Err(NbdError::Protocol("data that was not asked for".into())),
    }
}

fn extents(bytes: &[u8], asked: Range<u64>, end: u64) -> Result<Vec<Extent>, NbdError> {
    let mut extents = Vec::with_capacity(bytes.len() / 8);
    let mut at = asked.start;
    for extent in bytes.chunks_exact(8) {
        let (length, flags) = (u64::from(be32(extent, 0)), be32(extent, 4));
        // Only the last one may go on behind what was asked for, and none behind the end.
        if length == 0 || at >= asked.end || length > end - at {
            return Err(NbdError::Protocol(format!("an extent of {length} bytes at {at}")));
        }
        let next = at + length;
        extents.push((at..next.min(asked.end), flags));
        at = next;
    }
    Ok(extents)
}
