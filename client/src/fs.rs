//! File systems: which one a volume holds, told by its magic numbers, and which of its bytes nothing uses.
//!
//! The answers of `free` are promises: what they name may be backed up as zeros. So every doubt is an error, and an error
//! means that all of the volume is used. All here reads bytes of others: sizes are bounded before anything is allocated.

use std::{fmt, io};

use uuid::Uuid;

use janus_proto::ranges::Ranges;

use crate::source::view::ReadAt;

pub mod ext4;
pub mod ntfs;
pub mod xfs;

/// Why nothing is said about a volume's free space: all of it counts as used.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// It could not be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Its structures contradict each other.
    #[error("damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// It is in use, or was not unmounted: what is on the disk is not the last word.
    #[error("not clean: {what}")]
    NotClean {
        /// How that is known.
        what: String,
    },
    /// It has a feature that is not understood here.
    #[error("not supported: {what}")]
    Unsupported {
        /// The feature.
        what: String,
    },
}

impl FsError {
    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }

    pub(crate) fn not_clean(what: impl Into<String>) -> Self {
        Self::NotClean { what: what.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }
}

/// The byte ranges of `volume` that its file system, a `kind`, does not use; `None`: of such nothing is known here.
///
/// # Errors
/// When that can't be proven: all of it is used then.
pub fn free(kind: FileSystemKind, volume: &dyn ReadAt) -> Result<Option<Ranges>, FsError> {
    match kind {
        FileSystemKind::Ext2 | FileSystemKind::Ext3 | FileSystemKind::Ext4 => ext4::free(volume),
        FileSystemKind::Xfs => xfs::free(volume),
        FileSystemKind::Ntfs => ntfs::free(volume),
        _ => return Ok(None),
    }
    .map(Some)
}

/// The numbers below `end` whose bit in a bitmap is zero.
fn zero_bits(bitmap: &[u8], end: u64) -> Ranges {
    let mut zeros = Ranges::new();
    for (byte, base) in bitmap.iter().zip((0..end).step_by(8)) {
        match byte {
            // What comes after so many counts as used: memory is bounded.
            _ if zeros.len() > 4 * MANY_RANGES => break,
            0xFF => {}
            0 => zeros.push(base..end.min(base + 8)),
            _ => {
                for bit in (0..8).filter(|bit| byte >> bit & 1 == 0 && base + bit < end) {
                    zeros.push(base + bit..base + bit + 1);
                }
            }
        }
    }
    zeros
}

/// Ranges that are kept of one volume before short ones are left out, which then count as used: 32 MiB of memory.
const MANY_RANGES: usize = 1 << 21;
/// What is short then.
const SHORT_BYTES: u64 = 1 << 20;

/// Collects ascending free ranges in bounded memory.
#[derive(Default)]
struct Free(Ranges);

impl Free {
    fn push(&mut self, range: std::ops::Range<u64>) {
        if self.0.len() < MANY_RANGES || range.end - range.start >= SHORT_BYTES {
            self.0.push(range);
        }
    }
}

/// What a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileSystemKind {
    /// NTFS.
    Ntfs,
    /// ext2: ext4's ancestor, without a journal.
    Ext2,
    /// ext3: the same with one.
    Ext3,
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// FAT12, FAT16 or FAT32.
    Fat,
    /// exFAT.
    ExFat,
    /// Linux swap space.
    Swap,
    /// A physical volume of LVM.
    LvmPv,
    /// A part of a Linux software RAID.
    LinuxRaid,
    /// An encrypted volume of LUKS.
    Luks,
    /// An encrypted volume of Windows.
    BitLocker,
    /// A part of a ZFS pool.
    Zfs,
    /// ISO 9660.
    Iso9660,
}

impl fmt::Display for FileSystemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ntfs => "NTFS",
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "XFS",
            Self::Btrfs => "btrfs",
            Self::Fat => "FAT",
            Self::ExFat => "exFAT",
            Self::Swap => "swap",
            Self::LvmPv => "LVM",
            Self::LinuxRaid => "RAID",
            Self::Luks => "LUKS",
            Self::BitLocker => "BitLocker",
            Self::Zfs => "ZFS",
            Self::Iso9660 => "ISO 9660",
        })
    }
}

