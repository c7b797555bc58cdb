//! What is known of all servers: how machines have used them, what they report, which runs they have.
//!
//! Nothing here is durable and nothing can be lost: servers report all of it again. Use counters are Lamport counters,
//! merged by maximum, so that the order of reports doesn't matter and no clock takes part in a selection. Everything
//! is behind one lock, held for microseconds and never across an await.

mod recall;
mod runs;
mod sight;
mod snapshots;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use janus_proto::{
    clock::unix_ms,
    grants::Which,
    ids::{BackupId, DiskId, MachineKey, ServerId, SnapshotId},
    metadata::MAX_USE_JUMP,
    pb,
};
use tokio::time::Instant;
use tracing::warn;

pub use self::recall::Remembered;
use crate::agreement::{difference, differences};

use self::{
    runs::Runs,
    state::{Chain, ServerState, Told, Version},
};
pub use self::{
    runs::{Meter, RunNow},
    sight::Sight,
};

/// Servers remembered, reporting or used.
const MAX_SERVERS: usize = 64;
/// How long a second store of a server is told of: while both servers run they take turns, within a minute or so.
const RIVAL_KEPT: Duration = Duration::from_secs(300);

/// A report that isn't taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportRefused {
    /// A newer stream of this server is open.
    #[error("a newer report stream of server {server} is open")]
    Superseded {
        /// The server.
        server: ServerId,
    },
    /// The server has reported a later start of its own: this stream is of an older process.
    #[error(
        "server {server} has reported start epoch {known} already, this stream is of epoch {epoch}"
    )]
    OldEpoch {
        /// The server.
        server: ServerId,
        /// Highest epoch known.
        known: u64,
        /// Epoch of this stream.
        epoch: u64,
    },
    /// Too many servers report.
    #[error("this janus takes reports of at most {MAX_SERVERS} servers")]
    TooMany,
}

/// What was known of a server that was forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgotten {
    /// Its snapshots.
    pub snapshots: usize,
    /// Machines that had used it.
    pub machines: usize,
}

/// Why a server isn't forgotten.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForgetRefused {
    /// There is none of that name.
    #[error("this janus knows no server {server}; `janus status` names those it knows")]
    Unknown {
        /// As asked for.
        server: ServerId,
    },
    /// It would be back at once.
    #[error(
        "server {server} still reports, {seconds} s ago last: stop it, or take this janus out of its janus_urls, first"
    )]
    Reports {
        /// The server.
        server: ServerId,
        /// Since its last message.
        seconds: u64,
    },
    /// Calls are still sent there.
    #[error(
        "server {server} is {url} of server_urls: take it out there and send janus a SIGHUP first"
    )]
    InServerUrls {
        /// The server.
        server: ServerId,
        /// Its URL.
        url: String,
    },
}

/// How one machine stands with one server, for the selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Known {
    /// Counter of the newest start; 0: never.
    pub use_counter: u64,
    /// The server holds a chain of the machine, or is about to.
    pub has_chain: bool,
    /// Machines whose newest start is there.
    pub last_starts: usize,
    /// First backups that run there now.
    pub initial_runs: u32,
    /// The machine's first backup is to come there from another server.
    pub is_seeded: bool,
}

#[derive(Debug, Default)]
struct Inner {
    servers: BTreeMap<ServerId, ServerState>,
    /// Starts on their way: they count as used.
    claims: HashMap<u64, (MachineKey, ServerId, u64)>,
    next_number: u64,
    runs: Runs,
    /// Counts changes of `servers`.
    revision: u64,
}

