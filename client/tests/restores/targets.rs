//! What a disk can be restored to: images that other programs read, single volumes, devices of other sizes, several disks at once.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use xtask::{
    disk,
    loopback::LoopDevice,
    packages,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
/// Two partitions: 1 to 11 MiB and 13 to 45 MiB, on a disk of 64 MiB.
const SIZE: u64 = 64 * MIB;

struct Scene {
    site: Site,
    client: Client,
    disk: PathBuf,
}

fn scene(disks: &[&str]) -> Scene {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let disk = site.folder().join("disk.raw");
    partitioned(&disk);
    let mut specs = vec![format!("disk={}", disk.display())];
    for name in disks {
        let path = site.folder().join(name);
        disk::blank(&path, 8 * MIB).unwrap();
        disk::write_noise(&path, 0..8 * MIB, 7).unwrap();
        specs.push(format!("{name}={}", path.display()));
    }
    let client = site.client("machine", &specs).unwrap();
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
    Scene { site, client, disk }
}

/// A disk with a GPT, a FAT and an ext4 with odd sizes, and noise between them.
fn partitioned(path: &Path) {
    disk::blank(path, SIZE).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut gpt = gptman::GPT::new_from(&mut &file, 512, [7; 16]).unwrap();
    let part = |start: u64, sectors: u64, id: u8| gptman::GPTPartitionEntry {
        partition_type_guid: [0xA2; 16],
        unique_partition_guid: [id; 16],
        starting_lba: start,
        ending_lba: start + sectors - 1,
        attribute_bits: 0,
        partition_name: "part".into(),
    };
    gpt[1] = part(2048, 10 * 2048, 1);
    // Its last block is not a whole one.
    gpt[2] = part(13 * 2048, 32 * 2048 - 3, 2);
    gpt.write_into(&mut &file).unwrap();
    gptman::GPT::write_protective_mbr_into(&mut &file, 512).unwrap();
    drop(file);
    disk::write_noise(path, 2 * MIB..10 * MIB, 1).unwrap();
    let volume = path.with_extension("ext4");
    disk::blank(&volume, 32 * MIB - 3 * 512).unwrap();
    let sized = [volume.to_str().unwrap(), "32766K"];
    packages::output(packages::command("mkfs.ext4").args(["-q", "-F"]).args(sized)).unwrap();
    let content = fs::read(&volume).unwrap();
    File::options().write(true).open(path).unwrap().write_all_at(&content, 13 * MIB).unwrap();
    disk::write_noise(path, 30 * MIB..45 * MIB - 3 * 512, 2).unwrap();
}

fn bytes(path: &Path, range: Range<u64>) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    file.seek(SeekFrom::Start(range.start)).unwrap();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact(&mut bytes).unwrap();
    bytes
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    fn restore(&self, to: &Path, more: &[&str]) -> serde_json::Value {
        let mut arguments = vec!["restore", "disk", "--to", to.to_str().unwrap()];
        arguments.extend(more);
        self.client.answer(&arguments).unwrap()
    }

    fn refused(&self, to: &Path, more: &[&str]) -> String {
        let mut arguments = vec!["restore", "disk", "--to", to.to_str().unwrap()];
        arguments.extend(more);
        self.client.failure(&arguments).unwrap().error
    }
}

#[test]
fn images_are_what_other_programs_read() {
    let scene = scene(&[]);
    for (name, format) in [("disk.vhdx", "vhdx"), ("disk.VHD", "vpc"), ("disk.qcow2", "qcow2")] {
        let to = scene.path(name);
        scene.restore(&to, &[]);
        let [options, disk] = packages::for_qemu(&scene.disk, "raw");
        let [_, image] = packages::for_qemu(&to, format);
        let compare = ["compare", &options, &disk, &image];
        let same = packages::output(packages::command("qemu-img").args(compare));
        assert!(same.unwrap().contains("identical"), "{name}");
        // Replaced only when asked for, by another kind too.
        assert!(scene.refused(&to, &[]).contains("--force"));
        scene.restore(&to, &["--force", "--format", "raw"]);
        disk::compare(&scene.disk, &to).unwrap();
    }
    let vhdx = scene.path("disk.vhdx");
    scene.restore(&vhdx, &["--force"]);
    let flat = scene.path("flat");
    let unpacked =
        packages::command("7z").args(["x", "-so", "-tVHDX"]).arg(&vhdx).output().unwrap();
    fs::write(&flat, unpacked.stdout).unwrap();
    disk::compare(&scene.disk, &flat).unwrap();
    assert!(scene.refused(&scene.path("x.vhdx"), &["--verify"]).contains("--verify"));
    let left: Vec<_> = fs::read_dir(scene.site.folder()).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().contains("partial")));
}