/// A file system as it names itself. Its id is written as `blkid` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is.
    pub kind: FileSystemKind,
    /// Its id; may be empty.
    pub uuid: String,
    /// Its label; may be empty.
    pub label: String,
}

/// The first bytes of a volume, as far as they are read to tell what it is.
const HEAD_BYTES: u64 = 256 << 10;

/// What is on `volume`; `None`: nothing that is known here.
///
/// # Errors
/// When its first bytes can't be read.
pub fn detect(volume: &dyn ReadAt) -> io::Result<Option<Identity>> {
    let mut bytes = vec![0; volume.len().min(HEAD_BYTES) as usize];
    volume.read_exact_at(&mut bytes, 0)?;
    let head = Head(&bytes);
    // What lies below a file system comes first: an old superblock may still stand inside of it.
    let known = in_first_sector(head)
        .or_else(|| raid(head))
        .or_else(|| lvm(head))
        .or_else(|| ext(head))
        .or_else(|| btrfs(head))
        .or_else(|| swap(head))
        .or_else(|| zfs(head))
        .or_else(|| iso(head));
    Ok(known)
}

/// What tells itself in the first sector: a partition table there is none then.
pub(crate) fn in_first_sector(head: Head<'_>) -> Option<Identity> {
    let oem = head.bytes(3, 8)?;
    if head.is(0, b"LUKS\xba\xbe") {
        let label = if head.is(6, &[0, 2]) { head.text(24, 48) } else { String::new() };
        return identity(FileSystemKind::Luks, head.text(168, 40), label);
    }
    match oem {
        b"-FVE-FS-" => return identity(FileSystemKind::BitLocker, String::new(), String::new()),
        b"NTFS    " => {
            let serial = format!("{:016X}", head.u64(0x48)?);
            return identity(FileSystemKind::Ntfs, serial, String::new());
        }
        b"EXFAT   " => {
            return identity(FileSystemKind::ExFat, serial(head.u32(100)?), String::new());
        }
        _ => {}
    }
    if head.is(0, b"XFSB") {
        return identity(FileSystemKind::Xfs, head.uuid(32)?, head.text(108, 12));
    }
    fat(head)
}

fn fat(head: Head<'_>) -> Option<Identity> {
    let (sector, cluster) = (head.u16(11)?, head.u8(13)?);
    let plausible = head.is(510, &[0x55, 0xAA])
        && matches!(sector, 512 | 1024 | 2048 | 4096)
        && cluster.is_power_of_two()
        && head.u16(14)? != 0
        && matches!(head.u8(16)?, 1 | 2);
    let mut at = [(0x36, 39), (0x52, 67)].into_iter();
    let (_, ids) = at.rfind(|(name, _)| plausible && head.is(*name, b"FAT"))?;
    let label = head.text(ids + 4, 11);
    let label = if label.trim() == "NO NAME" { String::new() } else { label.trim().to_owned() };
    identity(FileSystemKind::Fat, serial(head.u32(ids)?), label)
}

fn raid(head: Head<'_>) -> Option<Identity> {
    let at = [0, 4096].into_iter().find(|at| head.u32(*at) == Some(0xA92B_4EFC))?;
    identity(FileSystemKind::LinuxRaid, head.uuid(at + 16)?, head.text(at + 32, 32))
}

fn lvm(head: Head<'_>) -> Option<Identity> {
    let label = |at: &usize| head.is(*at, b"LABELONE") && head.is(at + 24, b"LVM2 001");
    let at = (0..4).map(|sector| sector * 512).find(label)?;
    let header = at.checked_add(usize::try_from(head.u32(at + 20)?).ok()?)?;
    let id = head.text(header, 32);
    let mut parts = Vec::new();
    let mut rest = id.as_str();
    for len in [6, 4, 4, 4, 4, 4, 6] {
        let Some((part, more)) = rest.split_at_checked(len) else { break };
        parts.push(part);
        rest = more;
    }
    identity(FileSystemKind::LvmPv, parts.join("-"), String::new())
}

