//! The restore service: hashes or blocks of a range out, as a stream.

pub(crate) mod blocks;
mod hashes;

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::{
    asked,
    error::{ErrorReason, WireError, status},
    grants::Which,
    ids::{
        BlockHash, HandleId, MachineKey, ServerId, SessionId, SnapshotId, block_count,
        segment_count,
    },
    pb::{self, read_hashes_request::Of, restore_service_server::RestoreService},
    proof::Statement,
    tls::Role,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use self::{
    blocks::send_blocks,
    hashes::{Asked, send_hashes},
};
use crate::{
    audit::{Action, Event},
    blocking,
    caller::Caller,
    chain::{
        opened::{OpenError, OpenedSnapshot},
        table::TableError,
    },
    mirror::{Mirror, MirrorError, OpenedTable, record::Description},
    runs::{RunError, Runs},
    session::Session,
};

/// How long a handle lives without being used.
pub const HANDLE_LEASE: Duration = Duration::from_secs(600);
/// How long a reader waits for a segment of a stub.
const FETCH: Duration = Duration::from_secs(20);
const MAX_HANDLES: usize = 1024;
/// Of one machine.
const MAX_HANDLES_OF_MACHINE: usize = 64;
/// Answers made but not yet taken by the transport, about 1 MiB each.
const QUEUE: usize = 4;

/// What can go wrong with reading a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Not here.
    #[error(
        "snapshot {id} is not on server {server}; the catalog names its server, repeat the call with janus-server"
    )]
    UnknownSnapshot {
        /// What was asked for.
        id: SnapshotId,
        /// This server.
        server: String,
    },
    /// Not open.
    #[error("handle {id} is not open (any more): open the snapshot again")]
    UnknownHandle {
        /// What was asked for.
        id: HandleId,
    },
    /// Too many at once.
    #[error(
        "{MAX_HANDLES_OF_MACHINE} snapshots of this machine or {MAX_HANDLES} in all are open on this server: close some or try again later"
    )]
    TooMany,
    /// The chain can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A table can't be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Only its hashes are here.
    #[error(
        "only the table of snapshot {id} is on server {server}, its blocks are on {holder}: `janus-client restore` reads them there, and from others while it is away"
    )]
    OnlyTable {
        /// What was asked for.
        id: SnapshotId,
        /// This server.
        server: String,
        /// The snapshot's.
        holder: ServerId,
    },
    /// A mirrored table can't be read.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// Blocks are lost.
    #[error("block {block} of the disk is lost: it is not what was backed up any more")]
    Lost {
        /// The first of them.
        block: u64,
    },
    /// A session can't be read, or its head is damaged.
    #[error(transparent)]
    Run(#[from] RunError),
}

struct Handle {
    opened: Opened,
    /// A server that fills a stub from it.
    filler: Option<ServerId>,
    used: Instant,
}

/// What a handle stands for.
#[derive(Clone)]
enum Opened {
    Snapshot(Arc<OpenedSnapshot>),
    /// The hashes of a snapshot of another server.
    Table(Arc<OpenedTable>),
}

impl Opened {
    fn machine(&self) -> &MachineKey {
        match self {
            Self::Snapshot(opened) => &opened.held.run.machine,
            Self::Table(opened) => &opened.description.machine,
        }
    }
}

/// Where hashes are read from.
enum Content {
    Snapshot(Arc<OpenedSnapshot>),
    Table(Arc<OpenedTable>, Arc<Mirror>),
    Session(Arc<Session>, Arc<Runs>),
}

