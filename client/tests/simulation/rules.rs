//! What must hold at every step, and the record of what happened.
//!
//! Starts and calls of runs are seen as bytes on the wire, below all that they are to prove: a call that janus sends to a
//! wrong server counts even when that server refuses it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use janus_proto::{
    ids::{MachineKey, SnapshotId},
    pb,
};
use memchr::{memchr_iter, memmem};
use tokio::time::Instant;

use super::network::{Network, Node};

/// A start goes to no server that this janus has heard nothing of for longer: knowledge of 200 ms needs no probe, and
/// that of a probe is as old as its deadline at most.
const STALE: Duration = Duration::from_millis(1_250);
/// The same where lines are slow, and probes have a longer deadline.
const STALE_SLOW: Duration = Duration::from_millis(4_500);
const LEASE: Duration = Duration::from_secs(60);
/// Begins the feature by which starts are known on the wire, followed by who may get it.
pub const MARK: &str = "simulated-start:";

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub starts: u64,
    pub commits: u64,
    pub failovers: u64,
    pub partitions: u64,
    pub crashes: u64,
    pub lists: u64,
    pub snags: u64,
    pub drops: u64,
}

impl Counts {
    pub fn add(&mut self, other: Self) {
        self.starts += other.starts;
        self.commits += other.commits;
        self.failovers += other.failovers;
        self.partitions += other.partitions;
        self.crashes += other.crashes;
        self.lists += other.lists;
        self.snags += other.snags;
        self.drops += other.drops;
    }
}

/// A run as its machine knows it.
#[derive(Debug, Clone, Copy)]
struct Open {
    server: Node,
    machine: Node,
    /// A message of it that was answered was sent then.
    touched: Instant,
    /// Process of the server.
    life: u64,
    is_over: bool,
}

struct Inner {
    begun: Instant,
    is_slow: bool,
    trace: Vec<String>,
    broken: Option<String>,
    counts: Counts,
    runs: BTreeMap<String, Open>,
    /// Sessions and the runs they belong to.
    sessions: HashMap<String, String>,
    /// Highest counter of each machine on each server.
    counters: BTreeMap<(Node, Node), u64>,
    /// What each process of a janus has shown.
    seen: BTreeMap<(Node, u64), BTreeSet<SnapshotId>>,
    /// Highest counter of each machine on each server that a process of a janus has known.
    known_uses: HashMap<(Node, u64, usize), HashMap<MachineKey, u64>>,
    /// Snapshots whose commit was answered.
    kept: BTreeMap<Node, BTreeSet<String>>,
    /// Snapshots that their own server has dropped since.
    dropped: BTreeSet<SnapshotId>,
    /// Servers of each machine's starts since all is well.
    turns: Option<BTreeMap<Node, Vec<Node>>>,
}

/// Shared by all who see something; cheap to clone.
#[derive(Clone)]
pub struct Rules(Arc<Mutex<Inner>>);

