//! Images that other programs made, taken in as backups: exact, sparse, continued by what differs, and read right by others.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use chains::Model;
use janus_server::{
    carry::{self, CarryError, Content, Imported, NewDisk, NewRun},
    image::{Format, Geometry, Identity, Image, Kind, Layout, PAYLOAD_BYTES, Payload, UNIT_BYTES},
    storage,
};
use readers::{INSTALL_7Z, assert_same, libvhdi, run, seven_zip};
use sample::Sample;

mod chains;
mod readers;
#[allow(dead_code)] // Each test file uses its own part.
#[path = "../../proto/src/image/sample.rs"]
mod sample;

const MIB: usize = 1 << 20;

/// A disk with data at its ends and much of nothing between.
fn raw(path: &Path, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for range in [0..3 * MIB, len - MIB - 77..len] {
        for at in range {
            bytes[at] = (at / 512 * 7 + at % 251) as u8;
        }
    }
    let file = File::create(path).unwrap();
    file.set_len(len as u64).unwrap();
    file.write_all_at(&bytes[..3 * MIB], 0).unwrap();
    let tail = len - MIB - 77;
    file.write_all_at(&bytes[tail..], tail as u64).unwrap();
    bytes
}

fn import(
    model: &Model,
    (content, size_bytes, logical_sector_bytes): (Box<dyn Content>, u64, u32),
    taken_ms: i64,
) -> Result<Imported, CarryError> {
    let occupied_bytes = content.occupied_bytes();
    let disk = NewDisk {
        disk: "sda".parse().unwrap(),
        size_bytes,
        logical_sector_bytes,
        consistency: 2,
        skipped_bytes: 0,
        data_bytes: occupied_bytes,
        content,
    };
    let machine = model.key.clone();
    let (seal, disks) = (Vec::new(), vec![disk]);
    let new = NewRun { machine, run: None, taken_ms, seal, from: None, stubs: false, disks };
    let imported = carry::import(&model.runs, &new, &|_, _| true)?;
    // So much room is looked for before.
    assert!(imported.written_bytes <= occupied_bytes.unwrap());
    Ok(imported)
}

fn foreign(path: &Path) -> Result<(Box<dyn Content>, u64, u32), CarryError> {
    carry::foreign(&storage::Disk::default(), path)
}

/// Notes what was imported, compares it, and lets others read it.
fn check(model: &mut Model, imported: &Imported, expected: &[u8], what: &str) {
    let snapshot = &imported.run.snapshots[0];
    let mut content = expected.to_vec();
    // A disk of other programs may be longer than what was put on it.
    content.resize(snapshot.size_bytes as usize, 0);
    model.contents.insert(snapshot.id, Arc::new(content.clone()));
    model.live.insert(snapshot.id);
    model.check();
    content.resize(content.len().next_multiple_of(4096), 0);
    let image = model.folder.join("user/machine").join(&snapshot.image);
    assert_same(&run(&mut seven_zip(&image), INSTALL_7Z).stdout, &content, what);
    if snapshot.parent.is_none() {
        assert_same(&libvhdi(&[image], ""), &content, what);
    }
}

fn qemu(format: &str, options: &str, from: &Path, to: &Path) {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", format, "-o", options]).args([from, to]);
    run(&mut command, "apt-get install qemu-utils");
}

#[test]
fn images_of_qemu_and_raw_disks_become_bases_that_take_what_their_data_takes() {
    let base = tempfile::tempdir().unwrap();
    let source = base.path().join("source.raw");
    let expected = raw(&source, 24 * MIB + 4096);
    let mut images: Vec<(String, PathBuf)> = Vec::new();
    for (format, options) in [
        ("vhdx", "subformat=dynamic"),
        ("vhdx", "subformat=fixed"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
    ] {
        let path = base.path().join(format!("image-{}.{format}", images.len()));
        qemu(format, options, &source, &path);
        images.push((format!("{format} {options}"), path));
    }
    for (number, (what, path)) in images.iter().enumerate() {
        let before = fs::read(path).unwrap();
        for format in Format::ALL {
            let store = base.path().join(format!("store-{number}-{}", format.extension()));
            let mut model = Model::of(format, &store);
            let imported = import(&model, foreign(path).unwrap(), 7_000).unwrap();
            assert_eq!(
                (imported.run.committed_ms, imported.run.snapshots[0].consistency),
                (7_000, 2)
            );
            let written = imported.written_bytes as usize;
            assert!((4 * MIB..4 * MIB + 20_000).contains(&written), "{what}: {written}");
            let allocated = imported.run.snapshots[0].image_allocated_bytes as usize;
            assert!(allocated < 6 * MIB, "{what}: {allocated}");
            check(&mut model, &imported, &expected, what);
        }
        assert!(fs::read(path).unwrap() == before, "{what}: it stays as it was");
    }
    let mut model = Model::of(Format::Vhdx, &base.path().join("store-raw"));
    let (content, size) = carry::raw(&storage::Disk::default(), &source).unwrap();
    let imported = import(&model, (content, size, 512), 7_000).unwrap();
    check(&mut model, &imported, &expected, "raw");
    // Changed, it continues the chain with what differs.
    let mut changed = expected.clone();
    changed[MIB..MIB + 4096].fill(0xab);
    changed[2 * MIB..2 * MIB + 8192].fill(0);
    fs::write(&source, &changed).unwrap();
    let (content, size) = carry::raw(&storage::Disk::default(), &source).unwrap();
    let next = import(&model, (content, size, 512), 8_000).unwrap();
    assert_eq!(next.written_bytes, 4096);
    assert_eq!(next.run.snapshots[0].parent, Some(imported.run.snapshots[0].id));
    check(&mut model, &next, &changed, "changed");
    model.reopen();
    model.check();
}

#[test]
fn a_differencing_image_is_read_with_its_parents_and_not_without() {
    for (format, sector_bytes) in [(Format::Vhdx, 512), (Format::Vhdx, 4096), (Format::Vhd, 512)] {
        let base = tempfile::tempdir().unwrap();
        let geometry = Geometry { disk_bytes: 21 << 20, logical_sector_bytes: sector_bytes };
        let mut sample = Sample::of(format, base.path(), geometry);
        sample.add(&(0..900).map(|unit| (unit, 1)).collect());
        sample.add(&(100..130).map(|unit| (unit, 2)).collect());
        let last: BTreeMap<u64, u64> = [(5, 3), (110, 0), (5000, 4)].into();
        sample.add(&last);
        let expected = base.path().join("expected.raw");
        sample.write_raw(&expected);
        let expected = fs::read(expected).unwrap();
        let leaf = sample.files.last().unwrap();
        let mut model = Model::of(Format::Vhdx, &base.path().join("store"));
        let imported = import(&model, foreign(leaf).unwrap(), 7_000).unwrap();
        assert_eq!(imported.run.snapshots[0].logical_sector_bytes, sector_bytes);
        check(&mut model, &imported, &expected, "a chain");
        fs::rename(&sample.files[0], base.path().join("away")).unwrap();
        let error = foreign(leaf).err().unwrap().to_string();
        assert!(error.contains("parent") && error.contains("copy it there"), "{error}");
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("odd");
    for (len, words) in [(513, "multiple of 512"), (0, "has 0 bytes")] {
        fs::write(&path, vec![1; len]).unwrap();
        let error = carry::raw(&storage::Disk::default(), &path).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
        assert!(foreign(&path).is_err());
    }
    let none = carry::raw(&storage::Disk::default(), &base.path().join("none"));
    assert!(matches!(none, Err(CarryError::Io { .. })));
}
