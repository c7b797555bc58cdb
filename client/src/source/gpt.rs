//! The disk GUID of a GPT: it stays with the disk wherever it is plugged in (UEFI 2.10, section 5.3.2).

use janus_proto::ids::DiskId;
use uuid::Uuid;

use super::view::ReadAt;
use crate::fs::Head;

const SIGNATURE: &[u8] = b"EFI PART";
pub(crate) const HEADER_BYTES: usize = 92;

/// GUID in the primary GPT header, `None` when there is none or its checksum is wrong.
pub fn disk_guid(disk: &dyn ReadAt, sector_bytes: u32) -> Option<DiskId> {
    // An image of a 4096-byte-sector disk is a file of unknown sectors: try both.
    let mut sizes = vec![u64::from(sector_bytes), 512, 4096];
    sizes.dedup();
    sizes.into_iter().find_map(|sector| {
        let mut header = [0; 512];
        disk.read_exact_at(&mut header, sector).ok()?;
        parse(&header)
    })
}

fn parse(header: &[u8; 512]) -> Option<DiskId> {
    let guid = Header::parse(header)?.disk;
    if guid.is_nil() { None } else { guid.hyphenated().to_string().parse().ok() }
}

/// A header whose checksum is right; its other fields may say anything.
pub(crate) struct Header {
    /// Its bytes.
    pub(crate) length: usize,
    /// The disk's GUID.
    pub(crate) disk: Uuid,
    /// First sector of the entries.
    pub(crate) entries: u64,
    /// How many.
    pub(crate) count: u32,
    /// Bytes of each.
    pub(crate) entry_bytes: u32,
    /// Checksum of them all.
    pub(crate) entries_sum: u32,
}

impl Header {
    pub(crate) fn parse(sector: &[u8; 512]) -> Option<Self> {
        let head = Head(sector);
        let length = head.u32(12)? as usize;
        if !head.is(0, SIGNATURE) || !(HEADER_BYTES..=sector.len()).contains(&length) {
            return None;
        }
        let mut checked = *sector;
        checked[16..20].fill(0);
        if crc32(&checked[..length]) != head.u32(16)? {
            return None;
        }
        Some(Self {
            length,
            disk: head.guid(56)?,
            entries: head.u64(72)?,
            count: head.u32(80)?,
            entry_bytes: head.u32(84)?,
            entries_sum: head.u32(88)?,
        })
    }
}

/// CRC-32 (ISO 3309), as GPT uses it; only ever over one table.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_has_its_check_value() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn only_a_header_with_a_right_checksum_counts() {
        let guid: uuid::Uuid = "5f0c2200-1122-4344-9566-778899aabbcc".parse().unwrap();
        let mut header = [0u8; 512];
        header[..8].copy_from_slice(SIGNATURE);
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[56..72].copy_from_slice(&guid.to_bytes_le());
        assert_eq!(parse(&header), None);
        let crc = crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(parse(&header).unwrap().as_str(), "5f0c2200-1122-4344-9566-778899aabbcc");
        header[60] ^= 1;
        assert_eq!(parse(&header), None);
        header[12] = 0xff;
        header[13] = 0xff;
        assert_eq!(parse(&header), None);
    }
}
