//! Images read right by programs that have nothing to do with this one: 7-Zip, libvhdi, and qemu-img for bases.
//!
//! 7-Zip is the judge: it checks the links of a chain too. qemu-img must not be asked about children, it doesn't know them.
//! A tool that is missing fails the test with the command that installs it.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use janus_server::{
    image::{Format, Geometry, Identity, Image, Kind, Layout, PAYLOAD_BYTES, Payload, UNIT_BYTES},
    storage,
};

mod chains;
mod readers;
#[path = "../../proto/src/image/sample.rs"]
mod sample;

use readers::{INSTALL_7Z, assert_same, libvhdi, run, seven_zip, vhdx_core};
use sample::Sample;
use xtask::packages;

/// A chain of `links` images with all that a chain can hold: single units, runs over block borders, whole blocks, zeros over
/// data, the short last block.
fn chain(folder: &Path, disk_bytes: u64, logical_sector_bytes: u32, links: u64) -> Sample {
    let geometry = Geometry { disk_bytes, logical_sector_bytes };
    filled(Sample::new(folder, geometry), links)
}

fn vhd_chain(folder: &Path, disk_bytes: u64, links: u64) -> Sample {
    let geometry = Geometry { disk_bytes, logical_sector_bytes: 512 };
    filled(Sample::of(Format::Vhd, folder, geometry), links)
}

fn filled(mut sample: Sample, links: u64) -> Sample {
    let disk_bytes = sample.geometry.disk_bytes;
    let units = disk_bytes.div_ceil(4096);
    sample.add(&(0..units).filter(|unit| unit / 300 % 3 != 2).map(|unit| (unit, 1)).collect());
    for link in 2..=links {
        let start = link * 977 % units;
        let mut changed: BTreeMap<u64, u64> =
            (start..(start + 5).min(units)).map(|unit| (unit, link)).collect();
        let block = link * 3 % (units / 512);
        changed.extend(
            (block * 512..(block + 1) * 512).filter(|_| link % 2 == 0).map(|unit| (unit, link)),
        );
        changed.extend((0..20).map(|i| ((link * 131 + i * 397) % units, link + i)));
        changed.extend((0..10).map(|i| ((link * 57 + i * 211) % units, 0)));
        changed.extend((link % 3 == 0).then_some((units - 1, link)));
        sample.add(&changed);
    }
    sample
}

fn raw(sample: &Sample) -> Vec<u8> {
    let path = sample.folder.join("expected.raw");
    sample.write_raw(&path);
    fs::read(path).unwrap()
}

#[test]
fn chains_of_1_3_and_10_links_read_right() {
    for (links, disk_bytes, sector_bytes) in [
        (1, 25 << 20, 512),
        (3, (24 << 20) + 5 * 512, 512),
        (10, (31 << 20) + 4096, 512),
        (3, (25 << 20) + 4096, 4096),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let sample = chain(folder.path(), disk_bytes, sector_bytes, links);
        let (expected, leaf) = (raw(&sample), sample.files.last().unwrap());
        let what = format!("{links} links, {sector_bytes}-byte sectors");
        assert_same(
            &run(&mut seven_zip(leaf), INSTALL_7Z).stdout,
            &expected,
            &format!("7z, {what}"),
        );
        assert_same(&libvhdi(&sample.files, ""), &expected, &format!("libvhdi, {what}"));
    }
}

#[test]
fn vhd_chains_of_1_3_and_10_links_read_right() {
    for (links, disk_bytes) in [(1, 25 << 20), (3, (24 << 20) + 5 * 512), (10, (31 << 20) + 4096)] {
        let folder = tempfile::tempdir().unwrap();
        let sample = vhd_chain(folder.path(), disk_bytes, links);
        let (expected, leaf) = (raw(&sample), sample.files.last().unwrap());
        let read = run(&mut seven_zip(leaf), INSTALL_7Z).stdout;
        assert_same(&read, &expected, &format!("7z, {links} links"));
        assert_same(&libvhdi(&sample.files, ""), &expected, &format!("libvhdi, {links} links"));
    }
}

