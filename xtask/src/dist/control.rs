//! What dpkg has to know of a package: control file, settings that it must keep, scripts.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{Package, output, write};
use crate::site::workspace;

/// Writes the folder `DEBIAN`.
pub(super) fn write_all(
    package: &Package,
    root: &Path,
    version: &str,
    architecture: &str,
) -> Result<()> {
    let folder = root.join("DEBIAN");
    let control = control(package, version, architecture, size_kib(root)?)?;
    write(&folder.join("control"), &control, 0o644)?;
    write(&folder.join("conffiles"), &format!("{}\n", package.settings.1), 0o644)?;
    for script in ["postinst", "prerm", "postrm"] {
        let text = fs::read_to_string(workspace().join("packaging/debian").join(script))?;
        write(&folder.join(script), &filled(package, &text), 0o755)?;
    }
    Ok(())
}

fn control(package: &Package, version: &str, architecture: &str, kib: u64) -> Result<String> {
    let Package { name, summary, description, user, suggests, .. } = package;
    // The programs were linked with the C library of this machine: an older one may lack what they use.
    let libc = output("dpkg-query", &["-W", "-f", "${Version}", "libc6"])?;
    let libc = libc.split('-').next().context("libc6 without a version")?.to_owned();
    let adduser = if user.0.is_empty() { "" } else { ", adduser" };
    let suggests =
        if suggests.is_empty() { String::new() } else { format!("Suggests: {suggests}\n") };
    Ok(format!(
        "Package: {name}
Version: {version}
Architecture: {architecture}
Maintainer: Janus Backup <{repository}>
Installed-Size: {kib}
Depends: libc6 (>= {libc}), libgcc-s1{adduser}
{suggests}Section: admin
Priority: optional
Homepage: {repository}
Description: {summary}
 {description}
",
        repository = env!("CARGO_PKG_REPOSITORY"),
    ))
}

/// A script with the package's own words.
fn filled(package: &Package, script: &str) -> String {
    script
        .replace("@NAME@", package.name)
        .replace("@USER@", package.user.0)
        .replace("@HOME@", package.user.1)
        .replace("@UNITS@", &package.units.join(" "))
        .replace("@RESTARTS@", package.restarts)
        .replace("@CACHE@", package.cache)
}

fn size_kib(folder: &Path) -> Result<u64> {
    let mut kib = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        kib +=
            if path.is_dir() { size_kib(&path)? } else { entry.metadata()?.len().div_ceil(1024) };
    }
    Ok(kib)
}
