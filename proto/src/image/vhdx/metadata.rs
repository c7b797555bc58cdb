//! The metadata region: sizes, ids, parent locator.

use std::ops::Range;

use uuid::{Uuid, uuid};

use super::{
    Fields, Layout, MIB, PAGE, PAYLOAD_BYTES, check_disjoint, layout, locator, put,
    replayed::ReplayedFile,
};
use crate::{
    image::{Geometry, ImageError, Kind, Parent},
    storage::File,
};

const FILE_PARAMETERS: Uuid = uuid!("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
const VIRTUAL_DISK_SIZE: Uuid = uuid!("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
const VIRTUAL_DISK_ID: Uuid = uuid!("BECA12AB-B2E6-4523-93EF-C309E000C746");
const LOGICAL_SECTOR: Uuid = uuid!("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
const PHYSICAL_SECTOR: Uuid = uuid!("CDA348C7-445D-4471-9CC9-E9885251C556");
const PARENT_LOCATOR: Uuid = uuid!("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");

const TABLE_BYTES: u64 = 64 << 10;
const ENTRY_BYTES: usize = 32;
const MAX_ENTRIES: usize = 2047;
const HAS_PARENT: u32 = 2;
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;

/// What the metadata say, checked.
#[derive(Debug)]
pub(super) struct Metadata {
    /// With the virtual size.
    pub(super) geometry: Geometry,
    pub(super) block_bytes: u64,
    pub(super) virtual_disk: Uuid,
    pub(super) parent: Option<Parent>,
    pub(super) parent_names: Vec<String>,
}

/// Writes table and items.
pub(super) fn write(
    file: &File,
    layout: &Layout,
    virtual_disk: Uuid,
    parent: Option<&Parent>,
) -> Result<(), ImageError> {
    let flags = if layout.kind() == Kind::Differencing { HAS_PARENT } else { 0 };
    let parameters = [(PAYLOAD_BYTES as u32).to_le_bytes(), flags.to_le_bytes()].concat();
    let mut items = vec![
        (FILE_PARAMETERS, IS_REQUIRED, parameters),
        (
            VIRTUAL_DISK_SIZE,
            IS_REQUIRED | IS_VIRTUAL_DISK,
            layout.virtual_bytes().to_le_bytes().to_vec(),
        ),
        (VIRTUAL_DISK_ID, IS_REQUIRED | IS_VIRTUAL_DISK, virtual_disk.to_bytes_le().to_vec()),
        (
            LOGICAL_SECTOR,
            IS_REQUIRED | IS_VIRTUAL_DISK,
            layout.geometry().logical_sector_bytes.to_le_bytes().to_vec(),
        ),
        (PHYSICAL_SECTOR, IS_REQUIRED | IS_VIRTUAL_DISK, 4096u32.to_le_bytes().to_vec()),
    ];
    if let Some(parent) = parent {
        items.push((PARENT_LOCATOR, IS_REQUIRED, locator::encode(parent)?));
    }
    let (mut table, mut data) = ([0; PAGE], Vec::new());
    put(&mut table, 0, b"metadata");
    put(&mut table, 10, &(items.len() as u16).to_le_bytes());
    for (i, (id, flags, item)) in items.into_iter().enumerate() {
        let at = 32 + i * ENTRY_BYTES;
        put(&mut table, at, &id.to_bytes_le());
        put(&mut table, at + 16, &(TABLE_BYTES as u32 + data.len() as u32).to_le_bytes());
        put(&mut table, at + 20, &(item.len() as u32).to_le_bytes());
        put(&mut table, at + 24, &flags.to_le_bytes());
        data.extend_from_slice(&item);
    }
    // Whole pages, so that nothing of an earlier attempt stays behind.
    data.resize(data.len().next_multiple_of(PAGE), 0);
    file.write_all_at(&table, layout::METADATA_OFFSET).map_err(ImageError::io("write"))?;
    file.write_all_at(&data, layout::METADATA_OFFSET + TABLE_BYTES).map_err(ImageError::io("write"))
}

/// Reads the metadata in `region`, which lies within the file.
pub(super) fn read(file: &ReplayedFile, region: Range<u64>) -> Result<Metadata, ImageError> {
    let items = Items::read(file, region)?;
    let parameters: [u8; 8] = items.fixed(FILE_PARAMETERS, "file parameters")?;
    let block_bytes = u64::from(parameters.u32_at(0));
    if !block_bytes.is_power_of_two() || !(MIB..=256 * MIB).contains(&block_bytes) {
        return Err(ImageError::damaged(format!("blocks of {block_bytes} bytes")));
    }
    let logical_sector_bytes =
        u32::from_le_bytes(items.fixed(LOGICAL_SECTOR, "logical sector size")?);
    if !matches!(logical_sector_bytes, 512 | 4096) {
        return Err(ImageError::damaged(format!(
            "logical sectors of {logical_sector_bytes} bytes"
        )));
    }
    let disk_bytes = u64::from_le_bytes(items.fixed(VIRTUAL_DISK_SIZE, "virtual disk size")?);
    if disk_bytes == 0
        || !disk_bytes.is_multiple_of(logical_sector_bytes.into())
        || disk_bytes > 64 << 40
    {
        return Err(ImageError::damaged(format!("a virtual disk of {disk_bytes} bytes")));
    }
    let has_parent = parameters.u32_at(4) & HAS_PARENT != 0;
    let parent = match items.variable(PARENT_LOCATOR)? {
        Some(bytes) if has_parent => Some(locator::decode(&bytes)?),
        None if !has_parent => None,
        _ => return Err(ImageError::damaged("parent locator and file parameters disagree")),
    };
    let (parent, parent_names) = parent.map_or((None, Vec::new()), |(p, n)| (Some(p), n));
    Ok(Metadata {
        geometry: Geometry { disk_bytes, logical_sector_bytes },
        block_bytes,
        virtual_disk: Uuid::from_bytes_le(items.fixed(VIRTUAL_DISK_ID, "virtual disk id")?),
        parent,
        parent_names,
    })
}

/// The table of a metadata region: ids and places, checked.
struct Items<'a> {
    file: &'a ReplayedFile,
    known: Vec<(Uuid, Range<u64>)>,
}

impl<'a> Items<'a> {
    fn read(file: &'a ReplayedFile, region: Range<u64>) -> Result<Self, ImageError> {
        let mut table = vec![0; TABLE_BYTES as usize];
        // The region is at least 1 MiB long: an empty one fails here, or at its first item.
        file.read_exact_at(&mut table, region.start).map_err(ImageError::io("metadata table"))?;
        let count = usize::from(table.u16_at(10));
        if &table[..8] != b"metadata" || count > MAX_ENTRIES {
            return Err(ImageError::damaged("metadata table without its signature, or too long"));
        }
        let (mut known, mut places): (Vec<(Uuid, _)>, Vec<_>) = (Vec::new(), Vec::new());
        for entry in table[32..].chunks_exact(ENTRY_BYTES).take(count) {
            let (id, flags) = (entry.guid_at(0), entry.u32_at(24));
            let place = place_of(entry, &region)?;
            places.extend((!place.is_empty()).then(|| place.clone()));
            if flags & IS_USER == 0 && is_known(id) {
                if known.iter().any(|(other, _)| *other == id) {
                    return Err(ImageError::damaged(format!("metadata item {id} is listed twice")));
                }
                known.push((id, place));
            } else if flags & IS_REQUIRED != 0 {
                return Err(ImageError::unsupported(format!("required metadata item {id}")));
            }
        }
        check_disjoint(&mut places, "metadata items")?;
        Ok(Self { file, known })
    }

    fn place(&self, id: Uuid) -> Option<Range<u64>> {
        self.known.iter().find(|(other, _)| *other == id).map(|(_, place)| place.clone())
    }

    fn fixed<const N: usize>(&self, id: Uuid, what: &'static str) -> Result<[u8; N], ImageError> {
        let place = self.place(id).ok_or_else(|| ImageError::damaged(format!("no {what}")))?;
        if place.end - place.start != N as u64 {
            return Err(ImageError::damaged(format!(
                "{what} of {} bytes",
                place.end - place.start
            )));
        }
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, place.start).map_err(ImageError::io("metadata"))?;
        Ok(bytes)
    }

    fn variable(&self, id: Uuid) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(place) = self.place(id) else { return Ok(None) };
        let mut bytes = vec![0; (place.end - place.start) as usize];
        self.file.read_exact_at(&mut bytes, place.start).map_err(ImageError::io("metadata"))?;
        Ok(Some(bytes))
    }
}

fn is_known(id: Uuid) -> bool {
    [
        FILE_PARAMETERS,
        VIRTUAL_DISK_SIZE,
        VIRTUAL_DISK_ID,
        LOGICAL_SECTOR,
        PHYSICAL_SECTOR,
        PARENT_LOCATOR,
    ]
    .contains(&id)
}

/// Where an item lies in the file: within the region, behind the table, at most 1 MiB.
fn place_of(entry: &[u8], region: &Range<u64>) -> Result<Range<u64>, ImageError> {
    let (offset, bytes) = (u64::from(entry.u32_at(16)), u64::from(entry.u32_at(20)));
    if offset == 0 && bytes == 0 {
        return Ok(0..0);
    }
    if offset < TABLE_BYTES || bytes > MIB || offset + bytes > region.end - region.start {
        return Err(ImageError::damaged(format!("metadata item of {bytes} bytes at {offset}")));
    }
    Ok(region.start + offset..region.start + offset + bytes)
}
