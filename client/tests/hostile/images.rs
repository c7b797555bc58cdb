//! Volumes as their own makers leave them.

use std::{fs, process::Command};

use janus_client::{
    fs::{FileSystemKind, free},
    fuzz::{Sparse, encode},
    journal::{Journal, ntfs_usn::NtfsUsn},
    source::view::ReadAt,
    volume::layout,
};
use serde_json::json;
use xtask::disk;

use super::{
    scene::{Library, Volume as NtfsVolume},
    volume::Volume,
};

const MIB: u64 = 1 << 20;
const FIRST_USN: u64 = 1 << 18;
const OVERWRITE: u32 = 1;
const CLOSE: u32 = 0x8000_0000;

/// ext4, with checksums and without, and with other places for its structures.
pub const EXT4: [(&str, u64); 5] = [
    ("mkfs.ext4 -qF -b 1024 -O metadata_csum,64bit", 24),
    ("mkfs.ext4 -qF -b 4096 -O metadata_csum,bigalloc -C 16384", 24),
    ("mkfs.ext4 -qF -b 1024 -O metadata_csum,meta_bg,^resize_inode", 24),
    ("mkfs.ext4 -qF -b 1024 -O ^metadata_csum,uninit_bg", 24),
    ("mkfs.ext2 -qF -b 1024", 24),
];
/// XFS of both versions.
pub const XFS: [(&str, u64); 3] = [
    ("mkfs.xfs --unsupported -qf", 32),
    ("mkfs.xfs --unsupported -qf -b size=1024 -d agcount=2", 32),
    ("mkfs.xfs --unsupported -qf -m crc=0,finobt=0", 32),
];

/// A volume with files, and free space in pieces, where Linux mounts it.
pub fn filled(command: &str, mib: u64) -> Vec<u8> {
    let volume = Volume::make(command, mib * MIB);
    if !command.contains("crc=0") {
        volume.fill(5);
    }
    fs::read(volume.path()).unwrap()
}

/// An NTFS volume at two backups, and the cursor of the first.
pub struct Ntfs {
    pub before: Vec<u8>,
    pub cursor: Vec<u8>,
    pub after: Vec<u8>,
}

/// Files are made, some taken away; between the backups one is changed, one is made and one is deleted.
pub fn ntfs() -> Ntfs {
    let mut library = Library::start();
    let mut volume = NtfsVolume::new(16, 4096);
    let write = |file: u64, at: u64, len: u64| {
        json!(["write", format!("/f{file}"), at, len, file, at == 0])
    };
    let mut operations = vec![json!(["journal", 1, FIRST_USN])];
    operations.extend((0..24).map(|file| write(file, 0, 20_000 + file * 5000)));
    let made = library.change(&mut volume, operations, true).answers;
    let files: Vec<u64> = made[1..].iter().map(|answer| answer.as_u64().unwrap()).collect();
    let records = |from: u64, files: &[u64]| {
        let records: Vec<_> = files.iter().map(|file| (*file, OVERWRITE | CLOSE)).collect();
        json!(["records", from, records])
    };
    let mut operations: Vec<_> =
        (0..24).step_by(4).map(|f| json!(["delete", format!("/f{f}")])).collect();
    operations.push(records(FIRST_USN, &files));
    let answers = library.change(&mut volume, operations, true).answers;
    let next = answers.last().unwrap().as_u64().unwrap();
    let before = volume.bytes();
    let cursor = NtfsUsn::new(&volume.file()).changes(None).next.unwrap();
    let operations = vec![write(5, 4096, 9000), write(30, 0, 60_000), json!(["delete", "/f6"])];
    let made = library.change(&mut volume, operations, true).answers[1].as_u64().unwrap();
    library.change(&mut volume, vec![records(next, &[files[5], files[6], made])], true);
    Ntfs { before, cursor, after: volume.bytes() }
}