#[test]
fn a_vhd_of_the_largest_size_reads_right() {
    let folder = tempfile::tempdir().unwrap();
    let disk_bytes = 2040 << 30;
    let geometry = Geometry { disk_bytes, logical_sector_bytes: 512 };
    let mut sample = Sample::of(Format::Vhd, folder.path(), geometry);
    let last = disk_bytes / 4096 - 1;
    sample.add(&[(0, 1), (1, 1), (last - 600, 2), (last, 3)].into());
    sample.add(&[(1, 4), (last - 1, 5), (last, 0)].into());
    let places = [(0, 1 << 20), (disk_bytes - (4 << 20), 4 << 20)];
    let ranges: Vec<_> = places.iter().map(|(start, length)| format!("{start}+{length}")).collect();
    let expected = folder.path().join("expected.raw");
    sample.write_raw(&expected);
    let wanted: Vec<u8> = places
        .iter()
        .flat_map(|(start, length)| {
            let mut bytes = vec![0; *length];
            File::open(&expected).unwrap().read_exact_at(&mut bytes, *start).unwrap();
            bytes
        })
        .collect();
    assert_same(&libvhdi(&sample.files, &ranges.join(",")), &wanted, "libvhdi");
}

#[test]
fn every_image_of_a_chain_is_its_own_point_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let sample = chain(folder.path(), 9 << 20, 512, 4);
    let mut last = Vec::new();
    for links in 1..=4 {
        let earlier = tempfile::tempdir().unwrap();
        let expected = raw(&chain(earlier.path(), 9 << 20, 512, links));
        let leaf = &sample.files[links as usize - 1];
        assert_same(
            &run(&mut seven_zip(leaf), INSTALL_7Z).stdout,
            &expected,
            &format!("7z, link {links}"),
        );
        assert!(last != expected);
        last = expected;
    }
}

#[test]
fn a_disk_of_more_than_a_chunk_reads_right() {
    let folder = tempfile::tempdir().unwrap();
    let geometry = Geometry { disk_bytes: (4 << 30) + (16 << 20), logical_sector_bytes: 512 };
    let mut sample = Sample::new(folder.path(), geometry);
    let border = (4 << 30) / 4096;
    sample.add(&[(0, 1), (border - 1, 2), (border, 3), (border + 4095, 4)].into());
    sample.add(&[(1, 5), (border - 2, 6), (border - 1, 0), (border + 600, 7)].into());
    sample.add(&(border..border + 513).map(|unit| (unit, 8)).collect());
    let expected = folder.path().join("expected.raw");
    sample.write_raw(&expected);
    assert_same_stream(sample.files.last().unwrap(), &File::open(&expected).unwrap());

    let places = [(0, 1 << 20), ((4 << 30) - (4 << 20), 20 << 20)];
    let ranges: Vec<_> = places.iter().map(|(start, length)| format!("{start}+{length}")).collect();
    let mut wanted = Vec::new();
    for (start, length) in places {
        let mut bytes = vec![0; length];
        File::open(&expected).unwrap().read_exact_at(&mut bytes, start).unwrap();
        wanted.extend(bytes);
    }
    assert_same(&libvhdi(&sample.files, &ranges.join(",")), &wanted, "libvhdi");
}