/// Shared by all parts of janus; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Mutex<Inner>>);

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere can't leave a half-made change that matters: every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of `machine` on each of `servers`; an unknown server counts as never used.
    pub fn known(&self, machine: Option<&MachineKey>, servers: &[Option<ServerId>]) -> Vec<Known> {
        let inner = self.lock();
        let last_starts = inner.last_starts();
        let now = Instant::now();
        servers
            .iter()
            .map(|server| {
                let Some(server) = server else { return Known::default() };
                let used = machine.map(|machine| inner.used(machine, server)).unwrap_or_default();
                Known {
                    use_counter: used.counter,
                    has_chain: used.chain != Chain::Absent,
                    last_starts: last_starts.get(server).copied().unwrap_or(0),
                    initial_runs: inner.initial_runs(server, now),
                    is_seeded: machine.is_some_and(|machine| inner.is_seeded(machine, server)),
                }
            })
            .collect()
    }

    /// Counts a start that is about to be sent as used, until the claim is dropped or accepted. Its counter is above all
    /// that is known, and at least what the caller has `asked`, as far as the server takes it: one server that tells
    /// whatever it likes, or one caller, must not make the others refuse.
    pub fn claim(&self, machine: &MachineKey, server: &ServerId, asked: u64) -> Claim {
        let mut inner = self.lock();
        let highest = inner.highest_use(machine).saturating_add(1).max(asked);
        let counter = highest.min(inner.stored_use(machine, server).saturating_add(MAX_USE_JUMP));
        let number = inner.number();
        inner.claims.insert(number, (machine.clone(), server.clone(), counter));
        Claim { registry: self.clone(), number, counter }
    }

    /// Server that a run belongs to, if this janus has seen it.
    pub fn server_of_run(&self, run: BackupId) -> Option<ServerId> {
        self.lock().runs.server_of(run)
    }

    /// A call of `run` begins at `server`; it is over when the guard is dropped.
    pub fn run_call(
        &self,
        run: BackupId,
        server: &ServerId,
        machine: Option<&MachineKey>,
    ) -> RunCall {
        let meter = self.lock().runs.begin(run, server, machine, Instant::now());
        RunCall { registry: self.clone(), run, meter }
    }

    /// Runs under way, the oldest first.
    pub fn runs(&self) -> Vec<RunNow> {
        self.lock().runs.under_way(Instant::now())
    }

    /// Opens a report stream of `server`; older streams of it are out from now on.
    ///
    /// # Errors
    /// When it is of an older process than one that has reported, or too many servers report.
    pub fn open_report(
        &self,
        server: &ServerId,
        hello: &pb::ReportHello,
    ) -> Result<ReportSlot, ReportRefused> {
        let mut inner = self.lock();
        if inner.servers.len() >= MAX_SERVERS && !inner.servers.contains_key(server) {
            return Err(ReportRefused::TooMany);
        }
        let slot = inner.number();
        inner.revision += 1;
        let state = inner.servers.entry(server.clone()).or_default();
        let known = &state.version;
        if known.generation == hello.store_generation && hello.start_epoch < known.epoch {
            let (known, epoch) = (known.epoch, hello.start_epoch);
            return Err(ReportRefused::OldEpoch { server: server.clone(), known, epoch });
        }
        if known.is_of_later_stream(hello) {
            return Err(ReportRefused::Superseded { server: server.clone() });
        }
        let is_other = state.version.generation != hello.store_generation;
        match state.last_message {
            Some(_) if is_other => {
                let other = std::mem::take(&mut state.version.generation);
                state.rival = Some((other, Instant::now()));
            }
            Some(_) => {}
            None => state.rival = None,
        }
        state.version = Version {
            generation: hello.store_generation.clone(),
            epoch: hello.start_epoch,
            stream: hello.stream,
            sequence: 0,
        };
        state.slot = slot;
        state.staged = Some(Told::default());
        if let Some(granted) = &mut state.granted {
            granted.begin();
        }
        state.last_message = Some(Instant::now());
        state.heard_ms = unix_ms();
        state.settings = hello.settings.clone();
        state.vitals.clone_from(&hello.vitals);
        state.urls = hello.urls.iter().take(16).cloned().collect();
        Ok(ReportSlot { registry: self.clone(), server: server.clone(), slot })
    }

    /// Age of the last message of a server's report stream; `None` without a stream.
    pub fn report_age(&self, server: &ServerId) -> Option<Duration> {
        self.lock().servers.get(server)?.last_message.map(|at| at.elapsed())
    }

    /// Unix milliseconds of a server's last message, before this janus' start too; `None` when there was none.
    pub fn heard_ms(&self, server: &ServerId) -> Option<i64> {
        Some(self.lock().servers.get(server)?.heard_ms).filter(|ms| *ms > 0)
    }

    /// Servers that have reported or taken starts since this janus began.
    pub fn servers(&self) -> Vec<ServerId> {
        self.lock().servers.keys().cloned().collect()
    }

    /// Settings of all servers that have reported since this janus began.
    pub fn settings(&self) -> Vec<(ServerId, pb::SharedSettings)> {
        let inner = self.lock();
        let told =
            |(id, state): (&ServerId, &ServerState)| Some((id.clone(), state.settings.clone()?));
        inner.servers.iter().filter_map(told).collect()
    }

    /// What an administrator should look at: settings that differ, and names that two servers use.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = differences(&self.settings());
        warnings.extend(self.policy_difference());
        let inner = self.lock();
        let rivals = inner.servers.iter().filter_map(|(server, state)| {
            let (own, (other, seen)) = (&state.version.generation, state.rival.as_ref()?);
            let warning = format!(
                "server {server} reports two stores, {own} and {other}: two servers run with its certificate"
            );
            (seen.elapsed() < RIVAL_KEPT).then_some(warning)
        });
        warnings.extend(rivals);
        warnings
    }

    /// Policies that don't give the same rights.
    fn policy_difference(&self) -> Option<String> {
        let short = |digest: &str| digest.get(..12).unwrap_or("none").to_owned();
        let told = self.policies();
        difference("policy", told.iter().map(|(server, digest)| (server, short(digest))))
    }

    /// Other servers whose newest report was of the same store as that of `server`.
    pub fn same_store(&self, server: &ServerId) -> Vec<ServerId> {
        let inner = self.lock();
        let Some(state) = inner.servers.get(server) else { return Vec::new() };
        let own = &state.version.generation;
        let is_same = |(other, state): &(&ServerId, &ServerState)| {
            !own.is_empty() && *other != server && state.version.generation == *own
        };
        inner.servers.iter().filter(is_same).map(|(other, _)| other.clone()).collect()
    }

    /// Settings that a server has reported.
    pub fn settings_of(&self, server: &ServerId) -> Option<pb::SharedSettings> {
        self.lock().servers.get(server)?.settings.clone()
    }

    /// Free space and certificate of a server, as it has said last.
    pub fn vitals_of(&self, server: &ServerId) -> Option<pb::Vitals> {
        self.lock().servers.get(server)?.vitals.clone()
    }

    /// Machines that have damaged snapshots on a server.
    pub fn damaged(&self, server: &ServerId, sight: &Sight) -> Vec<pb::DamagedMachine> {
        self.lock().servers.get(server).map(|state| state.damaged(sight)).unwrap_or_default()
    }

    /// Snapshots on a server that lack blocks.
    pub fn incomplete(&self, server: &ServerId, sight: &Sight) -> u64 {
        self.lock().servers.get(server).map_or(0, |state| state.incomplete(sight))
    }

    /// What was proven of machines' backups on a server, as it has reported.
    pub fn proofs(&self, server: &ServerId, sight: &Sight) -> Vec<(MachineKey, pb::Proof)> {
        let inner = self.lock();
        let told = inner.servers.get(server).map(|state| &state.told.proofs);
        let of = told.into_iter().flatten();
        of.filter(|(key, _)| sight.sees(key))
            .map(|(key, proof)| (key.clone(), proof.clone()))
            .collect()
    }

    /// Open alarms of machines on a server, as it has reported.
    pub fn alarms(&self, server: &ServerId, sight: &Sight) -> Vec<(MachineKey, String)> {
        let inner = self.lock();
        let told = inner.servers.get(server).map(|state| &state.told.alarms);
        let of = told.into_iter().flatten();
        of.filter(|(key, _)| sight.sees(key))
            .map(|(key, alarm)| (key.clone(), alarm.clone()))
            .collect()
    }

    /// URLs under which clients reach a server, as it has reported them.
    pub fn urls_of(&self, server: &ServerId) -> Option<Vec<String>> {
        Some(self.lock().servers.get(server)?.urls.clone())
    }

    /// Forgets a server that is gone: what it has reported and how machines have used it. A server that still reports stays.
    ///
    /// # Errors
    /// Why it stays.
    pub fn forget(&self, server: &ServerId) -> Result<Forgotten, ForgetRefused> {
        let mut inner = self.lock();
        let known = inner.servers.get(server);
        let state = known.ok_or_else(|| ForgetRefused::Unknown { server: server.clone() })?;
        if let Some(at) = state.last_message {
            let seconds = at.elapsed().as_secs();
            return Err(ForgetRefused::Reports { server: server.clone(), seconds });
        }
        let forgotten =
            Forgotten { snapshots: state.told.snapshots.len(), machines: state.uses.len() };
        inner.servers.remove(server);
        inner.revision += 1;
        Ok(forgotten)
    }

    /// Snapshots of `server` as reported, in no order.
    pub fn snapshots(
        &self,
        server: &ServerId,
        machine: Option<&MachineKey>,
        disk: Option<&DiskId>,
    ) -> Vec<pb::Snapshot> {
        let inner = self.lock();
        let Some(state) = inner.servers.get(server) else { return Vec::new() };
        state.snapshots(machine, disk).cloned().collect()
    }

    /// Ids of the snapshots of `server` as reported.
    pub fn snapshot_ids(&self, server: &ServerId) -> BTreeSet<SnapshotId> {
        let inner = self.lock();
        let told = inner.servers.get(server).map(|state| state.told.snapshots.ids());
        told.into_iter().flatten().collect()
    }

    /// Unix milliseconds of the newest backup of each machine on each server, as reported: of one whose blocks are all there.
    pub fn last_backups(&self) -> BTreeMap<(String, ServerId), i64> {
        let inner = self.lock();
        let mut newest = BTreeMap::new();
        for (server, state) in &inner.servers {
            let of_disks = state.told.snapshots.newest();
            for snapshot in of_disks.filter(|snapshot| snapshot.missing_blocks == 0) {
                let key = (snapshot.machine.clone(), server.clone());
                let at = newest.entry(key).or_insert(i64::MIN);
                *at = snapshot.committed_ms.max(*at);
            }
        }
        newest
    }

    /// Machines that have started backups and whose servers all say that none was ever committed, with the Unix milliseconds since
    /// when the first start is known.
    pub fn unfinished(&self) -> BTreeMap<MachineKey, i64> {
        let inner = self.lock();
        let mut uses: BTreeMap<&MachineKey, (i64, bool)> = BTreeMap::new();
        let all = inner.servers.values().flat_map(|state| &state.uses);
        for (machine, used) in all.filter(|(_, used)| used.counter > 0) {
            let (since_ms, is_unfinished) = uses.entry(machine).or_insert((i64::MAX, true));
            *since_ms = used.first_ms.min(*since_ms);
            *is_unfinished &= used.is_unfinished;
        }
        let unfinished = uses.into_iter().filter(|(_, (_, is_unfinished))| *is_unfinished);
        unfinished.map(|(machine, (since_ms, _))| (machine.clone(), since_ms)).collect()
    }

    /// One snapshot, with the server that has reported it.
    pub fn snapshot(&self, id: SnapshotId) -> Option<(ServerId, pb::Snapshot)> {
        let inner = self.lock();
        inner.servers.iter().find_map(|(server, state)| {
            Some((server.clone(), state.told.snapshots.get(id)?.clone()))
        })
    }

    /// Counters of all machines that have used `server`.
    pub fn uses(&self, server: &ServerId) -> Vec<(MachineKey, u64)> {
        let inner = self.lock();
        let Some(state) = inner.servers.get(server) else { return Vec::new() };
        state.uses.iter().map(|(machine, used)| (machine.clone(), used.counter)).collect()
    }
}

