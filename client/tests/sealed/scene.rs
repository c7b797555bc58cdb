//! Two servers, and a machine whose disk holds a text that is known; what servers keep is searched for it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use memchr::memmem;
use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, Taken, answers},
};

pub const MIB: u64 = 1 << 20;
/// A short last block.
pub const SIZE: u64 = 48 * MIB + 1536;
pub const MACHINE: &str = "alice/machine";
pub const A: &str = "server-a";
pub const B: &str = "server-b";
/// Not a word of it may leave the machine.
pub const SECRET: &str = "the winter accounts of the lighthouse keepers, page ";

pub struct Scene {
    pub site: Site,
    pub client: Client,
    pub disk: PathBuf,
}

impl Scene {
    /// Of a machine that doesn't seal yet.
    pub fn plain() -> Self {
        let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, SIZE).unwrap();
        disk::write_noise(&disk, 5 * MIB..17 * MIB, 1).unwrap();
        disk::write_noise(&disk, SIZE - 512..SIZE, 2).unwrap();
        // As a whole block, across the border of two, and in the short last one.
        write(&disk, 20 * MIB, &secret(4096));
        write(&disk, 21 * MIB + 4000, &secret(200));
        write(&disk, SIZE - 1536, &secret(300));
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        Self { site, client, disk }
    }

    /// Of a machine that seals; returns its recovery key, too.
    pub fn sealed() -> (Self, String) {
        let mut scene = Self::plain();
        scene.client.settings.set("encryption", "client");
        let made: Value = scene.client.answer(&["seal", "init"]).unwrap();
        let recovery = made["recovery_key"].as_str().unwrap().to_owned();
        (scene, recovery)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.site.folder().join(name)
    }

    pub fn key_file(&self) -> PathBuf {
        self.path("pki/machine/seal.key")
    }

    pub fn backup(&self) -> answers::Backup {
        self.client.backup().unwrap()
    }

    pub fn backup_to(&self, server: &str) -> Taken {
        let taken = self.client.backup_and_copy(&self.disk, self.site.folder()).unwrap();
        assert_eq!(taken.server, server);
        taken
    }

    pub fn noise(&self, range: std::ops::Range<u64>, seed: u64) {
        disk::write_noise(&self.disk, range.start * MIB..range.end * MIB, seed).unwrap();
    }

    /// Restores into a new file, compares it, and returns what came of it.
    pub fn assert_restores(&self, what: &str, copy: &Path, more: &[&str]) -> answers::Restore {
        let to = self.path("restored.raw");
        let arguments = [&["restore", what, "--to", text(&to)], more].concat();
        let report = self.client.answer(&arguments).unwrap();
        disk::compare(copy, &to).unwrap();
        fs::remove_file(to).unwrap();
        report
    }

    /// A restore that is refused with all of these words, before anything was written.
    pub fn assert_refused(&self, what: &str, more: &[&str], words: &[&str]) {
        let to = self.path("refused.raw");
        let arguments = [&["restore", what, "--to", text(&to)], more].concat();
        let failure = self.client.failure(&arguments).unwrap();
        println!("{}", failure.error);
        words.iter().for_each(|word| assert!(failure.error.contains(word), "{word}: {failure:?}"));
        let left = fs::read_dir(self.site.folder()).unwrap().map(|one| one.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("refused")).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    pub fn images(&mut self, server: &str) -> PathBuf {
        self.site.server(server).unwrap().images().to_owned()
    }

    pub fn admin(&self, server: &str, arguments: &[&str]) -> Value {
        done(&self.site.admin(server, &[arguments, &["--json"]].concat()).unwrap())
    }
}

pub fn done(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = std::str::from_utf8(&output.stdout).unwrap().trim_end();
    serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("{output:?}"))
}

/// So many bytes of the text.
pub fn secret(len: usize) -> Vec<u8> {
    let pages = (0..).flat_map(|page: u32| format!("{SECRET}{page}\n").into_bytes());
    pages.take(len).collect()
}

pub fn write(disk: &Path, offset: u64, bytes: &[u8]) {
    File::options().write(true).open(disk).unwrap().write_all_at(bytes, offset).unwrap();
}

/// The files below a folder that hold these bytes anywhere.
pub fn files_with(folder: &Path, wanted: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_with(&entry.path(), wanted));
        } else if kind.is_file() && memmem::find(&fs::read(entry.path()).unwrap(), wanted).is_some()
        {
            found.push(entry.path());
        }
    }
    found
}

/// Runs a program that must succeed.
pub fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output.stdout
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < until, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes of the blocks of a disk that aren't zeros.
pub fn data(disk: &Path) -> u64 {
    let bytes = fs::read(disk).unwrap();
    let blocks = bytes.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0));
    blocks.map(|block| block.len() as u64).sum()
}
