//! What must be refused is refused, with one clear line that names the thing and the way out, and leaves nothing behind.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, OpenOptions},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use time::OffsetDateTime;
use xtask::{
    disk,
    loopback::{LoopDevice, SmallFileSystem},
    packages,
    site::{Client, GROUP, Plan, Programs, Site, USER, answers::Failure, free_ports, key_settings},
};

const MIB: u64 = 1 << 20;

fn one_server() -> Site {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    Site::start(Programs::for_tests().unwrap(), &plan).unwrap()
}

fn disk_of(site: &Site, size_bytes: u64) -> (PathBuf, Client) {
    let path = site.folder().join("disk.raw");
    disk::blank(&path, size_bytes).unwrap();
    disk::write_noise(&path, 0..size_bytes, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    (path, client)
}

/// The failed command says all of `words`.
fn assert_says(failure: &Failure, words: &[&str]) {
    for word in words {
        assert!(failure.error.contains(word), "{word:?} is not in {failure:?}");
    }
}

fn use_keys(client: &mut Client, folder: &Path) {
    for name in ["cert", "key", "ca"] {
        client.settings.set(name, folder.join(format!("{name}.pem")).to_string_lossy());
    }
}

/// Keys of another authority that also calls itself by our group's name; returns the folder of a client's keys.
fn foreign_keys(site: &Site) -> PathBuf {
    let folder = site.folder().join("foreign");
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let pki = |arguments: &[&str]| {
        packages::output(site.programs().server().arg("pki").args(arguments)).map(drop)
    };
    pki(&["init", "--out", &text(&folder), "--group", GROUP]).unwrap();
    let keys = folder.join("client");
    let (ca, out) = (text(&folder), text(&keys));
    pki(&["issue", "client", "--ca", &ca, "--user", USER, "--machine", "machine", "--out", &out])
        .unwrap();
    keys
}

#[test]
fn certificates_of_another_authority_are_refused_by_both_ends() {
    let site = one_server();
    let (_, mut client) = disk_of(&site, MIB);
    let good = site.folder().join("pki/machine");
    let foreign = foreign_keys(&site);

    // We don't trust them.
    use_keys(&mut client, &foreign);
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &[&site.url(), "certificate", "ca"]);

    // Our own files don't belong together: told before anything is sent.
    client.settings.set("ca", good.join("ca.pem").to_string_lossy());
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &["was not issued by the CA", "ca.pem"]);
    client.settings.set("cert", good.join("cert.pem").to_string_lossy());
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &["key", "doesn't belong to", "cert.pem"]);

    // They don't trust us: our side believes both authorities, so that the certificate gets as far as the handshake.
    let both = site.folder().join("both.pem");
    let text = fs::read_to_string(good.join("ca.pem")).unwrap()
        + &fs::read_to_string(foreign.join("ca.pem")).unwrap();
    fs::write(&both, text).unwrap();
    use_keys(&mut client, &foreign);
    client.settings.set("ca", both.to_string_lossy());
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &[&site.url(), "refused", "cert"]);

    use_keys(&mut client, &good);
    assert!(client.list().unwrap().snapshots.is_empty());
    client.backup().unwrap();
}

#[test]
fn a_missing_certificate_and_one_of_the_wrong_role_are_named() {
    let site = one_server();
    let (_, mut client) = disk_of(&site, MIB);
    client.settings.set("cert", "");
    assert_says(&client.failure(&["backup"]).unwrap(), &["cert", "is empty"]);
    client.settings.set("cert", "/does/not/exist.pem");
    assert_says(&client.failure(&["backup"]).unwrap(), &["/does/not/exist.pem", "no such file"]);
    site.issue("operator", "olga", &[]).unwrap();
    use_keys(&mut client, &site.folder().join("pki/olga"));
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &["operator"]);
}

#[test]
fn an_expired_certificate_is_named_by_client_and_server() {
    let mut site = one_server();
    let (_, mut client) = disk_of(&site, MIB);
    let uri = |rest: &str| SanType::URI(format!("janus://{GROUP}/{rest}").try_into().unwrap());
    let of_client = expired_keys(&site, "client", vec![uri(&format!("client/{USER}/machine"))]);
    let address = SanType::IpAddress([127, 0, 0, 1].into());
    let of_server = expired_keys(&site, "server", vec![uri("server/server-a"), address]);
    use_keys(&mut client, &of_client);
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &["cert.pem", "expired", "pki issue"]);

    site.stop_server("server-a").unwrap();
    let server = site.server("server-a").unwrap();
    for name in ["cert", "key", "ca"] {
        server.settings.set(name, of_server.join(format!("{name}.pem")).to_string_lossy());
    }
    let error = format!("{:#}", site.start_server("server-a").unwrap_err());
    assert!(error.contains("expired") && error.contains("cert.pem"), "{error}");
}

