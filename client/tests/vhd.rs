//! A site whose servers keep VHDs: backed up, restored, read by others, and left again for VHDX.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::Command,
};

use xtask::{
    disk, packages,
    site::{Client, Plan, Programs, Site, answers},
};

const MIB: u64 = 1 << 20;
const SERVER: &str = "server-a";

/// A server, and a client that backs one disk up to it.
struct Scene {
    site: Site,
    client: Client,
    disk: PathBuf,
}

impl Scene {
    fn new(disk_bytes: u64) -> Self {
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        site.server(SERVER).unwrap().settings.set("prefer_vhdx", false);
        site.start_all().unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, disk_bytes).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, disk }
    }

    fn backup(&self) -> answers::Disk {
        self.client.backup().unwrap().disks[0].clone()
    }

    fn image(&self, taken: &answers::Disk) -> PathBuf {
        self.site.folder().join(SERVER).join(&taken.image)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    /// The disk and what another program has read, which is padded to whole units.
    fn assert_is_disk(&self, read: &Path, what: &str) {
        let len = fs::metadata(&self.disk).unwrap().len();
        let file = OpenOptions::new().write(true).open(read).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len.next_multiple_of(4096), "{what}");
        file.set_len(len).unwrap();
        disk::compare(&self.disk, read).unwrap_or_else(|error| panic!("{what}: {error}"));
        fs::remove_file(read).unwrap();
    }
}

fn seven_zip(image: &Path, to: &Path) {
    fs::write(to, packages::seven_zip(image, "VHD").unwrap()).unwrap();
}

fn libvhdi(images: &[PathBuf], to: &Path) {
    fs::write(to, packages::libvhdi(images, "").unwrap()).unwrap();
}

#[test]
fn a_chain_of_vhds_restores_and_reads_right_elsewhere() {
    packages::require(packages::TEST_TOOLS).unwrap();
    let scene = Scene::new(33 * MIB + 3 * 512);
    disk::write_noise(&scene.disk, 0..20 * MIB, 1).unwrap();
    let read = scene.file("read.raw");
    let mut images = Vec::new();
    for (number, kind) in (0..).zip(["full", "delta", "delta"]) {
        let taken = scene.backup();
        assert_eq!(taken.kind, kind);
        assert!(taken.image.ends_with(".vhd"), "{}", taken.image);
        images.push(scene.image(&taken));
        seven_zip(&images[number as usize], &read);
        scene.assert_is_disk(&read, "7-Zip");
        libvhdi(&images, &read);
        scene.assert_is_disk(&read, "libvhdi");
        scene.client.restore(&taken.snapshot_id, &read).unwrap();
        disk::compare(&scene.disk, &read).unwrap();
        fs::remove_file(&read).unwrap();
        if number == 0 {
            // qemu-img is right about bases only.
            let mut qemu = Command::new("qemu-img");
            qemu.args(["convert", "-O", "raw"])
                .args(packages::for_qemu(&images[0], "vpc"))
                .arg(&read);
            packages::output(&mut qemu).unwrap();
            scene.assert_is_disk(&read, "qemu-img");
        }
        disk::change(&scene.disk, 2 * MIB, number).unwrap();
    }
}

#[test]
fn a_chain_goes_on_in_its_own_format_and_a_new_one_takes_the_preferred() {
    let mut scene = Scene::new(9 * MIB);
    disk::write_noise(&scene.disk, 0..9 * MIB, 1).unwrap();
    assert!(scene.backup().image.ends_with(".vhd"));
    scene.site.stop_server(SERVER).unwrap();
    scene.site.server(SERVER).unwrap().settings.set("prefer_vhdx", true);
    scene.site.start_server(SERVER).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    disk::change(&scene.disk, MIB, 2).unwrap();
    let taken = scene.backup();
    assert_eq!((taken.kind.as_str(), &taken.image[taken.image.len() - 4..]), ("delta", ".vhd"));
    OpenOptions::new().write(true).open(&scene.disk).unwrap().set_len(11 * MIB).unwrap();
    let taken = scene.backup();
    assert_eq!((taken.kind.as_str(), &taken.image[taken.image.len() - 5..]), ("full", ".vhdx"));
    let restored = scene.file("restored.raw");
    scene.client.restore("disk", &restored).unwrap();
    disk::compare(&scene.disk, &restored).unwrap();
}

#[test]
fn a_disk_that_no_vhd_holds_is_refused_with_the_way_out() {
    let scene = Scene::new(2041 << 30);
    let failure = scene.client.failure(&["backup"]).unwrap();
    for words in ["disk disk", "2040 GiB", "prefer_vhdx = true"] {
        assert!(failure.error.contains(words), "{words:?} is not in {failure:?}");
    }
    assert_eq!(failure.reason.as_deref(), Some("INVALID_FIELD"));
    // Nothing is left behind, and a disk that fits is taken.
    OpenOptions::new().write(true).open(&scene.disk).unwrap().set_len(9 * MIB).unwrap();
    assert_eq!(scene.backup().kind, "full");
}
