//! Two janus, three servers and twenty machines in one thread, on virtual time: the real janus and the real server over a
//! network in memory, with partitions, crashes, frozen and slow lines, all drawn from a seed.
//!
//! A seed that breaks a rule is printed; `JANUS_SIMULATION_SEED=<seed>` plays it alone and shows what happened.
//! `JANUS_SIMULATION_SEEDS=<count>` says how many are played: 500 without it, 100,000 with `JANUS_SOAK`; they begin with
//! `JANUS_SIMULATION_FIRST=<seed>`, 1 without it.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

#[path = "simulation/faults.rs"]
mod faults;
#[path = "simulation/machine.rs"]
mod machine;
#[path = "simulation/network.rs"]
mod network;
#[path = "simulation/node.rs"]
mod node;
#[path = "simulation/rules.rs"]
mod rules;
#[path = "simulation/site.rs"]
mod site;
#[path = "simulation/world.rs"]
mod world;

use rules::Counts;
use world::Outcome;

/// Events shown of a seed that breaks a rule.
const SHOWN: usize = 60;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Plays a seed on a thread of its own, so that nothing is left of an earlier one.
fn play(seed: u64) -> Outcome {
    let played =
        thread::Builder::new().name(format!("seed {seed}")).spawn(move || world::play(seed));
    played.unwrap().join().unwrap_or_else(|_| Outcome {
        broken: Some("panicked".into()),
        trace: Vec::new(),
        counts: Counts::default(),
    })
}

fn show(seed: u64, outcome: &Outcome) -> String {
    let trace = &outcome.trace[outcome.trace.len().saturating_sub(SHOWN)..];
    let broken = outcome.broken.as_deref().unwrap_or("no rule is broken");
    format!(
        "{}\nseed {seed}: {broken}\nreplay it with: JANUS_SIMULATION_SEED={seed} cargo test -p janus-client --test simulation every_seed -- --nocapture",
        trace.join("\n")
    )
}

#[test]
fn every_seed_keeps_the_rules() {
    if let Some(seed) = number("JANUS_SIMULATION_SEED") {
        let outcome = play(seed);
        println!("{}\n{:?}", show(seed, &outcome), outcome.counts);
        assert!(outcome.broken.is_none());
        return;
    }
    let soak = std::env::var_os("JANUS_SOAK").is_some();
    let seeds = number("JANUS_SIMULATION_SEEDS").unwrap_or(if soak { 100_000 } else { 500 });
    let first = number("JANUS_SIMULATION_FIRST").unwrap_or(1);
    let last = first.saturating_add(seeds).saturating_sub(1);
    let (next, begun) = (AtomicU64::new(first), Instant::now());
    let (total, broken) = (Mutex::new(Counts::default()), Mutex::new(Vec::new()));
    thread::scope(|threads| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            threads.spawn(|| {
                while broken.lock().unwrap().is_empty() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > last {
                        break;
                    }
                    let outcome = play(seed);
                    total.lock().unwrap().add(outcome.counts);
                    if outcome.broken.is_some() {
                        broken.lock().unwrap().push(show(seed, &outcome));
                    }
                }
            });
        }
    });
    let counts = total.into_inner().unwrap();
    let seconds = begun.elapsed().as_secs_f64();
    println!("{seeds} seeds from {first} in {seconds:.1} s: {counts:?}");
    let broken = broken.into_inner().unwrap();
    assert!(broken.is_empty(), "{}", broken.join("\n\n"));
    let each = [
        counts.starts,
        counts.commits,
        counts.failovers,
        counts.partitions,
        counts.crashes,
        counts.lists,
        counts.snags,
        counts.drops,
    ];
    assert!(
        seeds < 20 || each.iter().all(|count| *count > seeds / 20),
        "it exercises little: {counts:?}"
    );
}

#[test]
fn a_seed_replays_identically() {
    let last = if std::env::var_os("JANUS_SOAK").is_some() { 300 } else { 3 };
    for seed in 1..=last {
        let (first, second) = (play(seed), play(seed));
        let difference = first.trace.iter().zip(&second.trace).find(|(a, b)| a != b);
        assert_eq!(difference, None, "seed {seed}");
        assert_eq!((first.trace.len(), first.counts), (second.trace.len(), second.counts));
        assert!(first.trace.len() > 100, "seed {seed} does something");
    }
}
