//! What is sent back: `doc/proto.md`, "Simple reply message" and "Structured reply chunk message".
//!
//! Data are read behind the room for their head, so that both go out by one call without a copy.

use crate::nbd::wire::{SIMPLE_MAGIC, STRUCTURED_MAGIC, chunk};

const SIMPLE_BYTES: usize = 16;
const CHUNK_BYTES: usize = 20;
/// Room before data: the head of a chunk and its offset.
pub(super) const HEAD_ROOM: usize = CHUNK_BYTES + 8;

pub(super) fn simple(cookie: u64, errno: u32) -> [u8; SIMPLE_BYTES] {
    let mut head = [0; SIMPLE_BYTES];
    head[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&errno.to_be_bytes());
    head[8..].copy_from_slice(&cookie.to_be_bytes());
    head
}

fn head(cookie: u64, kind: u16, is_last: bool, len: usize) -> [u8; CHUNK_BYTES] {
    let flags = if is_last { chunk::DONE } else { 0 };
    let mut head = [0; CHUNK_BYTES];
    head[..4].copy_from_slice(&STRUCTURED_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    // No chunk is longer than a request and its head.
    head[16..].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    head
}

/// Puts the head of a simple reply before the data behind [`HEAD_ROOM`]; returns the message.
pub(super) fn simple_data(buffer: &mut [u8], cookie: u64) -> &[u8] {
    let start = HEAD_ROOM - SIMPLE_BYTES;
    buffer[start..HEAD_ROOM].copy_from_slice(&simple(cookie, 0));
    &buffer[start..]
}

/// The same of a chunk of data.
pub(super) fn data(buffer: &mut [u8], cookie: u64, offset: u64, is_last: bool) -> &[u8] {
    let len = buffer.len() - CHUNK_BYTES;
    buffer[..CHUNK_BYTES].copy_from_slice(&head(cookie, chunk::OFFSET_DATA, is_last, len));
    buffer[CHUNK_BYTES..HEAD_ROOM].copy_from_slice(&offset.to_be_bytes());
    buffer
}

pub(super) fn hole(cookie: u64, offset: u64, len: u32, is_last: bool) -> Vec<u8> {
    let head = head(cookie, chunk::OFFSET_HOLE, is_last, 12);
    [&head[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// A refusal in words, at an offset where one is known; the last chunk.
pub(super) fn error(cookie: u64, errno: u32, words: &str, offset: Option<u64>) -> Vec<u8> {
    let words: String = words.chars().take(200).collect();
    let mut body = errno.to_be_bytes().to_vec();
    body.extend((words.len() as u16).to_be_bytes());
    body.extend(words.as_bytes());
    body.extend(offset.iter().flat_map(|offset| offset.to_be_bytes()));
    let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    [&head(cookie, kind, true, body.len())[..], &body].concat()
}

/// What one context tells: lengths and flags.
pub(super) fn extents(cookie: u64, id: u32, extents: &[(u32, u32)], is_last: bool) -> Vec<u8> {
    let head = head(cookie, chunk::BLOCK_STATUS, is_last, 4 + extents.len() * 8);
    let mut message = [&head[..], &id.to_be_bytes()].concat();
    message.extend(extents.iter().flat_map(|(len, flags)| {
        let [len, flags] = [len.to_be_bytes(), flags.to_be_bytes()];
        len.into_iter().chain(flags)
    }));
    message
}
