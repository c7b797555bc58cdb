//! A client in another language, made from the .proto files alone, works through janus with mutual TLS.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use rcgen::{CertificateParams, Issuer, KeyPair};
use serde_json::Value;
use xtask::{
    disk, packages,
    site::{Client, Plan, Programs, Site, target, workspace},
};

const PACKAGES: &[&str] = &[
    "blake3==1.0.11",
    "googleapis-common-protos==1.76.0",
    "grpcio==1.85.1",
    "grpcio-tools==1.85.1",
];
const MIB: u64 = 1 << 20;

/// The Python program with its generated modules.
struct Python {
    interpreter: PathBuf,
    stubs: PathBuf,
}

impl Python {
    /// Made once: the tests of this file run side by side.
    fn ready() -> &'static Self {
        static READY: OnceLock<Python> = OnceLock::new();
        READY.get_or_init(Self::prepare)
    }

    fn prepare() -> Self {
        let interpreter = packages::python("python-client", PACKAGES).unwrap();
        let stubs = target().join("tools/python-client-stubs");
        let schema = workspace().join("proto/schema");
        let _ = fs::remove_dir_all(&stubs);
        fs::create_dir_all(&stubs).unwrap();
        let mut protoc = Command::new(&interpreter);
        protoc.args(["-m", "grpc_tools.protoc"]).arg(format!("-I{}", schema.display()));
        protoc
            .arg(format!("--python_out={}", stubs.display()))
            .arg(format!("--grpc_python_out={}", stubs.display()));
        for name in ["types", "backup", "restore", "catalog"] {
            protoc.arg(schema.join(format!("janus/v1/{name}.proto")));
        }
        packages::output(&mut protoc).unwrap();
        Self { interpreter, stubs }
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let mut python = Command::new(&self.interpreter);
        python.arg(workspace().join("client/tests/python/janus_client.py")).args(arguments);
        let output = python.output().unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&said)
            .unwrap_or_else(|_| panic!("{arguments:?} printed {said:?} and {complained}"))
    }

    /// Runs a command as the machine of `keys`.
    fn call(&self, url: &str, keys: &Path, arguments: &[&str]) -> Value {
        let path = |name: &str| keys.join(name).to_string_lossy().into_owned();
        let (cert, key, ca, stubs) =
            (path("cert.pem"), path("key.pem"), path("ca.pem"), self.stubs.to_string_lossy());
        let mut all =
            vec!["--url", url, "--cert", &cert, "--key", &key, "--ca", &ca, "--stubs", &stubs];
        all.extend(arguments);
        self.run(&all)
    }
}

#[test]
fn vectors_hold_in_python() {
    let python = Python::ready();
    let answer =
        python.run(&["vectors", &workspace().join("proto/vectors.json").to_string_lossy()]);
    assert_eq!(answer["checked"], 14, "{answer}");
}

#[test]
fn a_python_client_backs_up_lists_and_restores_through_janus() {
    let python = Python::ready();
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    // A size that isn't a multiple of 4096, with a hole in the middle.
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 12 * MIB + 512).unwrap();
    disk::write_noise(&path, 0..3 * MIB, 1).unwrap();
    disk::write_noise(&path, 9 * MIB..12 * MIB + 512, 2).unwrap();
    let rust: Client = site.client("python", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&rust).unwrap();
    let keys = site.folder().join("pki/python");
    let url = site.url().replace("127.0.0.1", "localhost");
    let call = |arguments: &[&str]| python.call(&url, &keys, arguments);
    let text = path.to_string_lossy().into_owned();

    let first = call(&["backup", "disk", &text]);
    assert_eq!(
        (&first["ok"], &first["delta"], &first["server"]),
        (&true.into(), &false.into(), &"server-a".into()),
        "{first}"
    );
    assert_eq!(first["server_in_metadata"], "server-a", "{first}");
    let second = call(&["backup", "disk", &text]);
    assert_eq!(
        (&second["delta"], &second["server"]),
        (&false.into(), &"server-b".into()),
        "{second}"
    );
    let changed = disk::change(&path, MIB / 4, 3).unwrap().len();
    let third = call(&["backup", "disk", &text]);
    assert_eq!((&third["delta"], &third["server"]), (&true.into(), &"server-a".into()), "{third}");
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
    let by_rust = site.folder().join("restored-by-rust");
    rust.restore("disk", &by_rust).unwrap();
    disk::compare(&path, &by_rust).unwrap();
    let ours = rust.backup().unwrap();
    assert_eq!(ours.disks[0].sent_bytes, changed as u64 * 4096, "{ours:?}");
    let answer = call(&["restore", &ours.disks[0].snapshot_id, &restored.to_string_lossy()]);
    assert_eq!(answer["ok"], true, "{answer}");

    // Errors arrive with their reason.
    let answer = call(&["backup", "../disk", &text]);
    assert_eq!(
        (&answer["code"], &answer["reason"]),
        (&"INVALID_ARGUMENT".into(), &"ERROR_REASON_INVALID_FIELD".into()),
        "{answer}"
    );
}

#[test]
fn a_certificate_without_a_role_is_told_so() {
    let python = Python::ready();
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
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
    let answer = python.call(&site.url(), &keys, &["list"]);
    let expected = ("UNAUTHENTICATED", "ERROR_REASON_IDENTITY_MISSING");
    assert_eq!(
        (answer["code"].as_str(), answer["reason"].as_str()),
        (Some(expected.0), Some(expected.1)),
        "{answer}"
    );
}