impl Rules {
    pub fn new(is_slow: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            begun: Instant::now(),
            is_slow,
            trace: Vec::new(),
            broken: None,
            counts: Counts::default(),
            runs: BTreeMap::new(),
            sessions: HashMap::new(),
            counters: BTreeMap::new(),
            seen: BTreeMap::new(),
            known_uses: HashMap::new(),
            kept: BTreeMap::new(),
            dropped: BTreeSet::new(),
            turns: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down what happens.
    pub fn note(&self, text: String) {
        self.lock().note(text);
    }

    /// A rule is broken.
    pub fn fail(&self, text: String) {
        self.lock().fail(text);
    }

    pub fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    pub fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.lock().counts);
    }

    /// Broken rule, all that happened, and how much of it.
    pub fn outcome(&self) -> (Option<String>, Vec<String>, Counts) {
        let mut inner = self.lock();
        (inner.broken.take(), std::mem::take(&mut inner.trace), inner.counts)
    }

    /// Bytes from `from` to `to`, which `from` has heard nothing of for `silence`.
    pub fn saw(&self, from: Node, to: Node, bytes: &[u8], silence: Duration) {
        let Node::Server(_) = to else { return };
        let mut rest = bytes;
        while let Some(at) = memmem::find(rest, MARK.as_bytes()) {
            rest = &rest[at + MARK.len()..];
            self.lock().saw_start(from, to, rest, silence);
        }
        for id in ids(bytes) {
            self.lock().saw_call(from, to, id);
        }
    }

    /// A start was answered.
    pub fn started(
        &self,
        machine: Node,
        server: Node,
        life: Option<u64>,
        sent: Instant,
        answer: &pb::StartBackupResponse,
    ) {
        self.lock().started(machine, server, life, sent, answer);
    }

    /// A message of a run, sent at `sent`, was answered.
    pub fn touched(&self, run: &str, sent: Instant) {
        if let Some(open) = self.lock().runs.get_mut(run) {
            open.touched = open.touched.max(sent);
        }
    }

    /// A run may be committed or given up from now on.
    pub fn ending(&self, run: &str) {
        if let Some(open) = self.lock().runs.get_mut(run) {
            open.is_over = true;
        }
    }

    pub fn committed(&self, server: Node, answer: &pb::CommitBackupResponse) {
        let mut inner = self.lock();
        inner.counts.commits += 1;
        let ids = answer.snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone());
        inner.kept.entry(server).or_default().extend(ids);
    }

    /// From now on all servers are up, and everybody knows.
    pub fn all_is_well(&self) {
        self.lock().turns = Some(BTreeMap::new());
    }

    /// What `janus` knows of all servers now; `life` is the number of its process.
    pub fn knows(&self, janus: Node, life: u64, snapshots: BTreeSet<SnapshotId>) {
        let mut inner = self.lock();
        let seen = inner.seen.entry((janus, life)).or_default();
        let gone: Vec<SnapshotId> = seen.difference(&snapshots).copied().collect();
        *seen = snapshots;
        let gone = gone.into_iter().filter(|id| !inner.dropped.contains(id));
        let gone: Vec<String> = gone.map(|id| id.to_string()).collect();
        if !gone.is_empty() {
            inner.fail(format!("{janus} has forgotten snapshots: {}", gone.join(", ")));
        }
    }

    /// The counters that `janus` knows of a server now: they never fall.
    pub fn uses(&self, janus: Node, life: u64, server: usize, uses: Vec<(MachineKey, u64)>) {
        let mut inner = self.lock();
        let known = inner.known_uses.entry((janus, life, server)).or_default();
        let mut fallen = None;
        for (machine, counter) in uses {
            let highest = known.entry(machine.clone()).or_default();
            if counter < *highest {
                fallen = Some(format!(
                    "{janus}: the counter of {machine} at server-{server} falls from {highest} to {counter}"
                ));
            }
            *highest = counter.max(*highest);
        }
        if let Some(fallen) = fallen {
            inner.fail(fallen);
        }
    }

    /// Snapshots that servers have acknowledged, and not dropped since.
    pub fn kept(&self, server: Node) -> Vec<SnapshotId> {
        let inner = self.lock();
        let kept = inner.kept.get(&server).into_iter().flatten();
        let kept = kept.filter_map(|id| id.parse().ok());
        kept.filter(|id| !inner.dropped.contains(id)).collect()
    }

    /// A server's own retention has dropped these.
    pub fn dropped(&self, ids: impl IntoIterator<Item = SnapshotId>) {
        let mut inner = self.lock();
        inner.dropped.extend(ids);
        inner.counts.drops += 1;
    }

    pub fn is_dropped(&self, id: SnapshotId) -> bool {
        self.lock().dropped.contains(&id)
    }
}

impl Inner {
    fn note(&mut self, text: String) {
        let at = self.begun.elapsed().as_secs_f64();
        self.trace.push(format!("{at:8.3} {text}"));
    }

    fn fail(&mut self, text: String) {
        self.note(format!("BROKEN: {text}"));
        let at = self.begun.elapsed().as_secs_f64();
        self.broken.get_or_insert(format!("at {at:.3} s: {text}"));
    }

