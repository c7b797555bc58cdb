//! Both ends of ProbeService: what they send to see how fast it gets through.

use bytes::Bytes;

/// Bytes of a message.
pub const PIECE_BYTES: usize = 256 << 10;
/// Bytes of a call.
pub const MAX_PROBE_BYTES: u64 = 64 << 20;

/// A message's bytes. They don't shrink: a line that packs what it carries must not look faster than it is.
pub fn noise() -> Bytes {
    let mut noise = vec![0; PIECE_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    noise.into()
}
