//! What a package installs, as a folder.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{Package, Plan, write};
use crate::{packages, site::workspace};

const UNITS: &str = "usr/lib/systemd/system";

/// Stages all of it.
pub(super) fn stage(plan: &Plan, package: &Package, root: &Path) -> Result<()> {
    let built = plan.programs.folder().join(package.name);
    let program = root.join("usr/bin").join(package.name);
    write(&program, "", 0o755)?;
    packages::output(Command::new("strip").arg("-o").arg(&program).arg(&built))?;
    let (example, installed) = package.settings;
    let settings = root.join(installed.trim_start_matches('/'));
    write(&settings, &fs::read_to_string(workspace().join(example))?, 0o644)?;
    units(package, &built, root, &settings)?;
    completions(package, &built, root)?;
    manual(&built, root)?;
    documents(package, root)
}

/// The client makes its own; the others' are files.
fn units(package: &Package, built: &Path, root: &Path, settings: &Path) -> Result<()> {
    let folder = root.join(UNITS);
    if package.name == "janus-client" {
        let mut client = Command::new(built);
        client.args(["service", "install", "--root", "/", "--print", "--json", "--config"]);
        let units: serde_json::Value =
            serde_json::from_str(&packages::output(client.arg(settings))?)?;
        let staged = settings.display().to_string();
        for (name, text) in units["units"].as_object().context("no units")? {
            let text = text.as_str().unwrap_or_default().replace(&staged, package.settings.1);
            write(&folder.join(name), &text, 0o644)?;
        }
        let hook = fs::read_to_string(workspace().join("packaging/hooks/qemu-freeze"))?;
        return write(&root.join("usr/lib/janus-client/qemu-freeze"), &hook, 0o755);
    }
    for unit in package.units {
        let text = fs::read_to_string(workspace().join("packaging/debian").join(unit))?;
        write(&folder.join(unit), &text, 0o644)?;
    }
    Ok(())
}

fn completions(package: &Package, built: &Path, root: &Path) -> Result<()> {
    let name = package.name;
    let places = [
        ("bash", format!("usr/share/bash-completion/completions/{name}")),
        ("zsh", format!("usr/share/zsh/vendor-completions/_{name}")),
        ("fish", format!("usr/share/fish/vendor_completions.d/{name}.fish")),
    ];
    for (shell, place) in places {
        let text = packages::output(Command::new(built).args(["completions", shell]))?;
        write(&root.join(place), &text, 0o644)?;
    }
    Ok(())
}

fn manual(built: &Path, root: &Path) -> Result<()> {
    let folder = root.join("usr/share/man/man1");
    packages::output(Command::new(built).arg("manual").arg(&folder))?;
    let pages = fs::read_dir(&folder)?.map(|page| Ok(page?.path()));
    compress(&pages.collect::<Result<Vec<_>>>()?)
}

fn documents(package: &Package, root: &Path) -> Result<()> {
    let folder = root.join("usr/share/doc").join(package.name);
    let read = |name: &str| fs::read_to_string(workspace().join(name));
    let copyright = format!(
        "Janus Backup is licensed under either of the Apache License 2.0 or the MIT license, as you like.\n\nOn Debian systems the Apache License is in /usr/share/common-licenses/Apache-2.0.\n\n{}",
        read("LICENSE-MIT")?
    );
    write(&folder.join("copyright"), &copyright, 0o644)?;
    write(&folder.join("README.md"), &read("README.md")?, 0o644)?;
    write(&folder.join("changelog"), &read("CHANGELOG.md")?, 0o644)?;
    compress(&["README.md", "changelog"].map(|name| folder.join(name)))
}

/// Without names and times, so that the same text gives the same file.
fn compress(paths: &[PathBuf]) -> Result<()> {
    packages::output(Command::new("gzip").args(["-9", "-n", "-f"]).args(paths)).map(drop)
}
