//! The GPT at the start of a disk, or the one at its end (UEFI 2.10, section 5.3).
//!
//! Own code: `gptman` 3.1.1 allocates for as many entries as a header says, asserts the size of an entry, and reads as many bytes
//! as its structures take in memory (152 for an entry of 128). A test compares with it all the same.

use uuid::Uuid;

use super::{Part, TableKind, VolumeError};
use crate::{
    fs::Head,
    source::{
        gpt::{HEADER_BYTES, Header, crc32},
        view::ReadAt,
    },
};

const ENTRY_BYTES: u32 = 128;
/// Tables of eight times the usual size are read.
const MAX_ENTRIES: u32 = 1024;

pub(super) struct Gpt {
    pub(super) kind: TableKind,
    pub(super) parts: Vec<Part>,
    pub(super) sector_bytes: u64,
}

/// The GPT of `disk`; `None` when neither the first nor the last can be read.
pub(super) fn read(disk: &dyn ReadAt, sector_bytes: u64) -> Result<Option<Gpt>, VolumeError> {
    // An image of a disk with sectors of 4096 bytes is a file of unknown sectors.
    for sector_bytes in [sector_bytes, 512, 4096] {
        let last = (disk.len() / sector_bytes).saturating_sub(1);
        for (kind, at) in [(TableKind::Gpt, 1), (TableKind::GptBackup, last)] {
            if at > 0
                && let Some(entries) = entries(disk, at, sector_bytes)?
            {
                return Ok(Some(Gpt { kind, parts: parts(&entries)?, sector_bytes }));
            }
        }
    }
    Ok(None)
}

/// The entries of the GPT whose header is at sector `at`; `None` when there is none or a sum is wrong.
fn entries(disk: &dyn ReadAt, at: u64, sector_bytes: u64) -> Result<Option<Vec<u8>>, VolumeError> {
    let mut sector = [0; 512];
    if !read_within(disk, &mut sector, at.checked_mul(sector_bytes))? {
        return Ok(None);
    }
    let header = Header::parse(&sector).filter(|header| header.length == HEADER_BYTES);
    let Some(header) = header else { return Ok(None) };
    let Header { count, entry_bytes, .. } = header;
    if entry_bytes != ENTRY_BYTES || count > MAX_ENTRIES {
        return Err(VolumeError::damaged(format!(
            "a GPT of {count} entries with {entry_bytes} bytes each is not understood"
        )));
    }
    let mut entries = vec![0; (count * ENTRY_BYTES) as usize];
    let is_whole = read_within(disk, &mut entries, header.entries.checked_mul(sector_bytes))?
        && crc32(&entries) == header.entries_sum;
    Ok(is_whole.then_some(entries))
}

/// Fills `buffer` from `start`; false when that is not within the disk.
fn read_within(
    disk: &dyn ReadAt,
    buffer: &mut [u8],
    start: Option<u64>,
) -> Result<bool, VolumeError> {
    let end = start.and_then(|start| start.checked_add(buffer.len() as u64));
    let Some(start) = start.filter(|_| end.is_some_and(|end| end <= disk.len())) else {
        return Ok(false);
    };
    disk.read_exact_at(buffer, start)?;
    Ok(true)
}

fn parts(entries: &[u8]) -> Result<Vec<Part>, VolumeError> {
    let mut parts = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(ENTRY_BYTES as usize)) {
        let entry = Head(entry);
        let read = || Some((entry.guid(0)?, entry.guid(16)?, entry.u64(32)?, entry.u64(40)?));
        let Some((kind, guid, first, last)) = read().filter(|(kind, ..)| !kind.is_nil()) else {
            continue;
        };
        let Some(sectors) = last.checked_sub(first).and_then(|n| n.checked_add(1)) else {
            return Err(VolumeError::damaged(format!("partition {number} ends before it starts")));
        };
        let (type_name, label) = (type_name(kind), label(entry));
        parts.push(Part { number, first, sectors, type_name, guid: Some(guid), label });
    }
    Ok(parts)
}

/// UTF-16, up to the first zero, without what a terminal might obey.
fn label(entry: Head<'_>) -> String {
    let units = (56..ENTRY_BYTES as usize).step_by(2).map_while(|at| entry.u16(at));
    char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .filter(|c| !c.is_control())
        .collect()
}

fn type_name(guid: Uuid) -> String {
    let known = match guid.hyphenated().to_string().as_str() {
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => "EFI system",
        "21686148-6449-6e6f-744e-656564454649" => "BIOS boot",
        "bc13c2ff-59e6-4262-a352-b275fd6f7172" => "Linux boot",
        "e3c9e316-0b5c-4db8-817d-f92df00215ae" => "Microsoft reserved",
        "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7" => "Microsoft data",
        "de94bba4-06d1-4d40-a16a-bfd50179d6ac" => "Windows recovery",
        "0fc63daf-8483-4772-8e79-3d69d8477de4" => "Linux data",
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709" => "Linux root",
        "933ac7e1-2eb4-4f13-b844-0e14e2aef915" => "Linux home",
        "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f" => "Linux swap",
        "e6d6d379-f507-44c2-a23c-238f2a3df928" => "Linux LVM",
        "a19d880f-05fc-4d3b-a006-743f0f84911e" => "Linux RAID",
        "ca7d7ccb-63ed-4c53-861c-1742536059cc" => "Linux LUKS",
        "6a898cc3-1dd2-11b2-99a6-080020736631" => "ZFS",
        other => return other.to_owned(),
    };
    known.to_owned()
}
