//! A PKI that isn't ours: `openssl` makes an authority with an intermediate, and certificates as SPIRE, step-ca and Active Directory
//! do. Servers, janus and machines have only those.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use janus_proto::{
    channel::{self, ConnectOptions, Expect},
    error::ErrorReason,
    ids::BackupId,
    pb::{self, enrollment_service_client::EnrollmentServiceClient},
    proof::Statement,
    tls::{Identity, Pki},
};
use jiff::{Span, Timestamp};
use xtask::{
    disk,
    site::{Client, GROUP, Plan, Programs, Settings, Site, free_ports},
};

use crate::scene::{A, B, Caller, Carried, MIB, Scene, proof, refused, start_of, until};

const MINUTE: Duration = Duration::from_secs(60);
const DAY: i64 = 24 * 60 * 60;
const ROUTER: &str = "router";

/// Rules as a site with SPIRE writes them.
const SPIFFE: &[(&str, &str)] = &[
    ("machines.uri", "spiffe://example.org/backup/client/{user}/{machine}"),
    ("machines.role", "client"),
    ("servers.uri", "spiffe://example.org/backup/server/{name}"),
    ("servers.role", "server"),
    ("router.uri", "spiffe://example.org/backup/router"),
    ("router.role", "janus"),
    ("router.name", ROUTER),
];

/// Rules for names of hosts and subjects.
const HOSTS: &[(&str, &str)] = &[
    ("machines.dns", "{machine}.{user}.clients.example.org"),
    ("machines.role", "client"),
    ("servers.dns", "{name}.servers.example.org"),
    ("servers.role", "server"),
    ("router.cn", "Backup Router"),
    ("router.role", "janus"),
    ("router.name", ROUTER),
];

/// A rule by which its holder says that a certificate is his.
const OWN: &[(&str, &str)] =
    &[("own.cn", "x"), ("own.role", "client"), ("own.user", "alice"), ("own.machine", "web1")];

/// The kinds of keys that openssl makes.
#[derive(Clone, Copy)]
enum Key {
    Rsa,
    P256,
    P384,
    Ed25519,
}

/// What a certificate is to say.
struct Wanted<'a> {
    key: Key,
    cn: &'a str,
    /// As openssl writes them.
    names: &'a str,
    /// Seconds from now.
    from: i64,
    until: i64,
}

impl Default for Wanted<'_> {
    fn default() -> Self {
        Self { key: Key::P256, cn: "", names: "", from: -60, until: DAY }
    }
}

/// A root, and an intermediate that signs.
struct Authority {
    folder: PathBuf,
}

fn openssl(folder: &Path, arguments: &[&str]) -> Output {
    let output = Command::new("openssl").args(arguments).current_dir(folder).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {}: {told}", arguments.join(" "));
    output
}

impl Authority {
    fn new(folder: &Path, key: Key) -> Self {
        fs::create_dir_all(folder.join("new")).unwrap();
        let this = Self { folder: folder.to_owned() };
        let config = "[ca]\ndefault_ca = one\n[one]\ndatabase = index.txt\nnew_certs_dir = new\n\
            rand_serial = yes\ndefault_md = sha256\npolicy = any\nunique_subject = no\nemail_in_dn = no\n\
            [any]\ncommonName = optional\norganizationName = optional\n\
            [authority]\nbasicConstraints = critical, CA:true\nkeyUsage = critical, keyCertSign, cRLSign\n\
            subjectKeyIdentifier = hash\n";
        fs::write(folder.join("ca.cnf"), config).unwrap();
        fs::write(folder.join("index.txt"), "").unwrap();
        for name in ["root", "issuing"] {
            this.key(name, key);
            let subject = format!("/O=Example/CN=Example {name}");
            let (key, request) = (format!("{name}.key"), format!("{name}.csr"));
            let arguments = ["req", "-new", "-config", "ca.cnf", "-key", &key, "-out", &request];
            openssl(folder, &[&arguments[..], &["-subj", &subject, "-batch"]].concat());
        }
        let span = (-DAY, 3650 * DAY);
        this.sign("root", &["-selfsign", "-keyfile", "root.key", "-extensions", "authority"], span);
        let by_root = ["-cert", "root.pem", "-keyfile", "root.key", "-extensions", "authority"];
        this.sign("issuing", &by_root, span);
        this
    }

    fn root(&self) -> PathBuf {
        self.folder.join("root.pem")
    }

