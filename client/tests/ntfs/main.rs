//! NTFS volumes that change in all ways we can think of: what the journal promises to be unchanged is unchanged.
//!
//! `JANUS_NTFS_SEED=<seed>` plays one history alone, `JANUS_NTFS_HISTORIES` sets how many are played.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use history::{History, Totals};
use scene::{Library, Volume};

mod history;
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

#[test]
fn free_clusters_hold_nothing_that_anybody_misses() {
    let mut library = Library::start();
    let mut volume = Volume::new(24, 4096);
    let mut operations = vec![serde_json::json!(["journal", 7, 1 << 18])];
    for file in 0..60 {
        operations.push(serde_json::json!([
            "write",
            format!("/f{file}"),
            0,
            file * 3001,
            file,
            true
        ]));
    }
    for file in (0..60).step_by(3) {
        operations.push(serde_json::json!(["delete", format!("/f{file}")]));
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