/// Committed inputs of a target that only other programs make.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let of = |kind: FileSystemKind, list: &[(&str, u64)]| {
        let image = |(command, mib): &(&str, u64)| {
            encode(&filled(command, *mib), |volume| drop(free(kind, volume)))
        };
        list.iter().map(image).collect()
    };
    match target {
        "ext4" => of(FileSystemKind::Ext4, &EXT4),
        // A log that was in use is too large to be committed.
        "xfs" => XFS.iter().map(|(command, mib)| xfs_with_a_clear_log(command, *mib)).collect(),
        "ntfs" => {
            let Ntfs { before, cursor, after } = ntfs();
            let read = |volume: &dyn ReadAt| {
                drop(free(FileSystemKind::Ntfs, volume));
                drop(NtfsUsn::new(volume).changes(Some(&cursor)));
            };
            vec![encode(&before, read), encode(&after, read)]
        }
        "mft_record" => records(&ntfs().after),
        "partitions" => vec![gpt(), mbr()],
        _ => Vec::new(),
    }
}

/// Its files are copied by its maker.
fn xfs_with_a_clear_log(command: &str, mib: u64) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (file, list) = (folder.path().join("file"), folder.path().join("list"));
    fs::write(&file, [7; 9000]).unwrap();
    let line = |number: u32| format!("f{number} ---644 0 0 {}\n", file.display());
    let files: String = (0..20).map(line).collect();
    fs::write(&list, format!("/\n0 0\nd--755 0 0\n{files}$\n")).unwrap();
    let volume = Volume::make(&format!("{command} -p {}", list.display()), mib * MIB);
    let image = fs::read(volume.path()).unwrap();
    encode(&image, |volume| drop(free(FileSystemKind::Xfs, volume)))
}

/// Records of the MFT, of the bitmap, of a folder, of the journal and of a file.
fn records(image: &[u8]) -> Vec<Vec<u8>> {
    let place = |at: usize| image.chunks(1024).position(|record| record == &image[at..at + 1024]);
    let cluster = u64::from_le_bytes(image[0x30..0x38].try_into().unwrap()) as usize;
    let mft = cluster * 4096;
    assert!(place(mft).is_some() && image[mft..].starts_with(b"FILE"));
    [0, 5, 6, 24, 30].map(|number| image[mft + number * 1024..][..1024].to_vec()).to_vec()
}

fn gpt() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    disk::blank(&path, 8 * MIB).unwrap();
    let mut sgdisk = Command::new("sgdisk");
    let made =
        sgdisk.args(["-n1:2048:+1M", "-n2:0:+2M", "-c2:data", "-n3:0:0"]).arg(&path).output();
    assert!(made.unwrap().status.success());
    encode(&fs::read(&path).unwrap(), |disk| drop(layout(disk, 512)))
}

/// Two partitions, and two logical ones in a third.
fn mbr() -> Vec<u8> {
    let mut disk = vec![0; 8 << 20];
    let mut table = |at: usize, entries: &[(u8, u32, u32)]| {
        for (number, (kind, first, sectors)) in entries.iter().enumerate() {
            let entry = &mut disk[at * 512 + 446 + number * 16..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..16].copy_from_slice(&sectors.to_le_bytes());
        }
        disk[at * 512 + 510..][..2].copy_from_slice(&[0x55, 0xAA]);
    };
    table(0, &[(0x83, 2048, 2048), (7, 4096, 2048), (5, 6144, 8192)]);
    table(6144, &[(0x83, 63, 2000), (5, 4096, 4096)]);
    table(6144 + 4096, &[(0x82, 63, 2000)]);
    let volumes = layout(&Sparse::decode(&encode(&disk, |disk| drop(layout(disk, 512)))), 512)
        .unwrap()
        .volumes;
    assert_eq!(volumes.iter().map(|one| one.number).collect::<Vec<_>>(), [1, 2, 5, 6]);
    encode(&disk, |disk| drop(layout(disk, 512)))
}
