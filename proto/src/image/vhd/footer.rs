//! The footer: what kind of file this is, its size and id. It stands at the end, and a copy at the start.

use std::time::SystemTime;

use uuid::Uuid;

use super::{Fields, checksum, put};
use crate::{image::ImageError, storage::File};

pub(super) const BYTES: usize = 512;
const COOKIE: &[u8; 8] = b"conectix";
/// What other programs don't know.
const HIDDEN: &[u8; 8] = b"vhd-stub";
const CHECKSUM: usize = 64;
/// As Hyper-V: programs that tell creators apart take the size of its images from the size field. QEMU before 8 does so for a few
/// names only, and takes that of all others, which is rounded down, from the geometry. Nobody reads by whom we are, and images
/// that we wrote as `jnsb` are read like these.
const CREATOR: &[u8; 4] = b"win ";
/// 2000-01-01, what time stamps count from.
const EPOCH_UNIX_SECONDS: u64 = 946_684_800;

/// Disk types that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskType {
    Fixed = 2,
    Dynamic = 3,
    Differencing = 4,
}

/// The fields that matter to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) disk_type: DiskType,
    pub(super) disk_bytes: u64,
    /// Where the dynamic header is.
    pub(super) header_offset: u64,
    /// Seconds since 2000.
    pub(super) time_stamp: u32,
    pub(super) unique_id: Uuid,
    /// The file doesn't say what it is.
    pub(super) is_hidden: bool,
}

impl Footer {
    pub(super) fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        put(&mut bytes, 0, if self.is_hidden { HIDDEN } else { COOKIE });
        put(&mut bytes, 8, &2u32.to_be_bytes());
        put(&mut bytes, 12, &0x0001_0000u32.to_be_bytes());
        put(&mut bytes, 16, &self.header_offset.to_be_bytes());
        put(&mut bytes, 24, &self.time_stamp.to_be_bytes());
        put(&mut bytes, 28, CREATOR);
        put(&mut bytes, 32, &0x0001_0000u32.to_be_bytes());
        put(&mut bytes, 36, b"Wi2k");
        put(&mut bytes, 40, &self.disk_bytes.to_be_bytes());
        put(&mut bytes, 48, &self.disk_bytes.to_be_bytes());
        let (cylinders, heads, sectors) = geometry(self.disk_bytes);
        put(&mut bytes, 56, &cylinders.to_be_bytes());
        put(&mut bytes, 58, &[heads, sectors]);
        put(&mut bytes, 60, &(self.disk_type as u32).to_be_bytes());
        put(&mut bytes, 68, self.unique_id.as_bytes());
        let sum = checksum(&bytes, CHECKSUM);
        put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
        bytes
    }

    /// Reads a footer; `None` when these bytes aren't one.
    fn decode(bytes: &[u8; BYTES]) -> Result<Option<Self>, ImageError> {
        let is_hidden = &bytes[..8] == HIDDEN;
        let is_footer = is_hidden || &bytes[..8] == COOKIE;
        if !is_footer || bytes.u32_at(CHECKSUM) != checksum(bytes, CHECKSUM) {
            return Ok(None);
        }
        let version = bytes.u32_at(12);
        if version >> 16 != 1 {
            return Err(ImageError::unsupported(format!("VHD version {version:#x}")));
        }
        let disk_type = match bytes.u32_at(60) {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            other => return Err(ImageError::unsupported(format!("VHD of type {other}"))),
        };
        let disk_bytes = bytes.u64_at(48);
        if disk_bytes == 0 || !disk_bytes.is_multiple_of(super::SECTOR) || disk_bytes > 64 << 40 {
            return Err(ImageError::damaged(format!("a virtual disk of {disk_bytes} bytes")));
        }
        Ok(Some(Self {
            disk_type,
            disk_bytes,
            header_offset: bytes.u64_at(16),
            time_stamp: bytes.u32_at(24),
            unique_id: bytes.uuid_at(68),
            is_hidden,
        }))
    }
}

/// Reads the footer of a file of `file_bytes`, and says where it begins.
///
/// A file that was cut, or not closed, is read by the copy at its start. Very old footers are a byte short.
pub(super) fn read(file: &File, file_bytes: u64) -> Result<(Footer, u64), ImageError> {
    let none = || ImageError::damaged("no valid VHD footer at the end of the file or at its start");
    let last = file_bytes.checked_sub(BYTES as u64).ok_or_else(none)?;
    for (at, len) in [(last, BYTES), (last + 1, BYTES - 1), (0, BYTES)] {
        let mut bytes = [0; BYTES];
        file.read_exact_at(&mut bytes[..len], at).map_err(ImageError::io("footer"))?;
        match Footer::decode(&bytes)? {
            Some(footer) if at == 0 && footer.disk_type == DiskType::Fixed => return Err(none()),
            Some(footer) => return Ok((footer, at)),
            None => {}
        }
    }
    Err(none())
}

