//! Seeding: the newest backups of another server's machines into this store, so that the next one here is a delta.
//!
//! What the other server has is read as what was carried here is ([`crate::carry`]): a snapshot there is the content of an
//! import (`remote`), only what its heads here don't hold travels, and a seeding that ends early is gone on with. Everything
//! here blocks, on a runtime of its own for the calls.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use janus_proto::{
    channel::{Dialer, Expect},
    error::{self, ErrorReason, WireError},
    grants::Which,
    ids::{BackupId, DiskId, MachineKey, ServerId},
    pb,
    tls::Role,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    carry::{self, CarryError, Imported, NewDisk, NewRun},
    chain::Held,
    peer::{self, Peers, is_away},
    runs::Runs,
};

pub mod choice;
mod remote;

use self::choice::Choice;
pub(crate) use self::remote::Remote;

/// How long a server that is away is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_secs(1);

/// Why nothing can be seeded.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A name of a server, and no janus to ask for it.
    #[error(
        "server {server} is reached through janus, and this server has no janus_urls: name its URL, --from https://HOST:PORT"
    )]
    NoJanus {
        /// As given.
        server: ServerId,
    },
    /// Neither a URL nor a name.
    #[error("--from {from}: neither a server's name nor a URL as https://HOST:PORT")]
    From {
        /// As given.
        from: String,
    },
    /// Nobody answers.
    #[error("the server to seed from can't be reached: {reason}")]
    Unreachable {
        /// Why.
        reason: String,
    },
    /// A janus stands between.
    #[error("{url} is a janus: name the server behind it, --from NAME")]
    Janus {
        /// As given.
        url: String,
    },
    /// This server itself.
    #[error("{server} is this server: name another one")]
    Own {
        /// Its name.
        server: ServerId,
    },
    /// It has no such machine.
    #[error("server {server} has no backup of what was named; machines are known at {}", .known.join(", "))]
    Nothing {
        /// Which server.
        server: ServerId,
        /// Servers that have any.
        known: Vec<String>,
    },
    /// No limit.
    #[error("{0}")]
    Limit(String),
    /// The calls need threads.
    #[error("no threads for calls: {0}")]
    Threads(std::io::Error),
}