impl Inner {
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn used(&self, machine: &MachineKey, server: &ServerId) -> state::Use {
        let mut used = self
            .servers
            .get(server)
            .and_then(|state| state.uses.get(machine))
            .copied()
            .unwrap_or_default();
        for (_, _, counter) in self.claims.values().filter(|(m, s, _)| m == machine && s == server)
        {
            used.counter = used.counter.max(*counter);
            if used.chain == Chain::Absent {
                used.chain = Chain::Assumed;
            }
        }
        used
    }

    /// Counter of the newest start that the server has told of, or accepted.
    fn stored_use(&self, machine: &MachineKey, server: &ServerId) -> u64 {
        let uses = self.servers.get(server).map(|state| &state.uses);
        uses.and_then(|uses| uses.get(machine)).map_or(0, |used| used.counter)
    }

    fn highest_use(&self, machine: &MachineKey) -> u64 {
        let stored = self
            .servers
            .values()
            .filter_map(|state| state.uses.get(machine))
            .map(|used| used.counter);
        let claimed =
            self.claims.values().filter(|(m, ..)| m == machine).map(|(.., counter)| *counter);
        stored.chain(claimed).max().unwrap_or(0)
    }

    // Walks all machines: thousands of them take less than a millisecond, and starts are rare.
    fn last_starts(&self) -> HashMap<ServerId, usize> {
        let mut newest: HashMap<&MachineKey, (u64, &ServerId)> = HashMap::new();
        let stored = self.servers.iter().flat_map(|(server, state)| {
            state.uses.iter().map(move |(machine, used)| (machine, used.counter, server))
        });
        let claimed =
            self.claims.values().map(|(machine, server, counter)| (machine, *counter, server));
        for (machine, counter, server) in
            stored.chain(claimed).filter(|(_, counter, _)| *counter > 0)
        {
            let entry = newest.entry(machine).or_insert((counter, server));
            // Equal counters come from two janus that could not see each other; the lowest id stands for both.
            if (counter, std::cmp::Reverse(server)) > (entry.0, std::cmp::Reverse(entry.1)) {
                *entry = (counter, server);
            }
        }
        let mut counts = HashMap::new();
        for (_, server) in newest.into_values() {
            *counts.entry(server.clone()).or_insert(0) += 1;
        }
        counts
    }

