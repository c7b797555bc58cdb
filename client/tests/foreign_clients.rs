//! Clients that nobody here wrote the gRPC of work through janus with mutual TLS: Python's grpcio and Node's grpc-js,
//! both with the default settings of their libraries.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
};

use rcgen::{CertificateParams, Issuer, KeyPair};
use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, free_ports, workspace},
};

#[path = "foreign/programs.rs"]
mod programs;

use programs::{Foreign, Watch, all};

const MIB: u64 = 1 << 20;
const STARTS: &str = "janus.v1.BackupService";
const READS: &str = "janus.v1.RestoreService";

fn site() -> Site {
    Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap()
}

#[test]
fn vectors_hold_in_other_languages() {
    for foreign in all() {
        let path = workspace().join("proto/vectors.json");
        let answer = foreign.plain("127.0.0.1:1", &["vectors", &path.to_string_lossy()]);
        assert_eq!(answer["checked"], 14, "{}: {answer}", foreign.name);
    }
}

#[test]
fn foreign_clients_back_up_list_and_restore_through_janus() {
    let mut site = site();
    site.start_all().unwrap();
    for foreign in all() {
        work_through(&site, foreign);
    }
}

fn work_through(site: &Site, foreign: &Foreign) {
    // A size that isn't a multiple of 4096, with a hole in the middle.
    let path = site.folder().join(format!("{}.raw", foreign.name));
    disk::blank(&path, 12 * MIB + 512).unwrap();
    disk::write_noise(&path, 0..3 * MIB, 1).unwrap();
    disk::write_noise(&path, 9 * MIB..12 * MIB + 512, 2).unwrap();
    let rust: Client = site.client(foreign.name, &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&rust).unwrap();
    let keys = site.folder().join("pki").join(foreign.name);
    let url = site.url().replace("127.0.0.1", "localhost");
    let call = |arguments: &[&str]| foreign.call(&url, &keys, arguments);
    let text = path.to_string_lossy().into_owned();

    let first = call(&["backup", "disk", &text]);
    let server = first["server"].as_str().unwrap_or_else(|| panic!("{first}")).to_owned();
    assert_eq!((&first["ok"], &first["delta"]), (&true.into(), &false.into()), "{first}");
    assert_eq!(first["server_in_metadata"], server.as_str(), "{first}");
    let second = call(&["backup", "disk", &text]);
    assert_eq!(second["delta"], false, "{second}");
    assert_ne!(second["server"], server.as_str(), "{second}");
    let changed = disk::change(&path, MIB / 4, 3).unwrap().len();
    let third = call(&["backup", "disk", &text]);
    assert_eq!((&third["delta"], &third["server"]), (&true.into(), &first["server"]), "{third}");
    assert_eq!(third["changed_blocks"], changed, "{third}");

    let listed = call(&["list"]);
    assert_eq!(listed["snapshots"].as_array().map(Vec::len), Some(3), "{listed}");
    assert_eq!(listed["snapshots"][0]["snapshot_id"], third["snapshot_id"], "{listed}");

    // Its own restore, and the other client's of what it stored; and the reverse.
    let restored = site.folder().join("restored");
    let answer =
        call(&["restore", third["snapshot_id"].as_str().unwrap(), &restored.to_string_lossy()]);
    assert_eq!(answer["ok"], true, "{answer}");
    disk::compare(&path, &restored).unwrap();
    let by_rust = site.folder().join(format!("restored-of-{}", foreign.name));
    rust.restore("disk", &by_rust).unwrap();
    disk::compare(&path, &by_rust).unwrap();
    let ours = rust.backup().unwrap();
    assert_eq!(ours.disks[0].sent_bytes, changed as u64 * 4096, "{ours:?}");
    let answer = call(&["restore", &ours.disks[0].snapshot_id, &restored.to_string_lossy()]);
    assert_eq!(answer["ok"], true, "{answer}");
    disk::compare(&path, &restored).unwrap();

    without_pins(&call, &text, &restored.to_string_lossy());
    disk::compare(&path, &restored).unwrap();

    // Errors arrive with their reason.
    let answer = call(&["backup", "../disk", &text]);
    assert_eq!(
        (&answer["code"], &answer["reason"]),
        (&"INVALID_ARGUMENT".into(), &"ERROR_REASON_INVALID_FIELD".into()),
        "{answer}"
    );
}

