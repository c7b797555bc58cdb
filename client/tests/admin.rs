//! What an administrator asks of a server's store, whether the server runs or not.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf, process::Output};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const SERVER: &str = "server-a";

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// One server, and a machine whose disk of so many MiB, the first of them with data, was backed up.
fn backed_up(disk_mib: u64, data_mib: u64) -> (Site, PathBuf, Client) {
    let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, disk_mib * MIB).unwrap();
    disk::write_noise(&path, 0..data_mib * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
    (site, path, client)
}

#[test]
fn usage_tells_logical_allocated_and_unique_bytes() {
    let (mut site, path, client) = backed_up(32, 16);
    // 4 MiB of the base are written anew: what the base holds of them nobody needs but itself.
    disk::write_noise(&path, 2 * MIB..6 * MIB, 2).unwrap();
    client.backup().unwrap();

    let shown = text(&site.admin(SERVER, &["usage", "--snapshots"]).unwrap());
    println!("{shown}");
    let running = json(&site.admin(SERVER, &["usage", "--snapshots", "--json"]).unwrap());
    let disk = &running["machines"][0]["disks"][0];
    assert_eq!(running["machines"][0]["machine"], "alice/machine");
    assert_eq!((&disk["logical_bytes"], &disk["snapshot_count"]), (&(32 * MIB).into(), &2.into()));
    let bytes = |snapshot: usize, name: &str| disk["snapshots"][snapshot][name].as_u64().unwrap();
    assert_eq!(bytes(1, "unique_bytes"), 4 * MIB, "{running}");
    assert_eq!(bytes(0, "unique_bytes"), bytes(0, "allocated_bytes"), "the head");
    assert!(bytes(1, "allocated_bytes") >= 16 * MIB, "{running}");
    assert_eq!(disk["allocated_bytes"], bytes(0, "allocated_bytes") + bytes(1, "allocated_bytes"));

    site.stop_server(SERVER).unwrap();
    let stopped = json(&site.admin(SERVER, &["usage", "--snapshots", "--json"]).unwrap());
    assert_eq!(stopped["machines"], running["machines"]);
    site.start_server(SERVER).unwrap();
    site.kill_server(SERVER).unwrap();
    text(&site.admin(SERVER, &["usage", "alice/machine"]).unwrap());
}

#[test]
fn clients_compare_with_a_store_made_anew_and_go_on_with_deltas() {
    let (mut site, path, client) = backed_up(32, 32);

    for (seed, command) in [&["rebuild"][..], &["adopt", "--new-id"]].into_iter().enumerate() {
        let refused = site.admin(SERVER, command).unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(1) && said.contains("in use"), "{refused:?}");
        site.stop_server(SERVER).unwrap();
        println!("{}", text(&site.admin(SERVER, command).unwrap()));
        site.start_server(SERVER).unwrap();
        site.await_ready(&client).unwrap();
        let at = (4 + seed as u64) * MIB;
        disk::write_noise(&path, at..at + MIB, 2).unwrap();
        let backup = client.backup().unwrap();
        let disk = &backup.disks[0];
        assert_eq!((disk.kind.as_str(), disk.sent_bytes), ("delta", MIB), "{backup:?}");
    }
    let to = site.folder().join("restored.raw");
    client.restore("disk", &to).unwrap();
    assert!(fs::read(to).unwrap() == fs::read(path).unwrap());
}

#[test]
fn a_moved_store_goes_on_at_its_new_place_alone() {
    let (mut site, path, client) = backed_up(64, 32);

    let to = site.folder().join("elsewhere");
    let to = to.to_str().unwrap();
    let refused = site.admin(SERVER, &["move", "--to", to]).unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use"), "{refused:?}");
    site.stop_server(SERVER).unwrap();
    let said = text(&site.admin(SERVER, &["move", "--to", to]).unwrap());
    println!("{said}");
    assert!(said.contains(&format!("set image_path = {to:?}")), "{said}");
    let Err(error) = site.start_server(SERVER) else { panic!("the old place is opened") };
    println!("{error:#}");
    assert!(site.log(SERVER).contains(&format!("was moved to {to}")), "{error:#}");

    site.server(SERVER).unwrap().settings.set("image_path", to);
    site.start_server(SERVER).unwrap();
    site.await_ready(&client).unwrap();
    disk::write_noise(&path, 3 * MIB..4 * MIB, 2).unwrap();
    let backup = client.backup().unwrap();
    let disk = &backup.disks[0];
    assert_eq!((disk.kind.as_str(), disk.sent_bytes), ("delta", MIB), "{backup:?}");
    let restored = site.folder().join("restored.raw");
    client.restore("disk", &restored).unwrap();
    assert!(fs::read(restored).unwrap() == fs::read(path).unwrap());
}

#[test]
fn commands_fail_with_one_line_and_a_code() {
    let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let fails = |arguments: &[&str], code: i32, words: &str| {
        let output = site.admin(SERVER, arguments).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
        output
    };
    let output = fails(&["usage", "bob/none", "--json"], 1, "no machine bob/none");
    assert_eq!(json(&output)["ok"], false);
    fails(&["usage", "bob"], 2, "not <user>/<machine>");
    fails(&["usage", "--lease-seconds", "0"], 2, "lease_seconds");
    let nowhere = site.folder().join("nowhere");
    fails(&["usage", "--image-path", &nowhere.to_string_lossy()], 1, "holds no store");
    assert!(!fs::exists(nowhere).unwrap());
}
