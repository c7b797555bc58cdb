//! File identifier and the two headers.

use uuid::Uuid;

use super::{Fields, PAGE, layout, put};
use crate::{image::ImageError, storage::File};

const SIGNATURE: &[u8; 8] = b"vhdxfile";
/// What other programs don't know.
pub(in crate::image) const HIDDEN: &[u8; 8] = b"vhdxstub";
const CREATOR: &str = "Janus Backup";
const OFFSETS: [u64; 2] = [64 << 10, 128 << 10];

/// The fields of a header that matter to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    offset: u64,
    pub(super) sequence: u64,
    pub(super) data_write: Uuid,
    pub(super) log_offset: u64,
    pub(super) log_bytes: u64,
    /// What entries of the log must carry to count; nil when it is empty.
    pub(super) log_id: Uuid,
    /// The file doesn't say what it is.
    pub(super) is_hidden: bool,
}

impl Header {
    /// Where the header that is not current lies.
    fn other_offset(&self) -> u64 {
        if self.offset == OFFSETS[0] { OFFSETS[1] } else { OFFSETS[0] }
    }

    /// The sequence number of a newer header.
    fn next(&self) -> Result<u64, ImageError> {
        self.sequence.checked_add(1).ok_or_else(|| ImageError::damaged("the last sequence number"))
    }
}

/// CRC-32C of `bytes` with the four bytes of the checksum field, at 4, taken as zero.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(8));
    let crc = crc32c::crc32c(&head[..head.len().min(4)]);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[0; 4]), rest)
}

/// Writes the file identifier: last, so that a file without its other structures isn't taken for a VHDX.
pub(super) fn write_identifier(file: &File) -> Result<(), ImageError> {
    let mut page = [0; PAGE];
    put(&mut page, 0, SIGNATURE);
    for (i, unit) in CREATOR.encode_utf16().enumerate() {
        put(&mut page, 8 + 2 * i, &unit.to_le_bytes());
    }
    file.write_all_at(&page, 0).map_err(ImageError::io("write"))
}

/// Hides a file from other programs, or shows it again. The caller syncs.
///
/// # Errors
/// When the file can't be written.
pub fn set_hidden(file: &File, is_hidden: bool) -> Result<(), ImageError> {
    let signature = if is_hidden { HIDDEN } else { SIGNATURE };
    file.write_all_at(signature, 0).map_err(ImageError::io("write"))
}

/// Writes both headers with an empty log.
pub(super) fn write_headers(file: &File, data_write: Uuid) -> Result<(), ImageError> {
    for (sequence, offset) in (1u64..).zip(OFFSETS) {
        let log = (layout::LOG_OFFSET, layout::LOG_BYTES);
        write_header(file, offset, sequence, data_write, log)?;
    }
    Ok(())
}

/// Gives a file another data write id: first into the header that is not current, then into the other, each synced.
pub(super) fn set_data_write(file: &File, data_write: Uuid) -> Result<(), ImageError> {
    let current = read(file)?;
    let log = (current.log_offset, current.log_bytes);
    let sync = || file.sync_data().map_err(ImageError::io("sync"));
    if current.data_write != data_write {
        write_header(file, current.other_offset(), current.next()?, data_write, log)?;
        sync()?;
    }
    let current = read(file)?;
    // Not only to have two: an older header with the old id must not come back when this one is damaged.
    write_header(file, current.other_offset(), current.next()?, data_write, log)?;
    sync()
}

fn write_header(
    file: &File,
    offset: u64,
    sequence: u64,
    data_write: Uuid,
    (log_offset, log_bytes): (u64, u64),
) -> Result<(), ImageError> {
    let mut page = [0; PAGE];
    put(&mut page, 0, b"head");
    put(&mut page, 8, &sequence.to_le_bytes());
    // The file write id changes with any write to a file; ours change with the data only.
    put(&mut page, 16, &data_write.to_bytes_le());
    put(&mut page, 32, &data_write.to_bytes_le());
    put(&mut page, 66, &1u16.to_le_bytes());
    put(&mut page, 68, &(log_bytes as u32).to_le_bytes());
    put(&mut page, 72, &log_offset.to_le_bytes());
    let sum = checksum(&page);
    put(&mut page, 4, &sum.to_le_bytes());
    file.write_all_at(&page, offset).map_err(ImageError::io("write"))
}

