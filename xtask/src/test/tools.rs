//! Tools from package registries, in `target/tools`, with pinned versions.

use std::process::Command;

use anyhow::Result;

use crate::{packages, site::target};

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
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout).trim());
    Ok(())
}
