//! Runs that this janus has seen: which server each belongs to. Losing them costs nothing, pinned calls name their
//! server themselves.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use janus_proto::ids::{BackupId, MachineKey, ServerId};
use tokio::time::Instant;

/// Runs remembered at once; the oldest are forgotten first.
const MAX_RUNS: usize = 4096;
/// A run without a call for this long doesn't count as running: twice the lease of a server.
const QUIET: Duration = Duration::from_secs(120);
/// Between two calls of a run that goes on; after its last call it is shown for so long.
const PAUSE: Duration = Duration::from_secs(5);
/// Seconds over which the rate of a run is taken.
const WINDOW_SECONDS: u64 = 3;

#[derive(Debug)]
struct Run {
    server: ServerId,
    machine: Option<MachineKey>,
    last_call: Instant,
    open_calls: usize,
    begun: Instant,
    meter: Arc<Meter>,
}

/// Bytes of a run that have passed, counted by its calls.
#[derive(Debug)]
pub struct Meter {
    base: Instant,
    sent: AtomicU64,
    received: AtomicU64,
    /// Number of the window that `in_window` counts for.
    window: AtomicU64,
    in_window: AtomicU64,
    /// Bytes of the window before it.
    before: AtomicU64,
}

impl Meter {
    fn new(base: Instant) -> Self {
        let zero = AtomicU64::default;
        let (sent, received, window) = (zero(), zero(), zero());
        Self { base, sent, received, window, in_window: zero(), before: zero() }
    }

    /// Bytes on their way to the server.
    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        self.count(bytes as u64);
    }

    /// Bytes on their way back.
    pub fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.count(bytes as u64);
    }

    fn now(&self) -> u64 {
        self.base.elapsed().as_secs() / WINDOW_SECONDS
    }

    // Two threads at the edge of a window may lose a frame of the rate, never of the sums.
    fn count(&self, bytes: u64) {
        let now = self.now();
        let window = self.window.swap(now, Ordering::Relaxed);
        if window != now {
            let ended = self.in_window.swap(0, Ordering::Relaxed);
            self.before.store(if window + 1 == now { ended } else { 0 }, Ordering::Relaxed);
        }
        self.in_window.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes in a second, as the last full window had them.
    fn rate(&self) -> u64 {
        let bytes = match self.now() - self.window.load(Ordering::Relaxed).min(self.now()) {
            0 if self.now() == 0 => {
                let seconds = self.base.elapsed().as_secs().max(1);
                return self.in_window.load(Ordering::Relaxed) / seconds;
            }
            0 => self.before.load(Ordering::Relaxed),
            1 => self.in_window.load(Ordering::Relaxed),
            _ => 0,
        };
        bytes / WINDOW_SECONDS
    }
}

/// A run that is under way, as this janus sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunNow {
    /// Its machine, where the caller has one.
    pub machine: Option<MachineKey>,
    /// Where it goes.
    pub server: ServerId,
    /// Since its first call here.
    pub age: Duration,
    /// Bytes to the server.
    pub sent: u64,
    /// Bytes from the server.
    pub received: u64,
    /// Bytes in a second, both ways, lately.
    pub rate: u64,
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
    ) -> Arc<Meter> {
        if !self.runs.contains_key(&run) {
            self.make_room();
            self.order.push_back(run);
        }
        let entry = self.runs.entry(run).or_insert_with(|| Run {
            server: server.clone(),
            machine: machine.cloned(),
            last_call: now,
            open_calls: 0,
            begun: now,
            meter: Arc::new(Meter::new(now)),
        });
        entry.server = server.clone();
        entry.last_call = now;
        entry.open_calls += 1;
        entry.meter.clone()
    }

    /// Runs under way, the oldest first.
    pub fn under_way(&self, now: Instant) -> Vec<RunNow> {
        let mut runs: Vec<RunNow> = self
            .runs
            .values()
            .filter(|run| run.open_calls > 0 || now.duration_since(run.last_call) < PAUSE)
            .map(|run| RunNow {
                machine: run.machine.clone(),
                server: run.server.clone(),
                age: now.duration_since(run.begun),
                sent: run.meter.sent.load(Ordering::Relaxed),
                received: run.meter.received.load(Ordering::Relaxed),
                rate: run.meter.rate(),
            })
            .collect();
        runs.sort_by_key(|run| std::cmp::Reverse(run.age));
        runs
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
    async fn a_run_is_shown_with_its_bytes_and_its_present_rate() {
        let (mut runs, run, server) = (Runs::default(), BackupId::new(), "a".parse().unwrap());
        let meter = runs.begin(run, &server, None, Instant::now());
        for _ in 0..20 {
            meter.sent(1000);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        meter.received(7);
        let shown = &runs.under_way(Instant::now())[0];
        assert_eq!((shown.sent, shown.received, shown.rate), (20_000, 7, 1000));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(runs.under_way(Instant::now())[0].rate, 0);
        runs.end(run, Instant::now());
        tokio::time::advance(PAUSE).await;
        assert!(runs.under_way(Instant::now()).is_empty());
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
