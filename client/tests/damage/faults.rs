//! What a start can't read costs the machine whose it is, and no other.

use std::{fs, time::Duration};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

use super::scene::MIB;

const A: &str = "server-a";
const B: &str = "server-b";

/// Two servers, and two machines that have a backup on each.
fn scene() -> (Site, [Client; 2]) {
    let plan = Plan { servers: vec![A.into(), B.into()], ..Plan::default() };
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
    for name in [A, B] {
        site.server(name).unwrap().settings.set("retention.automatic", false);
    }
    site.start_all().unwrap();
    let clients = ["one", "two"].map(|name| {
        let path = site.folder().join(name);
        disk::blank(&path, 8 * MIB).unwrap();
        disk::write_noise(&path, 0..4 * MIB, 1).unwrap();
        site.client(name, &[format!("disk={}", path.display())]).unwrap()
    });
    for client in &clients {
        site.await_ready(client).unwrap();
        let servers = [client.backup().unwrap().server, client.backup().unwrap().server];
        assert_ne!(servers[0], servers[1]);
    }
    (site, clients)
}

/// What `janus status` says of a server's store.
fn warnings(site: &Site) -> Vec<String> {
    let mut janus = site.programs().janus();
    janus.args(["status", "--json", "--config"]).arg(site.folder().join("settings/janus.toml"));
    let output = janus.output().unwrap();
    let status: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let server = status["servers"].as_array().unwrap().iter().find(|one| one["server"] == A);
    let warnings = server.unwrap()["warnings"].as_array().unwrap().iter();
    warnings.map(|warning| warning.as_str().unwrap().to_owned()).collect()
}

fn await_warnings(site: &Site, is_right: impl Fn(&[String]) -> bool) -> Vec<String> {
    for _ in 0..200 {
        let warnings = warnings(site);
        if is_right(&warnings) {
            return warnings;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{:?}", warnings(site));
}

fn admin(site: &Site, arguments: &[&str], code: i32) -> String {
    let output = site.admin(A, arguments).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_machine_that_cannot_be_read_keeps_no_other_from_its_backups() {
    let (mut site, [one, two]) = scene();
    let folder = site.folder().join(A).join("alice/one");
    site.stop_server(A).unwrap();
    // Whoever runs this, root too, can't list a file.
    fs::rename(folder.join(".runs"), folder.join(".away")).unwrap();
    fs::write(folder.join(".runs"), "no folder").unwrap();
    site.start_server(A).unwrap();
    site.await_ready(&two).unwrap();

    let told = await_warnings(&site, |warnings| !warnings.is_empty());
    println!("{told:?}");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with("alice/one: cannot list ") && told[0].contains("restart the server")
    );
    // The other machine goes on on both, this one on the other server.
    let servers = [two.backup().unwrap().server, two.backup().unwrap().server];
    assert!(servers.contains(&A.to_owned()) && servers.contains(&B.to_owned()), "{servers:?}");
    let taken = one.backup().unwrap();
    assert_eq!((taken.server.as_str(), one.backup().unwrap().server.as_str()), (B, B));
    assert!(taken.skipped.iter().all(|skipped| skipped.server == A), "{taken:?}");
    // What isn't known is no empty list.
    let list = one.list().unwrap();
    assert!(list.snapshots.iter().all(|snapshot| snapshot.server == B), "{list:?}");
    assert!(list.unreachable.iter().any(|u| u.server == A && u.reason.contains("cannot list")));

    for command in [&["verify"][..], &["verify", "alice/one"]] {
        assert!(admin(&site, command, 1).contains("alice/one: cannot list "), "{command:?}");
    }
    assert!(admin(&site, &["verify", "alice/two"], 0).contains("whole"));
    assert!(admin(&site, &["usage"], 0).contains("alice/one: cannot list "));
    assert!(admin(&site, &["delete", "alice/one"], 1).contains("can't be used on this server"));
    assert!(admin(&site, &["retention", "plan"], 1).contains("alice/one: machine alice/one can't"));

    site.stop_server(A).unwrap();
    fs::remove_file(folder.join(".runs")).unwrap();
    fs::rename(folder.join(".away"), folder.join(".runs")).unwrap();
    site.start_server(A).unwrap();
    site.await_ready(&one).unwrap();
    await_warnings(&site, <[String]>::is_empty);
    assert_eq!(one.list().unwrap().snapshots.len(), 4);
    assert_eq!(one.backup().unwrap().server, A);
}

#[test]
fn pins_that_cannot_be_read_are_told_and_stop_no_other_retention() {
    let (mut site, [one, two]) = scene();
    for client in [&one, &two] {
        (0..4).for_each(|_| drop(client.backup().unwrap()));
    }
    site.stop_server(A).unwrap();
    let pins = site.folder().join(A).join("alice/one/.pins.json");
    fs::write(&pins, "{").unwrap();
    let settings = &mut site.server(A).unwrap().settings;
    for (rule, count) in [("keep_all_days", 0), ("daily", 1), ("weekly", 0), ("monthly", 0)] {
        settings.set(&format!("retention.{rule}"), count);
    }
    settings.set("retention.at_least", 1);
    site.start_server(A).unwrap();
    site.await_ready(&one).unwrap();
    let told = await_warnings(&site, |warnings| !warnings.is_empty());
    assert!(told[0].contains(".pins.json is damaged") && told[0].contains("pin again"), "{told:?}");
    let done = admin(&site, &["retention", "run", "--now"], 1);
    assert!(done.contains("alice/two: 2 runs dropped"), "{done}");
    assert!(done.contains("alice/one: nothing dropped"), "{done}");
    assert!(admin(&site, &["verify"], 1).contains(".pins.json is damaged"));
    // Backups of both go on.
    for client in [&one, &two] {
        let servers = [client.backup().unwrap().server, client.backup().unwrap().server];
        assert!(servers.contains(&A.to_owned()), "{servers:?}");
    }
    // As the text says.
    fs::remove_file(pins).unwrap();
    assert!(admin(&site, &["retention", "run", "--now"], 0).contains("alice/one: 3 runs dropped"));
    await_warnings(&site, <[String]>::is_empty);
}