impl Content {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Snapshot(opened) => opened.held.snapshot().size_bytes,
            Self::Table(opened, _) => opened.tables.disk_bytes(),
            Self::Session(session, _) => session.disk.size_bytes,
        }
    }

    fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, RestoreError> {
        Ok(match self {
            Self::Snapshot(opened) => opened.tables.segment(segment)?,
            Self::Table(opened, mirror) => opened
                .tables
                .segment(segment)
                .inspect_err(|_| mirror.doubt(opened.description.id))?,
            Self::Session(session, runs) => {
                session.segment(segment).map_err(|error| runs.cannot_compare(session, error))?
            }
        })
    }

    /// Digests of a range of segments: all of a large disk would take as much memory for each reader.
    fn digests_in(&self, range: Range<u64>) -> Result<Vec<BlockHash>, RestoreError> {
        Ok(match self {
            Self::Snapshot(opened) => opened.tables.digests_in(range),
            Self::Table(opened, _) => opened.tables.digests_in(range),
            Self::Session(session, runs) => {
                session.digests_in(range).map_err(|error| runs.cannot_compare(session, error))?
            }
        })
    }
}

/// The service; see `restore.proto`.
pub struct Restore {
    runs: Arc<Runs>,
    mirror: Arc<Mirror>,
    server: String,
    /// Machines that don't read what they wrote.
    write_only: Vec<Which>,
    handles: Mutex<HashMap<HandleId, Handle>>,
}

impl Restore {
    /// A service over the runs and the mirror of the server of this name.
    pub fn new(runs: Arc<Runs>, mirror: Arc<Mirror>, server: String) -> Self {
        Self { runs, mirror, server, write_only: Vec::new(), handles: Mutex::default() }
    }

    /// The same, and these machines don't read what they wrote.
    pub fn with_write_only(self, write_only: Vec<Which>) -> Self {
        Self { write_only, ..self }
    }

    /// Closes handles that nobody has used for their lease: what they have open can't be purged. Blocks.
    pub fn expire(&self) {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.retain(|_, handle| handle.used.elapsed() < HANDLE_LEASE);
        let filling =
            handles.values().filter_map(|handle| match (&handle.opened, &handle.filler) {
                (Opened::Snapshot(opened), Some(filler)) => Some((filler.clone(), opened.clone())),
                _ => None,
            });
        let filling: Vec<_> = filling.collect();
        drop(handles);
        // Its server is still there.
        filling.iter().for_each(|(filler, opened)| self.runs.hold(filler, &opened.held));
    }

    fn keep(&self, opened: Opened, filler: Option<ServerId>) -> Result<HandleId, RestoreError> {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.retain(|_, handle| handle.used.elapsed() < HANDLE_LEASE);
        let of_machine =
            handles.values().filter(|handle| handle.opened.machine() == opened.machine());
        if handles.len() >= MAX_HANDLES || of_machine.count() >= MAX_HANDLES_OF_MACHINE {
            return Err(RestoreError::TooMany);
        }
        let id = HandleId::new();
        handles.insert(id, Handle { opened, filler, used: Instant::now() });
        Ok(id)
    }

    /// The snapshot behind a handle, whose lease is renewed. Handles of other machines are unknown to the caller.
    fn opened(&self, id: &str, caller: &Caller) -> Result<Opened, Status> {
        let id: HandleId = id.parse()?;
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = handles.get_mut(&id).filter(|handle| handle.used.elapsed() < HANDLE_LEASE);
        let handle = handle.filter(|handle| caller.may_list(handle.opened.machine()));
        let handle = handle.ok_or(RestoreError::UnknownHandle { id })?;
        handle.used = Instant::now();
        Ok(handle.opened.clone())
    }

    /// A handle for what was opened, as it is answered.
    fn answer(
        &self,
        opened: Opened,
        filler: Option<ServerId>,
        snapshot: pb::Snapshot,
    ) -> Result<pb::OpenSnapshotResponse, RestoreError> {
        let handle = self.keep(opened, filler)?.to_string();
        let lease_seconds = HANDLE_LEASE.as_secs() as u32;
        Ok(pb::OpenSnapshotResponse { handle, lease_seconds, snapshot: Some(snapshot) })
    }