    fn key(&self, name: &str, key: Key) {
        let more: &[&str] = match key {
            Key::Rsa => &["RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            Key::P256 => &["EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            Key::P384 => &["EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
            Key::Ed25519 => &["ED25519"],
        };
        let out = format!("{name}.key");
        openssl(&self.folder, &[&["genpkey", "-out", &out, "-algorithm"], more].concat());
    }

    /// `name.pem` of `name.csr`.
    fn sign(&self, name: &str, by: &[&str], (from, until): (i64, i64)) {
        let moment = |seconds: i64| {
            let at = Timestamp::now() + Span::new().seconds(seconds);
            at.strftime("%Y%m%d%H%M%SZ").to_string()
        };
        let (from, until) = (moment(from), moment(until));
        let (request, out) = (format!("{name}.csr"), format!("{name}.pem"));
        let arguments = ["ca", "-config", "ca.cnf", "-batch", "-notext", "-in", &request];
        let dates = ["-out", &out, "-startdate", &from, "-enddate", &until];
        openssl(&self.folder, &[&arguments[..], &dates, by].concat());
    }

    /// A folder with cert.pem, intermediate included, and key.pem. What stood there is replaced, as an agent does it.
    fn issue(&self, name: &str, wanted: &Wanted<'_>) -> PathBuf {
        let usage =
            "extendedKeyUsage = clientAuth, serverAuth\nkeyUsage = critical, digitalSignature\n";
        let names = match wanted.names {
            "" => String::new(),
            names => format!("subjectAltName = {names}\n"),
        };
        let file = format!("{name}.cnf");
        fs::write(self.folder.join(&file), format!("[leaf]\n{usage}{names}")).unwrap();
        self.key(name, wanted.key);
        let (key, request) = (format!("{name}.key"), format!("{name}.csr"));
        let subject = match wanted.cn {
            "" => "/O=Example".to_owned(),
            cn => format!("/O=Example/CN={cn}"),
        };
        let arguments = ["req", "-new", "-config", "ca.cnf", "-key", &key, "-out", &request];
        openssl(&self.folder, &[&arguments[..], &["-subj", &subject, "-batch"]].concat());
        let by = ["-cert", "issuing.pem", "-keyfile", "issuing.key", "-extfile", &file];
        let by = [&by[..], &["-extensions", "leaf"]].concat();
        self.sign(name, &by, (wanted.from, wanted.until));
        let out = self.folder.join(format!("of-{name}"));
        fs::create_dir_all(&out).unwrap();
        let read = |name: String| fs::read_to_string(self.folder.join(name)).unwrap();
        let chain = read(format!("{name}.pem")) + &read("issuing.pem".into());
        put(&out.join("cert.pem"), &chain);
        put(&out.join("key.pem"), &read(key));
        out
    }

    /// Settings of who has the files of a folder and believes this authority alone, by these rules.
    fn settings(&self, settings: &mut Settings, keys: &Path, rules: &[(&str, &str)]) {
        settings.set("cert", keys.join("cert.pem").to_string_lossy());
        settings.set("key", keys.join("key.pem").to_string_lossy());
        settings.set("ca", "");
        settings.set("pki.group", GROUP);
        settings.set("pki.ca", self.root().to_string_lossy());
        for (key, value) in rules {
            settings.set(&format!("pki.names.{key}"), *value);
        }
    }
}

fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, path).unwrap();
}

/// The same settings as the library takes them.
fn identity(authority: &Authority, name: &str, rules: &[(&str, &str)]) -> Identity {
    let keys = authority.folder.join(format!("of-{name}"));
    let mut text = format!("group = {GROUP:?}\nca = {:?}\ncheck_hosts = false\n", authority.root());
    for (key, value) in rules {
        text.push_str(&format!("names.{key} = {value:?}\n"));
    }
    let pki: Pki = toml::from_str(&text).unwrap();
    Identity::load_with(keys.join("cert.pem"), keys.join("key.pem"), "", &pki).unwrap()
}

