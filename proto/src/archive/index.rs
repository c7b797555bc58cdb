//! The index of a file that lies in parts: the sum of each part, and how long each of its frames is.
//!
//! ```text
//! 0    "JANUSIDX", version, bytes of a frame, frames of a part, 4 bytes of zeros, length of the file
//! 32   for each part: its BLAKE3 sum, then for each of its frames how many bytes it has, packed
//! ```
//!
//! Numbers are little-endian. All but the sums and lengths follow from the file's length, so the index of a file has one size.

use std::ops::Range;

use super::{FRAME_BYTES, PART_FRAMES};
use crate::ids::BlockHash;

const MAGIC: &[u8; 8] = b"JANUSIDX";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
/// The largest file: a disk of 64 TiB, every 4 KiB of it with its hash or bitmap beside it.
pub const MAX_FILE_BYTES: u64 = 66 << 40;
/// How much longer than its content a frame may be.
const FRAME_MARGIN: u64 = 8192;

/// The parts of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    length_bytes: u64,
    sums: Vec<BlockHash>,
    frames: Vec<u32>,
}

impl Index {
    /// The index of a file of which no part is known yet.
    pub fn new(length_bytes: u64) -> Self {
        Self { length_bytes, sums: Vec::new(), frames: Vec::new() }
    }

    /// Adds the next part.
    pub fn push(&mut self, sum: BlockHash, frames: &[u32]) {
        self.sums.push(sum);
        self.frames.extend_from_slice(frames);
    }

    /// Length of the file.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// How many parts there are.
    pub fn part_count(&self) -> u64 {
        self.sums.len() as u64
    }

    /// How many frames there are.
    pub fn frame_count(&self) -> u64 {
        self.frames.len() as u64
    }

    /// The sum of a part.
    pub fn sum(&self, part: u64) -> Option<&BlockHash> {
        self.sums.get(usize::try_from(part).ok()?)
    }

    /// The frames of a part.
    pub fn frames_of(&self, part: u64) -> Range<u64> {
        let start = part.saturating_mul(PART_FRAMES).min(self.frame_count());
        start..(start + PART_FRAMES).min(self.frame_count())
    }

    /// Packed lengths of some frames.
    pub fn lengths(&self, frames: Range<u64>) -> &[u32] {
        self.frames.get(frames.start as usize..frames.end as usize).unwrap_or_default()
    }

    /// Bytes of a part.
    pub fn part_bytes(&self, part: u64) -> u64 {
        self.lengths(self.frames_of(part)).iter().map(|len| u64::from(*len)).sum()
    }

    /// Bytes of all parts.
    pub fn stored_bytes(&self) -> u64 {
        self.frames.iter().map(|len| u64::from(*len)).sum()
    }

    /// Bytes that a frame has unpacked.
    pub fn unpacked_bytes(&self, frame: u64) -> u64 {
        self.length_bytes.saturating_sub(frame.saturating_mul(FRAME_BYTES)).min(FRAME_BYTES)
    }

    /// Bytes of the index of a file of this length; `None`: no file has that.
    pub fn encoded_bytes(length_bytes: u64) -> Option<u64> {
        if length_bytes > MAX_FILE_BYTES {
            return None;
        }
        let frames = length_bytes.div_ceil(FRAME_BYTES);
        let parts = frames.div_ceil(PART_FRAMES);
        Some(HEADER_BYTES as u64 + parts * BlockHash::LEN as u64 + frames * 4)
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes =
            Vec::with_capacity(HEADER_BYTES + self.sums.len() * 32 + self.frames.len() * 4);
        bytes.extend_from_slice(MAGIC);
        for number in [VERSION, FRAME_BYTES as u32, PART_FRAMES as u32, 0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.length_bytes.to_le_bytes());
        for (sum, frames) in self.sums.iter().zip(self.frames.chunks(PART_FRAMES as usize)) {
            bytes.extend_from_slice(&sum.0);
            bytes.extend(frames.iter().flat_map(|len| len.to_le_bytes()));
        }
        bytes
    }

