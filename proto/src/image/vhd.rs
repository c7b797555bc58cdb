//! VHD: the older of Microsoft's virtual disk formats, as its specification 1.0 describes it. Big-endian.
//!
//! What is written stays inside what all outside readers agree on: 2 MiB payload blocks, bitmaps whose bits change in bytes
//! (eight sectors, 4 KiB), a virtual size that is a multiple of 4096. Data start on 4 KiB borders, as Windows places them.
//!
//! ```text
//! 0       copy of the footer
//! 512     dynamic header: sizes, the parent's id, name and places
//! 4 KiB   the parent's absolute and relative path (children only)
//! 8 KiB   block allocation table (BAT), 2 MiB for each TiB of disk
//! then    slots in the order they were taken: 3584 bytes unused, 512 of sector bitmap, 2 MiB of data
//! then    the footer: type, size, id
//! ```
//!
//! A child names its parent by id, time stamp and file name. The time stamp is the parent's footer's, and also its file's
//! modification time, since readers may compare either.
//!
//! The format holds up to 2040 GiB and knows only 512-byte sectors.

mod absorb;
mod footer;
mod header;
mod layout;
mod locator;
mod read;
mod write;

#[cfg(test)]
mod tests;

pub use absorb::{Absorber, set_hidden, set_identity};
pub use layout::{Layout, MAX_BYTES};
pub use read::VhdImage;
pub use write::write_structures;

/// The time stamp of an image with this id, as its children name it.
pub fn time_stamp_of(id: uuid::Uuid) -> u32 {
    footer::time_stamp_of(id).unwrap_or_default()
}

const SECTOR: u64 = 512;
/// A table entry of a block that isn't in the file.
const UNUSED: u32 = u32::MAX;

/// Big-endian numbers out of a byte slice; reading past its end gives zeros, lengths are checked where they matter.
trait Fields {
    fn array<const N: usize>(&self, at: usize) -> [u8; N];

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    fn uuid_at(&self, at: usize) -> uuid::Uuid {
        uuid::Uuid::from_bytes(self.array(at))
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

/// Ones' complement of the sum of all bytes, with the four of the field itself, at `field`, taken as zero.
pub fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add((*byte).into()));
    let own = bytes.get(field..field + 4).unwrap_or_default();
    !sum(bytes).wrapping_sub(sum(own))
}
