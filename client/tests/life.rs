//! What an administrator does to running programs: read settings again, route in the server's process, forget a server.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::json;
use xtask::{
    disk,
    site::{Client, Plan, Process, Programs, Site, free_ports, key_settings},
};

const MIB: u64 = 1 << 20;

fn site(janus: bool) -> Site {
    Site::start(Programs::for_tests().unwrap(), &Plan { janus, ..Plan::default() }).unwrap()
}

fn disk_of(site: &Site, size_bytes: u64) -> (PathBuf, Client) {
    let path = site.folder().join("disk.raw");
    disk::blank(&path, size_bytes).unwrap();
    disk::write_noise(&path, 0..size_bytes, 1).unwrap();
    (path.clone(), site.client("machine", &[format!("disk={}", path.display())]).unwrap())
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "never: {what}");
        sleep(Duration::from_millis(20));
    }
}

fn hang_up(site: &Site, process: &Process, log: &str, said: &str) {
    process.hang_up();
    until(said, || site.log(log).contains(said));
}

#[test]
fn certificates_are_read_again_at_a_hangup() {
    let mut site = site(true);
    let (_, client) = disk_of(&site, MIB);
    site.await_ready(&client).unwrap();
    hang_up(&site, site.janus().unwrap(), "janus", "were read again");
    let certificate = site.folder().join("pki/server-a/cert.pem");
    let server = site.server("server-a").unwrap().process().unwrap().pid();
    let hang_up = |said: &str| {
        xtask::packages::output(
            std::process::Command::new("kill").args(["-HUP", &server.to_string()]),
        )
        .unwrap();
        until(said, || site.log("server-a").contains(said));
    };
    hang_up("were read again");
    fs::write(certificate, "no certificate").unwrap();
    hang_up("the old certificates stay in use");
    client.backup().unwrap();
}

#[test]
fn server_urls_are_read_again_at_a_hangup() {
    let mut site = site(true);
    let (path, client) = disk_of(&site, MIB);
    site.await_ready(&client).unwrap();
    assert_eq!(client.backup().unwrap().server, "server-a");
    let url = |site: &mut Site, name: &str| site.server(name).unwrap().url();
    let (a, b) = (url(&mut site, "server-a"), url(&mut site, "server-b"));
    let config = site.folder().join("settings/janus.toml");

    site.janus_settings().unwrap().set("server_urls", json!([a]));
    site.janus_settings().unwrap().write(&config).unwrap();
    hang_up(&site, site.janus().unwrap(), "janus", "no longer in server_urls");
    // It would be B's turn.
    assert_eq!(client.backup().unwrap().server, "server-a");
    let status = client.status().unwrap();
    let line = status.servers.iter().find(|line| line.server == "server-b").unwrap();
    assert!(
        !line.ready
            && line.reason.as_deref().is_some_and(|why| why.contains("not in its server_urls")),
        "{status:?}"
    );

    fs::write(&config, "server_urls = []").unwrap();
    hang_up(&site, site.janus().unwrap(), "janus", "the old settings stay in use");

    site.janus_settings().unwrap().set("server_urls", json!([a, b]));
    site.janus_settings().unwrap().set("probe_ms", 900);
    site.janus_settings().unwrap().write(&config).unwrap();
    hang_up(&site, site.janus().unwrap(), "janus", "need a restart keys=\"probe_ms\"");
    site.await_ready(&client).unwrap();
    let backup = client.backup().unwrap();
    assert_eq!(backup.server, "server-b");
    let restored = site.folder().join("restored");
    client.restore("disk", &restored).unwrap();
    disk::compare(&path, &restored).unwrap();
}

