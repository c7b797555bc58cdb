//! Update sequences: the last two bytes of each 512 of a structure stand in its header, and a check word in their place.

use super::record::Bytes;

/// What a structure counts as a sector, whatever the disk's sectors are.
const STRIDE: usize = 512;

/// Why a structure can't be put together again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fixup {
    /// Its header makes no sense.
    Malformed,
    /// Not all of it was written at the same time.
    Torn,
}

/// Puts all bytes back where they belong.
pub(crate) fn put_back(structure: &mut [u8]) -> Result<(), Fixup> {
    let words = || {
        let words = place(structure)?;
        Some(structure.get(words)?.to_vec())
    };
    let words = words().ok_or(Fixup::Malformed)?;
    if words.len() != (structure.len() / STRIDE + 1) * 2 {
        return Err(Fixup::Malformed);
    }
    for (stride, word) in structure.chunks_exact_mut(STRIDE).zip(words.chunks_exact(2).skip(1)) {
        let end = &mut stride[STRIDE - 2..];
        if *end != words[..2] {
            return Err(Fixup::Torn);
        }
        end.copy_from_slice(word);
    }
    Ok(())
}

/// Where the header has the check word and the bytes that it stands for.
pub(super) fn place(structure: &[u8]) -> Option<std::ops::Range<usize>> {
    let head = Bytes(structure);
    let (at, count) = (usize::from(head.u16(4).ok()?), usize::from(head.u16(6).ok()?));
    Some(at..at + count * 2)
}

/// Puts the check word at the end of each 512 bytes, as one who writes the structure does: for fuzzers.
pub(crate) fn make_right(structure: &mut [u8]) {
    let check = place(structure).and_then(|words| structure.get(words.start..words.start + 2));
    let Some([first, second]) = check.map(|check| [check[0], check[1]]) else { return };
    for stride in structure.chunks_exact_mut(STRIDE) {
        stride[STRIDE - 2..].copy_from_slice(&[first, second]);
    }
}
