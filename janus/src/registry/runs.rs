//! Runs that this janus has seen: which server each belongs to. Losing them costs nothing, pinned calls name their
//! server themselves.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use janus_proto::ids::{BackupId, MachineKey, ServerId};
use tokio::time::Instant;

/// Runs remembered at once; the oldest are forgotten first.
const MAX_RUNS: usize = 4096;
/// A run without a call for this long doesn't count as running: twice the lease of a server.
const QUIET: Duration = Duration::from_secs(120);

#[derive(Debug)]
struct Run {
    server: ServerId,
    machine: Option<MachineKey>,
    last_call: Instant,
    open_calls: usize,
}

/// Bounded memory of runs.
#[derive(Debug, Default)]
pub struct Runs {
    runs: HashMap<BackupId, Run>,
    order: VecDeque<BackupId>,
    /// Newest accepted start of each machine: its run has an id that only its calls tell.
    starts: HashMap<MachineKey, (ServerId, Instant)>,
}

impl Runs {
    /// Server of a run, if this janus knows it.
    pub fn server_of(&self, run: BackupId) -> Option<ServerId> {
        self.runs.get(&run).map(|run| run.server.clone())
    }

    /// A start of the machine was accepted by `server`.
    pub fn started(&mut self, machine: &MachineKey, server: &ServerId, now: Instant) {
        if self.starts.len() >= MAX_RUNS {
            self.starts.retain(|_, (_, at)| now.duration_since(*at) < QUIET);
        }
        if self.starts.len() < MAX_RUNS {
            self.starts.insert(machine.clone(), (server.clone(), now));
        }
    }

    /// A call of the run begins at `server`.
    pub fn begin(
        &mut self,
        run: BackupId,
        server: &ServerId,
        machine: Option<&MachineKey>,
        now: Instant,
    ) {
        if !self.runs.contains_key(&run) {
            self.make_room();
            self.order.push_back(run);
        }
        let entry = self.runs.entry(run).or_insert_with(|| Run {
            server: server.clone(),
            machine: machine.cloned(),
            last_call: now,
            open_calls: 0,
        });
        entry.server = server.clone();
        entry.last_call = now;
        entry.open_calls += 1;
    }

    /// A call of the run is over.
    pub fn end(&mut self, run: BackupId, now: Instant) {
        if let Some(run) = self.runs.get_mut(&run) {
            run.last_call = now;
            run.open_calls = run.open_calls.saturating_sub(1);
        }
    }

    /// Machines that have a run at `server` now.
    pub fn machines_at(&self, server: &ServerId, now: Instant) -> HashSet<&MachineKey> {
        let calling = self
            .runs
            .values()
            .filter(|run| run.server == *server)
            .filter(|run| run.open_calls > 0 || now.duration_since(run.last_call) < QUIET)
            .filter_map(|run| run.machine.as_ref());
        let started = self
            .starts
            .iter()
            .filter(|(_, (at, since))| at == server && now.duration_since(*since) < QUIET)
            .map(|(machine, _)| machine);
        calling.chain(started).collect()
    }

    fn make_room(&mut self) {
        while self.order.len() >= MAX_RUNS {
            if let Some(oldest) = self.order.pop_front() {
                self.runs.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_run_counts_while_it_has_calls_and_shortly_after() {
        let (mut runs, run) = (Runs::default(), BackupId::new());
        let (server, machine): (ServerId, MachineKey) =
            ("a".parse().unwrap(), "u/m".parse().unwrap());
        runs.begin(run, &server, Some(&machine), Instant::now());
        tokio::time::advance(QUIET * 3).await;
        assert_eq!(runs.machines_at(&server, Instant::now()).len(), 1);
        runs.end(run, Instant::now());
        assert_eq!(runs.machines_at(&server, Instant::now()).len(), 1);
        tokio::time::advance(QUIET).await;
        assert_eq!(runs.machines_at(&server, Instant::now()).len(), 0);
        assert_eq!(runs.server_of(run).as_ref(), Some(&server));
        runs.started(&machine, &server, Instant::now());
        assert_eq!(runs.machines_at(&server, Instant::now()).len(), 1);
        tokio::time::advance(QUIET).await;
        assert_eq!(runs.machines_at(&server, Instant::now()).len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_is_bounded() {
        let (mut runs, server) = (Runs::default(), "a".parse().unwrap());
        for _ in 0..MAX_RUNS + 10 {
            runs.begin(BackupId::new(), &server, None, Instant::now());
        }
        assert_eq!((runs.runs.len(), runs.order.len()), (MAX_RUNS, MAX_RUNS));
    }
}
