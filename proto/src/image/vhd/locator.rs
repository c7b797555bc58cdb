//! Where a child says its parent lies: an absolute and a relative path, in UTF-16LE, each with an entry in the header.

use super::{
    Fields,
    layout::{LOCATOR_BYTES, LOCATOR_OFFSETS},
    put,
};
use crate::{
    image::{ImageError, names},
    storage::File,
};

/// Entries in a header, of 24 bytes.
const ENTRIES: usize = 8;
const ENTRY_BYTES: usize = 24;
const ABSOLUTE: &[u8; 4] = b"W2ku";
const RELATIVE: &[u8; 4] = b"W2ru";
/// Longest path that is looked at, in bytes.
const MAX_PATH: u32 = 4096;

/// Writes the paths of a parent in the same folder, and their entries into `table`, a part of the header.
pub(super) fn write(file: &File, table: &mut [u8], name: &str) -> Result<(), ImageError> {
    names::check_plain(name)?;
    let paths = [(ABSOLUTE, format!("C:\\{name}")), (RELATIVE, format!(".\\{name}"))];
    for (i, ((code, path), offset)) in paths.into_iter().zip(LOCATOR_OFFSETS).enumerate() {
        let mut bytes: Vec<u8> = path.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let at = i * ENTRY_BYTES;
        put(table, at, code);
        // In bytes, as Windows writes it; the specification says sectors.
        put(table, at + 4, &(LOCATOR_BYTES as u32).to_be_bytes());
        put(table, at + 8, &(bytes.len() as u32).to_be_bytes());
        put(table, at + 16, &offset.to_be_bytes());
        // All of it, so that nothing of an earlier attempt stays behind.
        bytes.resize(LOCATOR_BYTES as usize, 0);
        file.write_all_at(&bytes, offset).map_err(ImageError::io("write"))?;
    }
    Ok(())
}

/// File names that the entries in `table` give the parent, the relative path's first. Entries of other systems are left out,
/// and so is what can't be read: the header has a name too.
pub(super) fn read(file: &File, file_bytes: u64, table: &[u8]) -> Result<Vec<String>, ImageError> {
    let mut found = Vec::new();
    for code in [RELATIVE, ABSOLUTE] {
        for entry in table.chunks_exact(ENTRY_BYTES).take(ENTRIES).filter(|e| &e[..4] == code) {
            let (bytes, offset) = (entry.u32_at(8), entry.u64_at(16));
            let inside = offset.checked_add(bytes.into()).is_some_and(|end| end <= file_bytes);
            if bytes > MAX_PATH || !inside {
                return Err(ImageError::damaged(format!(
                    "a parent's path of {bytes} bytes at {offset}"
                )));
            }
            let mut path = vec![0; bytes as usize];
            file.read_exact_at(&mut path, offset).map_err(ImageError::io("parent locator"))?;
            let units = path.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
            // Some writers end it with a zero.
            let path = names::utf16(units.take_while(|unit| *unit != 0))?;
            found.push(names::file_name(&path)?);
        }
    }
    Ok(found)
}
