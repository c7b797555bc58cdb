//! Images that other programs made, read right: every block size, fixed and dynamic, a log that was not replayed, damaged
//! copies. And our own with 4096-byte sectors, read by another program.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use janus_server::{
    image::{
        Format, Geometry, Identity, Image, ImageError, Kind, Layout, PAYLOAD_BYTES, Payload,
        UNIT_BYTES,
        foreign::{ForeignChain, ForeignError, open_chain},
        set_hidden, set_identity,
    },
    storage,
};

mod readers;
#[path = "../../proto/src/image/sample.rs"]
mod sample;

use readers::vhdx_core;
use sample::Sample;

const MIB: usize = 1 << 20;

fn qemu(arguments: &[&str], paths: &[&Path]) {
    let mut command = Command::new("qemu-img");
    let output = command.args(arguments).args(paths).output();
    let output = output.expect("qemu-img: apt-get install qemu-utils");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn open(path: &Path) -> Result<ForeignChain, ForeignError> {
    open_chain(&storage::Disk::default(), path)
}

/// All of a chain's disk, in pieces that fit no border.
fn read(chain: &ForeignChain) -> Vec<u8> {
    let mut disk = vec![0xee; chain.layers.geometry().disk_bytes as usize];
    let mut start = 0;
    for piece in disk.chunks_mut(777_777) {
        chain.layers.read_at(start, piece).unwrap();
        start += piece.len() as u64;
    }
    disk
}

/// Data, zeros and holes over `len` bytes.
fn raw(path: &Path, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
    for (number, stretch) in bytes.chunks_mut(700_000).enumerate() {
        if number % 3 == 1 {
            stretch.fill(0);
        }
    }
    fs::write(path, &bytes).unwrap();
    bytes
}

fn assert_same(actual: &[u8], expected: &[u8], what: &str) {
    let difference = actual.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(difference, None, "{what}: first byte that differs");
    // qemu-img may make a VHD longer, so that its size has a geometry.
    assert!(actual.len() >= expected.len(), "{what}: {} bytes", actual.len());
    assert!(actual[expected.len()..].iter().all(|byte| *byte == 0), "{what}: behind its end");
}

#[test]
fn images_of_qemu_read_right_whatever_their_kind_and_block_size() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.raw");
    let expected = raw(&source, 9 * MIB + 4096);
    let vhdx = ["1M", "2M", "8M", "32M", "256M"]
        .map(|size| ("vhdx", format!("subformat=dynamic,block_size={size}")));
    let others = [
        ("vhdx", "subformat=fixed"),
        ("vhdx", "subformat=dynamic,block_state_zero=off"),
        ("vpc", "subformat=dynamic"),
        ("vpc", "subformat=fixed"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
    ];
    for (format, options) in others.map(|(f, o)| (f, o.to_owned())).into_iter().chain(vhdx) {
        let image = folder.path().join(format!("image.{format}"));
        qemu(&["convert", "-f", "raw", "-O", format, "-o", &options], &[&source, &image]);
        let chain = open(&image).unwrap_or_else(|error| panic!("{format} {options}: {error}"));
        chain.layers.newest().check_blocks().unwrap();
        assert_same(&read(&chain), &expected, &format!("{format} {options}"));
    }
}

/// A VHD with 5 blocks of this size, of which every third is absent. A child of `parent.vhd` has bitmaps with lone sectors, as
/// Windows writes them. In a base all sectors are there: of others 7-Zip makes an error, qemu data, the specification zeros.
fn vhd_with_blocks(block_bytes: usize, is_child: bool) -> Vec<u8> {
    let (blocks, seed) = (5, usize::from(is_child));
    let used = block_bytes / 4096;
    let (mut table, mut data) = (vec![0xff; 512], Vec::new());
    let start = 1536 + table.len() + 512;
    for block in (seed..blocks).filter(|block| block % 3 != 1 - seed) {
        let entry = ((start + data.len()) / 512) as u32;
        table[block * 4..block * 4 + 4].copy_from_slice(&entry.to_be_bytes());
        let bits = |at: usize| if is_child { (at * 37 + block) as u8 } else { 0xff };
        data.extend((0..used.next_multiple_of(512)).map(|at| if at < used { bits(at) } else { 0 }));
        data.extend((0..block_bytes).map(|at| (at / 512 * 5 + at % 239 + block + seed * 3) as u8));
    }
    let mut header = vec![0; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[8..16].fill(0xff);
    header[16..24].copy_from_slice(&1536u64.to_be_bytes());
    header[24..28].copy_from_slice(&[0, 1, 0, 0]);
    header[28..32].copy_from_slice(&(blocks as u32).to_be_bytes());
    header[32..36].copy_from_slice(&(block_bytes as u32).to_be_bytes());
    let mut path = Vec::new();
    if is_child {
        path.extend(r".\parent.vhd".encode_utf16().flat_map(u16::to_le_bytes));
        header[40..56].fill(1);
        for (at, unit) in "parent.vhd".encode_utf16().enumerate() {
            header[64 + at * 2..66 + at * 2].copy_from_slice(&unit.to_be_bytes());
        }
        header[576..580].copy_from_slice(b"W2ru");
        header[580..584].copy_from_slice(&512u32.to_be_bytes());
        header[584..588].copy_from_slice(&(path.len() as u32).to_be_bytes());
        header[592..600].copy_from_slice(&2048u64.to_be_bytes());
    }
    path.resize(512, 0);
    let mut footer = vec![0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[8..16].copy_from_slice(&[0, 0, 0, 2, 0, 1, 0, 0]);
    footer[16..24].copy_from_slice(&512u64.to_be_bytes());
    footer[28..40].copy_from_slice(b"win \0\x0a\0\0Wi2k");
    for at in [40, 48] {
        footer[at..at + 8].copy_from_slice(&((blocks * block_bytes) as u64).to_be_bytes());
    }
    footer[63] = 3 + seed as u8;
    footer[68..84].fill(1 + seed as u8);
    for (bytes, field) in [(&mut header, 36), (&mut footer, 64)] {
        let sum = !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
    }
    [footer.clone(), header, table, path, data, footer].concat()
}

#[test]
fn vhds_of_other_block_sizes_read_as_7_zip_reads_them() {
    for block_bytes in [64 << 10, 512 << 10, MIB, 4 * MIB] {
        let folder = tempfile::tempdir().unwrap();
        for (name, is_child) in [("parent.vhd", false), ("child.vhd", true)] {
            let path = folder.path().join(name);
            fs::write(&path, vhd_with_blocks(block_bytes, is_child)).unwrap();
            let mut command = Command::new("7z");
            let output = command.args(["x", "-y", "-so", "-tVHD", "--"]).arg(&path).output();
            let output = output.expect("7z: apt-get install p7zip-full");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let chain = open(&path).unwrap();
            assert_eq!(chain.paths.len(), 1 + usize::from(is_child));
            chain.layers.newest().check_blocks().unwrap();
            let read = read(&chain);
            assert_same(&read, &output.stdout, &format!("{name}, blocks of {block_bytes} bytes"));
            assert_eq!((read.len(), output.stdout.len()), (5 * block_bytes, 5 * block_bytes));
        }
    }
}

/// A VHDX of qemu whose newest change is only in its log: the log's last entry, which qemu wrote, holds the allocation table that
/// was taken away here, and the header says that it counts.
fn with_dirty_log(path: &Path) -> Vec<u8> {
    qemu(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M"], &[path, Path::new("16M")]);
    // In one go: a second one would begin the log anew.
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "vhdx", "-c", "write -P 7 0 3M", "-c", "write -P 9 8M 1M"]);
    let output = qemu_io.arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut bytes = fs::read(path).unwrap();
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let log = MIB..2 * MIB;
    let newest = log
        .step_by(4096)
        .filter(|at| &bytes[*at..at + 4] == b"loge")
        .max_by_key(|at| field(at + 16));
    let newest = newest.expect("qemu leaves its log as it is");
    let id = bytes[newest + 32..newest + 48].to_vec();
    for at in [64 << 10, 128 << 10] {
        bytes[at + 48..at + 64].copy_from_slice(&id);
        bytes[at + 4..at + 8].fill(0);
        let sum = crc32c::crc32c(&bytes[at..at + 4096]);
        bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let table = (0..2)
        .map(|entry| (192 << 10) + 16 + entry * 32)
        .find(|at| bytes[*at] == 0x66)
        .map(|at| u64::from_le_bytes(bytes[at + 16..at + 24].try_into().unwrap()) as usize);
    let table = table.expect("the region of the allocation table");
    assert!(bytes[table..table + 128].iter().any(|byte| *byte != 0));
    bytes[table..table + 4096].fill(0);
    fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn a_log_is_replayed_without_touching_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dirty.vhdx");
    let before = with_dirty_log(&path);
    let file = |path| storage::Disk::default().open(path, storage::Access::Read).unwrap();
    assert!(matches!(Image::open(file(&path)), Err(ImageError::DirtyLog)));
    let chain = open(&path).unwrap();
    chain.layers.newest().check_blocks().unwrap();
    let mut expected = vec![0; 16 * MIB];
    expected[..3 * MIB].fill(7);
    expected[8 * MIB..9 * MIB].fill(9);
    assert_same(&read(&chain), &expected, "replayed");
    assert!(fs::read(&path).unwrap() == before);
    // qemu agrees, once it has replayed the log into a copy.
    let (copy, converted) = (folder.path().join("copy.vhdx"), folder.path().join("copy.raw"));
    fs::copy(&path, &copy).unwrap();
    qemu(&["check", "-q", "-f", "vhdx", "-r", "all"], &[&copy]);
    qemu(&["convert", "-f", "vhdx", "-O", "raw"], &[&copy, &converted]);
    assert_same(&fs::read(converted).unwrap(), &expected, "qemu");
}

#[test]
fn a_log_that_is_not_whole_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dirty.vhdx");
    let bytes = with_dirty_log(&path);
    let entries: Vec<usize> =
        (MIB..2 * MIB).step_by(4096).filter(|at| &bytes[*at..at + 4] == b"loge").collect();
    for at in &entries {
        for within in [16, 64, 4096 + 100, 8191] {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[bytes[at + within] ^ 1], (at + within) as u64).unwrap();
        }
    }
    let error = open(&path).unwrap_err();
    assert!(
        matches!(error, ForeignError::Image { source: ImageError::Damaged { .. }, .. }),
        "{error}"
    );
    // Cut since the log was written.
    fs::write(&path, &bytes[..bytes.len() - MIB]).unwrap();
    open(&path).unwrap_err();
}

/// Flips a byte of the file, does something, and flips it back.
fn with_flip(path: &Path, at: u64, work: impl FnOnce()) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
    work();
    file.write_all_at(&byte, at).unwrap();
}

