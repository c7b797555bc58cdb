//! Every reason not to believe a journal, brought about as it is in life, and read where a user reads it.

use std::{collections::BTreeSet, fs, os::unix::fs::FileExt, process::Command};

use janus_client::journal::Distrust;
use serde_json::{Value, json};
use xtask::site::{Client, Site};

use super::whole::{self, FIRST_USN, content_of};

#[path = "../nbd/qemu.rs"]
#[expect(dead_code, reason = "it belongs to the tests of NBD")]
mod qemu;

const MIB: u64 = 1 << 20;

/// What a reason is called here. A new one gets a name, and its place in `NAMES`.
fn name(reason: &Distrust) -> &'static str {
    match reason {
        Distrust::NoJournal => "no journal",
        Distrust::NoCursor => "no cursor",
        Distrust::OtherKind => "other kind",
        Distrust::Due { .. } => "due",
        Distrust::Off { .. } => "off",
        Distrust::Missed { .. } => "missed",
        Distrust::Reconciled => "reconciled",
        Distrust::BitmapGone { .. } => "bitmap gone",
        Distrust::Inconsistent { .. } => "inconsistent",
        Distrust::Granularity { .. } => "granularity",
        Distrust::Resized { .. } => "resized",
        Distrust::Unreadable { .. } => "unreadable",
        Distrust::Untracked { .. } => "untracked",
        Distrust::Recreated => "recreated",
        Distrust::Deleted => "deleted",
        Distrust::Restamped => "restamped",
        Distrust::Wrapped => "wrapped",
        Distrust::RolledBack => "rolled back",
        Distrust::OtherVolume => "other volume",
        Distrust::NotAtRest { .. } => "not at rest",
        Distrust::ForeignDriver => "foreign driver",
        Distrust::NotUnderstood { .. } => "not understood",
        Distrust::Damaged { .. } => "damaged",
    }
}

/// All but one. "unreadable" takes a server that tells a bitmap's name and not its bits: `nbd::tests` has one.
const NAMES: [&str; 22] = [
    "no journal",
    "no cursor",
    "other kind",
    "due",
    "off",
    "missed",
    "reconciled",
    "bitmap gone",
    "inconsistent",
    "granularity",
    "resized",
    "untracked",
    "recreated",
    "deleted",
    "restamped",
    "wrapped",
    "rolled back",
    "other volume",
    "not at rest",
    "foreign driver",
    "not understood",
    "damaged",
];

