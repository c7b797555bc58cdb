//! A carried folder written and read back, and what hostile or damaged ones give.

use std::{fs, sync::Arc};

use super::*;
use crate::{
    hash::{hash_blocks, segment_digest, table_digest},
    ids::{MAX_DISK_BYTES, SEGMENT_BYTES},
    image::Geometry,
    storage::{Op, Verdict, Watcher},
};

/// Data with holes, and a short last block.
fn content(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at / 4096 * 7 + at % 251 + 1) as u8).collect();
    for (number, stretch) in bytes.chunks_mut(300_000).enumerate() {
        if number % 3 == 1 {
            stretch.fill(0);
        }
    }
    bytes[5 << 20..13 << 20].fill(0);
    bytes
}

/// Writes a folder with one disk.
fn write(folder: &Path, content: &[u8]) -> Manifest {
    try_write(&Disk::default(), folder, content).unwrap()
}

fn try_write(storage: &Disk, folder: &Path, content: &[u8]) -> Result<Manifest, CarriedError> {
    let disk: DiskId = "root".parse().unwrap();
    let claim = Claim::take(storage, folder, [disk.clone()])?;
    let geometry = Geometry { disk_bytes: content.len() as u64, logical_sector_bytes: 512 };
    let mut writer = DiskWriter::create(&claim, &disk, geometry)?;
    let mut digests = Vec::new();
    for (segment, bytes) in (0..).zip(content.chunks(SEGMENT_BYTES as usize)) {
        let mut hashes = Vec::new();
        hash_blocks(bytes, &mut hashes);
        digests.push(segment_digest(&hashes));
        if bytes.iter().any(|byte| *byte != 0) {
            writer.segment(segment, &hashes, bytes)?;
        }
    }
    let entry = writer.finish(2, 7)?;
    assert_eq!(entry.table_digest, table_digest(content.len() as u64, &digests));
    let machine = MachineKey::new("alice", "laptop").unwrap();
    let manifest = Manifest::new(BackupId::new(), machine, 5, b"seal", vec![entry]);
    claim.finish(&manifest)?;
    Ok(manifest)
}

fn read_back(folder: &Path) -> Result<Vec<u8>, CarriedError> {
    let manifest = Manifest::read(&Disk::default(), folder)?;
    let disk = CarriedDisk::open(&Disk::default(), folder, &manifest.disks[0])?;
    let mut bytes = vec![0xee; disk.entry().size_bytes as usize];
    for (segment, piece) in (0..).zip(bytes.chunks_mut(SEGMENT_BYTES as usize)) {
        let expected = disk.segment(segment)?;
        disk.read_at(segment * SEGMENT_BYTES, piece)?;
        let mut found = Vec::new();
        hash_blocks(piece, &mut found);
        if let Some(wrong) = found.iter().zip(&expected).position(|(a, b)| a != b) {
            return Err(disk.wrong(segment * 1024 + wrong as u64));
        }
    }
    Ok(bytes)
}

#[test]
fn what_is_written_is_read_back_and_takes_no_more_than_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("new");
    let content = content((17 << 20) + 5 * 512);
    let manifest = write(&folder, &content);
    assert_eq!(Manifest::read(&Disk::default(), &folder).unwrap(), manifest);
    assert_eq!(manifest.seal(), b"seal");
    assert!(read_back(&folder).unwrap() == content);
    let entry = &manifest.disks[0];
    assert!(entry.data_bytes < 9 << 20 && entry.image_bytes <= 16 << 20, "{entry:?}");
    let mut names: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [MANIFEST, "root.table", "root.vhdx"]);
}

#[test]
fn a_folder_is_claimed_once_and_an_unfinished_one_is_written_anew() {
    let base = tempfile::tempdir().unwrap();
    let disk: DiskId = "root".parse().unwrap();
    let claim = |folder: &Path| Claim::take(&Disk::default(), folder, [disk.clone()]);
    // Files of somebody else stay.
    let theirs = base.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("root.vhdx"), b"mine").unwrap();
    assert!(matches!(claim(&theirs), Err(CarriedError::Occupied { .. })));
    // A killed writer leaves its mark, and nothing that could be taken in.
    let folder = base.path().join("folder");
    drop(claim(&folder).unwrap());
    fs::write(folder.join("root.vhdx"), b"half").unwrap();
    let read = Manifest::read(&Disk::default(), &folder);
    assert!(matches!(read, Err(CarriedError::Unfinished { .. })), "{read:?}");
    let content = content(14 << 20);
    write(&folder, &content);
    assert!(read_back(&folder).unwrap() == content);
    assert!(matches!(claim(&folder), Err(CarriedError::Occupied { .. })));
    // One that was given up leaves nothing.
    let folder = base.path().join("given up");
    let claimed = claim(&folder).unwrap();
    fs::write(folder.join("root.table"), b"half").unwrap();
    claimed.give_up();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    let read = Manifest::read(&Disk::default(), &folder);
    assert!(matches!(read, Err(CarriedError::Absent { .. })), "{read:?}");
}

