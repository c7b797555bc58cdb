//! A scenario is played once for every operation that can fail, and there it fails: the client tries again, and in the end all
//! that was acknowledged is there.

use std::time::Instant;

use janus_server::storage::Disk;
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    Scenario,
    crashes::{SYNC_BYTES, recover},
    folder,
    promises::Promised,
    recorder::{Entry, Fault, Recorder},
    rounds,
    shadow::{Kept, Shadow},
    world::{Survives, World, bring_home},
};

/// Lets every operation fail in every way, and prints how many that were.
pub fn every(name: &str, scenario: Scenario) {
    for fault in [Fault::Error, Fault::Down, Fault::Full, Fault::Short, Fault::Sync] {
        let begun = Instant::now();
        // A disk that stays away is nearly the same wherever it goes: without a soak a quarter of the places.
        let step = if fault == Fault::Down { rounds(4, 1) } else { 1 };
        let places = (0..).step_by(step as usize);
        let points = places.take_while(|at| play(name, scenario, fault, *at)).count();
        let seconds = begun.elapsed().as_secs_f64();
        println!("{name}: {fault:?}: {points} operations failed, {seconds:.1} s");
        assert!(points > 0);
    }
}

/// Plays a scenario in which operation `at` fails; false when it has fewer.
fn play(name: &str, scenario: Scenario, fault: Fault, at: usize) -> bool {
    let base = folder();
    let recorder = Recorder::failing(base.path(), fault, at);
    let storage = Disk::watched(recorder.clone()).in_boot("first").sync_after(SYNC_BYTES);
    let mut world = World::new(base.path().join("store"), storage, Some(recorder.clone()));
    let played = scenario(&mut world);
    let Some(hit) = recorder.hit() else {
        played.unwrap();
        return false;
    };
    let promised = world.promised();
    drop(world);
    let checked = played
        .and_then(|()| recover(base.path(), "first", promised.clone(), Survives::Received))
        .and_then(|()| cut_power(recorder.take_log(), &promised, fault));
    if let Err(error) = checked {
        let kept = base.keep();
        panic!(
            "scenario {name:?}, {fault:?} number {at} ({hit}): {error}\nthe store is in {}",
            kept.display()
        );
    }
    true
}

/// What a power cut at the end leaves.
fn cut_power(log: Vec<Entry>, promised: &Promised, fault: Fault) -> Result<(), String> {
    if !fault.is_followed_by_a_power_cut() {
        return Ok(());
    }
    let mut shadow = Shadow::new();
    for entry in &log {
        if let Entry::Act(act) = entry {
            shadow.apply(act);
        }
    }
    for round in 0..rounds(2, 10) {
        let mut chance = StdRng::seed_from_u64(round);
        let base = folder();
        let kept = if round == 0 { Kept::Nothing } else { Kept::Some(&mut chance) };
        shadow.save(kept, base.path()).unwrap();
        bring_home(base.path());
        recover(base.path(), "second", promised.clone(), Survives::Durable)
            .map_err(|error| format!("after a power cut at the end: {error}"))?;
    }
    Ok(())
}