    /// Opens the mirrored table of a snapshot.
    async fn open_table(
        &self,
        id: SnapshotId,
        caller: &Caller,
    ) -> Result<Response<pb::OpenSnapshotResponse>, Status> {
        let machine = self.mirror.machine_of(id).filter(|machine| caller.may_list(machine));
        let machine = machine
            .ok_or_else(|| RestoreError::UnknownSnapshot { id, server: self.server.clone() })?;
        let mirror = self.mirror.clone();
        let opened = blocking(move || mirror.open(id)).await?.map_err(RestoreError::Mirror)?;
        tracing::info!(%machine, snapshot_id = %id, "mirrored table opened");
        let snapshot = opened.description.wire.clone();
        Ok(Response::new(self.answer(Opened::Table(Arc::new(opened)), None, snapshot)?))
    }

    /// That the caller doesn't only write. Hashes it reads all the same: backups compare them.
    fn may_read_blocks(&self, caller: &Caller, opened: &Opened) -> Result<(), Status> {
        let machine = opened.machine();
        if !caller.may_read(machine) {
            let text = format!("{} may not restore machine {machine}", caller.principal);
            return Err(status(ErrorReason::NotAllowed, text));
        }
        let is_own = matches!(&caller.principal.role, Role::Client(own) if own == machine);
        if !is_own || !self.write_only.iter().any(|which| which.takes(machine)) {
            return Ok(());
        }
        let text = format!(
            "machine {machine} may only write (setting write_only of server {}): restore it as an operator, or with a certificate of `janus-server pki issue restore`",
            self.server
        );
        Err(status(ErrorReason::NotAllowed, text))
    }

    fn content(
        &self,
        of: Option<Of>,
        caller: &Caller,
        machine: Result<MachineKey, Status>,
    ) -> Result<Content, Status> {
        match of {
            Some(Of::Handle(id)) => Ok(match self.opened(&id, caller)? {
                Opened::Snapshot(opened) => Content::Snapshot(opened),
                Opened::Table(opened) => Content::Table(opened, self.mirror.clone()),
            }),
            Some(Of::SessionId(id)) => {
                let id: SessionId = id.parse()?;
                let session = self.runs.run_of(id, &machine?)?.session(id)?;
                Ok(Content::Session(session, self.runs.clone()))
            }
            None => Err(WireError::Missing { field: "handle or session_id" }.into()),
        }
    }
}

#[tonic::async_trait]
impl RestoreService for Restore {
    async fn open_snapshot(
        &self,
        request: Request<pb::OpenSnapshotRequest>,
    ) -> Result<Response<pb::OpenSnapshotResponse>, Status> {
        let caller = Caller::of(&request)?;
        let who = Caller::who(&request);
        let request = request.into_inner();
        caller.has_proven(&Statement::open(&request))?;
        let pb::OpenSnapshotRequest { snapshot_id, table, hold } = request;
        let id: SnapshotId = snapshot_id.parse()?;
        let unknown = || RestoreError::UnknownSnapshot { id, server: self.server.clone() };
        let held = self.runs.snapshot(id);
        if held.is_none() && table {
            return self.open_table(id, &caller).await;
        }
        let held = held.filter(|held| caller.may_list(&held.run.machine)).ok_or_else(unknown)?;
        let filler = server_of(&caller).filter(|_| hold);
        let (runs, holder) = (self.runs.clone(), filler.clone());
        let open = move || {
            let opened = runs.open_for_reading(&held)?;
            if let Some(machine) = runs.machine(&held.run.machine) {
                machine.note_read(opened.links());
            }
            if let Some(holder) = holder {
                runs.hold(&holder, &held);
            }
            let (run, snapshot) = (&held.run, held.snapshot());
            let event = Event::new(Action::Open).of_run(&run.machine, run.backup);
            runs.note(&who, event.of_snapshot(&snapshot.disk, snapshot.id));
            Ok(opened)
        };
        let opened = blocking(open).await?;
        let opened = Arc::new(opened.map_err(|error| match self.runs.snapshot(id) {
            // Deleted or thinned since we looked.
            None => unknown(),
            Some(_) => RestoreError::Open(error),
        })?);
        let snapshot = self.runs.to_wire(&opened.held, &self.server);
        tracing::info!(machine = %opened.held.run.machine, snapshot_id = %id, "snapshot opened");
        Ok(Response::new(self.answer(Opened::Snapshot(opened), filler, snapshot)?))
    }