/// What comes of a machine.
#[derive(Debug)]
pub enum Event<'a> {
    /// A backup as new is here, of that time.
    Here(&'a DiskId, i64),
    /// The newest backup there has lost something: an older one is taken.
    PassedOver(&'a DiskId),
    /// A run was taken in.
    Seeded(&'a Imported),
    /// A run was not.
    Failed(&'a CarryError),
}

/// Another server, to seed from.
pub struct Seeder {
    runtime: tokio::runtime::Runtime,
    link: Link,
    /// The other server, as it was named.
    from: String,
    stubs: bool,
    /// The run that is taken, where that needn't be the newest.
    only: Option<BackupId>,
}

/// The server of this name.
fn named(from: &str) -> Result<ServerId, SeedError> {
    from.parse().map_err(|_| SeedError::From { from: from.to_owned() })
}

/// Checks what can be told of the name or URL of another server without asking anybody.
///
/// # Errors
/// Says what is wrong with it.
pub fn check_from(from: &str, own: &ServerId, janus_urls: &[String]) -> Result<(), CarryError> {
    if from.contains("://") {
        return Ok(());
    }
    let server = named(from)?;
    if janus_urls.is_empty() {
        return Err(SeedError::NoJanus { server }.into());
    }
    match server == *own {
        true => Err(SeedError::Own { server }.into()),
        false => Ok(()),
    }
}

/// How it is called.
#[derive(Clone)]
struct Link {
    peers: Peers,
    server: ServerId,
    stop: CancellationToken,
    /// How long a server that is away is waited for.
    patience: Duration,
}

impl Seeder {
    /// Connects to the server `from` names, by its URL or through one of `janus_urls`.
    ///
    /// # Errors
    /// As [`SeedError`] says.
    pub fn connect(
        from: &str,
        (own, dialer): (&ServerId, &Dialer),
        janus_urls: &[String],
        stop: &CancellationToken,
    ) -> Result<Self, CarryError> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().map_err(SeedError::Threads)?;
        check_from(from, own, janus_urls)?;
        let unreachable = |reason| SeedError::Unreachable { reason };
        let (peers, server) = match from.contains("://") {
            true => {
                let urls = [from.to_owned()];
                let connecting = peer::connect(&urls, Expect::ServerOrJanus, dialer);
                let peers = runtime.block_on(connecting).map_err(unreachable)?;
                let Role::Server(server) = peers.role.clone() else {
                    return Err(SeedError::Janus { url: from.to_owned() }.into());
                };
                (peers, server)
            }
            false => {
                let server = named(from)?;
                let connecting = peer::connect(janus_urls, Expect::Janus, dialer);
                (runtime.block_on(connecting).map_err(unreachable)?, server)
            }
        };
        if server == *own {
            return Err(SeedError::Own { server }.into());
        }
        let link = Link { peers, server, stop: stop.clone(), patience: PATIENCE };
        Ok(Self { runtime, link, from: from.to_owned(), stubs: false, only: None })
    }

    /// Disks that have no chain here get only hashes: their blocks are fetched later (`fill`).
    #[must_use]
    pub fn hashes_only(mut self, stubs: bool) -> Self {
        self.stubs = stubs;
        self
    }

    /// Takes this run, not the newest of each disk.
    #[must_use]
    pub fn only(mut self, run: Option<BackupId>) -> Self {
        self.only = run;
        self
    }

    /// Waits so long for a server that is away.
    #[must_use]
    pub(crate) fn with_patience(mut self, patience: Duration) -> Self {
        self.link.patience = patience;
        self
    }

    /// A snapshot on a server that is reached the same way, which keeps it there on `hold`.
    pub(crate) fn remote(
        &self,
        server: &ServerId,
        snapshot: pb::Snapshot,
        hold: bool,
    ) -> Result<Remote, CarryError> {
        Remote::open(self.runtime.handle(), self.link.to(server), snapshot, hold)
    }

    /// Servers that have backups of a machine and are reached the same way.
    pub(crate) fn holders(&self, machine: &MachineKey) -> Result<Vec<ServerId>, CarryError> {
        let all = self.link.again(|| async { Ok(self.link.peers.machines().await?) }, || {});
        let mut holders = Vec::new();
        for info in self.runtime.block_on(all)? {
            let of_machine = info.servers.iter().filter(|_| info.machine == machine.to_string());
            for there in of_machine.filter(|there| there.snapshot_count > 0) {
                holders.push(there.server_id.parse().map_err(|error| self.nonsense(&error))?);
            }
        }
        Ok(holders)
    }

    /// Snapshots of a machine on one of them.
    pub(crate) fn snapshots_of(
        &self,
        server: &ServerId,
        machine: &MachineKey,
    ) -> Result<Vec<pb::Snapshot>, CarryError> {
        let link = self.link.to(server);
        let list = || async { Ok(link.peers.snapshots(&link.server, machine).await?) };
        self.runtime.block_on(link.again(list, || {}))
    }

    /// The other server.
    pub fn server(&self) -> &ServerId {
        &self.link.server
    }

    /// The machines that are meant and have backups there, each with what means it.
    ///
    /// # Errors
    /// When the list can't be had, or there are none.
    pub fn machines<'w>(
        &self,
        which: &'w [Which],
    ) -> Result<Vec<(MachineKey, &'w Which)>, CarryError> {
        let Link { server, .. } = &self.link;
        let all = self.link.again(|| async { Ok(self.link.peers.machines().await?) }, || {});
        let (mut machines, mut known) = (Vec::new(), BTreeSet::new());
        for info in self.runtime.block_on(all)? {
            let holders = info.servers.iter().filter(|there| there.snapshot_count > 0);
            let holders: Vec<_> = holders.map(|there| there.server_id.as_str()).collect();
            let key: MachineKey = info.machine.parse().map_err(|error| self.nonsense(&error))?;
            if holders.contains(&server.as_str()) {
                let meant = which.iter().filter(|which| which.takes(&key));
                machines.extend(meant.map(|which| (key.clone(), which)));
            }
            known.extend(holders.into_iter().map(str::to_owned));
        }
        if machines.is_empty()
            && let Some(reason) = self.runtime.block_on(self.link.away())
        {
            return Err(SeedError::Unreachable { reason }.into());
        }
        match machines.is_empty() {
            true => Err(SeedError::Nothing {
                server: server.clone(),
                known: if known.is_empty() {
                    vec!["no server".into()]
                } else {
                    known.into_iter().collect()
                },
            }
            .into()),
            false => Ok(machines),
        }
    }

    /// What is to be taken of a machine, of which `here` is held here, and `begun` was begun.
    fn choose(
        &self,
        machine: &MachineKey,
        which: &Which,
        here: &[Held],
        begun: Option<BackupId>,
    ) -> Result<Choice, CarryError> {
        let listed = self.snapshots_of(self.server(), machine)?;
        let choice = choice::choose(&listed, here, begun, self.only, |disk| which.takes_disk(disk));
        let choice = choice.map_err(|error| self.nonsense(&error))?;
        match (choice.runs.is_empty() && choice.here.is_empty(), self.only) {
            (false, _) => Ok(choice),
            (true, None) => {
                Err(self.link.error("it has no backup of such a disk of that machine".into()))
            }
            (true, Some(run)) => {
                Err(self.link.error(format!("it has no run {run} of such a disk of that machine")))
            }
        }
    }

    /// Opens snapshots of one run of a machine, to be imported beside what is `held` here.
    fn open(
        &self,
        machine: &MachineKey,
        snapshots: &[pb::Snapshot],
        held: &[Held],
    ) -> Result<NewRun, CarryError> {
        let has_chain = |disk: &str| held.iter().any(|held| held.snapshot().disk.as_str() == disk);
        let nonsense = |error| self.nonsense(&error);
        let first = snapshots.first();
        let disk = |snapshot: &pb::Snapshot| {
            Ok::<_, CarryError>(NewDisk {
                disk: snapshot.disk_id.parse().map_err(nonsense)?,
                size_bytes: snapshot.size_bytes,
                logical_sector_bytes: snapshot.logical_sector_bytes,
                consistency: snapshot.consistency,
                skipped_bytes: snapshot.skipped_bytes,
                // Nobody knows before it is read: what is full then ends it as a client's backup.
                data_bytes: None,
                content: {
                    // What becomes a stub is filled from it.
                    let hold = self.stubs && !has_chain(&snapshot.disk_id);
                    Box::new(self.remote(self.server(), snapshot.clone(), hold)?)
                },
            })
        };
        let run = first.map(|snapshot| snapshot.backup_id.parse()).transpose();
        Ok(NewRun {
            machine: machine.clone(),
            run: run.map_err(nonsense)?,
            taken_ms: first.map_or(0, choice::taken_ms),
            seal: first.map(|snapshot| snapshot.client_seal.to_vec()).unwrap_or_default(),
            from: Some(self.from.clone()),
            stubs: self.stubs,
            disks: snapshots.iter().map(disk).collect::<Result<_, _>>()?,
        })
    }

    /// Takes in the newest backup, or the one that was named, of each disk that is meant of a machine. `hear` gets the bytes of a run that are done and
    /// all, and answers whether to go on; `tell` hears what comes of each.
    ///
    /// # Errors
    /// When nothing of it can be taken, or it was stopped. What keeps one run away is told, and the others are taken.
    pub fn seed(
        &self,
        runs: &Arc<Runs>,
        machine: &MachineKey,
        which: &Which,
        hear: &dyn Fn(u64, u64) -> bool,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), CarryError> {
        let here = runs.machine(machine);
        let open = here.as_ref().map(|here| here.active()).unwrap_or_default();
        let held = here.map(|here| here.snapshots()).unwrap_or_default();
        let begun = open.iter().find_map(|run| run.origin()?.run);
        let choice = self.choose(machine, which, &held, begun)?;
        choice.passed_over.iter().for_each(|disk| tell(Event::PassedOver(disk)));
        choice.here.iter().for_each(|(disk, newest_ms)| tell(Event::Here(disk, *newest_ms)));
        for snapshots in &choice.runs {
            let opened = self.open(machine, snapshots, &held);
            match opened.and_then(|new| carry::import(runs, &new, hear)) {
                Ok(imported) => tell(Event::Seeded(&imported)),
                Err(CarryError::Stopped) => return Err(CarryError::Stopped),
                // Other runs have other disks.
                Err(error) => tell(Event::Failed(&error)),
            }
        }
        Ok(())
    }

    fn nonsense(&self, error: &WireError) -> CarryError {
        self.link.error(format!("its answer makes no sense: {error}"))
    }
}

impl From<SeedError> for CarryError {
    fn from(error: SeedError) -> Self {
        Self::Seed(Box::new(error))
    }
}

/// Why a call came to nothing.
enum CallError {
    Status(Status),
    Wire(WireError),
    Stopped,
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<WireError> for CallError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl Link {
    /// Why the janus in between can't reach the server, if it can't.
    async fn away(&self) -> Option<String> {
        if matches!(self.peers.role, Role::Server(_)) {
            return None;
        }
        let status = self.peers.router_status().await.ok()?;
        let server = &self.server;
        match status.servers.iter().find(|line| line.server_id == server.as_str()) {
            // It is said then which servers there are.
            None => None,
            Some(line) if line.ready => None,
            Some(line) => Some(format!("{} says of {server}: {}", self.peers.url, line.reason)),
        }
    }

    /// The same way to another server.
    fn to(&self, server: &ServerId) -> Self {
        Self { server: server.clone(), ..self.clone() }
    }

    /// Something is wrong there that doesn't pass.
    fn error(&self, reason: String) -> CarryError {
        CarryError::Source { server: self.server.clone(), reason, passes: false }
    }

    /// Makes a call, again for as long as the other server is away but not for too long; before each next try `forget` is
    /// called.
    async fn again<T, F: Future<Output = Result<T, CallError>>>(
        &self,
        call: impl Fn() -> F,
        forget: impl Fn(),
    ) -> Result<T, CarryError> {
        let (mut away_since, mut has_forgotten) = (None, false);
        loop {
            let done = tokio::select! {
                biased;
                () = self.stop.cancelled() => Err(CallError::Stopped),
                done = call() => done,
            };
            let status = match done {
                Ok(done) => return Ok(done),
                Err(CallError::Stopped) => return Err(CarryError::Stopped),
                Err(CallError::Wire(error)) => return Err(self.error(error.to_string())),
                Err(CallError::Status(status)) => status,
            };
            let has_expired = error::reason(&status) == Some(ErrorReason::HandleExpired);
            let passes = is_away(&status) || has_expired;
            let since: Instant = *away_since.get_or_insert_with(Instant::now);
            // A handle that has expired is opened again in any case.
            let is_first = has_expired && !std::mem::replace(&mut has_forgotten, true);
            if !passes || (since.elapsed() >= self.patience && !is_first) {
                let (server, reason) = (self.server.clone(), peer::told(&status));
                return Err(CarryError::Source { server, reason, passes });
            }
            forget();
            if is_first {
                continue;
            }
            tracing::debug!(server = %self.server, error = peer::told(&status), "away; trying again");
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(CarryError::Stopped),
                () = sleep(PAUSE) => {}
            }
        }
    }
}