/// Reads the identifier and the current header.
pub(super) fn read(file: &File) -> Result<Header, ImageError> {
    let mut signature = [0; 8];
    file.read_exact_at(&mut signature, 0).map_err(ImageError::io("file identifier"))?;
    let is_hidden = &signature == HIDDEN;
    if &signature != SIGNATURE && !is_hidden {
        return Err(ImageError::damaged("file does not start with \"vhdxfile\""));
    }
    let mut current: Option<(Header, [u8; PAGE])> = None;
    for offset in OFFSETS {
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, offset).map_err(ImageError::io("header"))?;
        if &page[..4] != b"head" || page.u32_at(4) != checksum(&page) {
            continue;
        }
        let header = Header { is_hidden, ..parse(&page, offset)? };
        match &current {
            Some((other, _)) if other.sequence > header.sequence => {}
            Some((other, bytes)) if other.sequence == header.sequence && *bytes != page => {
                return Err(ImageError::damaged(
                    "two different headers have the same sequence number",
                ));
            }
            _ => current = Some((header, page)),
        }
    }
    // Only the current header counts: an older one may still name a log that has been replayed.
    current.map(|(header, _)| header).ok_or_else(|| ImageError::damaged("neither header is valid"))
}

fn parse(page: &[u8; PAGE], offset: u64) -> Result<Header, ImageError> {
    let version = page.u16_at(66);
    if version != 1 {
        return Err(ImageError::unsupported(format!("VHDX version {version}")));
    }
    // An empty log may be of any version.
    let (log_version, log_id) = (page.u16_at(64), page.guid_at(48));
    if log_version != 0 && !log_id.is_nil() {
        return Err(ImageError::unsupported(format!("VHDX log version {log_version}")));
    }
    Ok(Header {
        offset,
        sequence: page.u64_at(8),
        data_write: page.guid_at(32),
        log_bytes: page.u32_at(68).into(),
        log_offset: page.u64_at(72),
        log_id,
        is_hidden: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> File {
        let file = crate::storage::temporary();
        write_headers(&file, Uuid::from_u128(7)).unwrap();
        write_identifier(&file).unwrap();
        file
    }

    #[test]
    fn the_newer_valid_header_wins() {
        let file = written();
        assert_eq!(read(&file).unwrap().sequence, 2);
        file.write_all_at(&[1], OFFSETS[1] + 100).unwrap();
        assert_eq!(
            read(&file).unwrap(),
            Header {
                offset: OFFSETS[0],
                sequence: 1,
                data_write: Uuid::from_u128(7),
                log_offset: 1 << 20,
                log_bytes: 1 << 20,
                log_id: Uuid::nil(),
                is_hidden: false,
            }
        );
        file.write_all_at(&[1], OFFSETS[0] + 100).unwrap();
        read(&file).unwrap_err();
    }

    #[test]
    fn a_new_id_is_in_both_headers_and_never_in_none() {
        let file = written();
        set_data_write(&file, Uuid::from_u128(8)).unwrap();
        for damaged in OFFSETS {
            let copy = written();
            for offset in OFFSETS {
                let mut page = [0; PAGE];
                file.read_exact_at(&mut page, offset).unwrap();
                copy.write_all_at(&page, offset).unwrap();
            }
            copy.write_all_at(&[1], damaged + 100).unwrap();
            assert_eq!(read(&copy).unwrap().data_write, Uuid::from_u128(8));
        }
        set_data_write(&file, Uuid::from_u128(8)).unwrap();
        assert_eq!(read(&file).unwrap().data_write, Uuid::from_u128(8));
    }

    #[test]
    fn a_log_is_told_and_newer_versions_are_refused() {
        for (at, is_read) in [(48, true), (64, false), (66, false)] {
            let file = written();
            let mut page = [0; PAGE];
            file.read_exact_at(&mut page, OFFSETS[1]).unwrap();
            page[at] = 9;
            let sum = checksum(&page);
            put(&mut page, 4, &sum.to_le_bytes());
            file.write_all_at(&page, OFFSETS[1]).unwrap();
            assert_eq!(read(&file).is_ok_and(|header| !header.log_id.is_nil()), is_read, "{at}");
        }
    }
}
