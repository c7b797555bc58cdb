//! A volume that Windows made, with its journal: taken while it was in use.

use std::{
    fs,
    os::unix::fs::FileExt,
    process::{Command, Stdio},
};

use janus_client::{
    fs::{FsError, ntfs},
    journal::{Distrust, Journal, ntfs_usn::NtfsUsn},
};
use xtask::packages::{self, Archive};

/// Test data of dissect.ntfs: a sparse image of 1 GiB, packed.
const ARCHIVE: Archive = Archive {
    requirement: "dissect.ntfs==3.16",
    file: "dissect_ntfs-3.16.tar.gz",
    sha256: "ce93136796aa9471f3aa28855b4b3c3e8132f9f97bc17a2f5494e0a660c190dd",
};
const MEMBER: &str = "dissect_ntfs-3.16/tests/_data/ntfs-cloud.bin.gz";

#[test]
fn a_volume_of_windows_is_read_and_believed_only_at_rest() {
    let archive = packages::pypi_source(&ARCHIVE).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let unpack = "tar -xzOf \"$0\" \"$1\" | gunzip -c | cp --sparse=always /dev/stdin \"$2\"";
    let mut shell = Command::new("bash");
    shell.args(["-e", "-o", "pipefail", "-c", unpack]).arg(&archive).arg(MEMBER).arg(&path);
    assert!(shell.status().unwrap().success());
    let volume = fs::File::options().read(true).write(true).open(&path).unwrap();
    let in_use = NtfsUsn::new(&volume).changes(None);
    assert!(matches!(in_use.changes, Err(Distrust::NotAtRest { .. })), "{:?}", in_use.changes);
    assert!(in_use.next.is_none());
    assert!(matches!(ntfs::free(&volume), Err(FsError::NotClean { .. })));

    // As a clean shutdown would have left the log: both restart pages carry the flag.
    for page in [0x14a8_8000, 0x14a8_9000] {
        let mut magic = [0; 4];
        volume.read_exact_at(&mut magic, page).unwrap();
        assert_eq!(&magic, b"RSTR");
        volume.write_all_at(&2u16.to_le_bytes(), page + 48 + 14).unwrap();
    }
    let free = ntfs::free(&volume).unwrap();
    let told = Command::new("ntfsinfo").arg("-mf").arg(&path).stderr(Stdio::null()).output();
    let told = String::from_utf8(told.unwrap().stdout).unwrap();
    let clusters = told.lines().find_map(|line| line.trim().strip_prefix("Free Clusters: "));
    let clusters: u64 = clusters.unwrap().split(' ').next().unwrap().parse().unwrap();
    assert_eq!(free.total(), clusters * 4096);
    let first = NtfsUsn::new(&volume).changes(None);
    assert_eq!(first.changes, Err(Distrust::NoCursor));
    let cursor = first.next.unwrap();
    let head = String::from_utf8_lossy(&cursor[4..]).into_owned();
    // tracking.log was overwritten and not closed.
    for known in
        ["\"journal\":134012053753022912,", "\"next_usn\":21376,", "\"open\":[844424930132011]"]
    {
        assert!(head.contains(known), "{known}: {head}");
    }
    let changes = NtfsUsn::new(&volume).changes(Some(&cursor)).changes.unwrap();
    assert_eq!(changes.free, free);
    let read = changes.changed.total();
    assert!(read < 12 << 20, "{read} bytes of structures and open files are read");
}