#[test]
fn a_volume_alone_and_again_by_what_differs() {
    let scene = scene(&[]);
    for (number, range) in [("1", MIB..11 * MIB), ("2", 13 * MIB..45 * MIB - 3 * 512)] {
        let to = scene.path(&format!("volume-{number}"));
        let report = scene.restore(&to, &["--volume", number]);
        assert_eq!(report["bytes"], range.end - range.start);
        assert!(bytes(&scene.disk, range.clone()) == fs::read(&to).unwrap(), "volume {number}");
        // Little of it changes: that is fetched, and what lies around it in the segments at its ends.
        let mut file = File::options().write(true).open(&to).unwrap();
        file.seek(SeekFrom::Start(5 * MIB)).unwrap();
        file.write_all(&[1; 9000]).unwrap();
        drop(file);
        let report = scene.restore(&to, &["--volume", number, "--force", "--verify"]);
        let fetched = report["fetched_bytes"].as_u64().unwrap();
        println!("volume {number} again: {fetched} bytes fetched");
        assert!(fetched <= 8 * MIB, "{report}");
        assert!(bytes(&scene.disk, range) == fs::read(&to).unwrap(), "volume {number}");
    }
    packages::output(packages::command("e2fsck").args(["-fn"]).arg(scene.path("volume-2")))
        .unwrap_or_default();
    let image = scene.path("volume.vhdx");
    scene.restore(&image, &["--volume", "1"]);
    let raw = scene.path("volume-1");
    let compare = ["compare", "-f", "raw", "-F", "vhdx"];
    packages::output(packages::command("qemu-img").args(compare).arg(&raw).arg(&image)).unwrap();
    let error = scene.refused(&scene.path("none"), &["--volume", "3"]);
    assert!(error.contains("no volume 3") && error.contains("volume 1, volume 2"), "{error}");
}

/// A loop device of so many bytes, full of noise.
fn device(scene: &Scene, size: u64) -> (LoopDevice, PathBuf) {
    let file = scene.path(&format!("device-{size}"));
    disk::blank(&file, size).unwrap();
    disk::write_noise(&file, 0..size, 9).unwrap();
    (LoopDevice::attach(&file).unwrap(), file)
}

fn sound(device: &Path) {
    let said = packages::output(packages::command("sgdisk").arg("-v").arg(device)).unwrap();
    assert!(said.contains("No problems found"), "{said}");
}

#[test]
fn as_root_a_larger_and_a_smaller_device_get_their_tables_moved() {
    let scene = scene(&[]);
    for size in [80 * MIB, 200 * MIB + 512 * 7, 46 * MIB] {
        let (device, file) = device(&scene, size);
        let report = scene.restore(device.path(), &["--force"]);
        assert_eq!(report["table_moved"], true, "{report}");
        sound(device.path());
        drop(device);
        for range in [MIB..11 * MIB, 11 * MIB..13 * MIB, 13 * MIB..45 * MIB - 3 * 512] {
            assert!(bytes(&scene.disk, range.clone()) == bytes(&file, range.clone()), "{range:?}");
        }
        // Where the backup was, there is nothing now that could be taken for one.
        if size > SIZE {
            let old = bytes(&file, SIZE - 33 * 512..SIZE);
            assert!(old.iter().all(|byte| *byte == 0));
        }
        fs::remove_file(file).unwrap();
    }
    let (same, _) = device(&scene, SIZE);
    assert_eq!(scene.restore(same.path(), &["--force"])["table_moved"], false);
    drop(same);
    disk::compare(&scene.disk, &scene.path(&format!("device-{SIZE}"))).unwrap();
    let (small, file) = device(&scene, 44 * MIB);
    let before = fs::read(&file).unwrap();
    let error = scene.refused(small.path(), &["--force"]);
    assert!(error.contains("volume 2") && error.contains("or more"), "{error}");
    assert!(fs::read(&file).unwrap() == before, "it was not touched");
    // One of its volumes fits.
    let report = scene.restore(small.path(), &["--force", "--volume", "1"]);
    assert_eq!(report["bytes"], 10 * MIB);
    let error = scene.refused(small.path(), &["--force", "--volume", "1", "--format", "vhdx"]);
    assert!(error.contains("block device"), "{error}");
}

#[test]
fn as_root_disks_of_a_machine_go_where_they_are_sent() {
    let scene = scene(&["second"]);
    let (device, file) = device(&scene, SIZE);
    let to = scene.path("second-restored");
    let machine = format!("{}/machine", xtask::site::USER);
    let first = format!("disk={}", device.path().display());
    let second = format!("second={}", to.display());
    let mut command = vec!["restore", &machine, "--map", &first, "--map", &second];
    // Nobody is asked where nobody is.
    let failure = scene.client.failure(&command).unwrap();
    assert!(failure.exit_code == 2 && failure.error.contains("--yes"), "{failure:?}");
    assert!(!to.exists());
    command.extend(["--yes", "--json"]);
    let finished = scene.client.run(&command).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(
        finished.stderr.contains("-> ") && finished.stderr.contains("overwritten"),
        "{finished:?}"
    );
    drop(device);
    disk::compare(&scene.disk, &file).unwrap();
    disk::compare(&scene.path("second"), &to).unwrap();
    let answer: serde_json::Value = finished.answer().unwrap();
    assert_eq!(answer["disks"].as_array().unwrap().len(), 2, "{answer}");
    // One disk was meant, and there are two.
    let failure = scene.client.failure(&["restore", &machine, "--to", "x"]).unwrap();
    assert!(failure.error.contains("disk, second"), "{failure:?}");
    let wrong = ["restore", &machine, "--map", "third=/tmp/x", "--yes"];
    let failure = scene.client.failure(&wrong).unwrap();
    assert!(
        failure.error.contains("third") && failure.error.contains("disk, second"),
        "{failure:?}"
    );
}

