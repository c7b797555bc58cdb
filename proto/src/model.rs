//! Strict forms of what travels: a [`Batch`] is valid, whoever sent the message it came from.

use bytes::Bytes;

use crate::{
    buffers::Buffer,
    error::WireError,
    hash,
    ids::{BLOCK_BYTES, BlockHash, block_count, block_len},
    pb,
};

/// Most data bytes a message of blocks may carry, before packing.
pub const MAX_BATCH_BYTES: usize = 1 << 20;
/// Most extents in one message.
pub const MAX_EXTENTS: usize = 4096;
/// Data is packed when that saves one byte in so many.
const WORTH: usize = 16;
/// Most ranges in one request.
pub const MAX_RANGES: usize = 4096;
/// Most hashes in one message of hashes.
pub const MAX_HASHES: usize = 32768;
/// gRPC message limit of this package: default limits of every gRPC library do.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// A run of blocks in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First block.
    pub first: u64,
    /// Number of blocks, at least 1.
    pub count: u64,
    /// All blocks are zero; they have neither hashes nor data in the batch.
    pub zero: bool,
}

impl Extent {
    /// Of blocks with data.
    pub fn of_data(blocks: std::ops::Range<u64>) -> Self {
        Self { first: blocks.start, count: blocks.end - blocks.start, zero: false }
    }

    /// First block after the extent.
    pub fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// Blocks with their hashes: extents ascending and inside the disk, hashes and data of exactly their length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    extents: Vec<Extent>,
    hashes: Bytes,
    data: Bytes,
}

/// A block whose bytes don't have the hash that came with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("block {block} doesn't have the hash sent with it")]
pub struct HashMismatch {
    /// Number of the first such block.
    pub block: u64,
}

/// One extent of a batch with its hashes (32 bytes each) and data, both empty for zero extents.
pub struct Piece<'a> {
    /// Which blocks.
    pub extent: Extent,
    /// Their hashes.
    pub hashes: &'a [u8],
    /// Their bytes.
    pub data: &'a [u8],
}

impl Batch {
    /// A batch of valid parts.
    ///
    /// # Errors
    /// When extents overlap, leave the disk of `size_bytes`, or don't match the lengths of hashes and data.
    pub fn new(
        size_bytes: u64,
        extents: Vec<Extent>,
        hashes: Bytes,
        data: Bytes,
    ) -> Result<Self, WireError> {
        let (blocks, bytes) = measure(size_bytes, &extents)?;
        if hashes.len() != blocks * BlockHash::LEN {
            return Err(WireError::Length {
                field: "hashes",
                expected: blocks * 32,
                actual: hashes.len(),
            });
        }
        if data.len() != bytes {
            return Err(WireError::Length { field: "data", expected: bytes, actual: data.len() });
        }
        Ok(Self { extents, hashes, data })
    }

    /// Checks and unpacks a message about a disk of `size_bytes`.
    ///
    /// # Errors
    /// When a field is invalid; data is never unpacked beyond the length its extents give.
    pub fn from_wire(size_bytes: u64, batch: pb::BlockBatch) -> Result<Self, WireError> {
        let extents: Vec<_> = batch
            .extents
            .iter()
            .map(|e| Extent { first: e.first_block, count: e.block_count, zero: e.zero })
            .collect();
        let (_, bytes) = measure(size_bytes, &extents)?;
        let data = unpack(batch.encoding(), batch.data, bytes)?;
        Self::new(size_bytes, extents, batch.hashes, data)
    }

    /// The message, packed by `encoding` when that makes it clearly shorter.
    pub fn into_wire(self, encoding: pb::Encoding) -> pb::BlockBatch {
        let (encoding, data) = pack_data(encoding, self.data);
        let extents = self
            .extents
            .iter()
            .map(|e| pb::BlockExtent { first_block: e.first, block_count: e.count, zero: e.zero })
            .collect();
        pb::BlockBatch { extents, hashes: self.hashes, data, encoding: encoding.into() }
    }

    /// Compares every block with its hash.
    ///
    /// # Errors
    /// Names the first block that differs.
    pub fn verify(&self) -> Result<(), HashMismatch> {
        let mut found = Vec::with_capacity(self.hashes.len() / BlockHash::LEN);
        for piece in self.pieces().filter(|piece| !piece.extent.zero) {
            found.clear();
            hash::hash_blocks(piece.data, &mut found);
            let wrong = found
                .iter()
                .zip(piece.hashes.chunks_exact(BlockHash::LEN))
                .position(|(a, b)| a.0 != b);
            if let Some(index) = wrong {
                return Err(HashMismatch { block: piece.extent.first + index as u64 });
            }
        }
        Ok(())
    }