/// Seconds since 2000.
pub(super) fn time_stamp(time: SystemTime) -> u32 {
    let unix = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(unix.saturating_sub(EPOCH_UNIX_SECONDS)).unwrap_or(u32::MAX)
}

/// The time that an id carries, in seconds since 2000: our ids do (UUID version 7), so that a merged file which takes a child's
/// id has its time stamp too.
pub(super) fn time_stamp_of(id: Uuid) -> Option<u32> {
    let (unix, _) = id.get_timestamp().filter(|_| id.get_version_num() == 7)?.to_unix();
    u32::try_from(unix.checked_sub(EPOCH_UNIX_SECONDS)?).ok()
}

/// The time that a time stamp stands for.
pub(super) fn time_of(time_stamp: u32) -> SystemTime {
    let unix = EPOCH_UNIX_SECONDS + u64::from(time_stamp);
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(unix)
}

/// Cylinders, heads and sectors per track, by the appendix of the specification: a hint for old systems.
fn geometry(disk_bytes: u64) -> (u16, u8, u8) {
    let total = (disk_bytes / super::SECTOR).min(65_535 * 16 * 255);
    if total >= 65_535 * 16 * 63 {
        return ((total / 255 / 16) as u16, 16, 255);
    }
    let (mut sectors, mut tracks) = (17, total / 17);
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (sectors, heads) = (31, 16);
        tracks = total / sectors;
    }
    if tracks >= heads * 1024 {
        (sectors, heads) = (63, 16);
        tracks = total / sectors;
    }
    ((tracks / heads) as u16, heads as u8, sectors as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::temporary;

    fn footer() -> Footer {
        Footer {
            disk_type: DiskType::Dynamic,
            disk_bytes: 5 << 20,
            header_offset: 512,
            time_stamp: 77,
            unique_id: Uuid::from_u128(7 << 100),
            is_hidden: false,
        }
    }

    #[test]
    fn a_footer_survives_the_round_trip_and_every_flip_is_noticed() {
        let bytes = footer().encode();
        assert_eq!(Footer::decode(&bytes).unwrap(), Some(footer()));
        for at in 0..BYTES {
            let mut flipped = bytes;
            flipped[at] ^= 0x10;
            assert_eq!(Footer::decode(&flipped).unwrap(), None, "byte {at}");
        }
    }

    #[test]
    fn footers_of_other_creators_say_the_same() {
        for creator in [b"jnsb", b"vpc "] {
            let mut bytes = footer().encode();
            assert_eq!(&bytes[28..32], b"win ", "what QEMU before 8 knows");
            put(&mut bytes, 28, creator);
            let sum = checksum(&bytes, CHECKSUM);
            put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
            assert_eq!(Footer::decode(&bytes).unwrap(), Some(footer()));
        }
    }

    #[test]
    fn the_copy_at_the_start_serves_when_the_end_is_lost() {
        let file = temporary();
        file.write_all_at(&footer().encode(), 0).unwrap();
        file.set_len(8192).unwrap();
        assert_eq!(read(&file, 8192).unwrap(), (footer(), 0));
        let newer = Footer { time_stamp: 78, ..footer() };
        file.write_all_at(&newer.encode(), 8192 - 512).unwrap();
        assert_eq!(read(&file, 8192).unwrap(), (newer, 8192 - 512));
        // As Virtual PC before 2004 wrote it.
        file.write_all_at(&newer.encode()[..511], 8192 - 511).unwrap();
        assert_eq!(read(&file, 8192).unwrap(), (newer, 8192 - 511));
        for length in [600, 512, 511, 0] {
            file.set_len(length).unwrap();
            assert_eq!(read(&file, length).is_ok(), length >= 512, "{length}");
        }
    }

    #[test]
    fn geometries_are_those_of_the_specification() {
        // What Virtual PC gives disks of these sizes.
        assert_eq!(geometry(12_582_912), (361, 4, 17));
        assert_eq!(geometry(4096), (0, 4, 17));
        assert_eq!(geometry(1 << 30), (2080, 16, 63));
        assert_eq!(geometry(127 << 30), (65_278, 16, 255));
        assert_eq!(geometry(2040 << 30), (65_535, 16, 255));
    }

    #[test]
    fn time_stamps_count_from_2000() {
        let now = time_stamp(SystemTime::now());
        assert!(time_stamp_of(Uuid::now_v7()).is_some_and(|stamp| stamp - now < 3));
        assert_eq!(time_stamp_of(Uuid::new_v4()), None);
        assert_eq!(time_stamp(time_of(812_345_678)), 812_345_678);
        assert_eq!(time_stamp(SystemTime::UNIX_EPOCH), 0);
    }
}
