//! Images of both formats. A VHDX is too large to be an input: each target replaces one structure of a valid one.

use std::{
    convert::Infallible,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, OnceLock},
};

use uuid::Uuid;

use super::Scratch;
use crate::image::{
    Format, Geometry, Identity, Image, Kind, Layers, Parent, Payload, Source, vhd, vhdx,
};

const MIB: u64 = 1 << 20;
/// Places in the VHDX that structures are replaced in: headers, region tables, log, metadata, allocation table.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;
/// What the logs of inputs belong to.
const LOG_ID: Uuid = Uuid::from_u128(0x1065);

/// A whole VHD.
pub fn fuzz_vhd(bytes: &[u8]) {
    let mut summed = bytes.to_vec();
    make_vhd_sums_right(&mut summed);
    for bytes in [bytes, &summed] {
        open_and_walk(Scratch::new(bytes));
    }
}

/// Two headers of a VHDX, 4 KiB each.
pub fn fuzz_vhdx_header(bytes: &[u8]) {
    let pages: Vec<&[u8]> = bytes.chunks(4096).take(2).collect();
    let places: Vec<_> = HEADERS.into_iter().zip(pages.iter().copied()).collect();
    open_and_walk(vhdx_with(&places));
    let summed: Vec<Vec<u8>> = pages.iter().map(|page| vhdx::summed(page, 4096)).collect();
    let places: Vec<_> = HEADERS.into_iter().zip(summed.iter().map(Vec::as_slice)).collect();
    open_and_walk(vhdx_with(&places));
}

/// A region table of a VHDX.
pub fn fuzz_vhdx_regions(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(64 << 10)];
    let summed = vhdx::summed(bytes, 64 << 10);
    for bytes in [bytes, &summed] {
        open_and_walk(vhdx_with(&REGIONS.map(|at| (at, bytes))));
    }
}

/// The metadata region of a VHDX.
pub fn fuzz_vhdx_metadata(bytes: &[u8]) {
    open_and_walk(vhdx_with(&[(METADATA, &bytes[..bytes.len().min(MIB as usize)])]));
}

/// The allocation table of a VHDX.
pub fn fuzz_vhdx_bat(bytes: &[u8]) {
    open_and_walk(vhdx_with(&[(BAT, &bytes[..bytes.len().min(MIB as usize)])]));
}

/// The log of a VHDX that was not closed.
pub fn fuzz_vhdx_log(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(MIB as usize)];
    let mut summed = bytes.to_vec();
    make_log_sums_right(&mut summed);
    let mut header = structures(HEADERS[1]);
    header[48..64].copy_from_slice(&LOG_ID.to_bytes_le());
    let header = vhdx::summed(&header, 4096);
    for bytes in [bytes, &summed] {
        open_and_walk(vhdx_with(&[(HEADERS[1], &header), (LOG, bytes)]));
    }
}

/// The parent locator of a VHDX.
pub fn fuzz_parent_locator(bytes: &[u8]) {
    let _ = vhdx::read_locator(bytes);
}

/// Reads all that can be read of an image in a reasonable time.
fn open_and_walk(scratch: io::Result<Scratch>) {
    let Ok(file) = scratch.and_then(|scratch| scratch.open()) else { return };
    let Ok(image) = Image::open_foreign(file) else { return };
    let _ = image.check_blocks();
    let size = image.geometry().disk_bytes;
    for start in [0, MIB, size / 2, size.saturating_sub(MIB)] {
        let Ok(extents) = image.extents(start..start + MIB) else { continue };
        for (range, source) in extents.into_iter().take(64) {
            if let Source::File(at) = source {
                let mut buffer = vec![0; (range.end - range.start).min(4096) as usize];
                let _ = image.read_file_at(&mut buffer, at);
            }
        }
    }
    if let Ok(layers) = Layers::new(vec![Arc::new(image)]) {
        let mut buffer = vec![0; size.min(3 * MIB) as usize];
        let _ = layers.read_at(0, &mut buffer);
    }
}

/// Footers and header of a VHD.
fn make_vhd_sums_right(bytes: &mut [u8]) {
    let mut fix = |at: usize, len: usize, field: usize| {
        if let Some(part) = at.checked_add(len).and_then(|end| bytes.get_mut(at..end)) {
            let sum = vhd::checksum(part, field);
            part[field..field + 4].copy_from_slice(&sum.to_be_bytes());
        }
    };
    fix(0, 512, 64);
    fix(512, 1024, 36);
    if let Some(last) = bytes.len().checked_sub(512) {
        let part = &mut bytes[last..];
        let sum = vhd::checksum(part, 64);
        part[64..68].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Gives everything in a log that could be an entry its id and sum.
fn make_log_sums_right(log: &mut [u8]) {
    for at in (0..log.len()).step_by(4096) {
        let Some(head) = log.get(at..at + 64).filter(|head| &head[..4] == b"loge") else {
            continue;
        };
        let length = head[8..12].iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte));
        log[at + 32..at + 48].copy_from_slice(&LOG_ID.to_bytes_le());
        if let Some(entry) = at.checked_add(length).and_then(|end| log.get(at..end)) {
            let summed = vhdx::summed(entry, entry.len());
            log[at..at + summed.len()].copy_from_slice(&summed);
        }
    }
}

