//! `janus-client test`.

use std::time::Duration;

use serde_json::{Value, json};
use xtask::site::{Client, MACHINES, Part, Plan, Programs, SITES, Site, Sites, url};

fn row<'a>(url: &'a Value, check: &str) -> &'a Value {
    let rows = url["checks"].as_array().unwrap();
    rows.iter().find(|row| row["check"] == check).unwrap_or_else(|| panic!("no {check}: {url}"))
}

/// The answer, with what it exits with. How full the disk of the machine is that tests run on is no matter.
pub fn tested(client: &Client) -> (Value, i32) {
    let finished = client.run(&["test", "--json"]).unwrap();
    let answer: Value = serde_json::from_str(&finished.stdout).unwrap();
    let code = finished.code.unwrap();
    assert_eq!(answer["exit_code"], code, "{answer}");
    (answer, code)
}

/// What of a URL is not as it should be, but for the space.
pub fn unwell(url: &Value) -> Vec<&str> {
    let rows = url["checks"].as_array().unwrap().iter();
    let rows = rows.filter(|row| row["state"] != "ok" && row["check"] != "space");
    rows.map(|row| row["check"].as_str().unwrap()).collect()
}

#[test]
fn as_root_it_says_of_each_url_how_it_stands() {
    let mut sites = Sites::start(Programs::for_tests().unwrap()).unwrap();
    let mut client = sites.client("laptop", &[]).unwrap();
    sites.await_equal(&client, Duration::from_secs(30)).unwrap();
    for place in SITES.into_iter().chain([MACHINES]) {
        sites.network().slow(place, 50_000).unwrap();
    }
    client.settings.set("urls", json!([url(SITES[0], 7420), url(SITES[1], 7421)]));
    println!("{}", client.run(&["test"]).unwrap().stdout);
    let (all_well, code) = tested(&client);
    assert!(code < 2 && all_well["ok"] == true, "{all_well}");
    for url in all_well["urls"].as_array().unwrap() {
        assert!(unwell(url).is_empty(), "{url}");
        for way in ["upload_bytes_per_second", "download_bytes_per_second"] {
            let mbit = url[way].as_f64().unwrap() * 8e-6;
            println!("{way} at 50 Mbit/s: {mbit:.1} Mbit/s");
            // What the line lets through at once counts, too: half as much again in two seconds.
            assert!((35.0..85.0).contains(&mbit), "{url}");
        }
    }
    assert_eq!(all_well["urls"][0]["peer"], "janus janus-north");
    assert!(row(&all_well["urls"][0], "servers")["text"].as_str().unwrap().contains("2 of 2"));

    // One that works is enough, but it is said.
    let urls = [url("nowhere", 7420), url(SITES[0], 7999), url(SITES[1], 7420)];
    client.settings.set("urls", json!(urls));
    sites.kill(SITES[0], Part::Server).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let (some, code) = tested(&client);
    assert_eq!(code, 1, "{some}");
    assert_eq!(row(&some["urls"][0], "name")["state"], "failed");
    assert_eq!(row(&some["urls"][1], "connection")["state"], "failed");
    assert_eq!(row(&some["urls"][2], "servers")["state"], "warning", "{some}");
    println!("{}", client.run(&["test"]).unwrap().stdout);

    client.settings.set("urls", json!(urls[..2]));
    let (none, code) = tested(&client);
    assert!(code == 2 && none["ok"] == false, "{none}");
}

#[test]
fn a_stranger_fails_by_its_certificate() {
    let plan = |name: &str| Plan { servers: vec![name.into()], janus: false, folder: None };
    let programs = Programs::for_tests().unwrap();
    let (ours, stranger) = (
        Site::start(programs.clone(), &plan("ours")).unwrap(),
        Site::start(programs, &plan("stranger")).unwrap(),
    );
    let mut client = ours.client("laptop", &[]).unwrap();
    client.settings.set("urls", json!([stranger.url(), ours.url()]));
    let (answer, code) = tested(&client);
    assert_eq!(code, 1, "{answer}");
    assert_eq!(row(&answer["urls"][0], "certificate")["state"], "failed", "{answer}");
    assert!(unwell(&answer["urls"][1]).is_empty(), "{answer}");
}