#[test]
fn either_copy_of_headers_and_regions_is_enough() {
    let folder = tempfile::tempdir().unwrap();
    let (source, image) = (folder.path().join("source.raw"), folder.path().join("image.vhdx"));
    let expected = raw(&source, 3 * MIB);
    qemu(&["convert", "-f", "raw", "-O", "vhdx"], &[&source, &image]);
    let pairs: [[u64; 2]; 2] = [[64 << 10, 128 << 10], [192 << 10, 256 << 10]];
    for pair in pairs {
        for at in pair {
            with_flip(&image, at + 20, || {
                assert_same(&read(&open(&image).unwrap()), &expected, &format!("flip at {at}"));
            });
        }
        with_flip(&image, pair[0] + 20, || {
            with_flip(&image, pair[1] + 20, || drop(open(&image).unwrap_err()));
        });
    }
    assert_same(&read(&open(&image).unwrap()), &expected, "whole again");
}

#[test]
fn blocks_without_data_read_as_zeros_in_a_base_and_as_the_parent_only_where_not_present() {
    let folder = tempfile::tempdir().unwrap();
    let geometry = Geometry { disk_bytes: 8 << 20, logical_sector_bytes: 512 };
    let mut sample = Sample::new(folder.path(), geometry);
    sample.add(&(0..2048).map(|unit| (unit, 1)).collect());
    sample.add(&[(0, 2)].into());
    let parent: Vec<u8> = (0..2048).flat_map(|unit| sample::unit(unit, 1)).collect();
    // The second payload block, of which the child holds nothing: its table entry is at 3 MiB.
    let block = 2 * MIB..4 * MIB;
    for (state, is_parent) in [(0, true), (1, false), (2, false), (3, false)] {
        let file = File::options().write(true).open(&sample.files[1]).unwrap();
        file.write_all_at(&u64::to_le_bytes(state), (3 << 20) + 8).unwrap();
        let disk = read(&open(&sample.files[1]).unwrap());
        let expected = if is_parent { parent[block.clone()].to_vec() } else { vec![0; 2 * MIB] };
        assert_same(&disk[block.clone()], &expected, &format!("state {state}"));
        // Of a base, every one of them is zero.
        let file = File::options().write(true).open(&sample.files[0]).unwrap();
        let mut entry = [0; 8];
        File::open(&sample.files[0]).unwrap().read_exact_at(&mut entry, (3 << 20) + 16).unwrap();
        file.write_all_at(&u64::to_le_bytes(state), (3 << 20) + 16).unwrap();
        let disk = read(&open(&sample.files[0]).unwrap());
        assert!(disk[4 * MIB..6 * MIB].iter().all(|byte| *byte == 0), "state {state}");
        file.write_all_at(&entry, (3 << 20) + 16).unwrap();
    }
}