/// Keys by our authority that expired yesterday: the product refuses to issue such ones.
fn expired_keys(site: &Site, name: &str, alternative_names: Vec<SanType>) -> PathBuf {
    let folder = site.folder().join(format!("expired-{name}"));
    fs::create_dir_all(&folder).unwrap();
    let read = |name: &str| fs::read_to_string(site.folder().join("pki").join(name)).unwrap();
    let authority = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), authority).unwrap();
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::now_utc() - time::Duration::days(30);
    params.not_after = OffsetDateTime::now_utc() - time::Duration::days(1);
    params.subject_alt_names = alternative_names;
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    fs::write(folder.join("cert.pem"), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
    fs::write(folder.join("ca.pem"), read("ca.pem")).unwrap();
    folder
}

#[test]
fn plain_http_is_answered_in_its_own_language() {
    let mut site = one_server();
    let urls = [site.url(), site.server("server-a").unwrap().url()];
    for url in urls {
        let mut stream = TcpStream::connect(url.strip_prefix("https://").unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert!(answer.contains("TLS") && answer.contains("certificate"), "{answer}");
    }
}

#[test]
fn wrong_urls_are_told_apart() {
    let site = one_server();
    let (_, mut client) = disk_of(&site, MIB);
    let closed = free_ports(1).unwrap()[0];
    // Takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let cases = [
        (site.url().replace("https:", "http:"), vec!["https"]),
        (format!("https://127.0.0.1:{closed}"), vec!["connection refused", "nothing listens"]),
        ("https://no-such-host.invalid:7420".into(), vec!["no-such-host.invalid", "not found"]),
        (format!("https://{}", silent.local_addr().unwrap()), vec!["timed out"]),
        ("not a url".into(), vec!["not a url"]),
    ];
    for (url, words) in cases {
        client.settings.set("urls", vec![url]);
        let failure = client.failure(&["backup"]).unwrap();
        assert_says(&failure, &words);
        let is_url = !words[0].contains("https") && words[0] != "not a url";
        assert_eq!(failure.exit_code, if is_url { 3 } else { 2 }, "{failure:?}");
        assert_says(&client.failure(&["list"]).unwrap(), &words);
    }
    // A second URL that works is enough.
    client.settings.set("urls", vec![format!("https://127.0.0.1:{closed}"), site.url()]);
    client.backup().unwrap();
}

#[test]
fn wrong_settings_name_the_nearest_key() {
    let site = one_server();
    let (_, client) = disk_of(&site, MIB);
    let mut wrong = client.clone();
    wrong.settings.set("chace_path", "/tmp");
    let failure = wrong.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 2, "{failure:?}");
    assert_says(&failure, &["chace_path", "cache_path", "client.toml"]);
    let mut wrong = client.clone();
    wrong.settings.set("hash_threads", "many");
    let failure = wrong.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 2, "{failure:?}");
    assert_says(&failure, &["hash_threads", "many"]);
    let failure = client.failure(&["backup", "--no-such-flag"]).unwrap();
    assert_eq!(failure.exit_code, 2, "{failure:?}");
    assert_says(&failure, &["--no-such-flag"]);

    let mut site = site;
    site.stop_server("server-a").unwrap();
    site.server("server-a").unwrap().settings.set("imagepath", "/tmp");
    let error = format!("{:#}", site.start_server("server-a").unwrap_err());
    assert!(error.contains("imagepath") && error.contains("image_path"), "{error}");
    site.stop_janus().unwrap();
    site.janus_settings().unwrap().set("server_url", "https://127.0.0.1:1");
    let error = format!("{:#}", site.start_janus().unwrap_err());
    assert!(error.contains("server_url") && error.contains("server_urls"), "{error}");
}

