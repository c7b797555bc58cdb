//! What is found is told, lost alone, and healed.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

use xtask::site::answers;

use super::scene::{Damaged, MIB, SERVER, flip};

/// Bytes of a file.
fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Where the data of a base's first slots lies: this byte of the disk is at 4 MiB more.
const DATA: u64 = 4 * MIB;

#[test]
fn one_changed_byte_costs_one_block_of_a_restore_and_nothing_after_the_next_backup() {
    let mut damaged = Damaged::new();
    damaged.while_stopped(|here| flip(&here.files("disk", "vhdx")[0], 20_000_000));
    damaged.scrub();
    let snapshots = damaged.client.list().unwrap().snapshots;
    assert!(snapshots.iter().any(|one| one.damaged_blocks == 1), "{snapshots:?}");
    let text = damaged.client.run(&["list"]).unwrap().stdout;
    assert!(text.contains("DAMAGED: 4.0 KiB lost"), "{text}");
    let status = damaged.client.status().unwrap();
    assert_eq!(status.servers[0].damaged[0].machine, "alice/machine");

    let (to, map) = (damaged.site.folder().join("restored"), damaged.site.folder().join("map"));
    let (to_text, map_text) = (to.to_string_lossy(), map.to_string_lossy());
    let base = damaged.copies[0].0.clone();
    let failure = damaged.client.failure(&["restore", &base, "--to", &to_text]).unwrap();
    let [lost] = &failure.lost[..] else { panic!("{failure:?}") };
    assert_eq!((failure.exit_code, lost.bytes), (1, 4096));
    assert!(!to.exists());
    let arguments = ["restore", &base, "--to", &to_text, "--partial", &map_text];
    let restored: answers::Restore = damaged.client.answer(&arguments).unwrap();
    assert_eq!(restored.lost, std::slice::from_ref(lost));
    let block = lost.offset as usize..lost.offset as usize + 4096;
    let mut expected = read(&damaged.copies[0].1);
    expected[block].fill(0);
    assert!(read(&to) == expected, "all but one block");
    fs::remove_file(&to).unwrap();
    let line = format!("0x{:08X}  0x00001000  -", lost.offset);
    assert!(fs::read_to_string(&map).unwrap().contains(&line), "{line}");

    damaged.change();
    assert_eq!(damaged.backup().kind, "delta");
    damaged.assert_restores(2);
    damaged.scrub();
    let snapshots = damaged.client.list().unwrap().snapshots;
    assert_eq!(snapshots[0].damaged_blocks, 0, "{snapshots:?}");
    assert!(!damaged.client.status().unwrap().servers[0].damaged[0].newest);
}