/// A file by its pages that are not zero.
#[derive(Default)]
struct Sparse {
    pages: Vec<(u64, Vec<u8>)>,
    length: u64,
}

/// A valid VHDX: a child with two blocks.
fn valid_vhdx() -> &'static Sparse {
    static VALID: OnceLock<Sparse> = OnceLock::new();
    VALID.get_or_init(|| {
        let empty = Sparse::default;
        let Ok(scratch) = Scratch::new(&[]) else { return empty() };
        let (Ok(file), Some(layout)) = (scratch.open(), child_layout()) else { return empty() };
        let identity =
            Identity { data_write: Uuid::from_u128(1), virtual_disk: Uuid::from_u128(2) };
        let parent =
            Parent { data_write: Uuid::from_u128(3), file_name: "base.vhdx".into(), time_stamp: 0 };
        let blocks = [(0, [0xff; 8]), (3, [u64::MAX; 8])]
            .into_iter()
            .zip(0..)
            .map(|((index, present), slot)| Ok::<_, Infallible>(Payload { index, slot, present }));
        let Ok(length) = layout.write_structures(&file, &identity, Some(&parent), 2, blocks) else {
            return empty();
        };
        let mut pages = Vec::new();
        for at in (0..length).step_by(4096) {
            let mut page = vec![0; 4096];
            let read = scratch.file.read_exact_at(&mut page, at);
            if read.is_ok() && page.iter().any(|byte| *byte != 0) {
                pages.push((at, page));
            }
        }
        Sparse { pages, length }
    })
}

fn child_layout() -> Option<crate::image::Layout> {
    let geometry = Geometry { disk_bytes: 8 * MIB, logical_sector_bytes: 512 };
    Format::Vhdx.layout(geometry, Kind::Differencing).ok()
}

/// The valid VHDX with other bytes at some places.
fn vhdx_with(places: &[(u64, &[u8])]) -> io::Result<Scratch> {
    let Sparse { pages, length } = valid_vhdx();
    let scratch = Scratch::new(&[])?;
    scratch.file.set_len(*length)?;
    for (at, page) in pages {
        scratch.file.write_all_at(page, *at)?;
    }
    for (at, bytes) in places {
        scratch.file.write_all_at(bytes, *at)?;
    }
    Ok(scratch)
}

/// What the valid VHDX has at a place, 4 KiB.
fn structures(at: u64) -> Vec<u8> {
    let found = valid_vhdx().pages.iter().find(|(page, _)| *page == at);
    found.map_or_else(|| vec![0; 4096], |(_, page)| page.clone())
}

/// A base and a child with blocks of 4 KiB, and a fixed image: small, so that inputs are.
pub(super) fn vhd_seeds() -> Vec<Vec<u8>> {
    let footer = |disk_type: u32| {
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[8..16].copy_from_slice(&[0, 0, 0, 2, 0, 1, 0, 0]);
        footer[16..24].copy_from_slice(&512u64.to_be_bytes());
        footer[28..32].copy_from_slice(b"win ");
        footer[48..56].copy_from_slice(&(5 * 4096u64).to_be_bytes());
        footer[60..64].copy_from_slice(&disk_type.to_be_bytes());
        footer[68..84].copy_from_slice(&[9; 16]);
        footer
    };
    let dynamic = |disk_type: u32| {
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[16..24].copy_from_slice(&1536u64.to_be_bytes());
        header[24..36].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 5, 0, 0, 0x10, 0]);
        header[40..56].copy_from_slice(&[8; 16]);
        header[64..74].copy_from_slice(b"\0a\0.\0v\0h\0d");
        header[576..600].copy_from_slice(b"W2ru\0\0\x02\0\0\0\0\x0a\0\0\0\0\0\0\0\0\0\0\x08\0");
        let mut table = vec![0xff; 512];
        table[..4].copy_from_slice(&5u32.to_be_bytes());
        table[12..16].copy_from_slice(&14u32.to_be_bytes());
        let mut path = vec![0; 512];
        path[..10].copy_from_slice(b"a\0.\0v\0h\0d\0");
        let mut block = vec![0; 512 + 4096];
        block[0] = 0b1010_0001;
        let mut bytes =
            [footer(disk_type), header, table, path, block.clone(), block, footer(disk_type)]
                .concat();
        make_vhd_sums_right(&mut bytes);
        bytes
    };
    let mut fixed = [vec![7; 5 * 4096], footer(2)].concat();
    make_vhd_sums_right(&mut fixed[5 * 4096..]);
    vec![dynamic(3), dynamic(4), fixed]
}

pub(super) fn header_seeds() -> Vec<Vec<u8>> {
    vec![HEADERS.map(structures).concat()]
}

