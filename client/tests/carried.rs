//! Backups that go to a server by hand: exported there, imported here, and backed up on over the line.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use serde_json::Value;
use xtask::{
    disk, packages,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Two servers, and a machine with two disks.
struct Scene {
    site: Site,
    client: Client,
    disks: [PathBuf; 2],
}

impl Scene {
    fn new() -> Self {
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
        site.start_all().unwrap();
        let disks = ["root", "data"].map(|name| site.folder().join(format!("{name}.raw")));
        disk::blank(&disks[0], 48 * MIB).unwrap();
        disk::write_noise(&disks[0], 0..20 * MIB, 1).unwrap();
        disk::blank(&disks[1], 16 * MIB + 512).unwrap();
        disk::write_noise(&disks[1], 3 * MIB..12 * MIB, 2).unwrap();
        let named =
            [format!("root={}", disks[0].display()), format!("data={}", disks[1].display())];
        let client = site.client("machine", &named).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, disks }
    }

    fn folder(&self) -> String {
        self.site.folder().join("usb").to_str().unwrap().to_owned()
    }

    fn copies(&self) -> [Vec<u8>; 2] {
        self.disks.each_ref().map(|disk| fs::read(disk).unwrap())
    }

    /// Restores both disks of the snapshots and compares them.
    fn assert_restores(&self, snapshots: &[Value], expected: &[Vec<u8>; 2]) {
        for (snapshot, expected) in snapshots.iter().zip(expected) {
            let to = self.site.folder().join("restored.raw");
            self.client.restore(snapshot["snapshot_id"].as_str().unwrap(), &to).unwrap();
            assert!(fs::read(&to).unwrap() == *expected, "{snapshot}");
            fs::remove_file(to).unwrap();
        }
    }
}

fn remove_store(path: &Path) {
    fs::remove_dir_all(path).unwrap();
    fs::create_dir(path).unwrap();
}

#[test]
fn a_first_backup_goes_to_the_other_server_by_hand_and_the_next_one_sends_what_changed() {
    let mut scene = Scene::new();
    let folder = scene.folder();
    let first = scene.client.backup().unwrap();
    assert_eq!(first.server, "server-a");
    let copies = scene.copies();
    let exported = scene.site.admin("server-a", &["export", "alice/machine", "--to", &folder]);
    println!("{}", text(&exported.unwrap()));
    // Not over something that is there.
    let again = scene.site.admin("server-a", &["export", "alice/machine", "--to", &folder]);
    assert!(refused(&again.unwrap()).contains("is there already"));

    let imported = scene.site.admin("server-b", &["import", &folder, "--json"]).unwrap();
    let imported = json(&imported);
    println!("{imported}");
    assert_eq!((&imported["ok"], &imported["was_here"]), (&true.into(), &false.into()));
    assert_eq!(imported["written_bytes"], 29 * MIB);
    let listed = scene.client.list().unwrap();
    assert_eq!(listed.snapshots.len(), 4);
    let shown = text(&scene.site.admin("server-b", &["import", &folder]).unwrap());
    assert!(shown.contains("is here already"), "{shown}");

    // It was no use: it is still the other server's turn, and only what has changed travels.
    disk::write_noise(&scene.disks[0], 5 * MIB..6 * MIB, 3).unwrap();
    let next = scene.client.backup().unwrap();
    assert_eq!((next.server.as_str(), next.use_counter), ("server-b", 2));
    let sent: Vec<_> =
        next.disks.iter().map(|disk| (disk.kind.as_str(), disk.sent_bytes)).collect();
    assert_eq!(sent, [("delta", MIB), ("delta", 0)]);

    // The store it came from goes.
    scene.site.kill_server("server-a").unwrap();
    remove_store(&scene.site.folder().join("server-a"));
    let disks = imported["disks"].as_array().unwrap().clone();
    scene.assert_restores(&disks, &copies);

    // And comes back empty, to get all of it from the folder while it is stopped.
    let imported = json(&scene.site.admin("server-a", &["import", &folder, "--json"]).unwrap());
    assert!(imported["error"].as_str().unwrap().contains("holds no store"), "{imported}");
    scene.site.start_server("server-a").unwrap();
    scene.site.stop_server("server-a").unwrap();
    let imported = json(&scene.site.admin("server-a", &["import", &folder, "--json"]).unwrap());
    assert_eq!(imported["ok"], true, "{imported}");
    scene.site.start_server("server-a").unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let disks = imported["disks"].as_array().unwrap().clone();
    scene.assert_restores(&disks, &copies);
    let newest: Vec<Value> = next
        .disks
        .iter()
        .map(|disk| serde_json::json!({ "snapshot_id": disk.snapshot_id }))
        .collect();
    scene.assert_restores(&newest, &scene.copies());
    disk::write_noise(&scene.disks[1], 4 * MIB..5 * MIB, 4).unwrap();
    let next = scene.client.backup().unwrap();
    assert_eq!(next.server, "server-a");
    let sent: Vec<_> =
        next.disks.iter().map(|disk| (disk.kind.as_str(), disk.sent_bytes)).collect();
    assert_eq!(sent, [("delta", MIB), ("delta", MIB)]);
}

