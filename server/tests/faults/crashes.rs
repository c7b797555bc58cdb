//! A scenario is recorded once; then, for every operation of it, what a crash there leaves is made, and the store opened on it.

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc, time::Instant};

use janus_server::storage::Disk;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    Scenario, folder,
    promises::Promised,
    recorder::{Act, Entry, Recorder},
    rounds,
    shadow::{Kept, Shadow},
    world::{Survives, World, bring_home},
};

/// What kind of crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Crash {
    /// `kill -9` between two operations.
    Killed,
    /// `kill -9` in the middle of a write, or while blocks are shared.
    KilledInWrite,
    /// A power cut; the disk happened to have all.
    KeptAll,
    /// A power cut; all that was not synced is lost.
    KeptSynced,
    /// A power cut; what was not synced is there in part and out of order.
    KeptSome,
    /// The same, and again while the server recovers from it.
    KeptSomeTwice,
    /// `kill -9`, and while the server recovers from it, a power cut.
    KilledThenPower,
}

impl Crash {
    fn boot(self) -> &'static str {
        match self {
            Self::Killed | Self::KilledInWrite | Self::KilledThenPower => "first",
            _ => "second",
        }
    }

    fn survives(self) -> Survives {
        match self {
            Self::Killed | Self::KilledInWrite | Self::KilledThenPower => Survives::Received,
            _ => Survives::Durable,
        }
    }
}

/// Bytes after which a session syncs: often, for these disks are small.
pub const SYNC_BYTES: u64 = 256 << 10;

/// Tries every crash at every operation of a scenario, and prints how many that were.
pub fn every(name: &str, scenario: Scenario) {
    let begun = Instant::now();
    let log = record(scenario);
    let mut tried: BTreeMap<Crash, usize> = BTreeMap::new();
    let (mut shadow, mut promised) = (Shadow::new(), Promised::default());
    let (mut acts, mut promises, mut last) = (0, 0, (0, 0));
    for entry in log.iter().map(Some).chain([None]) {
        let next = match entry {
            Some(Entry::Promise(promise)) => {
                promised.take(promise.clone());
                promises += 1;
                continue;
            }
            Some(Entry::Act(act)) => Some(act),
            None => None,
        };
        let at = Point { scenario: name, acts, next, shadow: &shadow, promised: &promised };
        let is_same = last == (shadow.syncs, promises);
        last = (shadow.syncs, promises);
        for (crash, seed) in crashes(&shadow, acts, next, is_same) {
            at.check(crash, seed);
            *tried.entry(crash).or_default() += 1;
        }
        if let Some(act) = next {
            shadow.apply(act);
            acts += 1;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{name}: {acts} operations, crashes tried: {tried:?}, {seconds:.1} s");
}

/// The crashes that differ from others at this place.
fn crashes(shadow: &Shadow, number: usize, next: Option<&Act>, is_same: bool) -> Vec<(Crash, u64)> {
    let mut crashes = vec![(Crash::Killed, 0), (Crash::KeptAll, 0)];
    // Two crashes are many: without a soak a quarter of the places.
    let twice = if number.is_multiple_of(4) { rounds(1, 20) } else { rounds(0, 20) };
    crashes.extend((0..twice).map(|round| (Crash::KilledThenPower, round)));
    if matches!(next, Some(Act::Write { .. } | Act::Clone { .. } | Act::CloneAll { .. })) {
        crashes.push((Crash::KilledInWrite, 0));
    }
    if !shadow.is_durable() {
        if !is_same {
            crashes.push((Crash::KeptSynced, 0));
        }
        crashes.extend((0..rounds(1, 40)).map(|round| (Crash::KeptSome, round)));
        crashes.extend((0..twice).map(|round| (Crash::KeptSomeTwice, round)));
    }
    crashes
}

/// All that a scenario does when nothing fails.
fn record(scenario: Scenario) -> Vec<Entry> {
    let base = folder();
    let recorder = Recorder::recording(base.path());
    let mut world =
        World::new(base.path().join("store"), disk("first", &recorder), Some(recorder.clone()));
    scenario(&mut world).unwrap();
    world.check().unwrap();
    drop(world);
    recorder.take_log()
}

fn disk(boot: &str, recorder: &Arc<Recorder>) -> Disk {
    Disk::watched(recorder.clone()).in_boot(boot).sync_after(SYNC_BYTES)
}

/// A place in a scenario: after so many operations.
struct Point<'a> {
    scenario: &'a str,
    acts: usize,
    next: Option<&'a Act>,
    shadow: &'a Shadow,
    promised: &'a Promised,
}

impl Point<'_> {
    fn check(&self, crash: Crash, seed: u64) {
        let mut chance = StdRng::seed_from_u64(seed << 32 | self.acts as u64);
        let kept = match (crash, self.next) {
            (Crash::Killed | Crash::KeptAll | Crash::KilledThenPower, _) => Kept::All,
            (Crash::KilledInWrite, Some(act)) => Kept::AllAnd(act),
            (Crash::KilledInWrite, None) => return,
            (Crash::KeptSynced, _) => Kept::Nothing,
            (Crash::KeptSome | Crash::KeptSomeTwice, _) => Kept::Some(&mut chance),
        };
        let base = folder();
        self.shadow.save(kept, base.path()).unwrap();
        bring_home(base.path());
        let recovered = match crash {
            Crash::KeptSomeTwice => {
                let shadow = Shadow::of(base.path()).unwrap();
                self.crash_again(base.path(), crash, shadow, &mut chance)
            }
            // What was not durable before the kill isn't after it.
            Crash::KilledThenPower => {
                self.crash_again(base.path(), crash, self.shadow.clone(), &mut chance)
            }
            _ => recover(base.path(), crash.boot(), self.promised.clone(), crash.survives()),
        };
        if let Err(error) = recovered {
            let kept = base.keep();
            panic!("{self}, {crash:?}, seed {seed}: {error}\nthe store is in {}", kept.display());
        }
    }

    /// Recovers, but is cut off after some operations of that; then recovers.
    fn crash_again(
        &self,
        base: &Path,
        crash: Crash,
        mut shadow: Shadow,
        chance: &mut StdRng,
    ) -> Result<(), String> {
        let recorder = Recorder::recording(base);
        let mut world = World::after_crash(
            base.join("store"),
            disk(crash.boot(), &recorder),
            self.promised.clone(),
            crash.survives(),
        )
        .recorded_by(recorder.clone());
        if self.promised.contents().is_empty() {
            world.disk("root", 1 << 20);
        }
        if self.promised.hides_damage() {
            world.verify()?;
        }
        world.backup()?;
        drop(world);
        let log = recorder.take_log();
        let mut promised = self.promised.clone();
        for entry in &log[..chance.random_range(0..=log.len())] {
            match entry {
                Entry::Act(act) => shadow.apply(act),
                Entry::Promise(promise) => promised.take(promise.clone()),
            }
        }
        let base = folder();
        let kept = if chance.random_bool(0.3) { Kept::Nothing } else { Kept::Some(chance) };
        shadow.save(kept, base.path()).unwrap();
        bring_home(base.path());
        recover(base.path(), "third", promised, Survives::Durable)
    }
}

