//! A fresh Debian to install packages in: made once by debootstrap, then unpacked from an archive.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    packages::{self, Tool},
    site::target,
};

const TOOLS: &[Tool] = &[
    Tool { program: "debootstrap", package: "debootstrap" },
    Tool { program: "chroot", package: "coreutils" },
];
const MIRROR: &str = "http://deb.debian.org/debian";

/// The root of a fresh Debian of this machine's release, whose C library the programs need. Gone when dropped.
#[derive(Debug)]
pub struct Root(tempfile::TempDir);

impl Root {
    /// Unpacks it. Needs root.
    ///
    /// # Errors
    /// When it can't be made: the first time the network is needed.
    pub fn unpack() -> Result<Self> {
        packages::require(TOOLS)?;
        let archive = archive(&release()?)?;
        let root = tempfile::tempdir_in(target())?;
        packages::output(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(root.path()))?;
        Ok(Self(root))
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs a program in it; what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let mut chroot = packages::command("chroot");
        chroot.arg(self.path()).args(words);
        chroot.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        packages::output(chroot.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"))
    }

    /// Installs a package, or upgrades it.
    ///
    /// # Errors
    /// When dpkg refuses.
    pub fn install(&self, package: &Path) -> Result<String> {
        let name = package.file_name().context("a package without a name")?;
        fs::copy(package, self.path().join("tmp").join(name))?;
        self.run(&["dpkg", "--install", &format!("/tmp/{}", name.to_string_lossy())])
    }
}

/// Debian's name of this machine's release.
fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release names no Debian release")?.trim_matches('"').to_owned())
}

/// Made under another name first, so that half of one is never used.
fn archive(release: &str) -> Result<PathBuf> {
    let folder = target().join("roots");
    let archive = folder.join(format!("{release}.tar"));
    if archive.exists() {
        return Ok(archive);
    }
    fs::create_dir_all(&folder)?;
    let made = tempfile::tempdir_in(&folder)?;
    let root = made.path().join(release);
    let mut debootstrap = packages::command("debootstrap");
    debootstrap.args(["--variant=minbase", release]).arg(&root).arg(MIRROR);
    packages::output(&mut debootstrap).context("make a fresh Debian")?;
    let new = archive.with_extension("new");
    let leave_out = ["--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*"];
    let mut tar = Command::new("tar");
    packages::output(tar.args(leave_out).arg("-cf").arg(&new).arg("-C").arg(&root).arg("."))?;
    fs::rename(new, &archive)?;
    Ok(archive)
}
