//! Damage in a server's store: it is never built on once it was seen, never spreads, what is whole stays usable, and the
//! next backup heals the newest snapshot.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod faults;
mod healing;
mod scene;

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
};

use self::scene::{Damaged, MIB, SERVER, flip};

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
fn what_a_restore_finds_is_sent_again() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| {
        // The entry of some block in the allocation table, which lies at 3 MiB: past the end of the file.
        let image = OpenOptions::new().write(true).open(&here.files("disk", "vhdx")[0]).unwrap();
        image.write_all_at(&(1u64 << 40 | 6).to_le_bytes(), (3 << 20) + 5 * 8).unwrap();
    });
    let to = damaged.site.folder().join("restored");
    let failure =
        damaged.client.failure(&["restore", "disk", "--to", &to.to_string_lossy()]).unwrap();
    assert_eq!(failure.reason.as_deref(), Some("STORE_DAMAGED"));
    let payload = 10 * MIB..12 * MIB;
    assert!(failure.lost.iter().all(|lost| payload.contains(&lost.offset)), "{failure:?}");
    // It is remembered.
    damaged.while_stopped(|_| ());
    damaged.change();
    let taken = damaged.backup();
    assert_eq!(taken.kind, "delta", "its blocks are sent again");
    assert!(taken.sent_bytes >= failure.lost.iter().map(|lost| lost.bytes).sum(), "{taken:?}");
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