#[test]
fn janus_urls_are_read_again_at_a_hangup() {
    let mut site = site(true);
    let (_, client) = disk_of(&site, MIB);
    site.await_ready(&client).unwrap();
    let config = site.folder().join("settings/server-b.toml");
    let age = || {
        let status = client.status().unwrap();
        status.servers.iter().find(|line| line.server == "server-b").unwrap().report_age_ms
    };
    let mut change = |urls: serde_json::Value| {
        let server = site.server("server-b").unwrap();
        server.settings.set("janus_urls", urls);
        server.settings.write(&config).unwrap();
        server.process().unwrap().hang_up();
    };
    change(json!([]));
    until("no reports", || age() < 0);
    let url = client.settings.get("urls").unwrap().clone();
    change(url);
    until("reports again", || age() >= 0);
}

/// Server A with a janus in its process, before A and B, and a client of that janus.
fn in_one_process() -> (Site, PathBuf, Client) {
    let plan = Plan { janus: false, ..Plan::default() };
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
    let keys = site.issue("janus", "router", &["--host", "127.0.0.1"]).unwrap();
    let url = format!("https://127.0.0.1:{}", free_ports(1).unwrap()[0]);
    let mut servers = Vec::new();
    for name in site.server_names() {
        let server = site.server(&name).unwrap();
        server.settings.set("janus_urls", json!([url]));
        servers.push(server.url());
    }
    let settings = &mut site.server("server-a").unwrap().settings;
    settings.set("janus.listen", url.trim_start_matches("https://"));
    settings.set("janus.server_urls", servers);
    for name in ["cert", "key", "ca"] {
        settings.set(&format!("janus.{name}"), keys.get(name).unwrap().clone());
    }
    site.start_all().unwrap();
    let (path, mut client) = disk_of(&site, 256 * MIB);
    client.settings.set("urls", json!([url]));
    site.await_ready(&client).unwrap();
    (site, path, client)
}

#[test]
fn a_server_with_a_janus_section_also_routes() {
    let (mut site, path, client) = in_one_process();
    assert_eq!(client.backup().unwrap().server, "server-a");
    assert_eq!(client.backup().unwrap().server, "server-b");
    site.kill_server("server-b").unwrap();
    assert_eq!(client.backup().unwrap().server, "server-a");
    let restored = site.folder().join("restored");
    client.restore("disk", &restored).unwrap();
    disk::compare(&path, &restored).unwrap();
    // One process, two ports, one end.
    site.stop_server("server-a").unwrap();
    assert!(site.log("server-a").matches("stopped").count() == 2, "{}", site.log("server-a"));
    assert_eq!(client.failure(&["list"]).unwrap().exit_code, 3);
}

#[test]
fn a_run_outlives_a_restart_of_server_and_router_in_one_process() {
    let (mut site, path, client) = in_one_process();
    let mut running = client.start(&["backup", "--json"]).unwrap();
    let images = site.server("server-a").unwrap().images().to_owned();
    until("data arrives", || disk::allocated_below(&images) > 48 * MIB);
    site.stop_server("server-a").unwrap();
    assert!(!running.has_ended(), "the run was to be caught in the middle");
    site.start_server("server-a").unwrap();
    let backup: xtask::site::answers::Backup = running.wait().unwrap().answer().unwrap();
    let restored = site.folder().join("restored");
    client.restore(&backup.disks[0].snapshot_id, &restored).unwrap();
    disk::compare(&path, &restored).unwrap();
}

