//! Region tables: where the block allocation table and the metadata are.

use std::ops::Range;

use uuid::{Uuid, uuid};

use super::{Fields, MIB, PAGE, check_disjoint, header, layout, put, replayed::ReplayedFile};
use crate::{image::ImageError, storage::File};

const BAT: Uuid = uuid!("2DC27766-F623-4200-9D64-115E9BFD4A08");
const METADATA: Uuid = uuid!("8B7CA206-4790-4B9A-B8FE-575F050F886E");
const OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_BYTES: usize = 64 << 10;
const ENTRY_BYTES: usize = 32;
const MAX_ENTRIES: usize = 2047;

/// The regions of a file, checked: inside the file, aligned, disjoint.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) bat: Range<u64>,
    pub(super) metadata: Range<u64>,
    /// All of them and the log, sorted: no payload may lie there.
    pub(super) taken: Vec<Range<u64>>,
}

/// Writes both tables.
pub(super) fn write(file: &File, bat_bytes: u64) -> Result<(), ImageError> {
    let mut table = vec![0; TABLE_BYTES];
    put(&mut table, 0, b"regi");
    put(&mut table, 8, &2u32.to_le_bytes());
    let regions = [
        (BAT, layout::BAT_OFFSET, bat_bytes),
        (METADATA, layout::METADATA_OFFSET, layout::METADATA_BYTES),
    ];
    for (i, (id, offset, bytes)) in regions.into_iter().enumerate() {
        let at = 16 + i * ENTRY_BYTES;
        put(&mut table, at, &id.to_bytes_le());
        put(&mut table, at + 16, &offset.to_le_bytes());
        put(&mut table, at + 24, &(bytes as u32).to_le_bytes());
        put(&mut table, at + 28, &1u32.to_le_bytes());
    }
    let sum = header::checksum(&table);
    put(&mut table, 4, &sum.to_le_bytes());
    for offset in OFFSETS {
        // The rest of a table is zero and stays a hole.
        file.write_all_at(&table[..PAGE], offset).map_err(ImageError::io("write"))?;
    }
    Ok(())
}

/// Reads the first valid table of a file whose log lies at `log`.
pub(super) fn read(file: &ReplayedFile, log: Range<u64>) -> Result<Regions, ImageError> {
    let mut table = vec![0; TABLE_BYTES];
    for offset in OFFSETS {
        file.read_exact_at(&mut table, offset).map_err(ImageError::io("region table"))?;
        if &table[..4] == b"regi" && table.u32_at(4) == header::checksum(&table) {
            return parse(&table, file.len(), log);
        }
    }
    Err(ImageError::damaged("neither region table is valid"))
}

fn parse(table: &[u8], file_bytes: u64, log: Range<u64>) -> Result<Regions, ImageError> {
    let count = table.u32_at(8) as usize;
    if count > MAX_ENTRIES {
        return Err(ImageError::damaged(format!("region table has {count} entries")));
    }
    let (mut bat, mut metadata) = (None, None);
    let mut taken = vec![check_place("log", log, file_bytes)?];
    for entry in table[16..].chunks_exact(ENTRY_BYTES).take(count) {
        let start = entry.u64_at(16);
        let place = start..start.saturating_add(entry.u32_at(24).into());
        let known = match entry.guid_at(0) {
            BAT => &mut bat,
            METADATA => &mut metadata,
            id if entry.u32_at(28) & 1 == 1 => {
                return Err(ImageError::unsupported(format!("required region {id}")));
            }
            _ => &mut None,
        };
        if known.is_some() {
            return Err(ImageError::damaged("a region is listed twice"));
        }
        taken.push(check_place("region", place.clone(), file_bytes)?);
        *known = Some(place);
    }
    taken.retain(|range| !range.is_empty());
    check_disjoint(&mut taken, "regions")?;
    let bat = bat.ok_or_else(|| ImageError::damaged("no block allocation table"))?;
    let metadata = metadata.ok_or_else(|| ImageError::damaged("no metadata region"))?;
    Ok(Regions { bat, metadata, taken })
}

fn check_place(what: &str, place: Range<u64>, file_bytes: u64) -> Result<Range<u64>, ImageError> {
    let aligned = place.start.is_multiple_of(MIB) && (place.end - place.start).is_multiple_of(MIB);
    if !aligned || place.start < MIB || place.end > file_bytes {
        return Err(ImageError::damaged(format!(
            "{what} at {place:?} of a file of {file_bytes} bytes"
        )));
    }
    Ok(place)
}
