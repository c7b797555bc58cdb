//! The disk GUID of a GPT: it stays with the disk wherever it is plugged in (UEFI 2.10, section 5.3.2).

use janus_proto::ids::DiskId;

use super::view::ReadAt;

const SIGNATURE: &[u8] = b"EFI PART";
const HEADER_BYTES: usize = 92;

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
    let length = u32::from_le_bytes(*header[12..].first_chunk()?) as usize;
    if &header[..8] != SIGNATURE || !(HEADER_BYTES..=header.len()).contains(&length) {
        return None;
    }
    let mut checked = *header;
    checked[16..20].fill(0);
    if crc32(&checked[..length]) != u32::from_le_bytes(*header[16..].first_chunk()?) {
        return None;
    }
    let guid = uuid::Uuid::from_bytes_le(*header[56..].first_chunk()?);
    if guid.is_nil() { None } else { guid.hyphenated().to_string().parse().ok() }
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