#[test]
fn a_pipe_is_no_disk_and_a_router_no_machine() {
    let site = one_server();
    let (_, client) = disk_of(&site, MIB);
    let pipe = site.folder().join("pipe");
    packages::output(std::process::Command::new("mkfifo").arg(&pipe)).unwrap();
    let mut wrong = client.clone();
    wrong.settings.set("disks", vec![format!("disk={}", pipe.display())]);
    let failure = wrong.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 4, "{failure:?}");
    assert_says(&failure, &["pipe", "neither"]);
    let mut wrong = client.clone();
    use_keys(&mut wrong, &site.folder().join("pki/server-a"));
    let failure = wrong.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 2, "{failure:?}");
    assert_says(&failure, &["server server-a", "pki issue client"]);
}

#[test]
fn missing_disks_and_odd_sizes_fail_before_anything_is_stored() {
    let site = one_server();
    let (path, mut client) = disk_of(&site, MIB);
    client.settings.set("disks", vec!["disk=/does/not/exist"]);
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 4, "{failure:?}");
    assert_says(&failure, &["/does/not/exist", "No such file"]);

    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB + 100).unwrap();
    client.settings.set("disks", vec![format!("disk={}", path.display())]);
    let failure = client.failure(&["backup"]).unwrap();
    assert_says(&failure, &["disk.raw", "512"]);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();

    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    client
        .settings
        .set("disks", vec![format!("same={}", path.display()), format!("same={}", path.display())]);
    assert_says(&client.failure(&["backup"]).unwrap(), &["same"]);
    assert!(client.list().unwrap().snapshots.is_empty());
}

#[test]
fn an_image_path_that_cannot_be_written_stops_the_server_at_its_start() {
    let mut site = one_server();
    site.stop_server("server-a").unwrap();
    let file = site.folder().join("a-file");
    fs::write(&file, "not a folder").unwrap();
    let images = file.join("images");
    site.server("server-a").unwrap().settings.set("image_path", images.to_string_lossy());
    let error = format!("{:#}", site.start_server("server-a").unwrap_err());
    assert!(error.contains(&*images.to_string_lossy()), "{error}");
}

#[test]
fn one_store_has_one_server() {
    let mut site = one_server();
    let mut second = key_settings(&site.folder().join("pki/server-a"));
    second.set("image_path", site.server("server-a").unwrap().images().to_string_lossy());
    second.set("listen", "127.0.0.1:0");
    let config = site.folder().join("second.toml");
    second.write(&config).unwrap();
    let output =
        site.programs().server().arg("serve").arg("--config").arg(&config).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("server-a"), "{said}");
}

#[test]
fn what_is_not_there_cannot_be_restored() {
    let site = one_server();
    let (_, client) = disk_of(&site, MIB);
    let taken = client.backup().unwrap();
    let to = site.folder().join("restored");
    let text = to.to_string_lossy().into_owned();
    for unknown in ["nosuchdisk", "018f3e5c-7a2b-7c3d-8e4f-5a6b7c8d9e0f"] {
        let failure = client.failure(&["restore", unknown, "--to", &text]).unwrap();
        assert_eq!(failure.exit_code, 5, "{failure:?}");
        assert_says(&failure, &[unknown]);
        assert!(!to.exists());
    }
    fs::write(&to, "mine").unwrap();
    let failure = client.failure(&["restore", "disk", "--to", &text]).unwrap();
    assert_says(&failure, &[&text, "--force"]);
    assert_eq!(fs::read_to_string(&to).unwrap(), "mine");
    // Another machine of the same user doesn't see it, nor read it by its id.
    let other = site.client("other", &[]).unwrap();
    assert!(other.list().unwrap().snapshots.is_empty());
    let elsewhere = site.folder().join("stolen").to_string_lossy().into_owned();
    let failure =
        other.failure(&["restore", &taken.disks[0].snapshot_id, "--to", &elsewhere]).unwrap();
    assert_eq!(failure.exit_code, 5, "{failure:?}");
}