    fn saw_start(&mut self, from: Node, to: Node, meant: &[u8], silence: Duration) {
        self.note(format!("{from} sends a start to {to}"));
        let pin = meant.first().filter(|byte| byte.is_ascii_digit());
        match pin {
            Some(pin) => {
                if Node::Server(usize::from(pin - b'0')) != to {
                    self.fail(format!("a start pinned to server-{} goes to {to}", pin - b'0'));
                }
            }
            None => {
                let stale = if self.is_slow { STALE_SLOW } else { STALE };
                if silence > stale {
                    self.fail(format!(
                        "{from} sends a start to {to}, of which it has heard nothing for {silence:?}"
                    ));
                }
            }
        }
    }

    fn saw_call(&mut self, from: Node, to: Node, id: &str) {
        let run = self.sessions.get(id).map_or(id, String::as_str);
        let Some(open) = self.runs.get(run) else { return };
        if open.server != to {
            let (machine, own) = (open.machine, open.server);
            self.fail(format!("{from} sends a call of {machine}'s run at {own} to {to}"));
        }
    }

    fn started(
        &mut self,
        machine: Node,
        server: Node,
        life: Option<u64>,
        sent: Instant,
        answer: &pb::StartBackupResponse,
    ) {
        self.counts.starts += 1;
        let is_new = answer.epoch == 1;
        let counter = answer.use_counter;
        self.note(format!(
            "{machine} has started at {server}, use {counter}, epoch {}",
            answer.epoch
        ));
        let highest = self.counters.entry((machine, server)).or_default();
        let known = std::mem::replace(highest, counter.max(*highest));
        if is_new && counter <= known {
            self.fail(format!("{machine} at {server}: use counter {counter} after {known}"));
        }
        if let Some(life) = life {
            self.check_lease(machine, server, life, &answer.backup_id);
        }
        self.check_turn(machine, server, is_new);
        let (is_over, life) = (life.is_none(), life.unwrap_or_default());
        let open = Open { server, machine, touched: sent, life, is_over };
        self.runs.insert(answer.backup_id.clone(), open);
        for session in &answer.sessions {
            self.sessions.insert(session.session_id.clone(), answer.backup_id.clone());
        }
    }

    /// A run keeps others of its machine away for as long as it was touched within the lease.
    fn check_lease(&mut self, machine: Node, server: Node, life: u64, run: &str) {
        let other = self.runs.iter().find(|(other, open)| {
            other.as_str() != run
                && (open.machine, open.server, open.life) == (machine, server, life)
                && !open.is_over
                && open.touched.elapsed() < LEASE
        });
        if other.is_some() {
            self.fail(format!("{machine} has two runs at {server}, both within their lease"));
        }
    }

    fn check_turn(&mut self, machine: Node, server: Node, is_new: bool) {
        let Some(turns) = self.turns.as_mut().filter(|_| is_new) else { return };
        let turns = turns.entry(machine).or_default();
        turns.push(server);
        let last: BTreeSet<_> = turns.iter().rev().take(super::site::SERVERS).collect();
        if last.len() < turns.len().min(super::site::SERVERS) {
            let turns = turns.clone();
            self.fail(format!("{machine}'s starts do not visit all servers in turn: {turns:?}"));
        }
    }
}

/// Whether `from` must be able to use `to`: nothing has been wrong between them for `long`.
pub fn is_well(network: &Network, from: Node, to: Node, long: Duration) -> bool {
    network.well_since(from, to).is_some_and(|since| since.elapsed() >= long)
}

/// UUIDs in protobuf string fields: a length of 36, then the text.
fn ids(bytes: &[u8]) -> impl Iterator<Item = &str> {
    memchr_iter(36, bytes).filter_map(|at| {
        let text = std::str::from_utf8(bytes.get(at + 1..at + 37)?).ok()?;
        let is_id = [8, 13, 18, 23].iter().all(|dash| text.as_bytes()[*dash] == b'-');
        is_id.then_some(text)
    })
}