fn chain(format: Format, folder: &Path, links: u64) -> Sample {
    let geometry = Geometry { disk_bytes: 9 << 20, logical_sector_bytes: 512 };
    let mut sample = Sample::of(format, folder, geometry);
    for link in 1..=links {
        sample.add(&(0..40).map(|i| ((link * 131 + i * 397) % 2304, link)).collect());
    }
    sample
}

fn expected(sample: &Sample) -> Vec<u8> {
    let path = sample.folder.join("expected.raw");
    sample.write_raw(&path);
    fs::read(path).unwrap()
}

#[test]
fn chains_are_found_by_names_in_their_folder() {
    for format in Format::ALL {
        let folder = tempfile::tempdir().unwrap();
        let sample = chain(format, folder.path(), 4);
        let found = open(&sample.files[3]).unwrap();
        let paths: Vec<PathBuf> = sample.files.iter().rev().cloned().collect();
        assert_eq!(found.paths, paths);
        assert_same(&read(&found), &expected(&sample), format.extension());
        // As Windows would find it.
        let shouting = sample.files[1].with_file_name("DISK-0001.".to_owned() + format.extension());
        fs::rename(&sample.files[1], shouting).unwrap();
        assert_same(&read(&open(&sample.files[3]).unwrap()), &expected_again(&sample), "case");
        fs::remove_file(&sample.files[0]).unwrap();
        let error = open(&sample.files[3]).unwrap_err();
        assert!(
            matches!(&error, ForeignError::NoParent { names, .. } if names.len() == 1),
            "{error}"
        );
        assert!(error.to_string().contains("disk-0000"), "{error}");
    }
}