#[test]
fn a_certificate_for_a_restore_reads_one_machine_and_writes_nothing() {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let (path, mut client) = disk_of(&site, MIB);
    client.backup().unwrap();
    let other = site.client("other", &[format!("disk={}", path.display())]).unwrap();
    let others = other.backup().unwrap().disks[0].snapshot_id.clone();
    let rescue = ["--user", USER, "--machine", "machine", "--hours", "24"];
    site.issue("restore", "rescue", &rescue).unwrap();
    use_keys(&mut client, &site.folder().join("pki/rescue"));

    assert_eq!(client.list().unwrap().snapshots.len(), 1);
    let to = site.folder().join("restored");
    client.restore("disk", &to).unwrap();
    disk::compare(&path, &to).unwrap();
    let elsewhere = site.folder().join("stolen").to_string_lossy().into_owned();
    let failure = client.failure(&["restore", &others, "--to", &elsewhere]).unwrap();
    assert_eq!(failure.exit_code, 5, "{failure:?}");
    let failure = client.failure(&["list", "--machine", &format!("{USER}/other")]).unwrap();
    assert_eq!(failure.reason.as_deref(), Some("NOT_ALLOWED"), "{failure:?}");
    assert_says(&client.failure(&["backup"]).unwrap(), &["restore of", "pki issue client"]);
}

#[test]
fn two_runs_of_one_machine_exclude_each_other() {
    let site = one_server();
    let (_, client) = disk_of(&site, 256 * MIB);
    let first = client.start(&["backup", "--json"]).unwrap();
    let (state, until) =
        (client.cache().join("state.json"), Instant::now() + Duration::from_secs(30));
    while !fs::read_to_string(&state).is_ok_and(|text| text.contains("\"backup_id\"")) {
        assert!(Instant::now() < until, "{}", first.log());
        std::thread::sleep(Duration::from_millis(2));
    }
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 6, "{failure:?}");
    let lock = client.cache().join("machine.lock").display().to_string();
    assert_says(&failure, &["another backup of this machine is running", &lock, "wait for it"]);
    assert_eq!(first.wait().unwrap().code, Some(0));
}

#[test]
fn no_server_ready_says_why_for_each() {
    let mut site = one_server();
    let (_, client) = disk_of(&site, MIB);
    site.kill_server("server-a").unwrap();
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(
        (failure.exit_code, failure.reason.as_deref()),
        (3, Some("NO_SERVER_READY")),
        "{failure:?}"
    );
    assert_says(&failure, &["server-a", "refused"]);
    site.start_server("server-a").unwrap();
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
}

/// What `janus status` prints, and its exit code.
fn janus_status(site: &Site, flag: Option<&str>) -> (Option<i32>, String) {
    let mut janus = site.programs().janus();
    janus.arg("status").arg("--config").arg(site.folder().join("settings/janus.toml"));
    let output = janus.args(flag).output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn janus_status_is_for_people_and_for_monitoring() {
    let mut site = one_server();
    let (_, client) = disk_of(&site, MIB);
    client.backup().unwrap();
    let (code, line) = janus_status(&site, Some("--check"));
    assert_eq!(code, Some(0), "{line}");
    assert!(line.starts_with("JANUS OK - ") && line.contains("machines=1 overdue=0"), "{line}");
    let (code, text) = janus_status(&site, None);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("server-a") && text.contains("alice/machine  last backup 20"), "{text}");
    let (_, json) = janus_status(&site, Some("--json"));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["ok"], &json["machines"][0]["server"]), (&true.into(), &"server-a".into()));

    let server = &json["servers"][0];
    assert!(server["free_bytes"].as_u64() > Some(0), "{server}");
    assert!(server["free_bytes"].as_u64() < server["total_bytes"].as_u64(), "{server}");
    for expires in [&server["certificate_expires_ms"], &json["certificate_expires_ms"]] {
        assert!(expires.as_i64() > server["since_ms"].as_i64(), "{json}");
    }
    assert!(text.contains(" free; certificate until 20"), "{text}");

    // A certificate that ends soon: said as soon as the server has read it, while its old connections stay.
    std::fs::remove_dir_all(site.folder().join("pki/server-a")).unwrap();
    site.issue("server", "server-a", &["--host", "127.0.0.1", "--days", "3"]).unwrap();
    site.server("server-a").unwrap().process().unwrap().hang_up();
    let soon = "WARNING - the certificate of server-a expires on ";
    let until = std::time::Instant::now() + std::time::Duration::from_secs(15);
    loop {
        let (code, line) = janus_status(&site, Some("--check"));
        if line.contains(soon) {
            assert_eq!(code, Some(1), "{line}");
            break;
        }
        assert!(std::time::Instant::now() < until, "{line}");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }

    site.kill_server("server-a").unwrap();
    assert!(client.failure(&["backup"]).is_ok());
    let (code, line) = janus_status(&site, Some("--check"));
    assert_eq!(code, Some(2), "{line}");
    assert!(line.contains("CRITICAL - no server takes backups; server-a: "), "{line}");
    site.kill_janus().unwrap();
    let (code, line) = janus_status(&site, Some("--check"));
    assert!(code == Some(2) && line.contains("connection refused"), "{line}");
    let (code, json) = janus_status(&site, Some("--json"));
    assert!(code == Some(1) && json.contains("\"ok\":false"), "{json}");
}