fn assert_same_stream(leaf: &Path, expected: &File) {
    let mut child =
        seven_zip(leaf).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect(INSTALL_7Z);
    let mut output = child.stdout.take().unwrap();
    let (mut offset, mut actual, mut wanted) = (0, vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let got = output.read(&mut actual).unwrap();
        if got == 0 {
            break;
        }
        expected.read_exact_at(&mut wanted[..got], offset).unwrap();
        assert!(actual[..got] == wanted[..got], "7z differs within {got} bytes from {offset} on");
        offset += got as u64;
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(offset, expected.metadata().unwrap().len());
}

#[test]
fn qemu_img_accepts_bases() {
    for disk_bytes in [4096, (5 << 20) + 512, 64 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let mut sample =
            Sample::new(folder.path(), Geometry { disk_bytes, logical_sector_bytes: 512 });
        sample.add(
            &(0..disk_bytes.div_ceil(4096))
                .filter(|unit| unit / 700 % 2 == 0)
                .map(|unit| (unit, 3))
                .collect(),
        );
        let (expected, base) = (folder.path().join("expected.raw"), &sample.files[0]);
        sample.write_raw(&expected);
        let qemu = |arguments: &[&str], paths: &[&Path]| {
            run(Command::new("qemu-img").args(arguments).args(paths), "apt-get install qemu-utils");
        };
        qemu(&["check", "-q", "-f", "vhdx"], &[base]);
        qemu(&["compare", "-q", "-f", "vhdx", "-F", "raw"], &[base, &expected]);
        let converted = folder.path().join("converted.raw");
        qemu(&["convert", "-f", "vhdx", "-O", "raw"], &[base, &converted]);
        assert_same(
            &fs::read(converted).unwrap(),
            &fs::read(&expected).unwrap(),
            "qemu-img convert",
        );
    }
}

#[test]
fn qemu_img_accepts_vhd_bases() {
    // Sizes that no geometry of cylinders, heads and sectors has.
    for disk_bytes in [4096, (5 << 20) + 512, (64 << 20) + 3 * 4096] {
        let folder = tempfile::tempdir().unwrap();
        let sample = vhd_chain(folder.path(), disk_bytes, 1);
        let (expected, base) = (folder.path().join("expected.raw"), &sample.files[0]);
        sample.write_raw(&expected);
        let converted = folder.path().join("converted.raw");
        let mut qemu = Command::new("qemu-img");
        qemu.args(["convert", "-O", "raw"]).args(packages::for_qemu(base, "vpc")).arg(&converted);
        run(&mut qemu, "apt-get install qemu-utils");
        let (read, wanted) = (fs::read(converted).unwrap(), fs::read(&expected).unwrap());
        assert_same(&read, &wanted, &format!("qemu-img convert, {disk_bytes} bytes"));
    }
}

#[test]
fn a_vhd_chain_with_a_wrong_parent_is_refused() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sample = vhd_chain(folder.path(), 9 << 20, 2);
    let stranger = vhd_chain(other.path(), 9 << 20, 1);
    fs::copy(&stranger.files[0], &sample.files[0]).unwrap();
    let output = seven_zip(&sample.files[1]).output().expect(INSTALL_7Z);
    assert!(!output.status.success());
}

#[test]
fn a_chain_with_a_wrong_parent_is_refused() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sample = chain(folder.path(), 9 << 20, 512, 2);
    let stranger = chain(other.path(), 9 << 20, 512, 1);
    fs::copy(&stranger.files[0], &sample.files[0]).unwrap();
    let output = seven_zip(&sample.files[1]).output().expect(INSTALL_7Z);
    assert!(!output.status.success());
}

#[test]
fn merged_chains_read_right() {
    for (format, sector_bytes) in [(Format::Vhdx, 512), (Format::Vhd, 512), (Format::Vhdx, 4096)] {
        merged_chains_of_a_kind_read_right(format, sector_bytes);
    }
}

fn merged_chains_of_a_kind_read_right(format: Format, sector_bytes: u32) {
    let folder = tempfile::tempdir().unwrap();
    let mut model = chains::Model::of(format, folder.path());
    model.sector_bytes = sector_bytes;
    // Three payload blocks: links hold parts of them, all of one, and what no link below has.
    let mut content = chains::changed(&vec![0; 6 << 20], &[(0, 300, 1), (1100, 100, 1)]);
    let mut runs = vec![model.backup(&[("sda", content.clone())])];
    for link in 2..10u64 {
        let block = [(512, 512, link), (link * 150, 20, link)][usize::from(link % 3 == 0)];
        let changes = [block, (link * 31, 9, link), (link * 40, 3, 0), (link * 57 + 512, 2, link)];
        content = chains::changed(&content, &changes);
        runs.push(model.backup(&[("sda", content.clone())]));
    }
    for dropped in [&[2, 3][..], &[0, 1], &[6], &[5, 8]] {
        for run in dropped {
            model.trash(&runs[*run]);
        }
        model.purge_all(true);
        model.check();
        for id in &model.live {
            let opened = model.open(*id);
            let machine = model.runs.machine(&model.key).unwrap();
            let image = |id| machine.snapshot(id).unwrap().snapshot().image.clone();
            let here = folder.path().join("user/machine");
            let links = opened.links().iter().rev();
            let files: Vec<_> = links.map(|id| here.join(image(*id))).collect();
            let leaf = files.last().unwrap();
            assert_same(&run(&mut seven_zip(leaf), INSTALL_7Z).stdout, &model.contents[id], "7z");
            assert_same(&libvhdi(&files, ""), &model.contents[id], "libvhdi");
            if format == Format::Vhdx {
                let read = vhdx_core(&files, sector_bytes);
                assert_same(&read, &model.contents[id], "vhdx-core");
            }
        }
    }
    // A disk with other sectors is another disk to a guest: a chain doesn't go on with it.
    if sector_bytes == 4096 {
        model.sector_bytes = 512;
        assert_eq!(model.backup(&[("sda", content)]).snapshots[0].parent, None);
    }
}