fn expected_again(sample: &Sample) -> Vec<u8> {
    fs::read(sample.folder.join("expected.raw")).unwrap()
}

/// A stub looks like no image to others, and is one to its own server.
#[test]
fn a_hidden_image_is_opened_by_its_own_server_alone() {
    for format in Format::ALL {
        let folder = tempfile::tempdir().unwrap();
        let sample = chain(format, folder.path(), 1);
        let path = &sample.files[0];
        let file = || storage::Disk::default().open(path, storage::Access::Write).unwrap();
        let whole = fs::read(path).unwrap();
        let id = Image::open(file()).unwrap().data_write();
        set_hidden(&file(), true).unwrap();
        let hidden = fs::read(path).unwrap();
        assert!(!hidden.windows(8).any(|found| found == b"vhdxfile" || found == b"conectix"));
        let image = Image::open(file()).unwrap();
        assert!(image.is_hidden() && image.data_write() == id && image.format() == format);
        assert!(open(path).unwrap_err().to_string().contains("a stub"));
        set_hidden(&file(), false).unwrap();
        assert_eq!(fs::read(path).unwrap(), whole, "{format:?}");
        // A merge that gives it another id shows it, too.
        set_hidden(&file(), true).unwrap();
        set_identity(&file(), id).unwrap();
        assert_same(&read(&open(path).unwrap()), &expected(&sample), "shown");
    }
}

