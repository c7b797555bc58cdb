//! An archive in Azure Blob Storage, as Microsoft's emulator Azurite speaks it. In the soak alone, since npm brings it.

use std::{
    fs,
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use xtask::{
    disk, packages,
    site::{free_ports, workspace},
};

use super::scene::{MACHINE, MIB, OTHER, SERVER, Scene, done};

/// What everybody's emulator has.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const CONTAINER: &str = "backups";
/// Makes a container: nothing of ours does.
const MAKE: &str = r#"
const [port, account, key, name] = process.argv.slice(1);
const date = new Date().toUTCString(), version = "2021-12-02";
const signed = ["PUT", ...Array(11).fill(""), `x-ms-date:${date}`, `x-ms-version:${version}`,
    `/${account}/${account}/${name}`, "restype:container"].join("\n");
const hmac = require("crypto").createHmac("sha256", Buffer.from(key, "base64"));
const authorization = `SharedKey ${account}:${hmac.update(signed).digest("base64")}`;
const headers = { "x-ms-date": date, "x-ms-version": version, authorization, "content-length": 0 };
const path = `/${account}/${name}?restype=container`;
require("http").request({ port, method: "PUT", path, headers }, (answer) => {
    answer.resume();
    console.error(answer.statusCode);
    process.exitCode = answer.statusCode === 201 ? 0 : 1;
}).end();
"#;

struct Azurite {
    process: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Azurite {
    fn start() -> Self {
        let ours = workspace().join("client/tests/archive/azurite");
        let program = packages::node("azurite", &ours).unwrap();
        let program = program.join("node_modules/azurite/dist/src/blob/main.js");
        let port = free_ports(1).unwrap()[0];
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("node");
        command.arg(program).args([
            "--blobHost",
            "127.0.0.1",
            "--skipApiVersionCheck",
            "--silent",
            "--disableTelemetry",
        ]);
        command.args(["--blobPort", &port.to_string(), "--location"]).arg(folder.path());
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        let azurite = Self { process, port, _folder: folder };
        let until = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "Azurite doesn't listen");
            thread::sleep(Duration::from_millis(100));
        }
        let mut make = Command::new("node");
        make.args(["-e", MAKE, &port.to_string(), ACCOUNT, KEY, CONTAINER]);
        let made = make.output().unwrap();
        assert!(made.status.success(), "{made:?}");
        azurite
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}/{ACCOUNT}", self.port)
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn an_archive_in_azure_is_written_verified_restored_and_imported() {
    if std::env::var_os("JANUS_SOAK").is_none() {
        return println!("NOT RUN: only in the soak");
    }
    let azurite = Azurite::start();
    let secrets = tempfile::tempdir().unwrap();
    let credentials = secrets.path().join("azure.env");
    let lines = format!("AZURE_STORAGE_ACCOUNT_NAME={ACCOUNT}\nAZURE_STORAGE_ACCOUNT_KEY={KEY}\n");
    fs::write(&credentials, lines).unwrap();
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600)).unwrap();
    let url = format!("az://{CONTAINER}/of/us");
    let settings = [
        ("archive.off.endpoint", azurite.endpoint().into()),
        ("archive.off.credentials", credentials.to_str().unwrap().into()),
        ("archive.off.silence_seconds", 10.into()),
    ];
    let mut scene = Scene::new(&url, &settings, 48, 18);
    for (round, kind) in (0..).zip(["full", "delta"]) {
        scene.backup();
        let archived = scene.archive(&[]);
        assert_eq!(archived["runs"][0]["disks"][0]["kind"], kind, "{archived}");
        // What is there isn't sent again.
        let again = scene.archive(&[MACHINE]);
        assert_eq!(again["sent_bytes"], 0, "{again}");
        disk::change(&scene.disk, MIB, 40 + round).unwrap();
    }
    let verified =
        done(&scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap());
    assert_eq!(verified["images"], 2, "{verified}");
    for taken in &scene.taken {
        let to = scene.path("restored.raw");
        let arguments = ["restore", &taken.snapshot, "--to", to.to_str().unwrap()];
        let mut restore = scene.bare(&[&arguments[..], &["--from-archive", &url]].concat(), None);
        restore.env("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT).env("AZURE_STORAGE_ACCOUNT_KEY", KEY);
        done(&restore.env("AZURE_STORAGE_ENDPOINT", azurite.endpoint()).output().unwrap());
        disk::compare(&taken.copy, &to).unwrap();
        fs::remove_file(to).unwrap();
    }
    scene.site.start_server(OTHER).unwrap();
    let import = ["import", "--from-archive", "off", "--machine", MACHINE, "--of", SERVER];
    done(&scene.site.admin(OTHER, &[&import[..], &["--json"]].concat()).unwrap());
}