fn ext(head: Head<'_>) -> Option<Identity> {
    if !head.is(0x438, &[0x53, 0xEF]) {
        return None;
    }
    let (compat, incompat, ro) = (head.u32(0x45C)?, head.u32(0x460)?, head.u32(0x464)?);
    // What ext3 doesn't know: all but filetype, recover, meta_bg; all but sparse_super, large_file, btree_dir.
    let kind = if incompat & !0x16 != 0 || ro & !0x7 != 0 {
        FileSystemKind::Ext4
    } else if compat & 0x4 != 0 {
        FileSystemKind::Ext3
    } else {
        FileSystemKind::Ext2
    };
    identity(kind, head.uuid(0x468)?, head.text(0x478, 16))
}

fn btrfs(head: Head<'_>) -> Option<Identity> {
    if !head.is(0x10040, b"_BHRfS_M") {
        return None;
    }
    identity(FileSystemKind::Btrfs, head.uuid(0x10020)?, head.text(0x1012B, 256))
}

fn swap(head: Head<'_>) -> Option<Identity> {
    let ends = |page: &usize| head.is(page - 10, b"SWAPSPACE2");
    [4096, 8192, 16384, 65536].iter().find(|page| ends(page))?;
    identity(FileSystemKind::Swap, head.uuid(1036)?, head.text(1052, 16))
}

fn zfs(head: Head<'_>) -> Option<Identity> {
    let magic = |at: usize| head.u64(at).is_some_and(|m| [m, m.swap_bytes()].contains(&0xBA_B10C));
    (0..128).find(|slot| magic((128 << 10) + slot * 1024))?;
    identity(FileSystemKind::Zfs, String::new(), String::new())
}

fn iso(head: Head<'_>) -> Option<Identity> {
    if !head.is(0x8001, b"CD001") {
        return None;
    }
    identity(FileSystemKind::Iso9660, String::new(), head.text(0x8028, 32).trim().to_owned())
}

#[allow(clippy::unnecessary_wraps)] // the last step of functions that answer `Option`
fn identity(kind: FileSystemKind, uuid: String, label: String) -> Option<Identity> {
    Some(Identity { kind, uuid, label })
}

fn serial(id: u32) -> String {
    format!("{:04X}-{:04X}", id >> 16, id & 0xFFFF)
}

/// Bytes of others: what lies past their end is `None`.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a>(pub(crate) &'a [u8]);

impl<'a> Head<'a> {
    pub(crate) fn bytes(self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(at..at.checked_add(len)?)
    }

    pub(crate) fn is(self, at: usize, magic: &[u8]) -> bool {
        self.bytes(at, magic.len()) == Some(magic)
    }

    pub(crate) fn u8(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub(crate) fn u16(self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(*self.bytes(at, 2)?.first_chunk()?))
    }

