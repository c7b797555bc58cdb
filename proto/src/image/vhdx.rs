//! VHDX: Microsoft's virtual disk format, as [MS-VHDX] describes it.
//!
//! What is written stays inside what all outside readers agree on: 2 MiB payload blocks, sector bitmaps whose bits change in
//! 4 KiB steps only, a virtual size that is a multiple of 4096, a sector bitmap
//! for every chunk of a child, never state ZERO in a child, an empty log.
//!
//! ```text
//! 0       file identifier, two headers, two region tables
//! 1 MiB   log, empty
//! 2 MiB   metadata: sizes, ids, parent locator
//! 3 MiB   block allocation table (BAT), 4 MiB for each TiB of disk
//! then    slots: 2 MiB of data each, in the order they were taken
//! then    sector bitmap blocks (children only): 1 MiB for 4 GiB of disk (32 GiB with 4096-byte sectors), mostly holes
//! ```

mod absorb;
mod bat;
mod bitmap;
mod header;
mod layout;
mod locator;
mod log;
mod metadata;
mod read;
mod region;
mod replayed;
mod write;

#[cfg(test)]
pub(super) mod tests;

pub use absorb::{Absorber, set_identity};
pub(super) use header::HIDDEN;
pub use header::set_hidden;
pub use layout::Layout;
pub use read::VhdxImage;
pub use write::write_structures;

use super::check_disjoint;
pub use super::payload::{PAYLOAD_BYTES, Payload, UNIT_BYTES};

const MIB: u64 = 1 << 20;
/// What the structures are written in: parts of a file that stay zero stay holes.
const PAGE: usize = 4096;

/// Little-endian numbers out of a byte slice; reading past its end gives zeros, lengths are checked where they matter.
trait Fields {
    fn array<const N: usize>(&self, at: usize) -> [u8; N];

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn guid_at(&self, at: usize) -> uuid::Uuid {
        uuid::Uuid::from_bytes_le(self.array(at))
    }
}

impl Fields for [u8] {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
}

/// Puts `value` at `at`. The buffers are our own and sized for what goes in.
fn put(buffer: &mut [u8], at: usize, value: &[u8]) {
    buffer[at..at + value.len()].copy_from_slice(value);
}

/// Reads a parent locator: for fuzzers.
///
/// # Errors
/// When it is damaged.
pub fn read_locator(bytes: &[u8]) -> Result<super::Parent, super::ImageError> {
    locator::decode(bytes).map(|(parent, _)| parent)
}

/// A parent locator: for fuzzers.
///
/// # Errors
/// When a name is too long for it.
pub fn write_locator(parent: &super::Parent) -> Result<Vec<u8>, super::ImageError> {
    locator::encode(parent)
}

/// `bytes`, padded to `len`, with their CRC-32C at 4: for fuzzers and tests.
pub fn summed(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len.max(8), 0);
    let sum = header::checksum(&bytes);
    put(&mut bytes, 4, &sum.to_le_bytes());
    bytes
}
