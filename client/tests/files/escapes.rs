//! Volumes that were made to write elsewhere: names that lead out, links in the way, two files of one name. Nothing leaves the target, and
//! what is refused is told.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_client::{
    browse::{BrowseError, copy::Report},
    fs::FileSystemKind,
};

use crate::{
    copied::{ALL, copy},
    damage::{self, Damaged},
    images::{self, Image, Plan},
};

/// Without checksums: those of XFS are made right again.
const EXT4: Plan = Plan { make: "mkfs.ext4 -q -F -O ^metadata_csum", mib: 32, ..images::EXT4 };
const XFS: Plan = images::XFS;
const NTFS: Plan = Plan { mib: 32, ..images::NTFS };

/// Writes `new` wherever `old` stands: as bytes, and as UTF-16. Both have the same length.
fn replace(image: &Image, old: &str, new: &str) {
    let bytes = Arc::new(fs::read(&image.path).unwrap());
    let mut changed = Damaged::new(bytes.clone());
    let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let pairs = [(old.as_bytes().to_vec(), new.as_bytes().to_vec()), (wide(old), wide(new))];
    let mut count = 0;
    for (old, new) in pairs {
        assert_eq!(old.len(), new.len());
        for at in memchr::memmem::find_iter(&bytes, &old) {
            changed.set(at, &new);
            if image.plan.kind == FileSystemKind::Xfs {
                damage::xfs(&mut changed, at);
            }
            count += 1;
        }
    }
    assert!(count > 0, "{old} is not there");
    fs::write(&image.path, changed.into_bytes()).unwrap();
}

/// Copies all of it into a folder of its own; beside that folder nothing may change.
fn copy_out(image: &Image) -> (PathBuf, Result<Report, BrowseError>) {
    let arena = image.folder.path().join("arena");
    let out = arena.join("a/b/c/out");
    fs::create_dir_all(&out).unwrap();
    fs::create_dir_all(arena.join("victim")).unwrap();
    fs::write(arena.join("victim/file"), "untouched").unwrap();
    let report = images::open(&image.path, image.plan.kind, Default::default())
        .map(|mut volume| copy(&mut volume, "/", &out, ALL));
    let names = |path: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|one| one.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&arena), ["a", "victim"]);
    for (folder, only) in [("a", "b"), ("a/b", "c"), ("a/b/c", "out"), ("victim", "file")] {
        assert_eq!(names(&arena.join(folder)), [only], "{folder}");
    }
    assert_eq!(fs::read(arena.join("victim/file")).unwrap(), b"untouched");
    (out, report)
}

#[test]
fn as_root_names_that_lead_out_are_refused_and_named() {
    for plan in [EXT4, XFS, NTFS] {
        for (old, new) in [
            ("0123456789", "../../evil"),
            ("0123456789", "/tmp/evil1"),
            ("0123456789", "evil\0\0\0\0\0\0"),
        ] {
            let image = Image::filled_with(plan, |root| {
                fs::write(root.join(old), "evil").unwrap();
                fs::write(root.join("honest"), "honest").unwrap();
            });
            replace(&image, old, new);
            let (out, report) = copy_out(&image);
            let report = report.unwrap();
            println!("{} {new:?}: {:?}", plan.name, report.skipped);
            assert!(report.skipped_count > 0, "{}: {new:?}", plan.name);
            // ext4's reader refuses the whole folder.
            let honest = plan.kind == FileSystemKind::Ext4 || out.join("honest").is_file();
            assert!(honest, "{}", plan.name);
        }
    }
}

#[test]
fn as_root_a_folder_with_the_name_of_a_link_is_refused() {
    for plan in [EXT4, XFS, NTFS] {
        let mut image = Image::blank(plan);
        let victim = image.folder.path().join("arena/victim");
        image.change(|root| {
            symlink(&victim, root.join("name-a")).unwrap();
            fs::create_dir(root.join("name-b")).unwrap();
            fs::write(root.join("name-b/file"), "overwritten").unwrap();
            fs::write(root.join("name-b/more"), "more").unwrap();
            Default::default()
        });
        replace(&image, "name-b", "name-a");
        let (_, report) = copy_out(&image);
        println!("{}: {:?}", plan.name, report.unwrap().skipped);
    }
}

#[test]
fn as_root_links_in_the_target_are_not_followed() {
    let image = Image::filled_with(images::EXT4, |root| {
        fs::create_dir_all(root.join("home/user")).unwrap();
        fs::write(root.join("home/user/file"), "overwritten").unwrap();
        fs::write(root.join("name"), "overwritten").unwrap();
    });
    let victim = image.folder.path().join("arena/victim");
    let out = image.folder.path().join("arena/a/b/c/out");
    fs::create_dir_all(&out).unwrap();
    fs::create_dir_all(&victim).unwrap();
    symlink(&victim, out.join("home")).unwrap();
    symlink(victim.join("file"), out.join("name")).unwrap();
    let (_, report) = copy_out(&image);
    let mut skipped: Vec<_> = report.unwrap().skipped;
    skipped.retain(|(path, _)| path != "/lost+found");
    println!("{skipped:?}");
    let paths: Vec<_> = skipped.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["/name", "/home"]);
}

#[test]
fn as_root_folders_that_contain_each_other_end() {
    // The entry of an inner folder gets the number of the outer one.
    let image = Image::filled_with(EXT4, |root| {
        fs::create_dir_all(root.join("outer-name/inner-name")).unwrap();
        fs::write(root.join("outer-name/file"), "file").unwrap();
    });
    let mut bytes = fs::read(&image.path).unwrap();
    let entry = |bytes: &[u8], name: &str| {
        let place = memchr::memmem::find_iter(bytes, name)
            .find(|at| bytes[at - 2] as usize == name.len() && bytes[at - 1] == 2);
        place.unwrap() - 8
    };
    let (outer, inner) = (entry(&bytes, "outer-name"), entry(&bytes, "inner-name"));
    let number = bytes[outer..outer + 4].to_vec();
    bytes[inner..inner + 4].copy_from_slice(&number);
    fs::write(&image.path, bytes).unwrap();
    let (out, report) = copy_out(&image);
    let skipped = report.unwrap().skipped;
    println!("{} refused: {}", skipped.len(), skipped[0].1);
    assert!(out.join("outer-name/inner-name/inner-name/file").is_file());
}
