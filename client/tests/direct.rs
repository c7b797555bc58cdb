//! With `direct = "prefer"` data goes straight to the server when that proves who it is at once, else through janus.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{net::TcpListener, path::PathBuf, time::Instant};

use serde_json::json;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, free_ports},
};

const MIB: u64 = 1 << 20;

fn prepared() -> Site {
    Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap()
}

/// A disk of noise and the client that prefers to send it directly.
fn disk_of(site: &Site) -> (PathBuf, Client) {
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 8 * MIB).unwrap();
    disk::write_noise(&path, 0..8 * MIB, 1).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    client.settings.set("direct", "prefer");
    site.await_ready(&client).unwrap();
    (path, client)
}

/// Bytes that janus has forwarded to and from the servers.
fn forwarded(client: &Client) -> (u64, u64) {
    let status = client.status().unwrap();
    status.servers.iter().fold((0, 0), |(sent, received), line| {
        (sent + line.bytes_sent, received + line.bytes_received)
    })
}

fn back_up_and_restore(site: &Site, path: &std::path::Path, client: &Client) {
    let backup = client.backup().unwrap();
    assert_eq!(backup.server, "server-a");
    let restored = site.folder().join("restored");
    client.restore("disk", &restored).unwrap();
    disk::compare(path, &restored).unwrap();
}

#[test]
fn data_goes_past_janus_where_the_server_can_be_reached() {
    let mut site = prepared();
    site.start_all().unwrap();
    let (path, mut client) = disk_of(&site);
    back_up_and_restore(&site, &path, &client);
    let (sent, received) = forwarded(&client);
    assert!(sent < MIB && received < MIB, "{sent} and {received} bytes went through janus");
    // A snapshot by its id knows its server's address, too.
    let snapshot = client.list().unwrap().snapshots[0].snapshot_id.clone();
    client.restore(&snapshot, &site.folder().join("by-id")).unwrap();
    disk::compare(&path, &site.folder().join("by-id")).unwrap();
    assert!(forwarded(&client).1 < MIB);
    // It is no server's turn twice for that.
    assert_eq!(client.backup().unwrap().server, "server-b");

    client.settings.set("direct", "never");
    client.restore(&snapshot, &site.folder().join("through-janus")).unwrap();
    assert!(forwarded(&client).1 > 8 * MIB);
}

#[test]
fn a_peer_that_is_not_the_server_gets_no_data() {
    let mut site = prepared();
    let other = site.server("server-b").unwrap().url();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_url = format!("https://{}", silent.local_addr().unwrap());
    let dead = format!("https://127.0.0.1:{}", free_ports(1).unwrap()[0]);
    let urls = json!([other, silent_url, dead, "https://no.such.host.invalid:1"]);
    site.server("server-a").unwrap().settings.set("urls", urls);
    site.start_all().unwrap();
    let (path, client) = disk_of(&site);
    let begun = Instant::now();
    back_up_and_restore(&site, &path, &client);
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    let (sent, received) = forwarded(&client);
    assert!(sent > 8 * MIB && received > 8 * MIB, "{sent} and {received} bytes went through janus");
}