    fn is_seeded(&self, machine: &MachineKey, server: &ServerId) -> bool {
        let vitals = self.servers.get(server).and_then(|state| state.vitals.as_ref());
        let seeding = vitals.map_or(&[][..], |vitals| &vitals.seeding);
        seeding.iter().any(|text| text.parse().is_ok_and(|which: Which| which.takes(machine)))
    }

    fn initial_runs(&self, server: &ServerId, now: Instant) -> u32 {
        let mut machines = self.runs.machines_at(server, now);
        machines.extend(
            self.claims.values().filter(|(_, at, _)| at == server).map(|(machine, ..)| machine),
        );
        let uses = self.servers.get(server).map(|state| &state.uses);
        let has_chain = |machine: &MachineKey| {
            uses.and_then(|uses| uses.get(machine)).is_some_and(|used| used.chain == Chain::Present)
        };
        machines.into_iter().filter(|machine| !has_chain(machine)).count() as u32
    }
}

/// A start on its way. Dropped without [`Claim::accept`], nothing has happened.
#[derive(Debug)]
pub struct Claim {
    registry: Registry,
    number: u64,
    counter: u64,
}

impl Claim {
    /// The use counter that the start carries.
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// The server has accepted the start with this counter.
    pub fn accept(self, counter: u64) {
        let mut inner = self.registry.lock();
        let Some((machine, server, _)) = inner.claims.remove(&self.number) else { return };
        inner.runs.started(&machine, &server, Instant::now());
        inner.revision += 1;
        if inner.servers.len() >= MAX_SERVERS && !inner.servers.contains_key(&server) {
            return;
        }
        let state = inner.servers.entry(server).or_default();
        state.raise(&machine, counter);
        if let Some(used) = state.uses.get_mut(&machine)
            && used.chain == Chain::Absent
        {
            used.chain = Chain::Assumed;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.registry.lock().claims.remove(&self.number);
    }
}

/// A call of a run under way.
#[derive(Debug)]
pub struct RunCall {
    registry: Registry,
    run: BackupId,
    meter: Arc<Meter>,
}

impl RunCall {
    /// What counts the run's bytes.
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }
}

