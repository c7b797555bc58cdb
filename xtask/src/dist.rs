//! `cargo xtask dist`: Debian packages of client, server and janus, in `target/dist`; with `--static` the client as one file.
//!
//! A package is a staged folder that `dpkg-deb` packs. What is in it comes from the built programs (binary, man pages,
//! completions, the client's units) and from `packaging/debian`. Times are those of the commit, so that the same tree gives
//! the same packages.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    packages::{self, Tool},
    site::{Profile, Programs, target, workspace},
};

mod alone;
mod control;
pub mod root;
mod stage;

/// Programs that packing needs.
pub const TOOLS: &[Tool] = &[
    Tool { program: "dpkg-deb", package: "dpkg" },
    Tool { program: "strip", package: "binutils" },
    Tool { program: "gzip", package: "gzip" },
];

/// Arguments of `cargo xtask dist`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pack debug builds, fast: for tests
    #[arg(long)]
    debug: bool,
    /// Make the client as one file without libraries instead, for live systems
    #[arg(long = "static", conflicts_with = "debug")]
    alone: bool,
    /// Folder for the packages; default: target/dist
    #[arg(long)]
    out: Option<PathBuf>,
    /// What is added to the version, such as +1
    #[arg(long, default_value = "")]
    suffix: String,
}

/// A package.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// Its name, and that of its program.
    pub name: &'static str,
    summary: &'static str,
    description: &'static str,
    /// Example settings in the tree, and what they are installed as.
    settings: (&'static str, &'static str),
    /// System user and its folder; empty: root.
    user: (&'static str, &'static str),
    /// Units that are stopped when it is removed.
    units: &'static [&'static str],
    /// Unit that an upgrade restarts.
    restarts: &'static str,
    /// Folder that a purge removes.
    cache: &'static str,
    suggests: &'static str,
}

/// All packages.
pub const PACKAGES: [Package; 3] = [
    Package {
        name: "janus-client",
        summary: "block-level backups of whole disks: client",
        description: "Backs disks up through janus to alternating servers, and brings them back.\n Enable it with: janus-client service install --config /etc/janus/client.toml",
        settings: ("client/client.example.toml", "/etc/janus/client.toml"),
        user: ("", ""),
        units: &["janus-client.timer", "janus-client.service"],
        restarts: "",
        cache: "/var/cache/janus-client",
        suggests: "lvm2, qemu-utils, zfsutils-linux",
    },
    Package {
        name: "janus-server",
        summary: "block-level backups of whole disks: server",
        description: "Keeps backups as chains of standard virtual disks (VHDX or VHD).\n Enable it with: systemctl enable --now janus-server",
        settings: ("server/server.example.toml", "/etc/janus/server.toml"),
        user: ("janus-server", "/var/lib/janus"),
        units: &["janus-server.service"],
        restarts: "janus-server.service",
        cache: "",
        suggests: "p7zip-full",
    },
    Package {
        name: "janus",
        summary: "block-level backups of whole disks: router",
        description: "Sends each backup to the server that its machine used longest ago.\n Enable it with: systemctl enable --now janus",
        settings: ("janus/janus.example.toml", "/etc/janus/janus.toml"),
        user: ("janus-router", "/var/lib/janus-router"),
        units: &["janus.service"],
        restarts: "janus.service",
        cache: "",
        suggests: "",
    },
];

/// How packages are made.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The programs.
    pub programs: Programs,
    /// Where packages go.
    pub out: PathBuf,
    /// What is added to the version.
    pub suffix: String,
    /// Packs for size, not for speed.
    pub small: bool,
}

/// Builds the programs, packs them and says where the packages are.
///
/// # Errors
/// When a build or a program fails.
pub fn run(args: &Args) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| target().join("dist"));
    if args.alone {
        packages::require(TOOLS)?;
        println!("{}", alone::build(&out, &args.suffix)?.display());
        return Ok(());
    }
    let profile = if args.debug { Profile::Dev } else { Profile::Release };
    let plan = Plan {
        programs: Programs::build(profile)?,
        out,
        suffix: args.suffix.clone(),
        small: !args.debug,
    };
    for package in &PACKAGES {
        println!("{}", pack(&plan, package)?.display());
    }
    Ok(())
}

/// Makes one package; returns its path.
///
/// # Errors
/// When a program fails.
pub fn pack(plan: &Plan, package: &Package) -> Result<PathBuf> {
    packages::require(TOOLS)?;
    fs::create_dir_all(&plan.out)?;
    let staged = tempfile::tempdir_in(&plan.out)?;
    let root = staged.path().join(package.name);
    stage::stage(plan, package, &root)?;
    let version = version(plan);
    let architecture = output("dpkg", &["--print-architecture"])?;
    control::write_all(package, &root, &version, &architecture)?;
    let path = plan.out.join(format!("{}_{version}_{architecture}.deb", package.name));
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.env("SOURCE_DATE_EPOCH", commit_time()).args(["--root-owner-group"]);
    dpkg.args(if plan.small { ["-Zxz", "-z6"] } else { ["-Zgzip", "-z1"] });
    packages::output(dpkg.arg("--build").arg(&root).arg(&path)).context("pack")?;
    Ok(path)
}

fn version(plan: &Plan) -> String {
    format!("{}{}", env!("CARGO_PKG_VERSION"), plan.suffix)
}

/// Seconds of the commit; 0 outside a repository.
fn commit_time() -> String {
    let mut git = Command::new("git");
    let time = packages::output(git.args(["log", "-1", "--format=%ct"]).current_dir(workspace()));
    time.map_or_else(|_| "0".into(), |time| time.trim().to_owned())
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    Ok(packages::output(Command::new(program).args(arguments))?.trim().to_owned())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = path.parent().context("a path without a folder")?;
    fs::create_dir_all(folder)?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, PermissionsExt::from_mode(mode))?;
    Ok(())
}