    async fn close_snapshot(
        &self,
        request: Request<pb::CloseSnapshotRequest>,
    ) -> Result<Response<pb::CloseSnapshotResponse>, Status> {
        let caller = Caller::of(&request)?;
        let pb::CloseSnapshotRequest { handle: id, release } = request.into_inner();
        if let Ok(opened) = self.opened(&id, &caller) {
            let id: HandleId = id.parse()?;
            self.handles.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            if let (Opened::Snapshot(opened), Some(server)) = (opened, server_of(&caller))
                && release
            {
                let runs = self.runs.clone();
                blocking(move || runs.release(&server, &opened.held)).await?;
            }
        }
        Ok(Response::new(pb::CloseSnapshotResponse {}))
    }

    type ReadHashesStream = ReceiverStream<Result<pb::ReadHashesResponse, Status>>;

    async fn read_hashes(
        &self,
        request: Request<pb::ReadHashesRequest>,
    ) -> Result<Response<Self::ReadHashesStream>, Status> {
        let caller = Caller::of(&request)?;
        let machine = caller.machine(request.metadata());
        let request = request.into_inner();
        let level = request.level();
        let content = self.content(request.of, &caller, machine)?;
        let total = match level {
            pb::HashLevel::Segment => segment_count(content.size_bytes()),
            pb::HashLevel::Block => block_count(content.size_bytes()),
            pb::HashLevel::Unspecified => return Err(WireError::Missing { field: "level" }.into()),
        };
        let wanted = Asked {
            level,
            ranges: asked::ranges(&request.ranges, total)?,
            hash_bytes: asked::hash_bytes(request.hash_bytes)?,
        };
        let (answers, stream) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || send_hashes(&content, &wanted, &answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ReadBlocksStream = ReceiverStream<Result<pb::ReadBlocksResponse, Status>>;

    async fn read_blocks(
        &self,
        request: Request<pb::ReadBlocksRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let opened = self.opened(&request.handle, &caller)?;
        self.may_read_blocks(&caller, &opened)?;
        let opened = match opened {
            Opened::Snapshot(opened) => opened,
            Opened::Table(opened) => {
                let Description { id, server: holder, .. } = opened.description.clone();
                let server = self.server.clone();
                return Err(RestoreError::OnlyTable { id, server, holder }.into());
            }
        };
        let ranges =
            asked::ranges(&request.ranges, block_count(opened.held.snapshot().size_bytes))?;
        let encoding = request.encodings().next().unwrap_or(pb::Encoding::None);
        let name_damaged = request.name_damaged;
        let (answers, stream) = mpsc::channel(QUEUE);
        let runs = self.runs.clone();
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || {
            let _in_span = span.entered();
            let fetch = fetch_of(&runs, &opened);
            let fetch = fetch.as_ref().map(|fetch| fetch as &dyn Fn(u64));
            let lost = send_blocks(&opened, &ranges, encoding, name_damaged, fetch, &answers);
            runs.note_lost(&opened, &lost);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The name of a caller that is a server.
fn server_of(caller: &Caller) -> Option<ServerId> {
    match &caller.principal.role {
        Role::Server(id) => Some(id.clone()),
        _ => None,
    }
}

/// Gets a segment from elsewhere, where what was opened builds on a stub. After one that didn't come in time no other is tried.
fn fetch_of(runs: &Runs, opened: &OpenedSnapshot) -> Option<impl Fn(u64)> {
    let base = opened.chain.len().checked_sub(1)?;
    let stub = opened.chain.get(base).filter(|_| opened.is_stub(base))?.snapshot().id;
    let is_late = std::cell::Cell::new(false);
    Some(move |segment| {
        if !is_late.get() {
            let began = Instant::now();
            runs.wanted().fetch(stub, segment, FETCH);
            is_late.set(began.elapsed() >= FETCH);
        }
    })
}

/// A stream that broke off: why, for the caller.
fn too_short() -> Status {
    status(ErrorReason::StoreDamaged, "a table of this snapshot is shorter than its disk")
}
