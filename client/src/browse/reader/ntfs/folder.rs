//! Names in a folder. Its blocks are read one after the other, as its bitmap says, so a tree that leads in a circle can't hold anybody up.

use std::collections::HashSet;

use super::{
    super::{super::BrowseError, tree::Result},
    DOS_ONLY, error, streams,
};
use crate::fs::ntfs::{Bytes, Ntfs, Record, fixups, types};

const INDEX: &str = "$I30";
const ENTRY_BYTES: usize = 16;
/// The last entry of a block, which has no name.
const LAST: u16 = 2;
/// Bitmap of the blocks of an index; 2^28 blocks.
const MOST_BITMAP_BYTES: u64 = 32 << 20;

/// Hands out each name, as UTF-8, and the number of its file.
pub(super) fn each_name(
    ntfs: &Ntfs<'_>,
    records: &[Record],
    each: &mut dyn FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let damaged = || BrowseError::damaged("a folder has no index");
    let root = streams::content(ntfs, records, types::INDEX_ROOT, INDEX)?.ok_or_else(damaged)?;
    let root = root.small(ntfs, ntfs.boot.record_bytes)?;
    let block_bytes = u64::from(Bytes(&root).u32(8).map_err(error)?);
    let mut seen = HashSet::new();
    let mut once = |name: &[u8], number: u64| match seen.insert((name.to_vec(), number)) {
        true => each(name, number),
        false => Ok(()),
    };
    each_of_node(&root, 16, &mut once)?;
    let blocks = streams::content(ntfs, records, types::INDEX_ALLOCATION, INDEX)?;
    let bitmap = streams::content(ntfs, records, types::BITMAP, INDEX)?;
    let (Some(blocks), Some(bitmap)) = (blocks, bitmap) else { return Ok(()) };
    if !block_bytes.is_power_of_two() || !(512..=1 << 20).contains(&block_bytes) {
        return Err(BrowseError::damaged("blocks of an index have an impossible size"));
    }
    let bitmap = bitmap.small(ntfs, MOST_BITMAP_BYTES)?;
    let count = blocks.size_bytes.min(blocks.mapped_bytes(ntfs)) / block_bytes;
    let mut block = vec![0; block_bytes as usize];
    for number in 0..count {
        let byte = bitmap.get((number / 8) as usize).copied().unwrap_or(0);
        if byte >> (number % 8) & 1 == 0 {
            continue;
        }
        blocks.read(ntfs, number * block_bytes, &mut block)?;
        if !block.starts_with(b"INDX") || fixups::put_back(&mut block).is_err() {
            return Err(BrowseError::damaged("a block of an index is torn"));
        }
        each_of_node(&block, 24, &mut once)?;
    }
    Ok(())
}

/// The names of one node, whose head is at `head`.
fn each_of_node(
    node: &[u8],
    head: usize,
    each: &mut dyn FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let damaged = || BrowseError::damaged("an index makes no sense");
    let field = |at| Bytes(node).u32(at).map(|value| value as usize).map_err(error);
    let (mut at, end) = (head + field(head)?, head.saturating_add(field(head + 4)?));
    let node = node.get(..end).ok_or_else(damaged)?;
    while at + ENTRY_BYTES <= end {
        let entry = Bytes(node.get(at..).ok_or_else(damaged)?);
        let number = entry.u64(0).map_err(error)? & 0xFFFF_FFFF_FFFF;
        let len = usize::from(entry.u16(8).map_err(error)?);
        let key_len = usize::from(entry.u16(10).map_err(error)?);
        if entry.u16(12).map_err(error)? & LAST != 0 {
            return Ok(());
        }
        if len < ENTRY_BYTES + key_len {
            return Err(damaged());
        }
        let key = entry.part(ENTRY_BYTES, key_len).map_err(error)?;
        let units = usize::from(key.u8(64).map_err(error)?);
        if key.u8(65).map_err(error)? != DOS_ONLY {
            let name = key.part(66, units * 2).map_err(error)?;
            each(&utf8(name.0), number)?;
        }
        at += len;
    }
    Ok(())
}

/// UTF-16 as UTF-8. Halves of pairs, which Windows allows, become three bytes each, so that different names stay different.
pub(super) fn utf8(bytes: &[u8]) -> Vec<u8> {
    let units = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
    let mut text = Vec::with_capacity(bytes.len());
    for decoded in char::decode_utf16(units) {
        match decoded {
            Ok(c) => text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(half) => {
                let half = half.unpaired_surrogate();
                text.extend([0xED, 0x80 | (half >> 6 & 0x3F) as u8, 0x80 | (half & 0x3F) as u8]);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_pairs_stay_different() {
        let name = |units: &[u16]| {
            utf8(&units.iter().flat_map(|unit| unit.to_le_bytes()).collect::<Vec<_>>())
        };
        assert_eq!(name(&[0x61, 0xD83D, 0xDE00]), "a😀".as_bytes());
        assert_ne!(name(&[0x61, 0xD83D]), name(&[0x61, 0xD83C]));
    }
}
