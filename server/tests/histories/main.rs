//! Histories of a store, drawn at random: backups, resizes, drops, pins, plans, merges, checks, restarts and damage, beside a
//! model that keeps every snapshot's bytes.
//!
//! After each step: what no damage can have touched restores bit by bit; of the rest every block is right or said to be lost,
//! and all that is lost was found when a check was the last thing that happened; the first backup after that check is whole. At
//! the end 7-Zip and libvhdi read the chains. A history that fails is made as short as it can be and printed; `JANUS_HISTORY_SEED`
//! repeats a run, `JANUS_HISTORY_CASES` says how many there are, and `JANUS_SOAK` makes them many.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

#[path = "../chains/mod.rs"]
mod chains;
mod harm;
mod history;
#[path = "../readers/mod.rs"]
mod readers;

use std::panic::{AssertUnwindSafe, catch_unwind};

use harm::{Harm, Target};
use history::History;
use janus_server::image::Format;
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};

const CASES: u32 = 20;
const CASES_IN_SOAK: u32 = 2000;

/// One step. Numbers choose among what is there.
#[derive(Debug, Clone)]
enum Step {
    Backup { changes: Vec<(u64, u64, u64)>, resize: Option<u64> },
    Drop(usize),
    BringBack(usize),
    Purge,
    Pin(usize),
    Unpin(usize),
    Thin,
    Verify,
    Damage { link: usize, target: Target, harm: Harm },
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop_oneof![Just(1u64), 1..20u64, Just(512)];
    let changes = prop::collection::vec((0..700u64, length, 0..5u64), 1..4);
    let target = prop_oneof![6 => Just(Target::Image), 2 => Just(Target::Table), 1 => Just(Target::Manifest)];
    let harm = prop_oneof![
        8 => (any::<u64>(), 0..8u8).prop_map(|(at, bit)| Harm::Flip { at, bit }),
        1 => Just(Harm::Delete),
        1 => any::<u64>().prop_map(Harm::Cut),
    ];
    let step = prop_oneof![
        8 => (changes, prop::option::weighted(0.15, 300..800u64))
            .prop_map(|(changes, resize)| Step::Backup { changes, resize }),
        3 => any::<usize>().prop_map(Step::Drop),
        1 => any::<usize>().prop_map(Step::BringBack),
        3 => Just(Step::Purge),
        1 => any::<usize>().prop_map(Step::Pin),
        1 => any::<usize>().prop_map(Step::Unpin),
        2 => Just(Step::Thin),
        3 => Just(Step::Verify),
        2 => (any::<usize>(), target, harm)
            .prop_map(|(link, target, harm)| Step::Damage { link, target, harm }),
        2 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 4..24)
}

/// Plays a history to its end.
fn play(format: Format, steps: &[Step]) -> history::Counts {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut history = History::new(format, folder.path());
    for step in steps {
        match step {
            Step::Backup { changes, resize } => history.backup(changes, *resize),
            Step::Drop(which) => history.drop_one(*which),
            Step::BringBack(which) => history.bring_back(*which),
            Step::Purge => history.purge(),
            Step::Pin(which) => history.pin(*which),
            Step::Unpin(which) => history.unpin(*which),
            Step::Thin => history.thin(),
            Step::Verify => history.verify(),
            Step::Damage { link, target, harm } => history.damage(*link, *target, *harm),
            Step::Restart => history.restart(),
        }
        history.check();
    }
    // Whatever has happened: a check and a backup make the newest snapshot whole.
    history.verify();
    history.check();
    history.backup(&[(7, 3, 9)], None);
    history.check();
    history.restart();
    history.check();
    history.read_by_others();
    history.counts
}

fn every_history_of(format: Format) {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let soak = std::env::var_os("JANUS_SOAK").is_some();
    // Always the same ones but in the soak, which is there to find new ones.
    let seed = number("JANUS_HISTORY_SEED");
    let seed = seed.unwrap_or_else(|| if soak { rand::random() } else { 1 });
    let cases = number("JANUS_HISTORY_CASES").map(|cases| cases as u32);
    let cases = cases.unwrap_or(if soak { CASES_IN_SOAK } else { CASES });
    println!("{format:?}: {cases} histories, JANUS_HISTORY_SEED={seed}");
    let config = ProptestConfig {
        cases,
        max_shrink_iters: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let bytes: Vec<u8> = seed.to_le_bytes().repeat(4);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let total = std::cell::Cell::new(history::Counts::default());
    let played = TestRunner::new_with_rng(config, rng).run(&steps(), |steps| {
        let played = catch_unwind(AssertUnwindSafe(|| play(format, &steps)));
        let counts = played.map_err(|panic| TestCaseError::fail(text_of(&*panic)))?;
        total.set(total.get() + counts);
        Ok(())
    });
    println!("{format:?}: {:?}", total.get());
    match played {
        Ok(()) => {}
        Err(TestError::Fail(reason, steps)) => {
            panic!("JANUS_HISTORY_SEED={seed}: {reason}\nthe shortest history: {steps:?}")
        }
        Err(error) => panic!("JANUS_HISTORY_SEED={seed}: {error}"),
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

#[test]
fn whatever_happens_to_vhdx_chains_what_is_restored_is_right() {
    every_history_of(Format::Vhdx);
}

#[test]
fn whatever_happens_to_vhd_chains_what_is_restored_is_right() {
    every_history_of(Format::Vhd);
}
