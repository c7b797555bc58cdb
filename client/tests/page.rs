//! The page of janus in a real browser, before real processes: what it says, and that it fits a desk and a phone.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread::sleep,
    time::{Duration, Instant},
};

use xtask::{
    disk,
    site::{Browser, Plan, Programs, Site, free_ports, target},
};

const MIB: u64 = 1 << 20;

/// An HTTP/1.1 answer, head and body.
fn http(port: u16, request: &str) -> (String, String) {
    let mut tcp = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(tcp, "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[test]
fn the_page_shows_what_an_administrator_wants_to_know() {
    let port = free_ports(1).unwrap()[0];
    let servers = ["server-a", "server-b", "server-c"].map(str::to_owned).to_vec();
    let plan = Plan { servers, ..Plan::default() };
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
    let janus = site.janus_settings().unwrap();
    janus.set("metrics_listen", format!("127.0.0.1:{port}"));
    site.start_all().unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 8 * MIB).unwrap();
    disk::write_noise(&path, 0..8 * MIB, 1).unwrap();
    let disks = [format!("disk={}", path.display())];
    let names = ["laptop", "web-01.a-rather-long-name-of-a-machine.example.org", "database"];
    for (count, name) in (1..).zip(names) {
        let client = site.client(name, &disks).unwrap();
        site.await_ready(&client).unwrap();
        for _ in 0..count {
            client.backup().unwrap();
        }
    }
    for server in ["server-a", "server-b"] {
        let proven = site.admin(server, &["prove", "--now"]).unwrap();
        assert_eq!(proven.status.code(), Some(0), "{proven:?}");
    }
    site.kill_server("server-c").unwrap();

    // A backup that goes on while we look.
    let large = site.folder().join("large.raw");
    disk::blank(&large, 1536 * MIB).unwrap();
    disk::write_noise(&large, 0..1536 * MIB, 2).unwrap();
    let busy = site.client("fileserver", &[format!("disk={}", large.display())]).unwrap();
    let browser = Browser::start().unwrap();
    browser.screen(1280, 1000, false, false).unwrap();
    let url = format!("http://127.0.0.1:{port}/");
    let running = busy.start(&["backup", "--json"]).unwrap();
    let begun = Instant::now();
    // The machines' first runs stay on the page for a while: it is the large one that has to be seen.
    let is_flowing = |text: &str| {
        ["alice/fileserver", "MiB/s", "server-c: "].iter().all(|part| text.contains(part))
    };
    let text = loop {
        browser.open(&url).unwrap();
        let text = browser.text().unwrap();
        if is_flowing(&text) {
            break text;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{text}");
        sleep(Duration::from_millis(100));
    };
    for says in [
        "janus router",
        "WARNING",
        "connection refused",
        "RUNNING NOW",
        "alice/fileserver",
        "alice/laptop",
        "server-a",
        "ready",
        "round trip",
        "last report",
        "last proven",
        "\nproven ",
        "days",
        "server-b none",
    ] {
        assert!(text.contains(says), "no {says:?} in: {text}");
    }

    let pictures = target().join("screenshots");
    fs::create_dir_all(&pictures).unwrap();
    for (name, width, height, is_phone, is_dark) in [
        ("desk", 1280, 1000, false, false),
        ("desk-dark", 1280, 1000, false, true),
        ("phone", 360, 1900, true, false),
    ] {
        browser.screen(width, height, is_phone, is_dark).unwrap();
        browser.open(&url).unwrap();
        browser.picture(&pictures.join(format!("page-{name}.png"))).unwrap();
        let wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]";
        let wide = browser.value(wide).unwrap();
        assert_eq!(wide[0], wide[1], "{name} scrolls sideways");
        assert_eq!(browser.value("innerWidth").unwrap(), width, "{name}");
        let back = browser.value("getComputedStyle(document.body).backgroundColor").unwrap();
        assert_eq!(back == "rgb(17, 22, 28)", is_dark, "the style sheet is in force: {back}");
    }
    assert_eq!(running.wait().unwrap().code, Some(0));
    drop(browser);

    let (head, body) = http(port, "GET /");
    assert!(head.starts_with("HTTP/1.1 200") && body.starts_with("<!DOCTYPE html>"), "{head}");
    for header in ["content-security-policy: default-src 'none'", "nosniff", "no-store"] {
        assert!(head.contains(header), "{head}");
    }
    let (head, body) = http(port, "HEAD /");
    assert!(head.starts_with("HTTP/1.1 200") && body.is_empty(), "{head}");
    assert!(http(port, "POST /").0.starts_with("HTTP/1.1 405"));
    assert!(http(port, "GET /nothing").0.starts_with("HTTP/1.1 404"));
}
