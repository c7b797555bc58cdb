//! A disk with logical sectors of 4096 bytes has them wherever it goes: a guest would not find its partitions with others.

use std::{
    fs,
    path::{Path, PathBuf},
};

use janus_proto::{
    image::Image,
    storage::{Access, Disk},
};
use serde_json::Value;
use xtask::{
    disk,
    loopback::LoopDevice,
    packages,
    site::{Plan, Programs, Site},
};

#[path = "../../../server/tests/readers/mod.rs"]
mod readers;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB + 4096;
const OLD: &str = "server-a";
const NEW: &str = "server-b";

/// Sectors of an image, by its structures.
fn sector_bytes(image: &Path) -> u32 {
    let file = Disk::default().open(image, Access::Read).unwrap();
    Image::open(file).unwrap().geometry().logical_sector_bytes
}

/// A chain, oldest first, read by programs that have nothing to do with this one.
fn assert_reads(chain: &[PathBuf], content: &[u8], what: &str) {
    assert!(chain.iter().all(|image| sector_bytes(image) == 4096), "{what}");
    // Images are padded to pairs of sectors, as 7-Zip wants them.
    let mut content = content.to_vec();
    content.resize(content.len().next_multiple_of(2 * 4096), 0);
    let leaf = chain.last().unwrap();
    readers::assert_same(&packages::seven_zip(leaf, "VHDX").unwrap(), &content, what);
    readers::assert_same(&readers::vhdx_core(chain, 4096), &content, what);
}

#[test]
fn as_root_a_disk_with_large_sectors_keeps_them_wherever_it_goes() {
    let plan = Plan { servers: vec![OLD.into(), NEW.into()], ..Plan::default() };
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
    site.start_server(OLD).unwrap();
    site.start_janus().unwrap();
    let (folder, stored) =
        (site.folder().to_owned(), site.server(OLD).unwrap().images().to_owned());
    let path = |name: &str| folder.join(name);
    let device = |name: &str| {
        disk::blank(&path(name), SIZE).unwrap();
        LoopDevice::attach_with_sectors(&path(name), 4096).unwrap()
    };
    let source = device("disk.raw");
    disk::write_noise(source.path(), 0..10 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", source.path().display())]).unwrap();
    site.await_ready(&client).unwrap();

    let mut taken = Vec::new();
    for (number, kind) in (0..).zip(["full", "delta", "delta", "delta", "delta"]) {
        let backup = client.backup().unwrap().disks.remove(0);
        assert_eq!(backup.kind, kind);
        taken.push((
            backup.snapshot_id,
            stored.join(&backup.image),
            fs::read(source.path()).unwrap(),
        ));
        let at = (4 * number + 1) * MIB;
        disk::write_noise(source.path(), at..at + MIB, number + 2).unwrap();
    }
    let images: Vec<_> = taken.iter().map(|(_, image, _)| image.clone()).collect();
    assert_reads(&images, &taken[4].2, "all links");

    // The base goes into a delta, and a delta into another.
    for (snapshot, ..) in [&taken[0], &taken[2]] {
        assert!(site.admin(OLD, &["delete", snapshot]).unwrap().status.success());
    }
    let purged = site.admin(OLD, &["trash", "purge"]).unwrap();
    assert!(purged.status.success() && !images[0].exists() && !images[2].exists(), "{purged:?}");
    taken.remove(2);
    taken.remove(0);
    let images: Vec<_> = taken.iter().map(|(_, image, _)| image.clone()).collect();
    for (number, (snapshot, _, content)) in taken.iter().enumerate() {
        assert_reads(&images[..=number], content, "merged links");
        let to = path("restored.vhdx");
        client.restore(snapshot, &to).unwrap();
        assert_reads(std::slice::from_ref(&to), content, "a restored image");
        fs::remove_file(to).unwrap();
        let target = device("target.raw");
        let to = target.path().to_str().unwrap();
        let _: Value = client.answer(&["restore", snapshot, "--to", to, "--force"]).unwrap();
        assert!(fs::read(target.path()).unwrap() == *content);
    }
    let vhd = path("restored.vhd");
    let refused = client.failure(&["restore", "disk", "--to", vhd.to_str().unwrap()]).unwrap();
    assert!(refused.error.contains("sectors of 4096 bytes"), "{refused:?}");

    // What is carried by hand, and what another server fetches and goes on with.
    let (id, _, content) = taken.last().unwrap();
    let usb = path("usb");
    let exported = site.admin(OLD, &["export", id, "--to", usb.to_str().unwrap()]).unwrap();
    assert!(exported.status.success(), "{exported:?}");
    assert_reads(&images_below(&usb), content, "an exported image");
    site.start_server(NEW).unwrap();
    site.await_ready(&client).unwrap();
    let seeded = site.admin(NEW, &["seed", "alice/machine", "--from", OLD]).unwrap();
    assert!(seeded.status.success(), "{seeded:?}");
    let backup = client.backup().unwrap();
    assert_eq!((&*backup.server, &*backup.disks[0].kind), (NEW, "delta"));
    let chain = images_below(site.server(NEW).unwrap().images());
    assert_reads(&chain, &fs::read(source.path()).unwrap(), "a seeded chain");
}

/// Images in a folder, by name.
fn images_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = disk::files_below(folder).unwrap();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "vhdx"));
    found.sort();
    found
}