    /// The same blocks with other bytes: `change` gets each run of them that has data, and its first block. The hashes stay what they
    /// were, so that [`Batch::verify`] has its place before.
    #[must_use]
    pub fn changed(self, mut change: impl FnMut(u64, &mut [u8])) -> Self {
        let (mut buffer, len) = (Buffer::take(), self.data.len());
        buffer[..len].copy_from_slice(&self.data);
        let mut at = 0;
        for piece in self.pieces().filter(|piece| !piece.extent.zero) {
            let end = at + piece.data.len();
            change(piece.extent.first, &mut buffer[at..end]);
            at = end;
        }
        Self { data: buffer.into_bytes(len), ..self }
    }

    /// The extents with their hashes and data, ascending.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let (mut hashes, mut data) = (&self.hashes[..], &self.data[..]);
        let last = self.extents.iter().rposition(|e| !e.zero);
        self.extents.iter().enumerate().map(move |(index, extent)| {
            if extent.zero {
                return Piece { extent: *extent, hashes: &[], data: &[] };
            }
            let (own_hashes, more_hashes) = hashes.split_at(extent.count as usize * BlockHash::LEN);
            // Only the last extent can end in the disk's short block.
            let len = if Some(index) == last {
                data.len()
            } else {
                (extent.count * BLOCK_BYTES) as usize
            };
            let (own_data, more_data) = data.split_at(len);
            (hashes, data) = (more_hashes, more_data);
            Piece { extent: *extent, hashes: own_hashes, data: own_data }
        })
    }

    /// The extents.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The hashes, 32 bytes each, of all blocks of extents that are not zero.
    pub fn hashes(&self) -> &[u8] {
        &self.hashes
    }

    /// Bytes of data before packing.
    pub fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Blocks and bytes that travel for these extents.
fn measure(size_bytes: u64, extents: &[Extent]) -> Result<(usize, usize), WireError> {
    if extents.len() > MAX_EXTENTS {
        return Err(WireError::invalid(
            "extents",
            format!("{} of them, more than {MAX_EXTENTS}", extents.len()),
        ));
    }
    let total = block_count(size_bytes);
    let (mut next, mut blocks, mut bytes) = (0, 0u64, 0u64);
    for extent in extents {
        let end =
            extent.first.checked_add(extent.count).filter(|end| *end <= total && extent.count > 0);
        let Some(end) = end.filter(|_| extent.first >= next) else {
            return Err(WireError::invalid(
                "extents",
                format!(
                    "block {} + {} is empty, out of order or past block {total}",
                    extent.first, extent.count
                ),
            ));
        };
        next = end;
        if !extent.zero {
            blocks += extent.count;
            bytes += (extent.count - 1) * BLOCK_BYTES + block_len(size_bytes, end - 1) as u64;
        }
        if bytes > MAX_BATCH_BYTES as u64 {
            return Err(WireError::invalid(
                "extents",
                format!("more than {MAX_BATCH_BYTES} bytes of data"),
            ));
        }
    }
    Ok((blocks as usize, bytes as usize))
}

fn unpack(encoding: pb::Encoding, data: Bytes, bytes: usize) -> Result<Bytes, WireError> {
    let raw = match encoding {
        pb::Encoding::Unspecified | pb::Encoding::None => return Ok(data),
        pb::Encoding::Lz4 => lz4_flex::block::decompress(&data, bytes).map_err(|e| e.to_string()),
        pb::Encoding::Zstd => zstd::bulk::decompress(&data, bytes).map_err(|e| e.to_string()),
    };
    raw.map(Bytes::from)
        .map_err(|reason| WireError::invalid("data", format!("does not unpack: {reason}")))
}

/// Packs a message that isn't packed yet, when that makes it clearly shorter.
pub fn pack(batch: pb::BlockBatch, encoding: pb::Encoding) -> pb::BlockBatch {
    if batch.encoding() != pb::Encoding::None {
        return batch;
    }
    let (encoding, data) = pack_data(encoding, batch.data);
    pb::BlockBatch { encoding: encoding.into(), data, ..batch }
}

