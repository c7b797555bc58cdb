//! Bytes with a head: a `u32` (little-endian) with the length of a JSON head, the head, and what it describes.

use serde::{Serialize, de::DeserializeOwned};

/// The bytes of a head and of all that follows it.
pub(super) fn pack<'a>(head: &impl Serialize, rest: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    // Numbers and names can always be written; nothing is remembered if not.
    let head = serde_json::to_vec(head).unwrap_or_default();
    let mut bytes = (head.len() as u32).to_le_bytes().to_vec();
    bytes.extend(head);
    rest.into_iter().for_each(|part| bytes.extend(part));
    bytes
}

/// The head and what follows it; `None` when there is no such head.
pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (head, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some((serde_json::from_slice(head).ok()?, rest))
}