#[test]
fn as_root_a_full_store_keeps_what_it_has() {
    let mut site = one_server();
    site.stop_server("server-a").unwrap();
    let store = SmallFileSystem::mount(64 * MIB).unwrap();
    let images = store.folder().join("images");
    site.server("server-a").unwrap().settings.set("image_path", images.to_string_lossy());
    site.start_server("server-a").unwrap();
    let (path, mut client) = disk_of(&site, 8 * MIB);
    let kept = client.backup().unwrap();

    let large = site.folder().join("large.raw");
    disk::blank(&large, 200 * MIB).unwrap();
    disk::write_noise(&large, 0..200 * MIB, 2).unwrap();
    client.settings.set("disks", vec![format!("large={}", large.display())]);
    client.settings.set("failover_after_seconds", 5);
    let failure = client.failure(&["backup"]).unwrap();
    assert!(
        failure.reason.as_deref() == Some("STORE_FULL") || failure.exit_code == 3,
        "{failure:?}"
    );
    assert_says(&failure, &["full"]);

    let list = client.list().unwrap();
    assert_eq!(list.snapshots.len(), 1, "{list:?}");
    let to = site.folder().join("restored");
    client.restore(&kept.disks[0].snapshot_id, &to).unwrap();
    disk::compare(&path, &to).unwrap();
    drop(site);
    drop(store);
}

#[test]
fn as_root_read_errors_name_the_device_and_the_place() {
    let site = one_server();
    let (path, mut client) = disk_of(&site, 32 * MIB);
    let device = LoopDevice::attach(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(16 * MIB).unwrap();
    let name = device.path().to_string_lossy().into_owned();
    client.settings.set("disks", vec![format!("disk={name}")]);
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 4, "{failure:?}");
    assert_says(&failure, &[&name, "Input/output error"]);
    assert!(client.list().unwrap().snapshots.is_empty());
}

#[test]
fn as_root_mounted_devices_are_neither_read_nor_written_by_accident() {
    let site = one_server();
    let (_, mut client) = disk_of(&site, MIB);
    client.backup().unwrap();
    let mounted = SmallFileSystem::mount(16 * MIB).unwrap();
    let name = mounted.device().to_string_lossy().into_owned();
    let failure = client.failure(&["restore", "disk", "--to", &name, "--force"]).unwrap();
    assert_says(&failure, &[&name, "mounted"]);
    client.settings.set("disks", vec![format!("live={name}")]);
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 4, "{failure:?}");
    assert_says(&failure, &[&name, "mounted", "allow_live"]);
    client.settings.set("allow_live", true);
    client.backup().unwrap();
    // Whoever lists or restores it is told.
    let list: serde_json::Value = client.answer(&["list"]).unwrap();
    let live = |one: &&serde_json::Value| one["disk_id"] == "live";
    let listed = list["snapshots"].as_array().unwrap().iter().find(live).unwrap().clone();
    assert_eq!(listed["consistency"], "smeared");
    let to = site.folder().join("live.raw");
    let restored: serde_json::Value =
        client.answer(&["restore", "live", "--to", to.to_str().unwrap()]).unwrap();
    assert_eq!(restored["consistency"], "smeared");
    drop(site);
    drop(mounted);
}

#[test]
fn as_root_a_device_is_restored_only_with_force() {
    let site = one_server();
    let (path, client) = disk_of(&site, 8 * MIB);
    client.backup().unwrap();
    let target = site.folder().join("target.raw");
    disk::blank(&target, 8 * MIB).unwrap();
    disk::write_noise(&target, 0..8 * MIB, 7).unwrap();
    let device = LoopDevice::attach(&target).unwrap();
    let name = device.path().to_string_lossy().into_owned();
    let failure = client.failure(&["restore", "disk", "--to", &name]).unwrap();
    assert_says(&failure, &[&name, "--force"]);
    client
        .answer::<xtask::site::answers::Restore>(&["restore", "disk", "--to", &name, "--force"])
        .unwrap();
    drop(device);
    disk::compare(&path, &target).unwrap();
}