/// What is done to the stopped store, with its name.
type Harm = (&'static str, fn(&Damaged));

fn newest(here: &Damaged, extension: &str) -> std::path::PathBuf {
    here.files("disk", extension).pop().unwrap()
}

fn flip_every(path: &Path, from: u64, to: u64, step: u64) {
    (from..to).step_by(step as usize).for_each(|at| flip(path, at));
}

const HARMS: &[Harm] = &[
    ("data of a base", |here| flip(&here.files("disk", "vhdx")[0], DATA + 7 * MIB + 9)),
    ("much data of a base", |here| {
        let file = OpenOptions::new().write(true).open(&here.files("disk", "vhdx")[0]).unwrap();
        file.write_all_at(&vec![0; 3 << 20], DATA + 9 * MIB + 512).unwrap();
    }),
    ("data of the newest delta", |here| {
        let image = newest(here, "vhdx");
        let data = first_data(&image, 5 * MIB);
        flip(&image, data);
    }),
    ("allocation table of a base", |here| {
        flip(&here.files("disk", "vhdx")[0], 3 * MIB + 4 * 8 + 2);
    }),
    ("allocation table of the newest delta", |here| {
        flip_every(&newest(here, "vhdx"), 3 * MIB, 3 * MIB + 16 * 8, 8);
    }),
    ("sector bitmaps of the newest delta", |here| {
        let image = newest(here, "vhdx");
        let end = fs::metadata(&image).unwrap().len();
        flip_every(&image, end - MIB, end - MIB + 8192, 64);
    }),
    ("a page of a table", |here| {
        let table = newest(here, "table");
        flip(&table, 200);
    }),
    ("the header of a table", |here| flip(&newest(here, "table"), 20)),
    ("the index of a table", |here| {
        let table = newest(here, "table");
        let end = fs::metadata(&table).unwrap().len();
        flip(&table, end - 3);
    }),
    ("both headers of an image", |here| {
        let image = newest(here, "vhdx");
        flip(&image, (64 << 10) + 30);
        flip(&image, (128 << 10) + 30);
    }),
    ("metadata of an image", |here| flip_every(&newest(here, "vhdx"), 2 * MIB, 2 * MIB + 512, 16)),
    ("a whole image", |here| fs::remove_file(newest(here, "vhdx")).unwrap()),
    ("a whole table", |here| fs::remove_file(newest(here, "table")).unwrap()),
    ("a manifest", |here| {
        let manifest = here.files(".runs", "json").pop().unwrap();
        fs::remove_file(manifest).unwrap();
    }),
];

/// First byte that isn't zero from `from` on.
fn first_data(path: &Path, from: u64) -> u64 {
    let (file, mut page) = (File::open(path).unwrap(), [0; 4096]);
    for at in (from..file.metadata().unwrap().len()).step_by(4096) {
        file.read_exact_at(&mut page, at).unwrap();
        if let Some(index) = page.iter().position(|byte| *byte != 0) {
            return at + index as u64;
        }
    }
    panic!("no data in {}", path.display())
}

#[test]
fn verify_tells_what_it_read_and_ends_with_1_when_anything_is_lost() {
    let mut damaged = Damaged::new();
    let whole = damaged.verify(&[], 0);
    assert_eq!((&whole["damaged_snapshots"], &whole["ok"]), (&0.into(), &true.into()));
    assert!(whole["read_bytes"].as_u64().unwrap() >= 32 * MIB, "{whole}");
    assert_eq!(whole["images"].as_array().unwrap().len(), 2, "each once: {whole}");
    assert!(damaged.client.list().unwrap().snapshots.iter().all(|one| one.verified_ms > 0));
    damaged.while_stopped(|here| {
        let image = newest(here, "vhdx");
        let data = first_data(&image, 5 * MIB);
        flip(&image, data);
        // Without a server the command does it itself.
        let found = here.verify(&["alice/machine/disk"], 1);
        assert_eq!(found["damaged_snapshots"], 1, "{found}");
        assert_eq!(found["images"][1]["damaged"][0]["block_count"], 1, "{found}");
    });
    let (base, delta) = (damaged.copies[0].0.clone(), damaged.copies[1].0.clone());
    assert_eq!(damaged.client.list().unwrap().snapshots[0].damaged_blocks, 1, "it is kept");
    damaged.verify(&[&format!("alice/machine/disk/{base}")], 0);
    let shown = damaged.site.admin(SERVER, &["verify", &format!("alice/machine/disk/{delta}")]);
    let shown = shown.unwrap();
    println!("{}", String::from_utf8_lossy(&shown.stdout));
    assert_eq!(shown.status.code(), Some(1));
    let wrong = damaged.site.admin(SERVER, &["verify", "alice"]).unwrap();
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

#[test]
fn whatever_is_damaged_the_next_backup_heals_the_newest_snapshot() {
    let mut damaged = Damaged::new();
    for (what, harm) in HARMS {
        damaged.while_stopped(harm);
        let found = damaged.verify(&[], 1);
        let snapshots = damaged.client.list().unwrap().snapshots;
        let hurt = snapshots.iter().filter(|one| one.damaged_blocks > 0).count();
        assert_eq!(found["damaged_snapshots"], hurt, "{what}: {found}");
        damaged.change();
        let taken = damaged.backup();
        eprintln!("{what}: {hurt} of {} snapshots damaged, then {}", snapshots.len(), taken.kind);
        damaged.assert_restores(damaged.copies.len() - 1);
        let newest = &damaged.client.list().unwrap().snapshots[0];
        assert_eq!(newest.damaged_blocks, 0, "{what}");
    }
    eprintln!("{} places tried on {SERVER}", HARMS.len());
}
