//! Seedings that the server goes on with by itself: one after another, again when one fails, and after a restart.
//!
//! They stand in `.seeds.json` below the image path, the oldest first. One that can't go on now (its hours are over, its server is
//! away) lets the others pass. Each goes once all of it is here, or an operator cancels it. Until then janus gives starts of the machines
//! that it covers, and that have no chain here, to other servers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::show::date;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    Admin, AdminError, Answer, Task,
    seed::{self, Order},
    table::table,
};
use crate::{
    background,
    chain::store::{SmallFile, Store, StoreError},
    runs::{Runs, now_ms},
};

const SEEDS: &str = ".seeds.json";
/// Most that wait.
const MOST: usize = 1000;
/// How often it is looked whether one can go on.
const LOOK: Duration = Duration::from_secs(1);
/// Pauses after failures grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(3600));

/// What waits.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Seeding {
    /// Names it.
    number: u32,
    /// Unix milliseconds.
    added_ms: i64,
    order: Order,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Seeds {
    /// The number that was given last.
    last: u32,
    seedings: Vec<Seeding>,
}

/// The queue of a store.
pub struct Queue {
    seeds: SmallFile<Seeds>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    at_work: Option<AtWork>,
    failed: BTreeMap<u32, Failed>,
}

struct AtWork {
    number: u32,
    told: String,
    stop: CancellationToken,
}

struct Failed {
    why: String,
    pause: Duration,
    next: Instant,
}

