//! A network without IPv4.

use std::time::Duration;

use serde_json::{Value, json};
use xtask::{
    disk,
    site::{Part, Programs, SITES, Sites},
};

use crate::test_command::{tested, unwell};

const MIB: u64 = 1 << 20;

fn url(host: &str, port: u16) -> String {
    format!("https://{host}:{port}")
}

#[test]
fn as_root_all_works_without_ipv4() {
    let mut sites = Sites::prepare(Programs::for_tests().unwrap()).unwrap();
    sites.network().only_ipv6().unwrap();
    let by_name = |site: &str, port| url(&format!("{site}6.example.org"), port);
    for site in SITES {
        let settings = sites.settings.get_mut(&(site, Part::Server)).unwrap();
        settings.set("listen", "[::]:7421");
        settings.set("urls", json!([by_name(site, 7421)]));
        settings.set("janus_urls", json!(SITES.map(|site| by_name(site, 7420))));
        let settings = sites.settings.get_mut(&(site, Part::Janus)).unwrap();
        settings.set("listen", "[::]:7420");
        let servers = [url("[::1]", 7421)];
        let other = SITES.into_iter().filter(|other| *other != site);
        let servers: Vec<_> =
            servers.into_iter().chain(other.map(|other| by_name(other, 7421))).collect();
        settings.set("server_urls", json!(servers));
        sites.start_part(site, Part::Server).unwrap();
        sites.start_part(site, Part::Janus).unwrap();
    }
    let path = sites.folder().join("disk.raw");
    disk::blank(&path, 8 * MIB).unwrap();
    disk::write_noise(&path, 0..8 * MIB, 5).unwrap();
    let mut client = sites.client("laptop", &[format!("disk={}", path.display())]).unwrap();
    let address = format!("[{}]", sites.network().address6(SITES[0]));
    client.settings.set("urls", json!([url(&address, 7420), by_name(SITES[1], 7420)]));

    let until = std::time::Instant::now() + Duration::from_secs(30);
    let mut servers = vec![];
    while servers.len() < 2 {
        assert!(std::time::Instant::now() < until, "backups don't alternate: {servers:?}");
        let backup = client.backup().unwrap();
        if !servers.contains(&backup.server) {
            servers.push(backup.server);
        }
    }
    let to = sites.folder().join("back.raw");
    client.restore("disk", &to).unwrap();
    disk::compare(&path, &to).unwrap();

    let finished = client.run(&["test"]).unwrap();
    println!("{}", finished.stdout);
    let (tested, _) = tested(&client);
    assert!(
        tested["urls"].as_array().unwrap().iter().all(|url| unwell(url).is_empty()),
        "{tested}"
    );
    // Behind a router there is nobody's hardware address.
    assert_eq!(tested["urls"][0]["mac"], Value::Null, "{tested}");
}
