//! Damage in a server's store: it is never built on once it was seen, never spreads, and what is whole stays usable.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use xtask::{
    disk,
    site::{Client, Plan, Programs, Site, answers},
};

const MIB: u64 = 1 << 20;
const SERVER: &str = "server-a";

/// A site with one server, whose store is to be damaged.
struct Damaged {
    site: Site,
    client: Client,
    disk: PathBuf,
    /// Copies of the disk, one for each backup.
    copies: Vec<(String, PathBuf)>,
}

impl Damaged {
    /// Two backups: a base and a delta.
    fn new() -> Self {
        let plan = Plan { servers: vec![SERVER.into()], ..Plan::default() };
        let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
        let disk = site.folder().join("disk.raw");
        disk::blank(&disk, 32 * MIB).unwrap();
        disk::write_noise(&disk, 0..32 * MIB, 1).unwrap();
        let client = site.client("machine", &[format!("disk={}", disk.display())]).unwrap();
        site.await_ready(&client).unwrap();
        let mut damaged = Self { site, client, disk, copies: Vec::new() };
        assert_eq!(damaged.backup().kind, "full");
        damaged.change();
        assert_eq!(damaged.backup().kind, "delta");
        damaged
    }

    fn change(&self) {
        disk::change(&self.disk, MIB, self.copies.len() as u64).unwrap();
    }

    fn backup(&mut self) -> answers::Disk {
        let taken = self.client.backup().unwrap().disks[0].clone();
        let copy = self.site.folder().join(format!("copy-{}", self.copies.len()));
        disk::copy(&self.disk, &copy).unwrap();
        self.copies.push((taken.snapshot_id.clone(), copy));
        taken
    }

    /// Restores a backup, counted from 0, and compares it.
    fn assert_restores(&self, backup: usize) {
        let (snapshot, copy) = &self.copies[backup];
        let to = self.site.folder().join("restored");
        self.client.restore(snapshot, &to).unwrap();
        disk::compare(copy, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    fn folder(&self) -> PathBuf {
        self.site.folder().join(SERVER).join("alice/machine")
    }

    /// The files of this kind in a folder of the machine, oldest first.
    fn files(&self, folder: &str, extension: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder().join(folder)).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|found| found == extension));
        files.sort();
        files
    }

    /// Does something to files of the stopped server.
    fn while_stopped(&mut self, work: impl FnOnce(&Self)) {
        self.site.stop_server(SERVER).unwrap();
        work(self);
        self.site.start_server(SERVER).unwrap();
        self.site.await_ready(&self.client).unwrap();
    }

    fn listed(&self) -> usize {
        self.client.list().unwrap().snapshots.len()
    }
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_changed_byte_in_an_image_does_not_get_into_a_new_base() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| flip(&here.files("disk", "vhdx")[0], 20_000_000));
    let file = OpenOptions::new().write(true).open(&damaged.disk).unwrap();
    file.set_len(33 * MIB).unwrap();
    let taken = damaged.backup();
    assert_eq!(taken.kind, "full", "{taken:?}");
    damaged.assert_restores(2);
}

#[test]
fn a_cut_image_is_not_built_on() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| {
        let image = OpenOptions::new().write(true).open(&here.files("disk", "vhdx")[1]).unwrap();
        image.set_len(5_000_000).unwrap();
    });
    damaged.change();
    assert_eq!(damaged.backup().kind, "full");
    damaged.assert_restores(2);
    damaged.assert_restores(0);
    damaged.change();
    assert_eq!(damaged.backup().kind, "delta");
    damaged.assert_restores(3);
}

#[test]
fn a_changed_byte_in_a_table_ends_in_a_new_base() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| {
        let table = &here.files("disk", "table")[0];
        flip(table, fs::metadata(table).unwrap().len() / 2);
    });
    damaged.change();
    assert_eq!(damaged.backup().kind, "full");
    damaged.assert_restores(2);
}

#[test]
fn what_a_restore_finds_is_not_built_on() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| {
        // The entry of some block in the allocation table, which lies at 3 MiB: past the end of the file.
        let image = OpenOptions::new().write(true).open(&here.files("disk", "vhdx")[0]).unwrap();
        image.write_all_at(&(1u64 << 40 | 6).to_le_bytes(), (3 << 20) + 5 * 8).unwrap();
    });
    let to = damaged.site.folder().join("restored");
    let failure = damaged.client.failure(&["restore", "disk", "--to", &to.to_string_lossy()]);
    assert_eq!(failure.unwrap().reason.as_deref(), Some("STORE_DAMAGED"));
    damaged.change();
    assert_eq!(damaged.backup().kind, "full");
    damaged.assert_restores(2);
}

#[test]
fn a_machines_file_is_made_again_from_its_runs() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| flip(&here.folder().join(".machine.json"), 40));
    assert_eq!(damaged.listed(), 2);
    damaged.while_stopped(|here| fs::remove_file(here.folder().join(".machine.json")).unwrap());
    damaged.while_stopped(|here| flip(&here.site.folder().join(SERVER).join(".store.json"), 40));
    damaged.change();
    assert_eq!(damaged.backup().kind, "delta");
    (0..3).for_each(|backup| damaged.assert_restores(backup));
}

#[test]
fn a_damaged_manifest_costs_no_file_and_can_be_brought_back() {
    let mut damaged = Damaged::new();
    let manifest = damaged.files(".runs", "json")[1].clone();
    let whole = fs::read(&manifest).unwrap();
    damaged.while_stopped(|_| flip(&manifest, 300));
    assert_eq!(damaged.listed(), 1);
    damaged.change();
    damaged.backup();
    damaged.assert_restores(0);
    damaged.assert_restores(2);
    assert!(!manifest.exists(), "its number is not used again");
    damaged.while_stopped(|here| {
        assert_eq!(here.files(".runs", "damaged").len(), 1);
        fs::write(&manifest, whole).unwrap();
    });
    assert_eq!(damaged.listed(), 3);
    (0..3).for_each(|backup| damaged.assert_restores(backup));
}