/// A site whose servers and janus have certificates of `authority` by these names.
fn site(kind: Key, rules: &[(&str, &str)], wanted: &[(&str, Wanted<'_>)]) -> (Scene, Authority) {
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let authority = Authority::new(&site.folder().join("foreign"), kind);
    for (name, wanted) in wanted {
        let keys = authority.issue(name, wanted);
        let settings = match *name {
            ROUTER => site.janus_settings().unwrap(),
            name => &mut site.server(name).unwrap().settings,
        };
        authority.settings(settings, &keys, rules);
        settings.set("pki.check_hosts", wanted.names.contains("IP:"));
    }
    (Scene { site, enroll_url: String::new() }, authority)
}

/// A site as SPIRE would equip it: no host in any certificate.
fn spiffe_site() -> (Scene, Authority) {
    let spiffe = |key, names| Wanted { key, names, ..Wanted::default() };
    let of_b = "URI:spiffe://example.org/backup/server/server-b";
    let (mut scene, authority) = site(
        Key::Rsa,
        SPIFFE,
        &[
            (A, spiffe(Key::Rsa, "URI:spiffe://example.org/backup/server/server-a")),
            (B, spiffe(Key::P256, of_b)),
            (ROUTER, spiffe(Key::P384, "URI:spiffe://example.org/backup/router")),
        ],
    );
    scene.site.start_all().unwrap();
    (scene, authority)
}

/// A machine that says by rules of its own who it is: a program that is not ours would ask no rules at all.
fn machine(
    scene: &Scene,
    authority: &Authority,
    name: &str,
    wanted: &Wanted<'_>,
    rules: &[(&str, &str)],
) -> Client {
    let keys = authority.issue(name, wanted);
    with_rules(scene, authority, (name, &keys), rules)
}

fn with_rules(
    scene: &Scene,
    authority: &Authority,
    (name, keys): (&str, &Path),
    rules: &[(&str, &str)],
) -> Client {
    let mut machine = scene.machine(name);
    authority.settings(&mut machine.settings, keys, rules);
    machine.settings.set("pki.check_hosts", false);
    machine
}

/// What a command that fails says.
fn failed(machine: &Client, arguments: &[&str]) -> String {
    let done = machine.run(arguments).unwrap();
    println!("{}", done.stderr.trim());
    assert_ne!(done.code, Some(0), "{}", done.stdout);
    done.stderr
}

#[test]
fn a_site_of_spiffe_certificates_backs_up_by_turns_and_restores() {
    let (mut scene, authority) = spiffe_site();
    let web1 = "URI:spiffe://example.org/backup/client/alice/web1";
    let wanted = Wanted { key: Key::Rsa, names: web1, ..Wanted::default() };
    let mut machine = machine(&scene, &authority, "web1", &wanted, SPIFFE);
    scene.works(&machine, "web1");
    disk::write_noise(&scene.disk("web1"), 0..MIB, 2).unwrap();
    scene.works(&machine, "web1");
    let snapshots = machine.list().unwrap().snapshots;
    let mut servers: Vec<_> = snapshots.iter().map(|one| one.server.as_str()).collect();
    servers.sort_unstable();
    assert_eq!(servers, [A, B]);
    for server in [A, B] {
        assert!(scene.site.log(server).contains("certificate_until"), "{}", scene.site.log(server));
    }

    // Who holds the key of the janus has the machine's certificate, and needs its signature all the same.
    let owner = identity(&authority, "web1", SPIFFE);
    assert!(owner.principal().limits.proof && owner.principal().is_mapped());
    let url = scene.site.server(A).unwrap().url();
    let thief = Caller::new(&url, &identity(&authority, ROUTER, SPIFFE));
    let start = start_of(&BackupId::new().to_string());
    let as_owner = |proof| Carried { principal: Some(&owner), proof, ..Carried::default() };
    refused(thief.start(&start, &as_owner(None)), ErrorReason::ProofRefused);
    let told = Statement::start(&start, None);
    refused(thief.start(&start, &as_owner(proof(&owner, &told, B))), ErrorReason::ProofRefused);
    thief.start(&start, &as_owner(proof(&owner, &told, A))).unwrap();

    // Straight to a server, not to the one where the thief has begun a run.
    let other = scene.site.server(B).unwrap().url();
    machine.settings.set("urls", [other].to_vec());
    machine.backup().unwrap();
    let to = scene.site.folder().join("direct");
    machine.restore("disk", &to).unwrap();
    disk::compare(&scene.disk("web1"), &to).unwrap();

    // What an enrolment has left beside it is about another certificate.
    let ending = Wanted { key: Key::Rsa, cn: "", names: web1, from: -DAY, until: 3600 };
    let keys = authority.issue("web1", &ending);
    fs::write(keys.join("enrolled.json"), r#"{"url":"https://127.0.0.1:1"}"#).unwrap();
    let done = machine.run(&["backup"]).unwrap();
    assert!(done.code == Some(0) && !done.stderr.contains("renewed"), "{}", done.stderr);
}

#[test]
fn other_certificates_of_the_same_authority_are_nobodys() {
    let (mut scene, authority) = spiffe_site();
    let direct = scene.site.server(A).unwrap().url();
    let janus = scene.site.url();
    // What somebody can get of a company's authority, and says it means.
    let web1 = &[
        ("servers.uri", "spiffe://example.org/backup/server/{name}"),
        ("servers.role", "server"),
        ("router.uri", "spiffe://example.org/backup/router"),
        ("router.role", "janus"),
        ("router.name", ROUTER),
    ];
    let good = "URI:spiffe://example.org/backup/client/alice/web1";
    let two = format!("{good}, URI:spiffe://example.org/backup/client/alice/web2");
    let own = format!("{good}, URI:janus://{GROUP}/operator/root");
    for (name, names, says) in [
        (
            "other",
            "URI:spiffe://example.org/mail/client/alice/web1",
            "has no name that a rule of pki.names takes: uri \"spiffe://example.org/mail/client/alice/web1\", cn \"x\"",
        ),
        (
            "alike",
            "URI:spiffe://example.org.evil.org/backup/client/alice/web1",
            "has no name that a rule of pki.names takes",
        ),
        ("two", &two, "has several URIs"),
        ("dots", "URI:spiffe://example.org/backup/client/../web1", "can't take"),
    ] {
        let wanted = Wanted { names, cn: "x", ..Wanted::default() };
        let keys = authority.issue(name, &wanted);
        let mut machine = with_rules(&scene, &authority, (name, &keys), &[&web1[..], OWN].concat());
        for url in [&direct, &janus] {
            machine.settings.set("urls", [url.clone()].to_vec());
            let told = failed(&machine, &["list"]);
            assert!(told.contains(says), "{name}: {told}");
        }
        // By the rules of the site its own program says it at once.
        let honest = with_rules(&scene, &authority, (name, &keys), SPIFFE);
        let told = failed(&honest, &["list"]);
        assert!(told.contains("can't be used") && told.contains(says), "{name}: {told}");
    }
    // A name of our own kind in such a certificate, by a program that believes it.
    let wanted = Wanted { names: &own, ..Wanted::default() };
    let keys = authority.issue("own", &wanted);
    let mut machine = scene.machine("own");
    for (key, file) in [("cert", "cert.pem"), ("key", "key.pem")] {
        machine.settings.set(key, keys.join(file).to_string_lossy());
    }
    machine.settings.set("ca", authority.root().to_string_lossy());
    machine.settings.set("urls", [direct.clone()].to_vec());
    let told = failed(&machine, &["list", "--machine", "alice/web1"]);
    // It can't tell whom it has reached, and whom it has reached doesn't believe it.
    assert!(
        told.contains("names no janus:// principal") || told.contains("is not for host"),
        "{told}"
    );
    let told = s_client(&direct, &keys, &authority);
    assert!(scene.site.log(A).contains("may stand in certificates of `ca` alone"), "{told}");

    // Expired: by its own program, and by the server.
    let wanted = Wanted { names: good, from: -DAY, until: -60, ..Wanted::default() };
    let old = self::machine(&scene, &authority, "old", &wanted, SPIFFE);
    let told = failed(&old, &["list"]);
    assert!(told.contains("expired on") && told.contains("by the PKI that it is of"), "{told}");
    let told = s_client(&direct, &authority.folder.join("of-old"), &authority);
    assert!(told.contains("certificate expired"), "{told}");
}

/// What another TLS program is told.
fn s_client(url: &str, keys: &Path, authority: &Authority) -> String {
    let root = authority.root();
    let mut client = Command::new("openssl");
    client.args([
        "s_client",
        "-tls1_3",
        "-alpn",
        "h2",
        "-connect",
        url.trim_start_matches("https://"),
    ]);
    client.arg("-cert").arg(keys.join("cert.pem")).arg("-cert_chain").arg(keys.join("cert.pem"));
    client.arg("-key").arg(keys.join("key.pem")).arg("-CAfile").arg(root);
    client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = client.spawn().unwrap();
    let begun = Instant::now();
    // It is told after the handshake, and its end is waited for, with its input open.
    while child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(15) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn who_is_revoked_is_cut_off_until_the_pki_makes_a_newer_certificate() {
    let (scene, authority) = spiffe_site();
    let names = "URI:spiffe://example.org/backup/client/alice/web1";
    let wanted = Wanted { key: Key::Ed25519, names, from: -5, ..Wanted::default() };
    let mut machine = machine(&scene, &authority, "web1", &wanted, SPIFFE);
    scene.works(&machine, "web1");
    scene.works(&machine, "web1");
    disk::write_noise(&scene.disk("web1"), 0..8 * MIB, 7).unwrap();
    machine.settings.set("bandwidth", ["1 Mbit/s"].to_vec());
    let mut running = machine.start(&["backup"]).unwrap();
    until("a run", MINUTE, || scene.site.log(A).matches("run started").count() == 2);
    std::thread::sleep(Duration::from_secs(2));
    assert!(!running.has_ended());
    let revoked = scene.admin(B, &["pki", "revoke", "--machine", "alice/web1"]);
    assert_eq!(revoked["known_to"], serde_json::json!([B, A]), "{revoked}");
    let told = scene.site.admin(B, &["pki", "revoke", "--machine", "alice/other"]).unwrap();
    assert!(String::from_utf8_lossy(&told.stdout).contains("one of your PKI counts as made when"));
    until("the end of the run", MINUTE, || running.has_ended());
    let ended = running.wait().unwrap();
    assert!(ended.code != Some(0) && ended.stderr.contains("revoked"), "{}", ended.stderr);
    assert!(failed(&machine, &["list"]).contains("revoked"));
    machine.settings.set("bandwidth", Vec::<String>::new());
    std::thread::sleep(Duration::from_secs(2));
    // One that was made later, but is said to begin before, doesn't count yet.
    let begins_before = Wanted { from: -3600, ..wanted };
    authority.issue("web1", &begins_before);
    assert!(failed(&machine, &["list"]).contains("revoked"));
    authority.issue("web1", &Wanted { from: 0, names, ..Wanted::default() });
    scene.works(&machine, "web1");
}

#[test]
fn names_of_hosts_and_subjects_beside_certificates_of_ours() {
    let host = "IP:127.0.0.1, DNS:localhost, DNS:";
    let of = |name: &str| format!("{host}{name}.Servers.example.org");
    let (of_a, of_b) = (of(A), of(B));
    let wanted = |key, cn, names| Wanted { key, cn, names, ..Wanted::default() };
    let (mut scene, authority) = site(
        Key::P384,
        HOSTS,
        &[
            (A, wanted(Key::P256, "A", &of_a)),
            (B, wanted(Key::Rsa, "B", &of_b)),
            (ROUTER, wanted(Key::Ed25519, "Backup Router", "IP:127.0.0.1")),
        ],
    );
    // Machines and operators of `pki issue` go on beside them.
    let ours = scene.site.folder().join("pki/ca.pem").to_string_lossy().into_owned();
    for name in [A, B] {
        scene.site.server(name).unwrap().settings.set("ca", ours.as_str());
    }
    scene.site.janus_settings().unwrap().set("ca", ours.as_str());
    let enroll = &mut scene.site.server(A).unwrap().settings;
    let address = format!("127.0.0.1:{}", free_ports(1).unwrap()[0]);
    let enroll_url = format!("https://{address}");
    enroll.set("enroll.listen", address);
    enroll.set("enroll.ca", Path::new(&ours).parent().unwrap().to_string_lossy());
    scene.site.start_all().unwrap();
    let names = "DNS:PC-1.alice.clients.example.org, DNS:pc-1.local";
    let pc = wanted(Key::P384, "pc-1", names);
    let mut pc = machine(&scene, &authority, "pc-1", &pc, HOSTS);
    pc.settings.set("pki.check_hosts", true);
    scene.works(&pc, "pc-1");
    scene.works(&pc, "pc-1");
    let disks = [format!("disk={}", scene.disk("pc-1").display())];
    let mut own = scene.site.client("web1", &disks).unwrap();
    // It must believe the servers' authority for that.
    assert!(failed(&own, &["list"]).contains("CA"));
    own.settings.set("pki.group", GROUP);
    own.settings.set("pki.ca", authority.root().to_string_lossy());
    for (key, value) in HOSTS {
        own.settings.set(&format!("pki.names.{key}"), *value);
    }
    scene.site.await_ready(&own).unwrap();
    own.backup().unwrap();
    own.backup().unwrap();
    assert_eq!(own.list().unwrap().snapshots.len(), 2);
    // Enrolment needs what a machine without a certificate can know, and says so.
    let token = scene.admin(A, &["enroll", "token", "--machine", "x", "--user", "alice"]);
    let error = token["error"].as_str().unwrap();
    assert!(error.contains("isn't of an authority in `ca`"), "{error}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let renewed = runtime.block_on(async {
        let options = ConnectOptions::expecting(Expect::Server);
        let known = identity(&authority, "pc-1", HOSTS);
        let channel = channel::connect(&enroll_url, &known, options).await.unwrap().channel;
        let asked = pb::RenewRequest { signing_request: vec![1].into() };
        EnrollmentServiceClient::new(channel).renew(asked).await
    });
    refused(renewed, ErrorReason::NotAllowed);

    // One authority in both files would count in two ways.
    let both = scene.site.folder().join("both.pem");
    let text = [fs::read(&ours).unwrap(), fs::read(authority.root()).unwrap()].concat();
    fs::write(&both, text).unwrap();
    pc.settings.set("ca", both.to_string_lossy());
    assert!(failed(&pc, &["list"]).contains("Leave it in one of them"));
    pc.settings.set("ca", "");
    // Two machines in one certificate, said by a program that takes the first.
    let rules = [OWN, &HOSTS[2..]].concat();
    let two = "DNS:pc-1.alice.clients.example.org, DNS:pc-2.alice.clients.example.org";
    let two = machine(&scene, &authority, "two", &wanted(Key::P256, "x", two), &rules);
    let told = failed(&two, &["list"]);
    assert!(
        told.contains("is for more than one: client alice/pc-1 by its dns")
            && told.contains("client alice/pc-2"),
        "{told}"
    );
    // A server under another host.
    scene.site.stop_server(A).unwrap();
    let elsewhere = wanted(Key::P256, "A", "DNS:server-a.servers.example.org");
    authority.issue(A, &elsewhere);
    scene.site.start_server(A).unwrap();
    pc.settings.set("urls", [scene.site.server(A).unwrap().url()].to_vec());
    let told = failed(&pc, &["list"]);
    assert!(told.contains("server-a.servers.example.org"), "{told}");
    pc.settings.set("pki.check_hosts", false);
    pc.list().unwrap();
}

#[test]
fn certificates_that_end_while_a_backup_runs_are_replaced_on_the_way() {
    let (scene, authority) = spiffe_site();
    let names = "URI:spiffe://example.org/backup/client/alice/web1";
    let short = || Wanted { names, until: 50, ..Wanted::default() };
    let mut machine = machine(&scene, &authority, "web1", &short(), SPIFFE);
    scene.site.await_ready(&machine).unwrap();
    disk::write_noise(&scene.disk("web1"), 0..8 * MIB, 3).unwrap();
    machine.settings.set("bandwidth", ["1 Mbit/s"].to_vec());
    authority.issue("web1", &short());
    let begun = Instant::now();
    let mut running = machine.start(&["backup"]).unwrap();
    until("a run", MINUTE, || {
        [A, B].iter().any(|name| scene.site.log(name).contains("run started"))
    });
    // The agent's work: other keys too, for machine, janus and a server.
    authority.issue("web1", &Wanted { names, ..Wanted::default() });
    let router = "URI:spiffe://example.org/backup/router";
    authority.issue(ROUTER, &Wanted { names: router, ..Wanted::default() });
    let server = "URI:spiffe://example.org/backup/server/server-a";
    authority.issue(A, &Wanted { names: server, ..Wanted::default() });
    for name in [A, "janus"] {
        until("new files", MINUTE, || scene.site.log(name).contains("were read again"));
    }
    until("the end of the run", 4 * MINUTE, || running.has_ended());
    let ended = running.wait().unwrap();
    println!("{}", ended.stderr);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(begun.elapsed() > Duration::from_secs(55), "it was over before the old one ended");
    machine.settings.set("bandwidth", Vec::<String>::new());
    scene.works(&machine, "web1");
    // What a server signs with its new key is believed by the others.
    let revoked = scene.admin(A, &["pki", "revoke", "--machine", "alice/other"]);
    assert_eq!(revoked["known_to"], serde_json::json!([A, B]), "{revoked}");
}
