//! Parts of a disk whose server is dead: a volume, a device of another size, several disks at once.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use janus_proto::show::date;
use serde_json::Value;
use xtask::{
    disk,
    loopback::LoopDevice,
    packages,
    site::{Client, Plan, Programs, Site, answers},
};

use crate::{caller::Caller, scene::MIB};

const SIZE: u64 = 64 * MIB;
const FIRST: Range<u64> = MIB..11 * MIB;
/// Its last block is not a whole one.
const SECOND: Range<u64> = 13 * MIB..45 * MIB - 3 * 512;
/// Only the dead server has what was there.
const CHANGED: Range<u64> = 3 * MIB..4 * MIB;

/// A disk with a GPT, and noise in its two volumes and between them.
fn partitioned(path: &Path) {
    disk::blank(path, SIZE).unwrap();
    disk::write_noise(path, MIB..45 * MIB, 1).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut gpt = gptman::GPT::new_from(&mut &file, 512, [7; 16]).unwrap();
    for (number, range) in [(1, FIRST), (2, SECOND)] {
        gpt[number] = gptman::GPTPartitionEntry {
            partition_type_guid: [0xA2; 16],
            unique_partition_guid: [number as u8; 16],
            starting_lba: range.start / 512,
            ending_lba: range.end / 512 - 1,
            attribute_bits: 0,
            partition_name: "part".into(),
        };
    }
    gpt.write_into(&mut &file).unwrap();
    gptman::GPT::write_protective_mbr_into(&mut &file, 512).unwrap();
}

fn bytes(path: &Path, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    File::open(path).unwrap().read_exact_at(&mut bytes, range.start).unwrap();
    bytes
}

/// Three disks, of which one has changed since the backup to a server that is dead now.
struct Scene {
    site: Site,
    client: Client,
    /// The disk that has changed, as it was.
    before: PathBuf,
    lost: answers::Backup,
}

impl Scene {
    fn new() -> Self {
        let mut site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
        let path = |name: &str| site.folder().join(name);
        let disks = ["disk", "second", "third"].map(|name| (name, path(name)));
        partitioned(&disks[0].1);
        for (seed, (_, path)) in (7..).zip(&disks[1..]) {
            disk::blank(path, 8 * MIB).unwrap();
            disk::write_noise(path, MIB..6 * MIB, seed).unwrap();
        }
        let before = path("before");
        disk::copy(&disks[0].1, &before).unwrap();
        let specs = disks.iter().map(|(name, path)| format!("{name}={}", path.display()));
        let client = site.client("machine", &specs.collect::<Vec<_>>()).unwrap();
        site.await_ready(&client).unwrap();
        let lost = client.backup().unwrap();
        // Times are told to the second.
        thread::sleep(Duration::from_millis(1100));
        disk::write_noise(&disks[0].1, CHANGED, 5).unwrap();
        let other = client.backup().unwrap().server;
        assert_ne!(other, lost.server);
        let caller = Caller::new(&site.url(), &site.folder().join("pki/machine"));
        let until = Instant::now() + Duration::from_secs(60);
        let is_known = || {
            let tables = caller.mirrored(&other, "").unwrap();
            tables.len() == 3 && tables.iter().all(|table| table.share.is_some())
        };
        while !is_known() {
            assert!(Instant::now() < until, "{}", site.log(&other));
            thread::sleep(Duration::from_millis(100));
        }
        site.kill_server(&lost.server).unwrap();
        Self { site, client, before, lost }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    fn snapshot(&self) -> &str {
        &self.lost.disks.iter().find(|one| one.disk_id == "disk").unwrap().snapshot_id
    }

    /// Arguments that restore the snapshot of the disk that has changed.
    fn restore<'a>(&'a self, to: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        [&["restore", self.snapshot(), "--to", to.to_str().unwrap()], more].concat()
    }

    /// What was there, without what nobody has.
    fn expected(&self, range: Range<u64>) -> Vec<u8> {
        let mut expected = bytes(&self.before, range.clone());
        for (at, byte) in (range.start..).zip(&mut expected) {
            if CHANGED.contains(&at) {
                *byte = 0;
            }
        }
        expected
    }
}

#[test]
fn as_root_parts_of_a_disk_come_from_others_and_fit_on_devices_of_other_sizes() {
    let scene = Scene::new();
    // All of this volume is elsewhere, though not all of the disk.
    let to = scene.path("volume");
    let report: Value = scene.client.answer(&scene.restore(&to, &["--volume", "2"])).unwrap();
    assert_eq!(report["bytes"], SECOND.end - SECOND.start, "{report}");
    assert!(fs::read(&to).unwrap() == bytes(&scene.before, SECOND));
    fs::remove_file(&to).unwrap();
    // Not all of this one.
    let failure = scene.client.failure(&scene.restore(&to, &["--volume", "1"])).unwrap();
    assert!(failure.error.contains("--partial MAP") && !to.exists(), "{failure:?}");
    let map = scene.path("volume.map");
    let more = ["--volume", "1", "--partial", map.to_str().unwrap()];
    let report: Value = scene.client.answer(&scene.restore(&to, &more)).unwrap();
    assert_eq!(report["lost"][0]["bytes"], MIB, "{report}");
    assert!(fs::read(&to).unwrap() == scene.expected(FIRST));

    for size in [80 * MIB, 46 * MIB] {
        let (file, map) = (scene.path("device"), scene.path(&format!("{size}.map")));
        disk::blank(&file, size).unwrap();
        disk::write_noise(&file, 0..size, 9).unwrap();
        let device = LoopDevice::attach(&file).unwrap();
        let more = ["--force", "--partial", map.to_str().unwrap()];
        let report: Value = scene.client.answer(&scene.restore(device.path(), &more)).unwrap();
        assert_eq!(report["table_moved"], true, "{report}");
        let said = packages::output(packages::command("sgdisk").arg("-v").arg(device.path()));
        assert!(said.unwrap().contains("No problems found"));
        drop(device);
        for range in [FIRST, FIRST.end..SECOND.start, SECOND] {
            assert!(bytes(&file, range.clone()) == scene.expected(range.clone()), "{range:?}");
        }
        fs::remove_file(file).unwrap();
    }
}

#[test]
fn disks_of_a_machine_come_from_others_where_they_are_sent() {
    let scene = Scene::new();
    let list = scene.client.list().unwrap();
    let of_lost = list.snapshots.iter().find(|one| one.server == scene.lost.server).unwrap();
    let (at, machine) = (date(of_lost.committed_ms), format!("{}/machine", xtask::site::USER));
    let places = ["second", "third"].map(|name| scene.path(&format!("{name}-restored")));
    let maps =
        ["second", "third"].map(|name| format!("{name}={}-restored", scene.path(name).display()));
    let mut command = vec!["restore", &machine, "--at", &at, "--yes"];
    maps.iter().for_each(|map| command.extend(["--map", map]));
    let answer: Value = scene.client.answer(&command).unwrap();
    for (at, place) in places.iter().enumerate() {
        assert_eq!(answer["disks"][at]["server"], scene.lost.server.as_str(), "{answer}");
        disk::compare(&scene.path(["second", "third"][at]), place).unwrap();
    }
    // Of the third one it is said what is missing, and how to get the rest.
    let map = format!("disk={}", scene.path("refused").display());
    let command = ["restore", &machine, "--at", &at, "--yes", "--map", &map];
    let failure = scene.client.failure(&command).unwrap();
    assert!(failure.error.contains("disk disk: ") && failure.exit_code == 3, "{failure:?}");
}
