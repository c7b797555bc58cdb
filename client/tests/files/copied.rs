//! What was put into each file system comes out again: content, holes, times, modes, owners, links, hard links.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Instant};

use janus_client::{
    browse::{
        Kind, Volume,
        copy::{Copy, Owner, Report, Wishes},
        volume::Piece,
    },
    fs::FileSystemKind,
    progress::Progress,
};
use tokio_util::sync::CancellationToken;

use crate::{
    images::{self, Image, Plan, allocated, run},
    tree,
};

pub const ALL: Wishes = Wishes { recursive: true, force: false, owner: Owner::IfPermitted };

/// Files for each file system: a thousand, or ten in the soak.
fn count() -> usize {
    if std::env::var_os("JANUS_SOAK").is_some() { 10_000 } else { 1_000 }
}

pub fn copy(volume: &mut Volume, path: &str, to: &Path, wishes: Wishes) -> Report {
    let stop = CancellationToken::new();
    Copy::run(volume, path.as_bytes(), to, wishes, Progress::new(0), stop).unwrap()
}

fn comes_out_again(plan: Plan) {
    let image = Image::filled(plan, count());
    let mut volume = image.volume();
    let out = image.folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let began = Instant::now();
    let report = copy(&mut volume, "/", &out, ALL);
    let mut found = tree::truths(&out, plan.abilities);
    if plan.mount.is_empty() {
        found.values_mut().filter(|one| one.kind == 'd').for_each(|one| one.modified = (0, 0));
    }
    println!("{}: copied in {:?}: {report:?}", plan.name, began.elapsed());
    let mut truths = image.truths.clone();
    if plan.kind == FileSystemKind::Ext3 {
        // Refused: see `browse::reader::ext4`.
        truths.retain(|path, _| !["all hole", "sparse.img"].map(Path::new).contains(&&**path));
    }
    tree::assert_equal(plan.name, &truths, &found);
    let skipped: Vec<_> = report.skipped.iter().map(|(path, _)| path.as_str()).collect();
    let expected: &[&str] = match plan.kind {
        FileSystemKind::Ext3 => &["/all hole", "/pipe", "/sparse.img"],
        _ if plan.abilities.unix => &["/pipe"],
        _ => &[],
    };
    let skipped: Vec<_> = skipped.into_iter().filter(|path| *path != "/lost+found").collect();
    assert_eq!(skipped, expected, "{:?}", report.skipped);
    assert_eq!(report.without_times, 0);
    if plan.abilities.holes && plan.kind != FileSystemKind::Ext3 {
        for (name, most) in [("sparse.img", 1 << 20), ("all hole", 0)] {
            let path = out.join(name);
            assert!(allocated(&path) <= most, "{name}: {} bytes allocated", allocated(&path));
        }
    }
    if plan.abilities.links {
        let names = out.join("again-0").metadata().unwrap().nlink();
        assert_eq!(names, 2, "a hard link");
    }
}

#[test]
fn as_root_ext4_comes_out_as_it_went_in() {
    comes_out_again(images::EXT4);
}

#[test]
fn as_root_ext3_comes_out_as_it_went_in() {
    comes_out_again(images::EXT3);
}

#[test]
fn as_root_xfs_comes_out_as_it_went_in() {
    comes_out_again(images::XFS);
}

#[test]
fn as_root_btrfs_comes_out_as_it_went_in() {
    comes_out_again(images::BTRFS);
}

#[test]
fn as_root_compressed_btrfs_comes_out_as_it_went_in() {
    comes_out_again(images::BTRFS_ZSTD);
}

#[test]
fn as_root_ntfs_comes_out_as_it_went_in() {
    comes_out_again(images::NTFS);
}

#[test]
fn fat_comes_out_as_it_went_in() {
    comes_out_again(images::FAT);
    comes_out_again(images::FAT16);
}

/// All of a file, or of a stream.
fn content(volume: &mut Volume, path: &str, stream: &str) -> Vec<u8> {
    let mut content = Vec::new();
    let end = volume.read(path.as_bytes(), stream, 0..1 << 30, &mut |piece| {
        match piece {
            Piece::Data(offset, bytes) => {
                content.resize(offset as usize, 0);
                content.extend_from_slice(bytes);
            }
            Piece::Zeros(end) => content.resize(end as usize, 0),
        }
        Ok(())
    });
    assert_eq!(end.unwrap(), content.len() as u64);
    content
}