impl Drop for RunCall {
    fn drop(&mut self) {
        self.registry.lock().runs.end(self.run, Instant::now());
    }
}

/// The one report stream of a server whose messages are taken. Dropping it closes the stream.
#[derive(Debug)]
pub struct ReportSlot {
    registry: Registry,
    server: ServerId,
    slot: u64,
}

impl ReportSlot {
    /// Takes one message in, whatever its kind but hello.
    ///
    /// # Errors
    /// When a newer stream of the server is open.
    pub fn take(
        &self,
        sequence: u64,
        event: Option<pb::report_request::Event>,
    ) -> Result<(), ReportRefused> {
        use pb::report_request::Event;
        let mut inner = self.registry.lock();
        inner.revision +=
            u64::from(!matches!(event, Some(Event::Heartbeat(_) | Event::Revocations(_)) | None));
        let state = inner
            .servers
            .get_mut(&self.server)
            .filter(|state| state.slot == self.slot)
            .ok_or_else(|| ReportRefused::Superseded { server: self.server.clone() })?;
        state.last_message = Some(Instant::now());
        state.heard_ms = unix_ms();
        state.version.sequence = state.version.sequence.max(sequence);
        match event {
            Some(Event::Full(change) | Event::Change(change)) => {
                state.take_machines(&change.machines);
                let told = state.staged.as_mut().unwrap_or(&mut state.told);
                told.apply(change);
                if told.snapshots.is_short() && !state.is_said_short {
                    state.is_said_short = true;
                    let kept = told.snapshots.len();
                    warn!(server = %self.server, kept, "has more snapshots than are remembered here: the oldest are not listed while it can't be reached");
                }
            }
            Some(Event::FullEnd(_)) => state.finish_full(),
            Some(Event::Grants(grants)) => state.granted.get_or_insert_default().take(grants),
            Some(Event::Heartbeat(heartbeat)) => {
                state.vitals = heartbeat.vitals.or(state.vitals.take());
            }
            // The report service has taken them.
            Some(Event::Hello(_) | Event::Revocations(_)) | None => {}
        }
        Ok(())
    }
}

impl Drop for ReportSlot {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        if let Some(state) = inner.servers.get_mut(&self.server)
            && state.slot == self.slot
        {
            state.last_message = None;
            // An unfinished full state is worth less than the old complete one.
            state.staged = None;
        }
    }
}

#[cfg(test)]
mod tests;