/// The reasons that were told.
#[derive(Default)]
struct Told(BTreeSet<&'static str>);

impl Told {
    /// A dry run says so, in JSON and in words.
    fn forecast(&mut self, client: &Client, reason: &Distrust) {
        let told = forecast(client);
        assert_eq!(told, Some(reason.to_string()));
        let words = client.run(&["backup", "--dry-run"]).unwrap().stdout;
        assert!(words.contains(&format!("full compare: {reason}")), "{words}");
        self.0.insert(name(reason));
    }

    /// The same of a reason with words of its own, among them these.
    fn forecast_like(&mut self, client: &Client, of: fn(String) -> Distrust, part: &str) {
        let told = forecast(client).unwrap();
        let what =
            told.strip_prefix(&of(String::new()).to_string()).unwrap_or_else(|| panic!("{told}"));
        assert!(what.contains(part), "{told}");
        self.forecast(client, &of(what.to_owned()));
    }

    /// A backup says so.
    fn backup(&mut self, client: &Client, reason: &Distrust) {
        let taken = client.backup().unwrap().disks.remove(0);
        assert_eq!(full_compare(&taken.reading), Some(reason.to_string()));
        self.0.insert(name(reason));
    }
}

fn full_compare(reading: &Value) -> Option<String> {
    let journal = &reading["journals"][0]["full_compare"];
    [&reading["full_compare"], journal].into_iter().find_map(Value::as_str).map(str::to_owned)
}

fn forecast(client: &Client) -> Option<String> {
    let answer: Value = client.answer(&["backup", "--dry-run"]).unwrap();
    full_compare(&answer["disks"][0]["reading"])
}

#[test]
fn every_reason_not_to_believe_a_journal_is_told_by_its_name() {
    let mut told = Told::default();
    let mut scene = whole::Scene::new();
    of_a_volume(&mut told, &mut scene);
    of_the_policy(&mut told, &mut scene);
    of_an_image(&mut told, &scene.site);
    let missing: Vec<_> = NAMES.iter().filter(|name| !told.0.contains(*name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// What a volume and its journal may have become since the backup; each from what the backup saw.
fn of_a_volume(told: &mut Told, scene: &mut whole::Scene) {
    scene.client.settings.set("audit_percent", 0);
    told.forecast(&scene.client, &Distrust::NoCursor);
    scene.backup();
    assert_eq!(forecast(&scene.client), None);
    let (then, usn) = (scene.volume.bytes(), scene.next_usn);
    let change = |scene: &mut whole::Scene, operations: Vec<Value>, clean| {
        scene.volume.put_back(&then);
        scene.library.change(&mut scene.volume, operations, clean).answers
    };
    let delete = json!(["delete_journal"]);

    change(scene, vec![delete.clone()], true);
    told.forecast(&scene.client, &Distrust::NoJournal);
    change(scene, vec![delete.clone(), json!(["journal", 2, FIRST_USN])], true);
    told.forecast(&scene.client, &Distrust::Recreated);
    let later = usn.next_multiple_of(4096);
    change(scene, vec![delete, json!(["journal", 1, later, later])], true);
    told.forecast(&scene.client, &Distrust::Restamped);
    change(scene, vec![json!(["flags", 0x10])], true);
    told.forecast(&scene.client, &Distrust::Deleted);
    let file = scene.files[0];
    let many = json!(["records", usn, vec![(file, 0x8000_0001u32); 100]]);
    let end = change(scene, vec![many], true)[0].as_u64().unwrap();
    let keep = json!(["keep_tail", (end - 1) / 4096 * 4096, end, 1]);
    scene.library.change(&mut scene.volume, vec![keep], true);
    told.forecast(&scene.client, &Distrust::Wrapped);
    let record = json!(["records", usn, [(file, 0x8000_0001u32)]]);
    change(scene, vec![record, json!(["corrupt", usn + 4, "09"])], true);
    told.forecast_like(&scene.client, |what| Distrust::NotUnderstood { what }, "version 9");

    change(scene, Vec::new(), false);
    told.forecast_like(&scene.client, |what| Distrust::NotAtRest { what }, "in use");
    scene.volume.put_back(&then);
    scene.volume.empty_log();
    told.forecast(&scene.client, &Distrust::ForeignDriver);
    scene.volume.put_back(&then);
    // The serial number.
    scene.volume.file().write_all_at(&[0xA5], 72).unwrap();
    told.forecast(&scene.client, &Distrust::OtherVolume);
    scene.volume.put_back(&then);
    let mft = u64::from_le_bytes(then[48..56].try_into().unwrap()) * scene.volume.cluster_bytes();
    scene.volume.file().write_all_at(b"BAAD", mft).unwrap();
    told.forecast_like(&scene.client, |what| Distrust::Damaged { what }, "MFT");

    scene.volume.put_back(&then);
    scene.overwrite(2, 77);
    scene.backup();
    scene.volume.put_back(&then);
    scene.next_usn = usn;
    told.forecast(&scene.client, &Distrust::RolledBack);
    scene.backup();
}

/// What keeps a run from believing whatever the journal says.
fn of_the_policy(told: &mut Told, scene: &mut whole::Scene) {
    scene.client.settings.set("full_compare_runs", 1);
    told.forecast(&scene.client, &Distrust::Due { runs: 1, days: 14 });
    scene.client.settings.set("full_compare_runs", 30);

    // The cache is one of an older day: of what the server has it knows less.
    let (cache, older) = (scene.client.cache(), scene.site.folder().join("older"));
    let copied = Command::new("cp").arg("-a").args([&cache, &older]).status().unwrap();
    assert!(copied.success());
    scene.overwrite(1, 78);
    scene.backup();
    fs::remove_dir_all(&cache).unwrap();
    fs::rename(older, cache).unwrap();
    told.backup(&scene.client, &Distrust::Reconciled);
    assert_eq!(forecast(&scene.client), None);

    scene.client.settings.set("audit_percent", 100);
    let content = scene.volume.bytes();
    let block = content.chunks(4096).position(|block| block[..16] == content_of(3)).unwrap();
    let offset = (block as u64 + 17) * 4096;
    scene.volume.file().write_all_at(&[0xA5; 100], offset + 300).unwrap();
    told.backup(&scene.client, &Distrust::Missed { offset });
    let off = |told: &str| {
        let date = told.split(" on ").nth(1).and_then(|rest| rest.split(' ').next());
        Distrust::Off { offset, date: date.unwrap().to_owned(), disk: "disk".into() }
    };
    let date = forecast(&scene.client).unwrap();
    told.forecast(&scene.client, &off(&date));
    scene.client.run(&["trust-journal", "disk"]).unwrap();
    scene.backup();

    scene.client.settings.set("encryption", "client");
    let _: Value = scene.client.answer(&["seal", "init"]).unwrap();
    told.forecast(&scene.client, &Distrust::OtherKind);
}

/// What may have become of an image's dirty bitmap; each from what the backup saw.
fn of_an_image(told: &mut Told, site: &Site) {
    let image = site.folder().join("vm.qcow2");
    qemu::create(&image, 64 * MIB);
    let client = site.client("guest", &[format!("vm=qcow2:{}", image.display())]).unwrap();
    client.backup().unwrap();
    assert_eq!(forecast(&client), None);
    let then = fs::read(&image).unwrap();
    let (path, name) = (qemu::text(&image), qemu::bitmaps(&image).remove(0));
    let bitmap = |arguments: &[&str]| {
        qemu::run("qemu-img", &[&["bitmap"], arguments, &[path, &name]].concat());
    };

    bitmap(&["--remove"]);
    told.forecast(&client, &Distrust::BitmapGone { name: name.clone() });
    bitmap(&["--add", "-g", "32768"]);
    told.forecast(&client, &Distrust::Granularity { name: name.clone(), bytes: 32768 });
    fs::write(&image, &then).unwrap();
    bitmap(&["--disable"]);
    told.forecast_like(&client, |what| Distrust::Untracked { what }, "was turned off");
    fs::write(&image, &then).unwrap();
    qemu::run("qemu-img", &["resize", "-q", path, "80M"]);
    told.forecast(&client, &Distrust::Resized { old: 64 * MIB, new: 80 * MIB });
    fs::write(&image, &then).unwrap();
    qemu::crash(&image, "write -q -P 2 40M 1M");
    told.forecast(&client, &Distrust::Inconsistent { name });
}