/// Opens what a crash has left, compares it, and backs up again.
pub fn recover(
    base: &Path,
    boot: &str,
    promised: Promised,
    survives: Survives,
) -> Result<(), String> {
    let storage = match promised.shares {
        true => disk(boot, &Recorder::sharing(base)),
        false => Disk::default().in_boot(boot).sync_after(SYNC_BYTES),
    };
    let (has_no_disks, is_open) = (promised.contents().is_empty(), promised.trying.is_some());
    let hides_damage = promised.hides_damage();
    let mut world = World::after_crash(base.join("store"), storage, promised, survives);
    let told = |when: &'static str| move |error: String| format!("{when}: {error}");
    world.check().map_err(told("at once"))?;
    if has_no_disks {
        world.disk("root", 1 << 20);
    }
    // What was found is still known; what was not can be.
    if hides_damage {
        world.verify().map_err(told("a check"))?;
    }
    if is_open {
        world.backup().map_err(told("the open run"))?;
    }
    world.change(77);
    world.backup().map_err(told("a further backup"))?;
    world.purge_kept(false).map_err(told("a further purge"))?;
    if world.is_half_moved() {
        world.relocate().map_err(told("the move goes on"))?;
    }
    world.restart()?;
    world.check().map_err(told("after a backup and a restart"))
}

impl fmt::Display for Point<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scenario {:?}, after {} operations", self.scenario, self.acts)?;
        match self.next {
            Some(Act::Write { handle, offset, data }) => {
                write!(f, ", before {} bytes at {offset} of file {handle}", data.len())
            }
            Some(act) => write!(f, ", before {act:?}"),
            None => Ok(()),
        }
    }
}