/// A client that knows nothing of servers: each call goes to the one it used last.
fn without_pins(call: &dyn Fn(&[&str]) -> Value, disk: &str, to: &str) {
    let older = call(&["--pins", "no", "backup", "disk", disk]);
    let newer = call(&["--pins", "no", "backup", "disk", disk]);
    assert_eq!((&older["ok"], &newer["ok"]), (&true.into(), &true.into()), "{older} {newer}");
    assert_ne!(older["server"], newer["server"], "they take turns");
    let restore =
        |of: &Value| call(&["--pins", "no", "restore", of["snapshot_id"].as_str().unwrap(), to]);
    let refused = restore(&older);
    assert_eq!(
        (&refused["code"], &refused["reason"]),
        (&"NOT_FOUND".into(), &"ERROR_REASON_SNAPSHOT_UNKNOWN".into()),
        "{refused}"
    );
    assert!(refused["error"].as_str().unwrap().contains("janus-server"), "the way out: {refused}");
    let answer = restore(&newer);
    assert_eq!(answer["ok"], true, "{answer}");
}

#[test]
fn foreign_clients_see_health_and_reflection() {
    let mut site = site();
    let ports = free_ports(2).unwrap();
    let plain = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>();
    site.janus_settings().unwrap().set("health_listen", plain[0].as_str());
    site.server("server-a").unwrap().settings.set("health_listen", plain[1].as_str());
    site.start_all().unwrap();
    let observer = site.client("observer", &[]).unwrap();
    site.await_ready(&observer).unwrap();
    let (url, keys) = (site.url(), site.folder().join("pki/observer"));
    for foreign in all() {
        let call = |arguments: &[&str]| foreign.call(&url, &keys, arguments);
        for service in ["", STARTS, READS] {
            assert_eq!(call(&["check", service])["status"], "SERVING", "{service}");
            assert_eq!(foreign.plain(&plain[0], &["check", service])["status"], "SERVING");
            assert_eq!(foreign.plain(&plain[1], &["check", service])["status"], "SERVING");
        }
        assert_eq!(call(&["check", "nobody"])["code"], "NOT_FOUND");
        let unknown = Watch::start(foreign.command(&url, &keys, &["watch", "nobody"]));
        assert_eq!(unknown.next(), "SERVICE_UNKNOWN");
        let services = call(&["services"]);
        for name in ["grpc.health.v1.Health", "janus.v1.CatalogService", STARTS, READS] {
            let names = services["services"].as_array().unwrap();
            assert!(names.iter().any(|known| known == name), "{name}: {services}");
        }
    }

    // The status flips after the last server stops, and back with the first that comes.
    let watches: Vec<_> = all()
        .iter()
        .map(|foreign| Watch::start(foreign.command(&url, &keys, &["watch", STARTS])))
        .collect();
    let all_say = |status: &str| watches.iter().for_each(|watch| assert_eq!(watch.next(), status));
    all_say("SERVING");
    site.stop_server("server-a").unwrap();
    let status = |path: &str| get(&plain[0], path);
    assert_eq!(status("/readyz"), 200, "one is left");
    site.stop_server("server-b").unwrap();
    all_say("NOT_SERVING");
    for foreign in all() {
        assert_eq!(foreign.plain(&plain[0], &["check", STARTS])["status"], "NOT_SERVING");
        assert_eq!(foreign.plain(&plain[0], &["check"])["status"], "SERVING", "the process lives");
    }
    assert_eq!((status("/readyz"), status("/livez")), (503, 200));
    site.start_server("server-a").unwrap();
    all_say("SERVING");
    assert_eq!((status("/readyz"), get(&plain[1], "/readyz")), (200, 200));
}

/// Status of a GET by HTTP/1.1.
fn get(address: &str, path: &str) -> u16 {
    let mut tcp = TcpStream::connect(address).unwrap();
    write!(tcp, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer}"))
}

#[test]
fn a_certificate_without_a_role_is_told_so() {
    let mut site = site();
    site.start_all().unwrap();
    let read = |name: &str| fs::read_to_string(site.folder().join("pki").join(name)).unwrap();
    let authority = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), authority).unwrap();
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let params = CertificateParams::new(vec!["nobody.example".to_owned()]).unwrap();
    let keys = site.folder().join("pki/nobody");
    fs::create_dir_all(&keys).unwrap();
    fs::write(keys.join("cert.pem"), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(keys.join("key.pem"), key.serialize_pem()).unwrap();
    fs::write(keys.join("ca.pem"), read("ca.pem")).unwrap();
    for foreign in all() {
        let answer = foreign.call(&site.url(), &keys, &["list"]);
        assert_eq!(answer["code"], "UNAUTHENTICATED", "{answer}");
        assert_eq!(answer["reason"], "ERROR_REASON_IDENTITY_MISSING", "{answer}");
    }
}
