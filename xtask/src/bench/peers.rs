//! Other programs on the same image, each with the settings that suit it best: fixed chunks, told to read everything.
//!
//! They write to a local folder, without a network and without TLS, which is easier than what janus does.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{Images, Row, assert_equal};
use crate::{
    disk, measure,
    packages::{self, Tool},
    site::target,
};

const BORG: &str = "borgbackup==1.4.5";
const RUSTIC: &str = "0.11.4";

/// What borg is built with; a path stands for a header.
const BORG_NEEDS: &[Tool] = &[
    Tool { program: "gcc", package: "gcc" },
    Tool { program: "pkg-config", package: "pkg-config" },
    Tool { program: "/usr/include/sys/acl.h", package: "libacl1-dev" },
    Tool { program: "/usr/include/openssl/ssl.h", package: "libssl-dev" },
    Tool { program: "/usr/include/lz4.h", package: "liblz4-dev" },
    Tool { program: "/usr/include/zstd.h", package: "libzstd-dev" },
    Tool { program: "/usr/include/xxhash.h", package: "libxxhash-dev" },
];

/// A program to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Peer {
    /// borg 1.4 from PyPI.
    Borg,
    /// restic, of the system.
    Restic,
    /// rustic from crates.io; building it takes minutes, once.
    Rustic,
}

struct Run<'a> {
    peer: Peer,
    program: PathBuf,
    repository: PathBuf,
    home: PathBuf,
    images: &'a Images,
}

pub(super) fn measure(peer: Peer, images: &Images, work: &Path) -> Result<Vec<Row>> {
    let home = work.join(format!("{peer:?}"));
    std::fs::create_dir_all(&home)?;
    let run =
        Run { peer, program: peer.install()?, repository: home.join("repository"), home, images };
    run.prepare()?;
    let live = run.home.join("disk.img");
    crate::disk::copy(&images.base, &live)?;
    let mut rows =
        vec![run.backup("first backup", "one", &live)?, run.backup("unchanged", "two", &live)?];
    std::fs::remove_file(&live)?;
    crate::disk::copy(&images.changed, &live)?;
    rows.push(run.backup("1 % changed", "three", &live)?);
    rows.push(run.restore("three")?);
    std::fs::remove_dir_all(&run.home)?;
    Ok(rows)
}

impl Peer {
    fn install(self) -> Result<PathBuf> {
        match self {
            Self::Borg => {
                packages::require(BORG_NEEDS)?;
                let python = packages::python("borg", &[BORG])
                    .context("build borg from PyPI (apt-get install python3-dev?)")?;
                Ok(python.with_file_name("borg"))
            }
            Self::Restic => {
                packages::require(&[Tool { program: "restic", package: "restic" }])?;
                Ok("restic".into())
            }
            Self::Rustic => {
                let root = target().join("tools/rustic");
                let program = root.join("bin/rustic");
                if !program.exists() {
                    println!("building rustic {RUSTIC} (once)");
                    let mut cargo = Command::new("cargo");
                    cargo
                        .args([
                            "install",
                            "--quiet",
                            "--locked",
                            "rustic-rs",
                            "--version",
                            RUSTIC,
                            "--root",
                        ])
                        .arg(&root);
                    packages::output(&mut cargo)?;
                }
                Ok(program)
            }
        }
    }
}

impl Run<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir(&self.home).env("HOME", &self.home);
        command.env("BORG_REPO", &self.repository).env("BORG_PASSPHRASE", "bench");
        command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        command.env("RESTIC_REPOSITORY", &self.repository).env("RESTIC_PASSWORD", "bench");
        command.env("RUSTIC_REPOSITORY", &self.repository).env("RUSTIC_PASSWORD", "bench");
        command
    }

    fn prepare(&self) -> Result<()> {
        let mut command = match self.peer {
            Peer::Borg => self.command(&["init", "--encryption", "repokey"]),
            Peer::Restic => self.command(&["init", "--repository-version", "2"]),
            Peer::Rustic => {
                self.command(&["init", "--set-chunker", "fixed_size", "--set-chunk-size", "1MiB"])
            }
        };
        packages::output(&mut command).map(drop)
    }

    fn backup(&self, what: &str, tag: &str, live: &Path) -> Result<Row> {
        let before = disk::allocated_below(&self.repository);
        let mut command = match self.peer {
            Peer::Borg => {
                let mut command =
                    self.command(&["create", "--read-special", "--files-cache=disabled"]);
                command.args([
                    "--chunker-params",
                    "fixed,4194304",
                    "-C",
                    "lz4",
                    &format!("::{tag}"),
                    "disk.img",
                ]);
                command
            }
            Peer::Restic => {
                self.command(&["backup", "--stdin", "--stdin-filename", "disk.img", "--tag", tag])
            }
            Peer::Rustic => self.command(&[
                "backup",
                "--force",
                "--as-path",
                "/disk.img",
                "--tag",
                tag,
                "disk.img",
            ]),
        };
        if self.peer == Peer::Restic {
            command.stdin(File::open(live)?);
        }
        let mut row = self.measured(what, command, None)?;
        row.stored_bytes = Some(disk::allocated_below(&self.repository).saturating_sub(before));
        Ok(row)
    }

    fn restore(&self, tag: &str) -> Result<Row> {
        let out = self.home.join("out");
        std::fs::create_dir_all(&out)?;
        let text = out.to_string_lossy();
        let (command, restored) = match self.peer {
            Peer::Borg => {
                let mut command = self.command(&["extract", "--sparse", &format!("::{tag}")]);
                command.current_dir(&out);
                (command, out.join("disk.img"))
            }
            Peer::Restic => {
                (self.command(&["restore", "latest", "--target", &text]), out.join("disk.img"))
            }
            Peer::Rustic => (
                self.command(&["restore", "latest:/disk.img", &format!("{text}/disk.img")]),
                out.join("disk.img"),
            ),
        };
        // A restore of ours reads from the disk and ends with a sync, too.
        disk::forget(&self.repository)?;
        let row = self.measured("restore, synced", command, Some(&restored))?;
        assert_equal(self.images, &restored, true)?;
        Ok(row)
    }

    fn measured(&self, what: &str, mut command: Command, written: Option<&Path>) -> Result<Row> {
        let log = File::create(self.home.join("log"))?;
        command.stdout(Stdio::null()).stderr(log);
        let started = Instant::now();
        let mut child =
            command.spawn().with_context(|| format!("run {}", self.program.display()))?;
        let (status, used, _) = measure::wait(&mut child, started, Duration::MAX)?;
        let said = std::fs::read_to_string(self.home.join("log")).unwrap_or_default();
        ensure!(status.success(), "{:?} {what}: {status}: {}", self.peer, said.trim());
        if let Some(path) = written {
            let synced = File::open(path).and_then(|file| file.sync_all());
            synced.with_context(|| {
                format!("{:?} restored nothing to {}", self.peer, path.display())
            })?;
        }
        let took = started.elapsed();
        let name = format!("{:?}", self.peer).to_lowercase();
        let mut row = self.images.row(&name, what, took.as_secs_f64());
        row.cpu_seconds_per_gib.push((name.clone(), used.cpu_seconds / self.images.gib()));
        row.peak_rss_mib.push((name, used.peak_rss_bytes >> 20));
        Ok(row)
    }
}
