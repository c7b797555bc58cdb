//! A server with a machine's backups, and an archive.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, Taken},
};

use super::s3::{BUCKET, KEY, S3, SECRET};

pub const MIB: u64 = 1 << 20;
pub const SERVER: &str = "server-a";
pub const OTHER: &str = "server-b";
pub const MACHINE: &str = "alice/machine";

pub fn json(output: &Output) -> Value {
    // Before it there may be events.
    let text = std::str::from_utf8(&output.stdout).unwrap().trim_end();
    serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("{output:?}"))
}

pub fn done(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    json(output)
}

pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub disk: PathBuf,
    /// What was backed up, the oldest first.
    pub taken: Vec<Taken>,
}

impl Scene {
    /// A server that archives to `url` as `off`, and one without anything.
    pub fn new(url: &str, settings: &[(&str, Value)], size_mib: u64, data_mib: u64) -> Self {
        let plan =
            Plan { servers: vec![SERVER.into(), OTHER.into()], janus: false, ..Plan::default() };
        let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
        let credentials = site.folder().join("off.env");
        fs::write(
            &credentials,
            format!("AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={SECRET}\n"),
        )
        .unwrap();
        fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600)).unwrap();
        for name in [SERVER, OTHER] {
            let own = &mut site.server(name).unwrap().settings;
            own.set("archive.off.url", url);
            own.set("archive.off.silence_seconds", 1);
            if url.starts_with("s3") {
                own.set("archive.off.credentials", credentials.to_str().unwrap());
                own.set("archive.off.region", "us-east-1");
            }
            settings.iter().for_each(|(key, value)| own.set(key, value.clone()));
        }
        site.start_server(SERVER).unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, size_mib * MIB).unwrap();
        disk::write_noise(&disk, 3 * MIB..(3 + data_mib) * MIB, 1).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        Self { site, client, disk, taken: Vec::new() }
    }

    /// The same with an archive in a store.
    pub fn with(s3: &S3, size_mib: u64, data_mib: u64) -> Self {
        let endpoint = ("archive.off.endpoint", s3.endpoint().into());
        Self::new(&format!("s3://{BUCKET}/of/us"), &[endpoint], size_mib, data_mib)
    }

    pub fn backup(&mut self) -> &Taken {
        let taken = self.client.backup_and_copy(&self.disk, self.site.folder()).unwrap();
        self.taken.push(taken);
        self.taken.last().unwrap()
    }

    pub fn archive(&self, more: &[&str]) -> Value {
        done(&self.site.admin(SERVER, &[&["archive", "off", "--json"][..], more].concat()).unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    /// `janus-client` of a system that has nothing of ours, no certificate either.
    pub fn bare(&self, arguments: &[&str], s3: Option<&S3>) -> Command {
        let mut command = self.site.programs().client();
        command.args(arguments).arg("--json");
        command.args(["--cache-path", self.path("bare").to_str().unwrap()]);
        command.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", SECRET);
        if let Some(s3) = s3 {
            command.env("AWS_ENDPOINT", s3.endpoint()).env("AWS_REGION", "us-east-1");
        }
        command
    }

    /// Brings each backup back out of the archive at `url`.
    pub fn assert_restored(&self, url: &str, s3: Option<&S3>) {
        for taken in &self.taken {
            self.assert_one_restored(taken, url, s3);
        }
    }

    pub fn assert_one_restored(&self, taken: &Taken, url: &str, s3: Option<&S3>) {
        let to = self.path("restored.raw");
        let arguments = ["restore", &taken.snapshot, "--to", to.to_str().unwrap()];
        let more = ["--from-archive", url, "--archive-timeout", "1"];
        let restored = self.bare(&[&arguments[..], &more].concat(), s3).output().unwrap();
        assert_eq!(restored.status.code(), Some(0), "{restored:?}");
        disk::compare(&taken.copy, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    /// All secrets stay where they are.
    pub fn assert_secret(&self) {
        for name in [SERVER, OTHER] {
            assert!(!self.site.log(name).contains(SECRET), "{name}");
        }
    }
}

/// Puts parts of an image together, as anybody can.
pub fn put_together(parts: &[PathBuf], to: &Path) {
    let mut command = Command::new("sh");
    command.args(["-c", "cat \"$@\" | zstd -d -q -o \"$0\""]).arg(to).args(parts);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}; to install zstd: apt-get install zstd");
}
