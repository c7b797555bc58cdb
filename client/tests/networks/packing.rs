//! Which encoding a backup chooses by itself.

use std::{fs, path::Path, time::Duration};

use serde_json::Value;
use xtask::{
    disk,
    site::{MACHINES, Plan, Programs, SITES, Site, Sites},
};

const MIB: u64 = 1 << 20;

/// A disk of what programs are made of: it shrinks to less than half.
fn programs_disk(path: &Path, mib: u64) -> String {
    let programs = Programs::for_tests().unwrap();
    let read = |name| fs::read(programs.folder().join(name)).unwrap();
    let mut content: Vec<u8> =
        ["janus-client", "janus-server", "janus"].into_iter().flat_map(read).collect();
    while (content.len() as u64) < mib * MIB {
        content.extend_from_within(..);
    }
    content.truncate((mib * MIB) as usize);
    fs::write(path, content).unwrap();
    format!("disk={}", path.display())
}

fn noise_disk(path: &Path, mib: u64) -> String {
    disk::blank(path, mib * MIB).unwrap();
    disk::write_noise(path, 0..mib * MIB, 11).unwrap();
    format!("noise={}", path.display())
}

fn row(line: &str, what: &str, answer: &Value) -> (String, u64, u64) {
    let packing = &answer["packing"];
    assert_eq!(packing["setting"], "auto", "{answer}");
    let disk = &answer["disks"][0];
    let sent = disk["sent_bytes"].as_u64().unwrap();
    let wire = disk["wire_bytes"].as_u64().unwrap();
    assert_eq!(packing["saved_bytes"].as_u64().unwrap(), sent - wire, "{answer}");
    let mostly = packing["mostly"].as_str().unwrap().to_owned();
    println!(
        "{line}, {what}: mostly {mostly}, {} MiB travelled as {:.1}, {:.1} s; {}",
        sent / MIB,
        wire as f64 / MIB as f64,
        answer["seconds"].as_f64().unwrap(),
        packing["by"]
    );
    (mostly, sent, wire)
}

#[test]
fn as_root_a_line_of_20_mbit_gets_zstd_and_noise_travels_as_it_is() {
    let sites = Sites::start(Programs::for_tests().unwrap()).unwrap();
    let path = sites.folder().join("programs.raw");
    let client = sites.client("laptop", &[programs_disk(&path, 48)]).unwrap();
    sites.await_equal(&client, Duration::from_secs(30)).unwrap();
    for place in SITES.into_iter().chain([MACHINES]) {
        sites.network().slow(place, 20_000).unwrap();
    }
    let backup: Value = client.answer(&["backup"]).unwrap();
    let (mostly, sent, wire) = row("20 Mbit/s", "programs", &backup);
    assert_eq!(mostly, "zstd");
    assert!(wire * 3 < sent * 2, "{backup}");
    let by =
        |encoding: &str, bytes: &str| backup["packing"]["by"][encoding][bytes].as_u64().unwrap();
    // No more is on its way before the line is known.
    assert!(by("none", "raw_bytes") < 8 * MIB, "{backup}");
    assert!(by("zstd", "wire_bytes") * 2 < by("zstd", "raw_bytes"), "{backup}");

    // The next backup there knows the line.
    let mut content = fs::read(&path).unwrap();
    content.copy_within((8 * MIB) as usize..(14 * MIB) as usize, 0);
    fs::write(&path, &content).unwrap();
    let server = backup["server"].as_str().unwrap();
    let delta: Value = client.answer(&["backup", "--server", server]).unwrap();
    let (mostly, sent, wire) = row("20 Mbit/s", "6 MiB that changed", &delta);
    assert_eq!(mostly, "zstd");
    assert!(sent > 5 * MIB && wire * 3 < sent * 2, "{delta}");
    assert_eq!(delta["packing"]["by"]["none"]["raw_bytes"], 0, "{delta}");

    let to = sites.folder().join("back.raw");
    let restored = client.restore("disk", &to).unwrap();
    println!(
        "restored: {:.1} MiB came, {:.1} s",
        restored.fetched_bytes as f64 / MIB as f64,
        restored.seconds
    );
    disk::compare(&path, &to).unwrap();
    assert!(restored.fetched_bytes < 32 * MIB, "{restored:?}");

    let noise = noise_disk(&sites.folder().join("noise.raw"), 12);
    let other = sites.client("phone", &[noise]).unwrap();
    let backup: Value = other.answer(&["backup"]).unwrap();
    let (_, sent, wire) = row("20 Mbit/s", "noise", &backup);
    assert_eq!(sent, wire);
}

#[test]
fn on_loopback_nothing_is_packed() {
    let plan = Plan { servers: vec!["ours".into()], janus: false, folder: None };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let disk = programs_disk(&site.folder().join("programs.raw"), 96);
    let client = site.client("laptop", &[disk]).unwrap();
    let backup: Value = client.answer(&["backup"]).unwrap();
    let (mostly, ..) = row("loopback", "programs", &backup);
    assert_eq!(mostly, "none");
}