/// Bytes that travel for this data when `encoding` is tried on it.
pub fn packed_len(encoding: pb::Encoding, data: &[u8]) -> usize {
    compress(encoding, data).map_or(data.len(), |packed| packed.len())
}

fn pack_data(encoding: pb::Encoding, data: Bytes) -> (pb::Encoding, Bytes) {
    match compress(encoding, &data) {
        Some(packed) => (encoding, packed.into()),
        None => (pb::Encoding::None, data),
    }
}

/// `None` where it doesn't pay: the other end has to unpack it, too.
fn compress(encoding: pb::Encoding, data: &[u8]) -> Option<Vec<u8>> {
    let packed = match encoding {
        pb::Encoding::Lz4 => lz4_flex::block::compress(data),
        pb::Encoding::Zstd => zstd::bulk::compress(data, 1).ok()?,
        pb::Encoding::Unspecified | pb::Encoding::None => return None,
    };
    let worth = data.len() - data.len() / WORTH;
    (packed.len() < worth).then_some(packed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(size_bytes: u64, extents: &[(u64, u64, bool)]) -> Batch {
        let extents: Vec<_> = extents
            .iter()
            .map(|(first, count, zero)| Extent { first: *first, count: *count, zero: *zero })
            .collect();
        let (_, bytes) = measure(size_bytes, &extents).unwrap();
        let data: Vec<u8> = (0..bytes).map(|i| (i / 700 + 1) as u8).collect();
        let mut hashes = Vec::new();
        hash::hash_blocks(&data, &mut hashes);
        Batch::new(size_bytes, extents, hashes.iter().flat_map(|h| h.0).collect(), data.into())
            .unwrap()
    }

    #[test]
    fn batches_survive_every_encoding() {
        let batch = sample(40 * 4096 + 512, &[(0, 3, false), (3, 20, true), (30, 11, false)]);
        batch.verify().unwrap();
        for encoding in [pb::Encoding::None, pb::Encoding::Lz4, pb::Encoding::Zstd] {
            let wire = batch.clone().into_wire(encoding);
            assert_eq!(wire.encoding(), encoding);
            assert_eq!(Batch::from_wire(40 * 4096 + 512, wire).unwrap(), batch);
        }
    }

    #[test]
    fn changed_batches_keep_their_shape_and_hashes() {
        let batch = sample(40 * 4096 + 512, &[(0, 3, false), (3, 20, true), (30, 11, false)]);
        let mut seen = Vec::new();
        let changed = batch.clone().changed(|first, data| {
            seen.push((first, data.len()));
            data.fill(9);
        });
        assert_eq!(seen, [(0, 3 * 4096), (30, 10 * 4096 + 512)]);
        assert_eq!((changed.extents(), changed.hashes()), (batch.extents(), batch.hashes()));
        let data: Vec<&[u8]> = changed.pieces().map(|piece| piece.data).collect();
        assert!(data.concat().iter().all(|byte| *byte == 9));
        assert_eq!(data.concat().len(), batch.data_len());
    }

    #[test]
    fn a_changed_byte_is_named_by_its_block() {
        let batch = sample(1 << 20, &[(5, 4, false)]);
        let mut wire = batch.into_wire(pb::Encoding::None);
        let mut data = wire.data.to_vec();
        data[4096 * 2 + 9] ^= 1;
        wire.data = data.into();
        assert_eq!(
            Batch::from_wire(1 << 20, wire).unwrap().verify(),
            Err(HashMismatch { block: 7 })
        );
    }

    proptest! {
        #[test]
        fn hostile_messages_are_errors(
            extents in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..5),
            hashes in prop::collection::vec(any::<u8>(), 0..100),
            data in prop::collection::vec(any::<u8>(), 0..100),
            encoding in 0..5i32,
            size in prop_oneof![0..100_000u64, any::<u64>()],
        ) {
            let extents = extents.iter().map(|(f, c, zero)| pb::BlockExtent { first_block: *f, block_count: *c, zero: *zero }).collect();
            let wire = pb::BlockBatch { extents, hashes: hashes.into(), data: data.into(), encoding };
            if let Ok(batch) = Batch::from_wire(size, wire) {
                prop_assert!(batch.data_len() <= MAX_BATCH_BYTES);
                let _ = batch.verify();
            }
        }
    }
}