#[test]
fn as_root_streams_and_compression_of_ntfs_are_read() {
    let text = "All work and no play makes Jack a dull boy. ".repeat(20_000);
    let mut noise = vec![0; 300_000];
    xtask::noise::Noise::new(3).fill(&mut noise);
    let mixed = [text.as_bytes(), &noise, &vec![0; 500_000], text.as_bytes()].concat();
    let image = Image::filled_with(images::NTFS, |root| {
        fs::write(root.join("plain.txt"), "content").unwrap();
        fs::write(root.join("plain.txt:Zone.Identifier"), "[ZoneTransfer]\r\nZoneId=3\r\n")
            .unwrap();
        fs::write(root.join("plain.txt:big"), &noise).unwrap();
        let packed = root.join("packed");
        fs::create_dir(&packed).unwrap();
        // FILE_ATTRIBUTE_DIRECTORY is not part of it; compressed is 0x800.
        let value = 0x800u32.to_be_bytes();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&packed, "system.ntfs_attrib_be", &value, flags).unwrap();
        fs::write(packed.join("text"), &text).unwrap();
        fs::write(packed.join("mixed"), &mixed).unwrap();
        fs::write(packed.join("tiny"), "tiny").unwrap();
    });
    let mut volume = image.volume();
    let plain = volume.look(b"/plain.txt").unwrap();
    let streams: Vec<_> =
        plain.streams.iter().map(|one| (one.name.as_str(), one.size_bytes)).collect();
    println!("streams of plain.txt: {streams:?}");
    assert_eq!(streams, [("Zone.Identifier", 26), ("big", 300_000)]);
    assert_eq!(
        content(&mut volume, "/plain.txt", "Zone.Identifier"),
        b"[ZoneTransfer]\r\nZoneId=3\r\n"
    );
    assert_eq!(content(&mut volume, "/plain.txt", "big"), noise);
    for (name, expected) in [("text", text.as_bytes()), ("mixed", &mixed), ("tiny", b"tiny")] {
        let path = format!("/packed/{name}");
        let entry = volume.look(path.as_bytes()).unwrap();
        assert_eq!(content(&mut volume, &path, ""), expected, "{name}");
        let allocated = entry.allocated_bytes.unwrap();
        println!("{path}: {} bytes in {allocated}, {}", entry.size_bytes, entry.attributes);
        assert!(entry.attributes.contains('C'), "{entry:?}");
        assert!(name == "tiny" || allocated < entry.size_bytes, "{name} is not compressed");
    }
    // Parts too, from the middle of compressed units.
    let mut part = Vec::new();
    let mut take = |piece: Piece<'_>| {
        if let Piece::Data(_, bytes) = piece {
            part.extend_from_slice(bytes);
        }
        Ok(())
    };
    volume.read(b"/packed/mixed", "", 70_001..200_002, &mut take).unwrap();
    assert_eq!(part, mixed[70_001..200_002]);
}

#[test]
fn as_root_what_a_crash_left_in_the_log_is_there() {
    for plan in [images::EXT4, images::XFS] {
        let mut image = Image::filled_with(plan, |root| {
            (0..200)
                .for_each(|n| fs::write(root.join(format!("old-{n}")), format!("{n}")).unwrap());
        });
        let mount = image.mount();
        for number in 0..300 {
            fs::write(mount.0.join(format!("new-{number}")), format!("new {number}")).unwrap();
        }
        (0..50).for_each(|number| fs::remove_file(mount.0.join(format!("old-{number}"))).unwrap());
        run("sync", &["-f", mount.0.to_str().unwrap()]);
        let crashed = image.folder.path().join("crashed");
        fs::copy(&image.path, &crashed).unwrap();
        image.truths = tree::truths(&mount.0, plan.abilities);
        drop(mount);
        let mut volume = images::open(&crashed, plan.kind, Default::default()).unwrap();
        let out = image.folder.path().join("out");
        fs::create_dir(&out).unwrap();
        let report = copy(&mut volume, "/", &out, ALL);
        println!("{}: {report:?}", plan.name);
        let mut found = tree::truths(&out, plan.abilities);
        if plan.kind == FileSystemKind::Xfs {
            // Of files whose inode is only in the log, times and owners are not known.
            for (path, truth) in &mut found {
                let known = image.truths.get(path).unwrap();
                (truth.modified, truth.owner) = (known.modified, known.owner);
            }
        }
        tree::assert_equal(plan.name, &image.truths, &found);
    }
}

#[test]
fn as_root_subvolumes_of_btrfs_are_folders() {
    let image = Image::filled_with(images::BTRFS, |root| {
        run("btrfs", &["subvolume", "create", root.join("home").to_str().unwrap()]);
        fs::write(root.join("home/letter"), "first").unwrap();
        let snapshot = root.join("before").to_str().unwrap().to_owned();
        run(
            "btrfs",
            &["subvolume", "snapshot", "-r", root.join("home").to_str().unwrap(), &snapshot],
        );
        fs::write(root.join("home/letter"), "second").unwrap();
    });
    let mut volume = image.volume();
    assert_eq!(content(&mut volume, "/home/letter", ""), b"second");
    assert_eq!(content(&mut volume, "/before/letter", ""), b"first");
    let names = volume.list(b"/").unwrap();
    assert!(names.iter().all(|entry| entry.kind() == Kind::Folder), "{names:?}");
}