#[test]
fn a_parent_that_is_another_or_the_child_itself_is_refused() {
    for format in Format::ALL {
        let [folder, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (sample, stranger) = (chain(format, folder.path(), 3), chain(format, other.path(), 2));
        for from in [&stranger.files[1], &sample.files[2]] {
            fs::copy(from, &sample.files[1]).unwrap();
            let error = open(&sample.files[2]).unwrap_err();
            let is_wrong =
                matches!(error, ForeignError::Image { source: ImageError::WrongParent { .. }, .. });
            assert!(is_wrong, "{error}");
        }
    }
}

/// Puts another locator into a child of ours: its metadata item has room behind it.
fn with_locator(path: &Path, pairs: &[(&str, &str)]) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut table = vec![0; 4096];
    file.read_exact_at(&mut table, 2 << 20).unwrap();
    let at = (0..6).map(|item| 32 + item * 32).find(|at| table[*at] == 0x2d).unwrap();
    let mut locator = vec![0; 20 + pairs.len() * 12];
    let old = u32::from_le_bytes(table[at + 16..at + 20].try_into().unwrap());
    file.read_exact_at(&mut locator[..16], (2 << 20) + u64::from(old)).unwrap();
    locator[18] = pairs.len() as u8;
    for (number, (key, value)) in pairs.iter().enumerate() {
        for (text, offset, length) in [(key, 0, 8), (value, 4, 10)] {
            let place = 20 + number * 12;
            let start = locator.len() as u32;
            locator.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            let bytes = (locator.len() as u32 - start) as u16;
            locator[place + offset..place + offset + 4].copy_from_slice(&start.to_le_bytes());
            locator[place + length..place + length + 2].copy_from_slice(&bytes.to_le_bytes());
        }
    }
    file.write_all_at(&locator, (2 << 20) + u64::from(old)).unwrap();
    table[at + 20..at + 24].copy_from_slice(&(locator.len() as u32).to_le_bytes());
    file.write_all_at(&table, 2 << 20).unwrap();
}

#[test]
fn parents_are_found_by_whichever_path_fits() {
    let folder = tempfile::tempdir().unwrap();
    let sample = chain(Format::Vhdx, folder.path(), 2);
    let base = Image::open(
        storage::Disk::default().open(&sample.files[0], storage::Access::Read).unwrap(),
    );
    let id = base.unwrap().data_write().hyphenated().to_string();
    let (plain, upper) = (format!("{{{id}}}"), format!("{{{}}}", id.to_uppercase()));
    let expected = expected(&sample);
    let paths: [&[(&str, &str)]; 5] = [
        &[("relative_path", r"..\elsewhere\disk-0000.vhdx")],
        &[("volume_path", r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\disk-0000.vhdx")],
        &[("absolute_win32_path", r"\\?\D:\vm\disk-0000.vhdx")],
        &[("relative_path", "moved.vhdx"), ("absolute_win32_path", r"D:\vm\disk-0000.vhdx")],
        &[("absolute_win32_path", r"D:\vm\moved.vhdx"), ("relative_path", "./disk-0000.vhdx")],
    ];
    for paths in paths {
        for link in [&plain, &upper] {
            with_locator(&sample.files[1], &[&[("parent_linkage", link.as_str())], paths].concat());
            let chain = open(&sample.files[1]).unwrap_or_else(|error| panic!("{paths:?}: {error}"));
            assert_same(&read(&chain), &expected, &format!("{paths:?}"));
        }
    }
    for pairs in [
        &[("parent_linkage", plain.as_str())][..],
        &[("relative_path", "disk-0000.vhdx")],
        &[("parent_linkage", "no id"), ("relative_path", "disk-0000.vhdx")],
        &[("parent_linkage", plain.as_str()), ("relative_path", r"..\..")],
    ] {
        with_locator(&sample.files[1], pairs);
        open(&sample.files[1]).unwrap_err();
    }
}

#[test]
fn our_vhdx_with_large_sectors_reads_right_in_another_reader() {
    for sector_bytes in [512, 4096] {
        let folder = tempfile::tempdir().unwrap();
        let geometry =
            Geometry { disk_bytes: (9 << 20) + 4096, logical_sector_bytes: sector_bytes };
        let mut sample = Sample::new(folder.path(), geometry);
        sample.add(&(0..2000).map(|unit| (unit, 1)).collect());
        for link in 2..=3 {
            let zeros = (0..20).map(|i| ((link * 57 + i * 211) % 2304, 0));
            let lone = (0..40).map(|i| ((link * 131 + i * 397) % 2304, link + i));
            let whole = (512..1024).map(|unit| (unit, link)).filter(|_| link == 3);
            sample.add(&zeros.chain(lone).chain(whole).collect::<BTreeMap<_, _>>());
        }
        let read = vhdx_core(&sample.files, sector_bytes);
        assert_same(&read, &expected(&sample), &format!("{sector_bytes}-byte sectors"));
    }
}