impl Queue {
    /// The queue of a store. Nothing is read yet.
    pub(super) fn new(store: &Store) -> Self {
        Self { seeds: SmallFile::new(store, SEEDS), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seedings(&self) -> Result<Vec<Seeding>, StoreError> {
        Ok(self.seeds.lock().value()?.seedings.clone())
    }

    /// Tells which machines the seedings are to bring here.
    fn tell_awaited(&self, runs: &Runs) {
        match self.seedings() {
            Ok(seedings) => {
                let all = seedings.into_iter().map(|seeding| seeding.order.which);
                runs.set_awaited(all.collect());
            }
            Err(error) => tracing::error!(%error, "the queue of seedings can't be read"),
        }
    }

    /// Adds a seeding; answers its number.
    pub(super) fn add(&self, runs: &Runs, order: Order) -> Result<u32, AdminError> {
        let mut seeds = self.seeds.lock();
        if seeds.value()?.seedings.len() >= MOST {
            return Err(AdminError::QueueFull { most: MOST });
        }
        let added = seeds.change(|seeds| {
            seeds.last = seeds.last.wrapping_add(1);
            seeds.seedings.push(Seeding { number: seeds.last, added_ms: now_ms(), order });
            seeds.last
        })?;
        drop(seeds);
        self.tell_awaited(runs);
        Ok(added)
    }

    /// Takes a seeding out, also one at work. What it has brought stays.
    pub(super) fn cancel(&self, runs: &Runs, number: u32) -> Result<(), AdminError> {
        let mut state = self.state();
        if !self.seedings()?.iter().any(|seeding| seeding.number == number) {
            return Err(AdminError::NotQueued { number });
        }
        self.remove(&mut state, runs, number)?;
        if let Some(at_work) = state.at_work.as_ref().filter(|at_work| at_work.number == number) {
            at_work.stop.cancel();
        }
        Ok(())
    }

    fn remove(&self, state: &mut State, runs: &Runs, number: u32) -> Result<(), StoreError> {
        let is_other = |seeding: &Seeding| seeding.number != number;
        self.seeds.lock().change(|seeds| seeds.seedings.retain(is_other))?;
        state.failed.remove(&number);
        self.tell_awaited(runs);
        Ok(())
    }

    /// The queue as a table for people, and for programs.
    pub(super) fn shown(&self) -> Result<(String, Vec<Value>), AdminError> {
        let state = self.state();
        let seedings = self.seedings()?;
        let head = ["number", "from", "what", "how", "added", "state"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let mut listed = Vec::new();
        for Seeding { number, added_ms, order } in &seedings {
            let at_work = state.at_work.as_ref().filter(|at_work| at_work.number == *number);
            let failed = state.failed.get(number);
            let told = match (at_work, failed) {
                (Some(at_work), _) => at_work.told.clone(),
                (None, Some(Failed { why, next, .. })) => {
                    let left = next.saturating_duration_since(Instant::now());
                    format!("failed, again in {} s: {why}", left.as_secs())
                }
                (None, None) if !order.is_time() => "waits for its hours".to_owned(),
                (None, None) => "waits".to_owned(),
            };
            let what = order.which.to_string();
            rows.push(vec![
                number.to_string(),
                order.from.clone(),
                what.clone(),
                order.how(),
                date(*added_ms),
                told.clone(),
            ]);
            listed.push(json!({
                "number": number,
                "from": order.from,
                "what": what,
                "hashes_only": order.hashes_only,
                "hours": order.hours.map(|hours| hours.to_string()),
                "mib_per_second": order.mib_per_second,
                "bandwidth": order.bandwidth,
                "added_ms": added_ms,
                "at_work": at_work.is_some(),
                "failed": failed.map(|failed| &failed.why),
                "state": told,
            }));
        }
        let text = if listed.is_empty() { String::new() } else { table(&rows) };
        Ok((text, listed))
    }

    /// The next one that can go on: one that hasn't failed, else the one that waits longest for its next try, so that none holds the
    /// others up.
    fn begin(&self, shutdown: &CancellationToken) -> Option<(Seeding, CancellationToken)> {
        let mut state = self.state();
        let seedings = match self.seedings() {
            Ok(seedings) => seedings,
            Err(error) => {
                tracing::error!(%error, "the queue of seedings can't be read");
                return None;
            }
        };
        let now = Instant::now();
        let next = |seeding: &Seeding| state.failed.get(&seeding.number).map(|failed| failed.next);
        let can_go = |seeding: &Seeding| {
            seeding.order.is_time() && next(seeding).is_none_or(|next| next <= now)
        };
        let seeding = seedings.into_iter().filter(can_go).min_by_key(next)?;
        let (number, stop) = (seeding.number, shutdown.child_token());
        let told = "begins".to_owned();
        state.at_work = Some(AtWork { number, told, stop: stop.clone() });
        Some((seeding, stop))
    }

    fn tell(&self, line: String) {
        if let Some(at_work) = &mut self.state().at_work {
            at_work.told = line;
        }
    }

    /// Takes note of what came of one.
    fn end(&self, runs: &Runs, number: u32, failed: Option<String>) {
        let mut state = self.state();
        state.at_work = None;
        let why = match failed {
            Some(why) => why,
            None => match self.remove(&mut state, runs, number) {
                Ok(()) => return,
                Err(error) => format!("it is done, but can't be taken out of the queue: {error}"),
            },
        };
        let (first, longest) = PAUSES;
        let pause = state.failed.get(&number).map_or(first, |last| (last.pause * 2).min(longest));
        tracing::warn!(number, error = why, "a seeding of the queue failed; it is tried again");
        state.failed.insert(number, Failed { why, pause, next: Instant::now() + pause });
    }

    /// Goes on with all that can, until none can. Blocks.
    fn work(&self, admin: &Admin, shutdown: &CancellationToken) {
        let runs = admin.runs();
        while let Some((Seeding { number, order, .. }, stop)) = self.begin(shutdown) {
            let tell = |line| self.tell(line);
            let done = seed::seed(admin, &order, false, &Task::new(&stop, &tell));
            if shutdown.is_cancelled() {
                return;
            }
            match done {
                Ok(answer) if !answer.is_bad => {
                    tracing::info!(number, from = order.from, what = %order.which, "seeded");
                    self.end(runs, number, None);
                }
                Ok(answer) => self.end(runs, number, Some(failures(&answer))),
                // Its hours are over, or it was taken out.
                Err(AdminError::Cancelled) => {
                    self.state().at_work = None;
                    return;
                }
                Err(error) => self.end(runs, number, Some(error.to_string())),
            }
        }
    }
}

/// What failed of several machines.
fn failures(answer: &Answer) -> String {
    let failed = answer.text.lines().filter(|line| line.contains("FAILED"));
    failed.collect::<Vec<_>>().join("; ")
}

/// Works on the queue until `shutdown`.
pub async fn follow(admin: Arc<Admin>, shutdown: CancellationToken) {
    let waiting = admin.clone();
    background(move || waiting.queue().tell_awaited(waiting.runs())).await;
    while !shutdown.is_cancelled() {
        let (admin, stop) = (admin.clone(), shutdown.clone());
        background(move || admin.queue().work(&admin, &stop)).await;
        shutdown.run_until_cancelled(sleep(LOOK)).await;
    }
}
