//! The whole client on NTFS volumes: what the journal saves, and what happens when it was wrong.

use std::{fs, os::unix::fs::FileExt};

use serde_json::{Value, json};
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, answers},
};

use super::scene::{Library, Volume};

pub const FIRST_USN: u64 = 1 << 18;
const OVERWRITE: u32 = 1;
const CLOSE: u32 = 0x8000_0000;

pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub library: Library,
    pub volume: Volume,
    pub next_usn: u64,
    pub files: Vec<u64>,
}

impl Scene {
    /// A volume with five files of 1 MiB, and one server.
    pub fn new() -> Self {
        Self::with(&["server-a"])
    }

    fn with(servers: &[&str]) -> Self {
        let servers = servers.iter().map(|name| (*name).to_owned()).collect();
        let plan = Plan { servers, ..Plan::default() };
        let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
        let mut library = Library::start();
        let mut volume = Volume::new(48, 4096);
        let made = (0..5).map(|file| json!(["write", format!("/f{file}"), 0, 1 << 20, file, true]));
        let mut operations = vec![json!(["journal", 1, FIRST_USN])];
        operations.extend(made);
        let changed = library.change(&mut volume, operations, true);
        let files = changed.answers[1..].iter().map(|answer| answer.as_u64().unwrap()).collect();
        let client =
            site.client("machine", &[format!("disk={}", volume.path().display())]).unwrap();
        site.await_ready(&client).unwrap();
        let mut scene = Self { site, client, library, volume, next_usn: FIRST_USN, files };
        scene.records(&[0, 1, 2, 3, 4]);
        scene
    }

    fn records(&mut self, files: &[usize]) {
        let records: Vec<_> =
            files.iter().map(|file| (self.files[*file], OVERWRITE | CLOSE)).collect();
        let operation = json!(["records", self.next_usn, records]);
        let changed = self.library.change(&mut self.volume, vec![operation], true);
        self.next_usn = changed.answers[0].as_u64().unwrap();
    }

    pub fn overwrite(&mut self, file: usize, seed: u32) {
        let operation = json!(["write", format!("/f{file}"), 300_000, 40_000, seed, false]);
        self.library.change(&mut self.volume, vec![operation], true);
        self.records(&[file]);
    }

    pub fn backup(&self) -> answers::Disk {
        self.client.backup().unwrap().disks[0].clone()
    }

    fn assert_restores(&self, taken: &answers::Disk) {
        let to = self.site.folder().join("restored");
        self.client.restore(&taken.snapshot_id, &to).unwrap();
        disk::compare(self.volume.path(), &to).unwrap();
        fs::remove_file(to).unwrap();
    }
}

fn full_compare(taken: &answers::Disk) -> &Value {
    &taken.reading["journals"][0]["full_compare"]
}

#[test]
fn only_what_the_journal_names_is_read_and_the_rest_is_right() {
    let mut scene = Scene::new();
    scene.client.settings.set("audit_percent", 0);
    let first = scene.backup();
    assert_eq!(full_compare(&first), "nothing is remembered of an earlier backup");
    scene.overwrite(2, 77);
    let second = scene.backup();
    assert_eq!(full_compare(&second), &Value::Null, "{second:?}");
    assert!(second.read_bytes + (4 << 20) < first.read_bytes, "{second:?} {first:?}");
    assert!(second.sent_bytes < 200_000, "{second:?}");
    scene.assert_restores(&second);
    let text = scene.client.run(&["backup"]).unwrap().stdout;
    assert!(text.contains("unchanged or free by the NTFS USN journal"), "{text}");
    // A driver that writes no journal.
    scene.volume.empty_log();
    let third = scene.backup();
    assert_eq!(full_compare(&third), "a driver that keeps no change journal has used the volume");
    scene.assert_restores(&third);
}