#[test]
fn a_changed_byte_of_any_file_is_found_and_named() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("folder");
    let content = content(14 << 20);
    let manifest = write(&folder, &content);
    let image = folder.join("root.vhdx");
    let flip = |path: &Path, at: usize| {
        let mut bytes = fs::read(path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    // The last block of the image has data.
    let at = manifest.disks[0].image_bytes as usize - 4096 + 9;
    flip(&image, at);
    let error = read_back(&folder).unwrap_err();
    match &error {
        CarriedError::Block { path, offset, .. } => {
            assert!(*path == image && at - 9 == *offset as usize, "{error}");
        }
        other => panic!("{other}"),
    }
    assert!(error.is_damage());
    flip(&image, at);
    for name in ["root.table", MANIFEST] {
        let path = folder.join(name);
        for at in (0..fs::metadata(&path).unwrap().len() as usize).step_by(997) {
            flip(&path, at);
            let error = read_back(&folder).expect_err("a flipped byte");
            assert!(error.to_string().contains(name) && error.is_damage(), "{name} {at}: {error}");
            flip(&path, at);
        }
    }
    fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(9 << 20).unwrap();
    let error = read_back(&folder).unwrap_err().to_string();
    assert!(error.contains("root.vhdx") && error.contains("were written"), "{error}");
}

#[test]
fn manifests_that_ask_for_more_than_a_folder_are_refused() {
    let base = tempfile::tempdir().unwrap();
    let manifest = write(&base.path().join("folder"), &content(14 << 20));
    let right = serde_json::to_value(&manifest).unwrap();
    let parse = |value: &serde_json::Value| {
        let text = serde_json::to_vec(value).unwrap();
        Manifest::parse(Path::new("m"), &summed::with_sum(text))
    };
    assert_eq!(parse(&right).unwrap(), manifest);
    for (pointer, wrong) in [
        ("/disks/0/image", serde_json::json!("../root.vhdx")),
        ("/disks/0/image", "/etc/passwd".into()),
        ("/disks/0/table", "root.vhdx".into()),
        ("/disks/0/disk", "../root".into()),
        ("/disks/0/disk", "CON".into()),
        ("/disks/0/size_bytes", 0.into()),
        ("/disks/0/size_bytes", 513.into()),
        ("/disks/0/size_bytes", (MAX_DISK_BYTES + 512).into()),
        ("/disks/0/size_bytes", u64::MAX.into()),
        ("/disks/0/logical_sector_bytes", 520.into()),
        ("/disks/0/consistency", 9.into()),
        ("/disks/0/table_digest", "00".into()),
        ("/disks", serde_json::json!([])),
        ("/disks", serde_json::json!([right["disks"][0], right["disks"][0]])),
        ("/machine", "alice".into()),
        ("/machine", "../x".into()),
        ("/kind", "other".into()),
        ("/committed_ms", (-1).into()),
        ("/client_seal", "xy".into()),
        ("/run", "1".into()),
    ] {
        let mut value = right.clone();
        *value.pointer_mut(pointer).unwrap() = wrong.clone();
        let error = parse(&value).expect_err(&format!("{pointer} {wrong}"));
        assert!(matches!(error, CarriedError::Damaged { .. }), "{error}");
    }
    let mut newer = right.clone();
    newer["format"] = 2.into();
    newer["more"] = 1.into();
    assert!(matches!(parse(&newer), Err(CarriedError::Newer { .. })));
}

/// A disk with a file system like FAT32: files end at some size, and nothing but plain writes is there.
#[derive(Debug)]
struct Fat {
    most: u64,
}

impl Watcher for Fat {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        let end = match op {
            Op::Write { offset, data, .. } => offset + data.len() as u64,
            Op::SetLen { len, .. } => *len,
            Op::Punch { .. } | Op::CloneRange { .. } | Op::CloneAll { .. } => {
                return Err(io::ErrorKind::Unsupported.into());
            }
            _ => 0,
        };
        match end > self.most {
            true => Err(io::Error::from_raw_os_error(libc::EFBIG)),
            false => Ok(Verdict::Go),
        }
    }
}

#[test]
fn a_file_system_without_holes_will_do_and_one_for_small_files_is_named() {
    let base = tempfile::tempdir().unwrap();
    let content = content(14 << 20);
    let plain = Disk::watched(Arc::new(Fat { most: u64::MAX }));
    try_write(&plain, &base.path().join("plain"), &content).unwrap();
    assert!(read_back(&base.path().join("plain")).unwrap() == content);
    let fat = Disk::watched(Arc::new(Fat { most: 9 << 20 }));
    let error = try_write(&fat, &base.path().join("fat"), &content).unwrap_err();
    assert!(matches!(error, CarriedError::TooLarge { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("root.vhdx") && text.contains("exFAT"), "{text}");
}

#[test]
fn links_and_pipes_are_not_followed() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("folder");
    let manifest = write(&folder, &content(14 << 20));
    let image = folder.join("root.vhdx");
    let away = base.path().join("away");
    fs::rename(&image, &away).unwrap();
    std::os::unix::fs::symlink(&away, &image).unwrap();
    let open = || CarriedDisk::open(&Disk::default(), &folder, &manifest.disks[0]);
    assert!(matches!(open(), Err(CarriedError::Io { .. })));
    fs::remove_file(&image).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &image,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(open().unwrap_err().to_string().contains("no file"));
}