pub(super) fn region_seeds() -> Vec<Vec<u8>> {
    vec![structures(REGIONS[0])[..512].to_vec()]
}

/// Table and items, with the holes between them.
pub(super) fn metadata_seeds() -> Vec<Vec<u8>> {
    let mut bytes = structures(METADATA);
    bytes.resize(64 << 10, 0);
    bytes.extend(structures(METADATA + (64 << 10)));
    bytes.truncate((64 << 10) + 1024);
    vec![bytes]
}

pub(super) fn bat_seeds() -> Vec<Vec<u8>> {
    let mut bytes = structures(BAT)[..64].to_vec();
    bytes.resize(2048 * 8, 0);
    // The bitmap of the first chunk has its entry after the chunk's blocks.
    bytes.extend(&structures(BAT + 4 * 4096)[..8]);
    vec![bytes]
}

pub(super) fn locator_seeds() -> Vec<Vec<u8>> {
    let parent =
        Parent { data_write: Uuid::from_u128(3), file_name: "base.vhdx".into(), time_stamp: 0 };
    vhdx::write_locator(&parent).into_iter().collect()
}

/// A sequence of two entries: a page for the allocation table, then zeros over it.
pub(super) fn log_seeds() -> Vec<Vec<u8>> {
    let entry = |sequence: u64, tail: u32, data: Option<u8>| {
        let mut entry = vec![0; if data.is_some() { 8192 } else { 4096 }];
        let length = entry.len() as u32;
        entry[..4].copy_from_slice(b"loge");
        entry[8..12].copy_from_slice(&length.to_le_bytes());
        entry[12..16].copy_from_slice(&tail.to_le_bytes());
        entry[16..24].copy_from_slice(&sequence.to_le_bytes());
        entry[24..28].copy_from_slice(&1u32.to_le_bytes());
        entry[48..56].copy_from_slice(&(8 * MIB).to_le_bytes());
        entry[56..64].copy_from_slice(&(9 * MIB).to_le_bytes());
        let descriptor = &mut entry[64..96];
        descriptor[..4].copy_from_slice(if data.is_some() { b"desc" } else { b"zero" });
        descriptor[8..16].copy_from_slice(&4096u64.to_le_bytes());
        descriptor[16..24].copy_from_slice(&(BAT + 4096).to_le_bytes());
        descriptor[24..32].copy_from_slice(&sequence.to_le_bytes());
        if let Some(byte) = data {
            entry[4096..].fill(byte);
            entry[4096..4100].copy_from_slice(b"data");
            entry[4100..4104].copy_from_slice(&((sequence >> 32) as u32).to_le_bytes());
            entry[8188..].copy_from_slice(&(sequence as u32).to_le_bytes());
        }
        entry
    };
    let mut log = [entry(7, 0, Some(2)), entry(8, 0, None)].concat();
    make_log_sums_right(&mut log);
    vec![log]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageError;

    fn open(places: &[(u64, &[u8])]) -> Result<Image, ImageError> {
        Image::open_foreign(vhdx_with(places).unwrap().open().unwrap())
    }

    /// A target whose valid input is refused at the first check would test nothing behind it.
    #[test]
    fn the_inputs_to_begin_with_are_valid() {
        let kinds = vhd_seeds().into_iter().map(|seed| {
            let image = Image::open(Scratch::new(&seed).unwrap().open().unwrap()).unwrap();
            image.check_blocks().unwrap();
            let data = image.extents(0..5 * 4096).unwrap();
            assert!(data.iter().any(|(_, source)| matches!(source, Source::File(_))));
            (image.kind(), data.len())
        });
        assert_eq!(
            kinds.collect::<Vec<_>>(),
            [(Kind::Dynamic, 12), (Kind::Differencing, 12), (Kind::Dynamic, 1)]
        );
        let [headers, regions, metadata, table, log] =
            [header_seeds, region_seeds, metadata_seeds, bat_seeds, log_seeds]
                .map(|seeds| seeds().remove(0));
        let untouched = open(&[]).unwrap().extents(0..8 * MIB).unwrap();
        let summed = vhdx::summed(&regions, 64 << 10);
        for places in [
            vec![(HEADERS[0], &headers[..4096]), (HEADERS[1], &headers[4096..])],
            vec![(REGIONS[0], summed.as_slice()), (REGIONS[1], &regions)],
            vec![(METADATA, metadata.as_slice())],
            vec![(BAT, table.as_slice())],
        ] {
            let image = open(&places).unwrap();
            image.check_blocks().unwrap();
            assert_eq!(image.extents(0..8 * MIB).unwrap(), untouched);
        }
        let mut header = structures(HEADERS[1]);
        header[48..64].copy_from_slice(&LOG_ID.to_bytes_le());
        let header = vhdx::summed(&header, 4096);
        open(&[(HEADERS[1], &header), (LOG, &log)]).unwrap();
        open(&[(HEADERS[1], &header)]).unwrap_err();
        vhdx::read_locator(&locator_seeds()[0]).unwrap();
    }
}