/// A new server comes into rotation without a full compare: only segment digests are compared with it.
#[test]
fn a_server_that_was_seeded_gets_a_delta_by_the_journal() {
    let mut scene = Scene::with(&["server-a", "server-b"]);
    scene.client.settings.set("audit_percent", 0);
    let first = scene.client.backup().unwrap();
    let other = if first.server == "server-a" { "server-b" } else { "server-a" };
    let seeding = ["seed", "--from", &first.server, "--all"];
    let seeded = scene.site.admin(other, &seeding).unwrap();
    assert!(seeded.status.success(), "{seeded:?}");
    scene.overwrite(2, 78);
    let second = scene.client.backup().unwrap();
    let disk = &second.disks[0];
    assert_eq!((second.server.as_str(), disk.kind.as_str()), (other, "delta"), "{second:?}");
    assert_eq!(full_compare(disk), &Value::Null, "{disk:?}");
    assert!(disk.read_bytes + (4 << 20) < first.disks[0].read_bytes, "{disk:?}");
    assert!(disk.sent_bytes < 200_000, "{disk:?}");
    scene.assert_restores(disk);
}

#[test]
fn a_change_behind_the_journal_is_found_within_its_audits_and_turns_it_off() {
    let mut scene = Scene::new();
    // All promised blocks have been read after four backups.
    scene.client.settings.set("audit_percent", 25);
    scene.backup();
    let content = scene.volume.bytes();
    let start = content.windows(4096).position(|block| block[..16] == content_of(3)).unwrap();
    scene.volume.file().write_all_at(&[0xA5; 100], start as u64 + 70_000).unwrap();
    let mut found = None;
    for round in 0..4 {
        let taken = scene.backup();
        if full_compare(&taken) != &Value::Null {
            found = Some((round, taken));
            break;
        }
    }
    let (round, taken) = found.expect("found in its turn");
    println!("found in backup {round} after the change");
    let reason = full_compare(&taken).as_str().unwrap();
    assert!(reason.contains("missed a change at byte"), "{reason}");
    scene.assert_restores(&taken);
    // It stays off until the user says otherwise; the disk is compared as a whole.
    let next = scene.backup();
    let reason = full_compare(&next).as_str().unwrap();
    assert!(reason.contains("janus-client trust-journal disk"), "{reason}");
    scene.client.run(&["trust-journal", "disk"]).unwrap();
    let again = scene.backup();
    assert_eq!(full_compare(&again), "nothing is remembered of an earlier backup");
    assert_eq!(full_compare(&scene.backup()), &Value::Null);
}

/// How the library's pattern for a seed begins.
pub fn content_of(seed: usize) -> [u8; 16] {
    let start = seed * 4099 % (1 << 19);
    std::array::from_fn(|at| {
        let i = start + at;
        (i * 7 + i / 251) as u8
    })
}

#[test]
fn free_space_is_skipped_and_told() {
    let mut scene = Scene::new();
    let delete = vec![json!(["delete", "/f1"]), json!(["delete", "/f3"])];
    scene.library.change(&mut scene.volume, delete, true);
    scene.client.settings.set("skip_free", true);
    let before = scene.volume.contents();
    let taken = scene.backup();
    assert!(taken.reading["zero_bytes"].as_u64().unwrap() > 30 << 20, "{taken:?}");
    let listed = scene.client.run(&["list"]).unwrap().stdout;
    assert!(listed.contains("MiB skipped"), "{listed}");
    // What takes the place of free space is read though no record speaks of these clusters' past.
    let again = vec![json!(["write", "/f7", 0, 2 << 20, 9, true])];
    let changed = scene.library.change(&mut scene.volume, again, true);
    scene.files.push(changed.answers[0].as_u64().unwrap());
    scene.records(&[5]);
    let now = scene.volume.contents();
    assert_ne!(before, now);
    let taken = scene.backup();
    let to = scene.volume.path().with_extension("restored");
    scene.client.restore(&taken.snapshot_id, &to).unwrap();
    fs::rename(&to, scene.volume.path()).unwrap();
    assert_eq!(scene.volume.contents(), now);
    let mut check = std::process::Command::new("ntfsfix");
    assert!(check.arg("-n").arg(scene.volume.path()).status().unwrap().success());
}