    pub(crate) fn u32(self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(*self.bytes(at, 4)?.first_chunk()?))
    }

    pub(crate) fn u64(self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(*self.bytes(at, 8)?.first_chunk()?))
    }

    pub(crate) fn be16(self, at: usize) -> Option<u16> {
        self.u16(at).map(u16::swap_bytes)
    }

    pub(crate) fn be32(self, at: usize) -> Option<u32> {
        self.u32(at).map(u32::swap_bytes)
    }

    pub(crate) fn be64(self, at: usize) -> Option<u64> {
        self.u64(at).map(u64::swap_bytes)
    }

    /// An id as Windows and the GPT write it.
    pub(crate) fn guid(self, at: usize) -> Option<Uuid> {
        Some(Uuid::from_bytes_le(*self.bytes(at, 16)?.first_chunk()?))
    }

    fn uuid(self, at: usize) -> Option<String> {
        Some(Uuid::from_bytes(*self.bytes(at, 16)?.first_chunk()?).hyphenated().to_string())
    }

    /// Up to the first zero byte, without what a terminal might obey.
    fn text(self, at: usize, len: usize) -> String {
        let bytes = self.bytes(at, len).unwrap_or_default();
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).chars().filter(|c| !c.is_control()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    impl ReadAt for Vec<u8> {
        fn len(&self) -> u64 {
            self.as_slice().len() as u64
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let from = usize::try_from(offset).map_err(io::Error::other)?;
            let end = from.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(self.get(from..end).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    fn made_by(command: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        fs::File::create(&path).unwrap().set_len(320 << 20).unwrap();
        let mut words = command.split(' ');
        let made = Command::new(words.next().unwrap()).args(words).arg(&path).output().unwrap();
        assert!(made.status.success(), "{command}: {made:?}");
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(HEAD_BYTES as usize);
        bytes
    }

    #[test]
    fn what_the_makers_of_file_systems_write_is_known() {
        let uuid = "0a1b2c3d-1122-4344-9566-778899aabbcc";
        for (command, kind) in [
            (format!("mkfs.ext2 -qF -U {uuid} -L disk"), FileSystemKind::Ext2),
            (format!("mkfs.ext3 -qF -U {uuid} -L disk"), FileSystemKind::Ext3),
            (format!("mkfs.ext4 -qF -U {uuid} -L disk"), FileSystemKind::Ext4),
            (format!("mkfs.xfs -q -m uuid={uuid} -L disk"), FileSystemKind::Xfs),
            (format!("mkswap -q -U {uuid} -L disk"), FileSystemKind::Swap),
        ] {
            let found = detect(&made_by(&command)).unwrap().unwrap();
            let expected = Identity { kind, uuid: uuid.into(), label: "disk".into() };
            assert_eq!(found, expected, "{command}");
        }
    }

    #[test]
    fn magic_numbers_tell_the_others() {
        type Parts<'a> = &'a [(usize, &'a [u8])];
        let cases: [(Parts<'_>, _); 9] = [
            (&[(3, b"NTFS    ")], FileSystemKind::Ntfs),
            (&[(3, b"EXFAT   ")], FileSystemKind::ExFat),
            (&[(3, b"-FVE-FS-")], FileSystemKind::BitLocker),
            (&[(0, b"LUKS\xba\xbe")], FileSystemKind::Luks),
            (
                &[(512, b"LABELONE"), (536, b"LVM2 001"), (0x438, b"\x53\xEF")],
                FileSystemKind::LvmPv,
            ),
            (&[(4096, b"\xfc\x4e\x2b\xa9")], FileSystemKind::LinuxRaid),
            (&[(0x10040, b"_BHRfS_M")], FileSystemKind::Btrfs),
            (&[(0x21000, b"\x0c\xb1\xba\0\0\0\0\0")], FileSystemKind::Zfs),
            (&[(0x8001, b"CD001")], FileSystemKind::Iso9660),
        ];
        for (parts, kind) in cases {
            let mut bytes = vec![0; HEAD_BYTES as usize];
            for (at, magic) in parts {
                bytes[*at..at + magic.len()].copy_from_slice(magic);
            }
            assert_eq!(detect(&bytes).unwrap().map(|found| found.kind), Some(kind));
        }
        for len in [0, 1, 511, 1081, 70_000] {
            assert_eq!(detect(&vec![0u8; len]).unwrap(), None, "{len}");
        }
    }

    #[test]
    fn a_fat_tells_its_serial_and_label() {
        let mut bytes = vec![0; 512];
        bytes[11..17].copy_from_slice(&[0, 2, 8, 32, 0, 2]);
        bytes[67..71].copy_from_slice(&[0xCD, 0xAB, 0x34, 0x12]);
        bytes[71..90].copy_from_slice(b"EFI        FAT32   ");
        bytes[510..].copy_from_slice(&[0x55, 0xAA]);
        let found = detect(&bytes).unwrap().unwrap();
        assert_eq!(
            (found.kind, &*found.uuid, &*found.label),
            (FileSystemKind::Fat, "1234-ABCD", "EFI")
        );
    }
}
