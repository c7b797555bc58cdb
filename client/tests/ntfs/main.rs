//! NTFS volumes that change in all ways we can think of: what the journal promises to be unchanged is unchanged.
//!
//! `JANUS_NTFS_SEED=<seed>` plays one history alone, `JANUS_NTFS_HISTORIES` sets how many are played.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use history::{History, Totals};
use janus_client::journal::{Journal, ntfs_usn::NtfsUsn};
use scene::{Library, Volume};
use serde_json::json;

mod history;
mod reasons;
mod scene;
mod whole;
mod windows;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn every_allocated_cluster_that_differs_was_predicted_or_all_is_compared() {
    let mut library = Library::start();
    let soak = std::env::var_os("JANUS_SOAK").is_some();
    let seeds = match number("JANUS_NTFS_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("JANUS_NTFS_HISTORIES").unwrap_or(if soak { 3000 } else { 100 }),
    };
    let mut totals = Totals::default();
    for seed in seeds.clone() {
        History::new(&mut library, seed).play(&mut totals);
    }
    println!("{totals}");
    if seeds.count() >= 100 {
        totals.assert_worth();
    }
}

/// A record of ranges has no time: after a roll-back the same may stand in its place, or that of another file.
#[test]
fn a_roll_back_behind_records_without_a_time_is_noticed() {
    let mut library = Library::start();
    for after in ["/f", "/g"] {
        let mut volume = Volume::new(16, 4096);
        let usn = 1 << 18;
        let make = |name: &str, seed: u32| json!(["write", name, 0, 100_000, seed, true]);
        let made = vec![json!(["journal", 7, usn]), make("/f", 1), make("/g", 4)];
        let made = library.change(&mut volume, made, true).answers;
        let [f, g] = [&made[1], &made[2]].map(|answer| answer.as_u64().unwrap());
        let records = |usn: u64, file: u64, reason: u32, version: u32| {
            json!(["records", usn, [[file, reason]], version])
        };
        let made = library.change(&mut volume, vec![records(usn, f, 0x8000_0100, 3)], true);
        let usn = made.answers[0].as_u64().unwrap();
        let before = volume.bytes();
        let mut overwrite = |volume: &mut Volume, name: &str, seed: u32| {
            let file = if name == "/f" { f } else { g };
            let write = json!(["write", name, 0, 50_000, seed, false]);
            library.change(volume, vec![write, records(usn, file, 0x8000_0001, 4)], true);
            volume.bytes()
        };
        let then = overwrite(&mut volume, "/f", 2);
        let cursor = NtfsUsn::new(&volume.file()).changes(None).next.unwrap();
        volume.put_back(&before);
        let now = overwrite(&mut volume, after, 3);
        let changes = NtfsUsn::new(&volume.file()).changes(Some(&cursor)).changes.unwrap();
        let clusters = then.chunks(4096).zip(now.chunks(4096)).enumerate();
        let differing: Vec<u64> = clusters
            .filter(|(_, (then, now))| then != now)
            .map(|(at, _)| at as u64 * 4096)
            .collect();
        assert!(differing.len() > 12, "{differing:?}");
        let unread = differing.iter().find(|at| !changes.changed.contains(**at));
        assert_eq!(unread, None, "{after} was written then");
    }
}

#[test]
fn free_clusters_hold_nothing_that_anybody_misses() {
    let mut library = Library::start();
    let mut volume = Volume::new(24, 4096);
    let mut operations = vec![json!(["journal", 7, 1 << 18])];
    for file in 0..60 {
        operations.push(json!(["write", format!("/f{file}"), 0, file * 3001, file, true]));
    }
    for file in (0..60).step_by(3) {
        operations.push(json!(["delete", format!("/f{file}")]));
    }
    let answer = library.change(&mut volume, operations, true);
    let free = janus_client::fs::ntfs::free(&volume.file()).unwrap();
    let mut ours = vec![false; volume.clusters() as usize];
    for range in free.iter() {
        assert_eq!((range.start % 4096, range.end % 4096), (0, 0));
        (range.start / 4096..range.end / 4096).for_each(|cluster| ours[cluster as usize] = true);
    }
    let theirs: Vec<bool> =
        (0..volume.clusters()).map(|cluster| !answer.is_used(cluster)).collect();
    assert_eq!(ours, theirs);
    // What was free can be anything: the files are what they were.
    let before = volume.contents();
    volume.fill(&free, 0xFF);
    assert_eq!(volume.contents(), before);
    let mut check = std::process::Command::new("ntfsfix");
    assert!(check.arg("-n").arg(volume.path()).status().unwrap().success());
    // A volume that was not left at rest tells nothing.
    library.change(&mut volume, vec![], false);
    let error = janus_client::fs::ntfs::free(&volume.file()).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
}

#[test]
fn damaged_volumes_end_in_errors_and_promise_nothing_wrong() {
    let mut library = Library::start();
    let mut outcomes: BTreeMap<&str, u32> = BTreeMap::new();
    let soak = std::env::var_os("JANUS_SOAK").is_some();
    let mut history = History::new(&mut library, 7);
    history.grow();
    let (image, cursor) = history.damage_parts();
    for seed in 1..=if soak { 20_000 } else { 1000 } {
        *outcomes.entry(scene::mutated(&image, &cursor, seed)).or_default() += 1;
    }
    println!("{outcomes:?}");
    assert!(outcomes.len() > 1, "{outcomes:?}");
}