    /// Reads the index of a file of this length.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn decode(length_bytes: u64, bytes: &[u8]) -> Result<Self, String> {
        let expected = Self::encoded_bytes(length_bytes).ok_or("a file too large")?;
        if bytes.len() as u64 != expected {
            return Err(format!("it has {} bytes, not {expected}", bytes.len()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(array(bytes, at));
        if bytes.get(..8) != Some(MAGIC) {
            return Err("it does not start with \"JANUSIDX\"".into());
        }
        let (version, frame, part) = (u32_at(8), u32_at(12), u32_at(16));
        if (version, u64::from(frame), u64::from(part)) != (VERSION, FRAME_BYTES, PART_FRAMES) {
            return Err(format!("version {version}, frames of {frame} bytes, {part} in a part"));
        }
        if u32_at(20) != 0 {
            return Err("its header has more than it should".into());
        }
        let length = u64::from_le_bytes(array(bytes, 24));
        if length != length_bytes {
            return Err(format!("it is of a file of {length} bytes, not {length_bytes}"));
        }
        let mut index = Self::new(length_bytes);
        let (mut rest, mut left) =
            (bytes.get(HEADER_BYTES..).unwrap_or_default(), length_bytes.div_ceil(FRAME_BYTES));
        while left > 0 {
            let frames = left.min(PART_FRAMES);
            let (sum, after) = rest.split_first_chunk::<32>().ok_or("too short")?;
            let (lengths, after) =
                after.split_at_checked(frames as usize * 4).ok_or("too short")?;
            let lengths: Vec<u32> =
                lengths.as_chunks().0.iter().map(|len| u32::from_le_bytes(*len)).collect();
            let most = FRAME_BYTES + FRAME_MARGIN;
            if lengths.iter().any(|len| *len == 0 || u64::from(*len) > most) {
                return Err(format!("part {} has a frame of a wrong length", index.part_count()));
            }
            index.push(BlockHash(*sum), &lengths);
            (rest, left) = (after, left - frames);
        }
        Ok(index)
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// Packs a part frame by frame.
#[derive(Debug, Default)]
pub struct Packer {
    packed: Vec<u8>,
    frames: Vec<u32>,
    /// A frame of zeros, once there was one.
    zeros: Vec<u8>,
}

impl Packer {
    /// Adds a frame.
    ///
    /// # Errors
    /// When it can't be packed.
    pub fn push(&mut self, frame: &[u8]) -> std::io::Result<()> {
        let is_zeros = frame.len() as u64 == FRAME_BYTES && crate::hash::is_zero(frame);
        if is_zeros && !self.zeros.is_empty() {
            self.frames.push(self.zeros.len() as u32);
            self.packed.extend_from_slice(&self.zeros);
            return Ok(());
        }
        let packed = zstd::bulk::compress(frame, LEVEL)?;
        self.frames.push(packed.len() as u32);
        self.packed.extend_from_slice(&packed);
        if is_zeros {
            self.zeros = packed;
        }
        Ok(())
    }

    /// Frames of the part so far.
    pub fn frame_count(&self) -> u64 {
        self.frames.len() as u64
    }

    /// The part, and how long each of its frames is; the next one begins.
    pub fn take(&mut self) -> (Vec<u8>, Vec<u32>) {
        (std::mem::take(&mut self.packed), std::mem::take(&mut self.frames))
    }
}

/// Fast enough for disks, and zeros take nothing.
const LEVEL: i32 = 1;

/// Unpacks a frame that must have this many bytes.
///
/// # Errors
/// When it doesn't.
pub fn unpack(frame: &[u8], bytes: u64) -> Result<Vec<u8>, String> {
    let unpacked = zstd::bulk::decompress(frame, bytes.min(FRAME_BYTES) as usize);
    let unpacked = unpacked.map_err(|error| error.to_string())?;
    match unpacked.len() as u64 == bytes {
        true => Ok(unpacked),
        false => Err(format!("a frame of {} bytes, not {bytes}", unpacked.len())),
    }
}
