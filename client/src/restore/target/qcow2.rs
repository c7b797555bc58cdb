//! A qcow2 of what was restored, made by `qemu-img`.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{TargetError, io_error};

const PROGRAM: &str = "qemu-img";

/// Looks whether the program is there, before a disk is restored for nothing.
pub(super) fn check(target: &Path) -> Result<(), TargetError> {
    let mut asked = Command::new(PROGRAM);
    asked.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match asked.status() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(failed(
            target,
            "a qcow2 is made by qemu-img, which is not installed: it is in the package qemu-utils; or restore a raw disk, VHD or VHDX",
        )),
        Err(error) => Err(failed(target, format!("{PROGRAM} can't be started: {error}"))),
    }
}

/// Makes a qcow2 of a raw disk, beside it; returns its path. It is synced.
pub(super) fn convert(raw: &Path, target: &Path) -> Result<PathBuf, TargetError> {
    let mut made = raw.as_os_str().to_owned();
    made.push(".qcow2");
    let made = PathBuf::from(made);
    let mut command = Command::new(PROGRAM);
    command.args(["convert", "-q", "-f", "raw", "-O", "qcow2", "--"]).arg(raw).arg(&made);
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(target, format!("{PROGRAM}: {error}")))?;
    if !output.status.success() {
        let _ = fs::remove_file(&made);
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().lines().next_back().unwrap_or("it ended without a word").to_owned();
        return Err(failed(target, format!("{PROGRAM} convert: {said}")));
    }
    let synced = File::open(&made).and_then(|file| file.sync_all());
    synced.map_err(|source| io_error(target, "completed", source))?;
    Ok(made)
}

fn failed(target: &Path, reason: impl Into<String>) -> TargetError {
    TargetError::Qcow2 { path: target.into(), reason: reason.into() }
}