#[test]
fn as_root_nothing_is_written_before_all_places_are_good() {
    let scene = scene(&["second"]);
    let (device, file) = device(&scene, SIZE);
    let before = fs::read(&file).unwrap();
    let machine = format!("{}/machine", xtask::site::USER);
    let first = format!("disk={}", device.path().display());
    // The same device by another name.
    let twin = scene.path("twin");
    let number = fs::metadata(device.path()).unwrap().rdev();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &twin,
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        number,
    )
    .unwrap();
    fs::write(scene.path("there"), "mine").unwrap();
    let bad = [
        (twin.clone(), "the place of another disk"),
        (scene.path("there"), "--force"),
        (scene.path("no/folder"), "its folder does not exist"),
        (PathBuf::from("/dev/no-such-device"), "no such device"),
    ];
    for (place, said) in bad {
        let second = format!("second={}", place.display());
        let command = ["restore", &machine, "--map", &first, "--map", &second, "--yes"];
        let failure = scene.client.failure(&command).unwrap();
        assert!(failure.error.contains(said), "{failure:?}");
        assert!(fs::read(&file).unwrap() == before, "{said}: the first disk was overwritten");
    }
    assert!(!Path::new("/dev/no-such-device").exists());
}

#[test]
fn a_replaced_file_keeps_its_mode_and_the_links_to_it() {
    let scene = scene(&[]);
    let (to, link) = (scene.path("image"), scene.path("link"));
    fs::write(&to, "old").unwrap();
    fs::set_permissions(&to, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink(&to, &link).unwrap();
    scene.restore(&link, &["--force"]);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    disk::compare(&scene.disk, &to).unwrap();
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn who_has_looked_at_files_leaves_nothing_open_on_the_server() {
    let mut scene = scene(&[]);
    let server = scene.site.server("server-a").unwrap();
    let fds = format!("/proc/{}/fd", server.process().unwrap().pid());
    let images = || {
        let targets =
            fs::read_dir(&fds).unwrap().flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        targets.filter(|target| target.extension().is_some_and(|end| end == "vhdx")).count()
    };
    let before = images();
    for _ in 0..3 {
        scene.client.run(&["ls", "disk:/2"]).unwrap();
        assert_eq!(scene.client.run(&["ls", "disk"]).unwrap().code, Some(0));
        assert_ne!(scene.client.run(&["cat", "disk:/2/none"]).unwrap().code, Some(0));
    }
    assert_eq!(images(), before);
}

#[test]
fn a_machine_set_up_anew_goes_on_with_its_chains() {
    let plan = Plan { servers: vec!["server-a".into(), "server-b".into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let disk = site.folder().join("disk.raw");
    disk::blank(&disk, 32 * MIB).unwrap();
    disk::write_noise(&disk, 0..32 * MIB, 1).unwrap();
    let old = site.client("machine", &[format!("sda-1234={}", disk.display())]).unwrap();
    site.await_ready(&old).unwrap();
    let servers = [old.backup().unwrap().server, old.backup().unwrap().server];
    assert_ne!(servers[0], servers[1]);

    // The new disk has another id. Which chain it goes on with is for its owner to say.
    let mut anew = old.twin("anew").unwrap();
    anew.settings.set("disks", vec![format!("sdb-9876={}", disk.display())]);
    let finished = anew.run(&["adopt"]).unwrap();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    println!("{}", finished.stdout);
    assert!(finished.stdout.contains("\"sda-1234=/dev/…\""), "{}", finished.stdout);
    assert!(finished.stdout.contains("2 snapshots of 32.0 MiB"), "{}", finished.stdout);

    anew.settings.set("disks", vec![format!("sda-1234={}", disk.display())]);
    let finished = anew.run(&["adopt"]).unwrap();
    println!("{}", finished.stdout);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    disk::change(&disk, MIB, 5).unwrap();
    for server in servers {
        let backup = anew.backup().unwrap();
        assert_eq!(backup.server, server, "its turn, as before");
        assert!(backup.disks[0].kind == "delta" && backup.disks[0].sent_bytes <= 2 * MIB);
    }
}
