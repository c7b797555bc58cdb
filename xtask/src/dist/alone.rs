//! `cargo xtask dist --static`: the client as one file that needs no library of the system it runs on, for live systems in which a
//! machine is brought back.
//!
//! With Rust's musl target it is built for that. Without it, glibc itself is linked in, which resolves names by `/etc/hosts` and
//! DNS only: all that a live system has.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::output;
use crate::{
    packages,
    site::{target, workspace},
};

/// Builds it into `out`; returns its path.
///
/// # Errors
/// When the build fails, or its result needs a library.
pub fn build(out: &Path, suffix: &str) -> Result<PathBuf> {
    let architecture = std::env::consts::ARCH;
    let (musl, gnu) =
        (format!("{architecture}-unknown-linux-musl"), format!("{architecture}-unknown-linux-gnu"));
    let folder = output("rustc", &["--print", "target-libdir", "--target", &musl])?;
    let (triple, flags) = match Path::new(&folder).is_dir() {
        true => (musl, ""),
        false => {
            println!(
                "Rust's target {musl} is not installed (rustup target add {musl}): linking glibc in instead"
            );
            (gnu, "-C target-feature=+crt-static")
        }
    };
    // A folder of its own: other flags would build everything else anew.
    let building = target().join("static");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(workspace()).env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", &building);
    cargo.args(["build", "--release", "--locked", "-p", "janus-client", "--bin", "janus-client"]);
    let done = cargo.args(["--target", &triple]).status().context("start cargo")?;
    ensure!(done.success(), "the build failed");
    let built = building.join(triple).join("release/janus-client");
    fs::create_dir_all(out)?;
    let version = env!("CARGO_PKG_VERSION");
    let path = out.join(format!("janus-client-static-{version}{suffix}-{architecture}"));
    packages::output(Command::new("strip").arg("-o").arg(&path).arg(&built))?;
    check(&path)?;
    Ok(path)
}

/// It runs, and names no library.
fn check(path: &Path) -> Result<()> {
    let needed = packages::output(Command::new("readelf").arg("-dl").arg(path))?;
    for word in ["(NEEDED)", "INTERP"] {
        ensure!(!needed.contains(word), "{} is not static: it has {word}", path.display());
    }
    packages::output(Command::new(path).arg("--version").env_clear()).map(drop)
}
