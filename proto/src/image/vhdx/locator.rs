//! Parent locators: keys and values that name a child's parent.

use std::collections::HashMap;

use uuid::{Uuid, uuid};

use super::{Fields, put};
use crate::image::{ImageError, NamedParent, Parent, names};

const VHDX_LOCATOR: Uuid = uuid!("B04AEFB7-D19E-4A81-B789-25B8E9445913");
const ENTRY_BYTES: usize = 12;
/// Keys of paths, in the order in which they count.
const PATHS: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

/// The locator of a child whose parent lies in the same folder.
///
/// Hyper-V and 7-Zip use `relative_path`; libvhdi takes the name from `absolute_win32_path` and fails without it.
pub(super) fn encode(parent: &Parent) -> Result<Vec<u8>, ImageError> {
    let name = &parent.file_name;
    names::check_plain(name)?;
    let pairs = [
        ("parent_linkage", format!("{{{}}}", parent.data_write.hyphenated())),
        ("relative_path", format!(".\\{name}")),
        ("absolute_win32_path", format!("C:\\{name}")),
    ];
    let mut bytes = vec![0; 20 + pairs.len() * ENTRY_BYTES];
    put(&mut bytes, 0, &VHDX_LOCATOR.to_bytes_le());
    put(&mut bytes, 18, &(pairs.len() as u16).to_le_bytes());
    for (i, (key, value)) in pairs.into_iter().enumerate() {
        let at = 20 + i * ENTRY_BYTES;
        for (text, offset_at, length_at) in [(key, at, at + 8), (&value, at + 4, at + 10)] {
            let start = bytes.len();
            bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            let length = (bytes.len() - start) as u16;
            put(&mut bytes, offset_at, &(start as u32).to_le_bytes());
            put(&mut bytes, length_at, &length.to_le_bytes());
        }
    }
    Ok(bytes)
}

/// Reads a locator: the parent, and all file names it is given, the most trusted first. Of a path only its last part is taken:
/// a chain lives in one folder.
pub(super) fn decode(bytes: &[u8]) -> Result<NamedParent, ImageError> {
    if bytes.guid_at(0) != VHDX_LOCATOR {
        return Err(ImageError::unsupported(format!(
            "parent locator of type {}",
            bytes.guid_at(0)
        )));
    }
    let mut pairs = HashMap::new();
    for i in 0..usize::from(bytes.u16_at(18)) {
        let at = 20 + i * ENTRY_BYTES;
        let entry = bytes
            .get(at..at + ENTRY_BYTES)
            .ok_or_else(|| ImageError::damaged("short parent locator"))?;
        let key = text(bytes, entry.u32_at(0), entry.u16_at(8))?;
        let value = text(bytes, entry.u32_at(4), entry.u16_at(10))?;
        pairs.insert(key, value);
    }
    let linkage =
        pairs.get("parent_linkage").ok_or_else(|| ImageError::damaged("no parent_linkage"))?;
    let data_write = Uuid::try_parse(linkage).map_err(|_| {
        ImageError::damaged(format!("parent_linkage {:?} is no id", names::shorten(linkage)))
    })?;
    let mut found = Vec::new();
    for path in PATHS.into_iter().filter_map(|key| pairs.get(key)) {
        let name = names::file_name(path)?;
        if !found.contains(&name) {
            found.push(name);
        }
    }
    let file_name = found
        .first()
        .cloned()
        .ok_or_else(|| ImageError::damaged("parent locator without a path"))?;
    Ok((Parent { data_write, file_name, time_stamp: 0 }, found))
}

fn text(bytes: &[u8], offset: u32, length: u16) -> Result<String, ImageError> {
    let start = offset as usize;
    let part = bytes.get(start..start.saturating_add(length.into()));
    let part = part.filter(|part| part.len().is_multiple_of(2));
    let units = part
        .ok_or_else(|| ImageError::damaged("parent locator points outside itself"))?
        .chunks_exact(2);
    names::utf16(units.map(|unit| u16::from_le_bytes([unit[0], unit[1]])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locator_survives_the_round_trip() {
        let parent = Parent {
            data_write: Uuid::from_u128(1 << 100 | 5),
            file_name: "sda-0001.vhdx".into(),
            time_stamp: 0,
        };
        let names = vec![parent.file_name.clone()];
        assert_eq!(decode(&encode(&parent).unwrap()).unwrap(), (parent, names));
    }

    #[test]
    fn names_with_folders_are_not_written_and_damage_is_an_error() {
        for file_name in ["", "..", "a/b", "a\\b", "C:x", "ä.vhdx", "a\0"] {
            encode(&Parent { data_write: Uuid::nil(), file_name: file_name.into(), time_stamp: 0 })
                .unwrap_err();
        }
        let bytes =
            encode(&Parent { data_write: Uuid::nil(), file_name: "a.vhdx".into(), time_stamp: 0 })
                .unwrap();
        for length in 0..bytes.len() {
            decode(&bytes[..length]).unwrap_err();
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x80;
            let _ = decode(&flipped);
        }
    }
}