#[test]
fn a_client_writes_a_folder_without_a_server_and_then_sends_what_changed_to_who_imported_it() {
    let mut scene = Scene::new();
    let folder = scene.folder();
    let names = scene.site.server_names();
    names.iter().for_each(|name| scene.site.stop_server(name).unwrap());
    scene.site.stop_janus().unwrap();
    let copies = scene.copies();
    let made: Value = scene.client.answer(&["backup", "--to-folder", &folder]).unwrap();
    println!("{made}");
    assert_eq!(made["disks"][0]["data_bytes"], 20 * MIB);
    assert_eq!(made["disks"][1]["data_bytes"], 9 * MIB);
    let again = scene.client.failure(&["backup", "--to-folder", &folder]).unwrap();
    assert!(again.error.contains("is there already"), "{again:?}");
    // Anybody reads it.
    let image = Path::new(&folder).join("root.vhdx");
    assert!(packages::seven_zip(&image, "VHDX").unwrap() == copies[0]);

    scene.site.start_all().unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    let imported = json(&scene.site.admin("server-b", &["import", &folder, "--json"]).unwrap());
    assert_eq!(imported["ok"], true, "{imported}");
    let disks = imported["disks"].as_array().unwrap().clone();
    scene.assert_restores(&disks, &copies);
    assert_eq!(scene.client.list().unwrap().snapshots.len(), 2);
    // Images as others might have made them.
    let data = scene.disks[1].to_str().unwrap();
    let images = [("--vhdx", image.to_str().unwrap(), "root"), ("--raw", data, "data")];
    for (kind, path, name) in images {
        let import = ["import", kind, path, "--machine", "alice/machine", "--disk", name];
        println!("{}", text(&scene.site.admin("server-a", &import).unwrap()));
    }
    disk::write_noise(&scene.disks[0], 5 * MIB..6 * MIB, 3).unwrap();
    let backups: Vec<_> = (0..2).map(|_| scene.client.backup().unwrap()).collect();
    let sent = |server: &str| -> Vec<_> {
        let backup = backups.iter().find(|backup| backup.server == server).unwrap();
        backup.disks.iter().map(|disk| (disk.kind.clone(), disk.sent_bytes)).collect()
    };
    assert_eq!(sent("server-b"), [("delta".into(), MIB), ("delta".into(), 0)]);
    assert_eq!(sent("server-a"), [("delta".into(), MIB), ("delta".into(), 0)]);
    for backup in &backups {
        let disks = backup.disks.iter();
        let disks: Vec<Value> =
            disks.map(|one| serde_json::json!({ "snapshot_id": one.snapshot_id })).collect();
        scene.assert_restores(&disks, &scene.copies());
    }
}

#[test]
fn damage_hostile_folders_and_wrong_arguments_are_told_and_change_nothing() {
    let scene = Scene::new();
    let folder = scene.folder();
    scene.client.backup().unwrap();
    let first = scene.client.list().unwrap().snapshots[0].snapshot_id.clone();
    text(&scene.site.admin("server-a", &["export", &first, "--to", &folder]).unwrap());
    let import = |folder: &str| scene.site.admin("server-b", &["import", folder]).unwrap();
    let snapshots = || {
        let usage = json(&scene.site.admin("server-b", &["usage", "--json"]).unwrap());
        let machines = usage["machines"].as_array().unwrap().clone();
        machines.iter().map(|machine| machine["disks"].as_array().unwrap().len()).sum::<usize>()
    };
    // A byte of data in the middle of the first disk's image.
    let image = Path::new(&folder).join("root.vhdx");
    let right = fs::read(&image).unwrap();
    let mut wrong = right.clone();
    let at = right.len() / 2;
    wrong[at] ^= 1;
    fs::write(&image, &wrong).unwrap();
    let said = refused(&import(&folder));
    println!("{said}");
    assert!(said.contains("root.vhdx") && said.contains(&format!("byte {}", at / 4096 * 4096)));
    assert_eq!(snapshots(), 0);
    fs::write(&image, &right).unwrap();
    // A manifest with a name that leads out, and the sum made right.
    let path = Path::new(&folder).join("janus-backup.json");
    let manifest = fs::read_to_string(&path).unwrap();
    let (body, _) = manifest.split_at(manifest.len() - 65);
    let hostile = body.replace("\"root.vhdx\"", "\"../../root.vhdx\"");
    assert_ne!(hostile, body);
    let sum = blake3::hash(hostile.as_bytes());
    fs::write(&path, format!("{hostile}{sum}\n")).unwrap();
    let said = refused(&import(&folder));
    assert!(said.contains("janus-backup.json is damaged") && said.contains("../../"), "{said}");
    assert_eq!(snapshots(), 0);
    fs::write(&path, &manifest).unwrap();
    // As another machine, beside its own.
    text(&scene.site.admin("server-b", &["import", &folder, "--machine", "bob/other"]).unwrap());
    text(&import(&folder));
    assert_eq!(snapshots(), 4);
    assert!(refused(&import("/nowhere")).contains("holds no carried backup"));
    for wrong in [
        &["import"][..],
        &["import", &folder, "--disk", "x"],
        &["import", "--vhdx", "a.vhdx"],
        &["import", "--vhdx", "a.vhdx", "--raw", "b", "--machine", "a/b", "--disk", "c"],
        &["export", &first],
    ] {
        let output = scene.site.admin("server-b", wrong).unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
    // Nobody waits for what a pipe may say.
    let pipe = scene.site.folder().join("pipe");
    xtask::packages::output(std::process::Command::new("mkfifo").arg(&pipe)).unwrap();
    for kind in ["--raw", "--vhdx"] {
        let named = [kind, pipe.to_str().unwrap(), "--machine", "alice/piped", "--disk", "root"];
        let output = scene.site.admin("server-b", &[&["import"][..], &named].concat()).unwrap();
        assert!(refused(&output).contains("it is no file"), "{output:?}");
    }
    let unknown = scene.site.admin("server-a", &["export", "bob/none", "--to", "/x"]).unwrap();
    assert!(refused(&unknown).contains("no machine bob/none"));
}
