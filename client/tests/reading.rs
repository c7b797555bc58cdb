//! What a backup reads and sends, and that the user is told before.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;

#[test]
fn a_dry_run_tells_what_each_server_would_get_and_sends_nothing() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 64 * MIB).unwrap();
    disk::write_noise(&path, 0..24 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    let dry_run = || {
        let answer: Value = client.answer(&["backup", "--dry-run"]).unwrap();
        answer["disks"][0].clone()
    };
    let to = |forecast: &Value, server: &str| {
        let servers = forecast["servers"].as_array().unwrap().clone();
        let named = servers.into_iter().find(|one| one["server"] == server);
        named.map(|one| one["bytes"].as_u64().unwrap())
    };
    let before = dry_run();
    assert_eq!(
        (&before["first_bytes"], &before["read_bytes"]),
        (&(24 * MIB).into(), &(24 * MIB).into())
    );
    assert_eq!(before["reading"]["full_compare"], "there is no change journal");
    site.await_ready(&client).unwrap();
    assert!(client.list().unwrap().snapshots.is_empty());

    let first = client.backup().unwrap();
    disk::write_noise(&path, 8 * MIB..9 * MIB, 2).unwrap();
    let second = client.backup().unwrap();
    assert_ne!(first.server, second.server);
    disk::write_noise(&path, 20 * MIB..21 * MIB, 3).unwrap();
    let then = dry_run();
    assert_eq!((&then["first_bytes"], &then["changed_bytes"]), (&Value::Null, &MIB.into()));
    assert_eq!(to(&then, &first.server), Some(2 * MIB), "what has changed since its own head");
    assert_eq!(to(&then, &second.server), Some(MIB));

    let third = client.backup().unwrap();
    assert_eq!((&third.server, third.disks[0].sent_bytes), (&first.server, 2 * MIB));
}
