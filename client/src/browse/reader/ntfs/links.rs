//! Links of NTFS: symbolic links, junctions, those of WSL and of Interix; and contents that are kept elsewhere.

use super::{super::tree::Result, error, folder::utf8};
use crate::fs::ntfs::Bytes;

/// A reparse point may have so many bytes.
pub(super) const MOST_BYTES: u64 = 16 << 10;

const MOUNT_POINT: u32 = 0xA000_0003;
const SYMLINK: u32 = 0xA000_000C;
const WSL_LINK: u32 = 0xA000_001D;
const WOF: u32 = 0x8000_0017;
const DEDUP: u32 = 0x8000_0013;

/// What a file stands for.
pub(super) enum Meaning {
    /// Its content.
    Content,
    /// Another file, by this path.
    Link(Vec<u8>),
    /// A content that isn't in its streams.
    Elsewhere(String),
}

pub(super) fn of_reparse_point(bytes: &[u8]) -> Result<Meaning> {
    let head = Bytes(bytes);
    let tag = head.u32(0).map_err(error)?;
    let meaning = match tag {
        SYMLINK => Meaning::Link(target(head, 20)?),
        MOUNT_POINT => Meaning::Link(target(head, 16)?),
        WSL_LINK => Meaning::Link(bytes.get(12..).unwrap_or_default().to_vec()),
        WOF => Meaning::Elsewhere("it is compressed by Windows for reading only (WOF)".into()),
        DEDUP => Meaning::Elsewhere("its content is in the deduplication store of Windows".into()),
        other => Meaning::Elsewhere(format!("only a driver of Windows can read it ({other:#x})")),
    };
    Ok(meaning)
}

/// The path that is meant for people, else the one of the system; its names are at `names`.
fn target(head: Bytes<'_>, names: usize) -> Result<Vec<u8>> {
    let name = |at: usize| {
        let (from, len) = (head.u16(at)?, head.u16(at + 2)?);
        head.part(names + usize::from(from), len.into())
    };
    let (system, people) = (name(8).map_err(error)?, name(12).map_err(error)?);
    let mut path = utf8(if people.0.is_empty() { system.0 } else { people.0 });
    if let Some(rest) = path.strip_prefix(br"\??\") {
        path = rest.to_vec();
    }
    path.iter_mut().filter(|byte| **byte == b'\\').for_each(|byte| *byte = b'/');
    Ok(path)
}

pub(super) fn of_interix(bytes: &[u8]) -> Meaning {
    match bytes.strip_prefix(b"IntxLNK\x01") {
        Some(target) => Meaning::Link(utf8(target)),
        None => Meaning::Content,
    }
}
