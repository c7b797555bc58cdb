//! Programs that have nothing to do with this one, and read its images: 7-Zip, libvhdi in a virtual environment of Python, and
//! the crate vhdx-core.
//!
//! A tool that is missing fails the test with the command that installs it.

#![allow(dead_code)] // Each test file uses its own part.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use janus_server::image::Format;
use vhdx::VhdxReader;
use xtask::packages;

pub fn assert_same(actual: &[u8], expected: &[u8], what: &str) {
    let difference = actual.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(difference, None, "{what}: first byte that differs");
    assert_eq!(actual.len(), expected.len(), "{what}: size");
}

pub fn run(command: &mut Command, install: &str) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; to install it: {install}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    output
}

pub fn seven_zip(leaf: &Path) -> Command {
    let mut command = Command::new("7z");
    // Without the type 7-Zip opens the file system inside.
    let format = Format::of_name(&leaf.to_string_lossy()).unwrap();
    command.args(["x", "-y", "-so"]).arg(format!("-t{}", format.extension().to_uppercase()));
    command.arg("--").arg(leaf);
    command
}

pub const INSTALL_7Z: &str = "apt-get install p7zip-full (7-Zip 22 or newer)";

pub fn libvhdi(files: &[PathBuf], ranges: &str) -> Vec<u8> {
    packages::libvhdi(files, ranges).unwrap()
}

/// What the crate vhdx-core makes of a chain of VHDXs (oldest first) with these sectors. It takes parents as they are given.
pub fn vhdx_core(files: &[PathBuf], sector_bytes: u32) -> Vec<u8> {
    let mut reader = VhdxReader::open(&files[0]).unwrap();
    for path in &files[1..] {
        reader = VhdxReader::from_bytes_with_parent(fs::read(path).unwrap(), reader).unwrap();
    }
    assert_eq!(reader.logical_sector_size(), sector_bytes);
    let mut disk = Vec::new();
    reader.read_to_end(&mut disk).unwrap();
    disk
}
