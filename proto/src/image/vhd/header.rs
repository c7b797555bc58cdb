//! The dynamic header: where the table is, how long blocks are, and which image is the parent.

use std::ops::Range;

use super::{
    Fields, Layout, SECTOR, checksum,
    layout::{BAT_OFFSET, HEADER_OFFSET},
    locator, put,
};
use crate::{
    image::{ImageError, NamedParent, Parent, names, payload::PAYLOAD_BYTES},
    storage::File,
};

pub(super) const BYTES: usize = 1024;
const COOKIE: &[u8; 8] = b"cxsparse";
const CHECKSUM: usize = 36;
const NAME: Range<usize> = 64..576;
const LOCATORS: Range<usize> = 576..768;

/// What it says, checked as far as it can be alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) table_offset: u64,
    pub(super) entries: u64,
    pub(super) block_bytes: u64,
}

/// Writes the header, and for a child the names of its parent.
pub(super) fn write(
    file: &File,
    layout: &Layout,
    parent: Option<&Parent>,
) -> Result<(), ImageError> {
    let mut bytes = [0; BYTES];
    put(&mut bytes, 0, COOKIE);
    put(&mut bytes, 8, &u64::MAX.to_be_bytes());
    put(&mut bytes, 16, &BAT_OFFSET.to_be_bytes());
    put(&mut bytes, 24, &0x0001_0000u32.to_be_bytes());
    put(&mut bytes, 28, &(layout.payload_count() as u32).to_be_bytes());
    put(&mut bytes, 32, &(PAYLOAD_BYTES as u32).to_be_bytes());
    if let Some(parent) = parent {
        put(&mut bytes, 40, parent.data_write.as_bytes());
        put(&mut bytes, 56, &parent.time_stamp.to_be_bytes());
        locator::write(file, &mut bytes[LOCATORS], &parent.file_name)?;
        for (i, unit) in parent.file_name.encode_utf16().enumerate() {
            put(&mut bytes, NAME.start + 2 * i, &unit.to_be_bytes());
        }
    }
    let sum = checksum(&bytes, CHECKSUM);
    put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
    file.write_all_at(&bytes, HEADER_OFFSET).map_err(ImageError::io("write"))
}

/// Reads the header at `offset` of a file of `file_bytes`, and of a child the parent with all names it is given.
pub(super) fn read(
    file: &File,
    file_bytes: u64,
    offset: u64,
    is_child: bool,
) -> Result<(Header, Option<NamedParent>), ImageError> {
    if offset.checked_add(BYTES as u64).is_none_or(|end| end > file_bytes) {
        return Err(ImageError::damaged(format!("a dynamic header at {offset}")));
    }
    let mut bytes = [0; BYTES];
    file.read_exact_at(&mut bytes, offset).map_err(ImageError::io("dynamic header"))?;
    let header = parse(&bytes)?;
    let parent = if is_child { Some(read_parent(file, file_bytes, &bytes)?) } else { None };
    Ok((header, parent))
}

fn parse(bytes: &[u8; BYTES]) -> Result<Header, ImageError> {
    if &bytes[..8] != COOKIE || bytes.u32_at(CHECKSUM) != checksum(bytes, CHECKSUM) {
        return Err(ImageError::damaged("the dynamic header is not valid"));
    }
    let version = bytes.u32_at(24);
    if version >> 16 != 1 {
        return Err(ImageError::unsupported(format!("VHD header version {version:#x}")));
    }
    let block_bytes = u64::from(bytes.u32_at(32));
    if !block_bytes.is_power_of_two() || !(8 * SECTOR..=256 << 20).contains(&block_bytes) {
        return Err(ImageError::damaged(format!("blocks of {block_bytes} bytes")));
    }
    Ok(Header { table_offset: bytes.u64_at(16), entries: bytes.u32_at(28).into(), block_bytes })
}

fn read_parent(
    file: &File,
    file_bytes: u64,
    bytes: &[u8; BYTES],
) -> Result<NamedParent, ImageError> {
    let mut names = locator::read(file, file_bytes, &bytes[LOCATORS])?;
    let units = bytes[NAME].chunks_exact(2).map(|unit| u16::from_be_bytes([unit[0], unit[1]]));
    let own = names::utf16(units.take_while(|unit| *unit != 0))?;
    if !own.is_empty() {
        names.push(names::file_name(&own)?);
    }
    let mut seen = Vec::new();
    names.retain(|name| {
        !seen.contains(name) && {
            seen.push(name.clone());
            true
        }
    });
    let file_name = names
        .first()
        .cloned()
        .ok_or_else(|| ImageError::damaged("a child without its parent's name"))?;
    let parent = Parent { data_write: bytes.uuid_at(40), file_name, time_stamp: bytes.u32_at(56) };
    Ok((parent, names))
}