#[test]
fn a_janus_section_that_cannot_work_is_refused() {
    let site = Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let refused = |key: &str, value: &str| {
        let mut settings = key_settings(&site.folder().join("pki/server-a"));
        settings.set(key, value);
        let config = site.folder().join("settings/server.toml");
        settings.write(&config).unwrap();
        let mut server = site.programs().server();
        let output = server.args(["serve", "--config"]).arg(&config).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused("janus.listen", "127.0.0.1:1");
    assert!(said.contains("section [janus]: setting server_urls: is empty"), "{said}");
    let said = refused("janus.lsten", "127.0.0.1:1");
    assert!(said.contains("unknown key \"janus.lsten\"; did you mean \"janus.listen\"?"), "{said}");
    let said = refused("janus.log", "debug");
    assert!(said.contains("janus.log: one process has one log: set log"), "{said}");
}

#[test]
fn a_server_that_is_gone_can_be_forgotten() {
    let mut site = site(true);
    let (_, client) = disk_of(&site, MIB);
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
    client.backup().unwrap();
    let config = site.folder().join("settings/janus.toml");
    let forget = |site: &Site, name: &str| {
        let mut janus = site.programs().janus();
        let output = janus.args(["forget", name, "--config"]).arg(&config).output().unwrap();
        let said = if output.status.success() { output.stdout } else { output.stderr };
        (output.status.code(), String::from_utf8(said).unwrap())
    };
    let said = forget(&site, "server-b");
    assert!(said.0 == Some(1) && said.1.contains("of server_urls: take it out"), "{said:?}");
    let a = site.server("server-a").unwrap().url();
    site.janus_settings().unwrap().set("server_urls", json!([a]));
    site.janus_settings().unwrap().write(&config).unwrap();
    hang_up(&site, site.janus().unwrap(), "janus", "no longer in server_urls");
    let said = forget(&site, "server-b");
    assert!(said.0 == Some(1) && said.1.contains("still reports"), "{said:?}");
    site.stop_server("server-b").unwrap();
    until("the report stream has ended", || {
        let status = client.status().unwrap();
        let b = status.servers.iter().find(|line| line.server == "server-b").unwrap();
        let says = b.reason.as_deref().is_some_and(|why| why.ends_with("janus forget server-b"));
        assert!(b.last_report_ms > Some(0), "{b:?}");
        says && b.report_age_ms == -1
    });
    assert_eq!(forget(&site, "server-b").0, Some(0));
    assert!(client.status().unwrap().servers.iter().all(|line| line.server != "server-b"));
    let listed = client.list().unwrap();
    assert_eq!(listed.snapshots.len(), 1, "{listed:?}");
    assert!(
        listed.snapshots[0].server == "server-a" && listed.unreachable.is_empty(),
        "{listed:?}"
    );
    let said = forget(&site, "server-b");
    assert!(said.0 == Some(1) && said.1.contains("knows no server server-b"), "{said:?}");
}

#[test]
fn a_machine_whose_first_backup_never_ends_is_seen() {
    let mut site = site(true);
    let (_, client) = disk_of(&site, 256 * MIB);
    site.await_ready(&client).unwrap();
    let images =
        ["server-a", "server-b"].map(|name| site.server(name).unwrap().images().to_owned());
    let held = || images.iter().map(|folder| disk::allocated_below(folder)).sum::<u64>();
    let before = held();
    let running = client.start(&["backup"]).unwrap();
    until("data arrives", || held() > before + MIB);
    running.kill();
    running.wait().unwrap();
    until("it is told", || {
        let machines = client.status().unwrap().machines;
        machines.len() == 1 && machines[0].first_use_ms > Some(0)
    });
    let mut janus = site.programs().janus();
    janus.args(["status", "--check", "--overdue-after-hours", "0", "--config"]);
    let said = janus.arg(site.folder().join("settings/janus.toml")).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("never got one done"), "{said}");
    client.backup().unwrap();
    until("it has one", || {
        let machines = client.status().unwrap().machines;
        machines.len() == 1 && machines[0].first_use_ms.is_none()
    });
}

#[test]
fn a_machine_may_not_forget_a_server() {
    let site = site(true);
    let (_, client) = disk_of(&site, MIB);
    site.await_ready(&client).unwrap();
    let mut janus = site.programs().janus();
    janus.args(["forget", "server-b", "--url", &site.url()]);
    for name in ["cert", "key", "ca"] {
        let path = client.settings.get(name).unwrap().as_str().unwrap().to_owned();
        janus.args([format!("--{name}"), path]);
    }
    let output = janus.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("an operator may"), "{said}");
}
