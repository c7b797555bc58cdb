//! What happens around an export: servers and janus that go and come, signals, sockets of the dead.

use std::os::unix::fs::PermissionsExt;

use crate::{
    raw::{READ, Raw},
    scene::{MIB, SIZE, Scene, await_that, run, text},
};

/// Reads a range with plain requests; each must be answered.
fn read(raw: &mut Raw, range: std::ops::Range<u64>) -> Vec<u8> {
    let mut all = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(MIB) as u32;
        raw.request(READ, at, at, len);
        assert_eq!(raw.simple(), (0, at));
        all.extend(raw.take(len as usize).unwrap());
        at += u64::from(len);
    }
    all
}

#[test]
fn reads_go_on_when_the_server_comes_back_and_past_a_janus_that_does_not() {
    let mut scene = Scene::new(&["server-a"]);
    let direct = scene.site.server("server-a").unwrap().url();
    let urls = vec![scene.site.url(), direct];
    scene.client.settings.set("urls", urls);
    scene.backup();
    let content = std::fs::read(&scene.image).unwrap();
    let export = scene.serve("vm", &[]);
    let mut raw = Raw::ready(&export.socket, false);
    assert!(read(&mut raw, 0..MIB) == content[..MIB as usize]);

    // Gone while somebody reads, and back two seconds later: the answers only come late.
    scene.site.kill_server("server-a").unwrap();
    let reader = std::thread::spawn(move || {
        let got = read(&mut raw, 16 * MIB..24 * MIB);
        (raw, got)
    });
    std::thread::sleep(std::time::Duration::from_secs(2));
    scene.site.start_server("server-a").unwrap();
    let (mut raw, got) = reader.join().unwrap();
    assert!(got == content[16 << 20..24 << 20]);

    // Another way to the same server.
    scene.site.kill_janus().unwrap();
    assert!(read(&mut raw, 30 * MIB..SIZE) == content[30 << 20..]);
    println!("{}", export.log());
    export.end();
}

#[test]
fn a_server_that_stays_away_is_an_error_and_the_export_lives() {
    let mut scene = Scene::new(&["server-a"]);
    scene.client.settings.set("failover_after_seconds", 1);
    scene.backup();
    let content = std::fs::read(&scene.image).unwrap();
    let export = scene.serve("vm", &[]);
    scene.site.kill_server("server-a").unwrap();
    let mut raw = Raw::ready(&export.socket, true);
    raw.request(READ, 1, 8 * MIB, 4096);
    let (flags, kind, cookie, body) = raw.chunk();
    assert_eq!((flags, kind, cookie), (1, 0x8001, 1));
    assert_eq!(body[..4], 5u32.to_be_bytes());
    println!("the client is told: {}", String::from_utf8_lossy(&body[6..]));
    scene.site.start_server("server-a").unwrap();
    await_that("it is read again", || {
        raw.request(READ, 2, 8 * MIB, 4096);
        let (_, kind, _, body) = raw.chunk();
        kind == 1 && body[8..] == content[8 << 20..][..4096]
    });
    export.end();
}

#[test]
fn sockets_are_private_those_of_the_living_are_left_and_those_of_the_dead_replaced() {
    let scene = Scene::new(&["server-a"]);
    scene.backup();
    let export = scene.serve("vm", &[]);
    let socket = export.socket.clone();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    let failure = scene.client.failure(&["nbd", "vm", "--socket", text(&socket)]).unwrap();
    assert!(failure.error.contains("another program listens"), "{failure:?}");
    run("nbdinfo", &["--size", &export.uri]);
    export.kill();
    assert!(socket.exists());
    let stale = std::fs::metadata(&socket).unwrap().modified().unwrap();
    let export = {
        let arguments = ["nbd", "vm", "--socket", text(&socket)];
        let running = scene.client.start(&arguments).unwrap();
        await_that("the socket is a new one", || {
            let made = std::fs::metadata(&socket).and_then(|meta| meta.modified());
            made.is_ok_and(|made| made != stale)
                && std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        running
    };
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
    export.interrupt();
    assert_eq!(export.wait().unwrap().code, Some(0));
    assert!(!socket.exists());

    // Without a place of its own it makes one, and removes it.
    let running = scene.client.start(&["nbd", "vm"]).unwrap();
    let mut path = String::new();
    await_that("it says where", || {
        let said = running.output();
        let uri = said.split("socket=").nth(1).and_then(|rest| rest.split_whitespace().next());
        path = uri.unwrap_or_default().to_owned();
        said.contains("Ctrl-C")
    });
    assert!(std::path::Path::new(&path).exists(), "{path}");
    println!("{}", running.output());
    running.interrupt();
    assert_eq!(running.wait().unwrap().code, Some(0));
    assert!(!std::path::Path::new(&path).parent().unwrap().exists());
}
