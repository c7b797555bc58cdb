//! The table service: hash tables for other servers, and what is mirrored here of theirs.

use std::sync::Arc;

use janus_proto::{
    error::{ErrorReason, WireError, status},
    ids::{BlockHash, MachineKey, SnapshotId},
    pb::{self, table_service_server::TableService},
    proof::Statement,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::{
    audit::{Action, Event},
    blocking,
    caller::Caller,
    chain::{
        Held,
        table::{Difference, Differing, TableError, TableStack},
    },
    mirror::{Mirror, record::Description, share::Share},
    restore::RestoreError,
    runs::Runs,
    spawn_work,
};

/// Answers made but not yet taken by the transport.
const QUEUE: usize = 2;
/// Bytes of segments gathered in a message: with one more segment it is below the 1 MiB that the contract allows.
const MESSAGE_BYTES: usize = 1 << 19;
/// What a segment takes beside its hashes.
const SEGMENT_BYTES: usize = 192;
const PAGE: usize = 100;
const MAX_PAGE: usize = 200;

/// The service; see `table.proto`.
pub struct Tables {
    runs: Arc<Runs>,
    mirror: Arc<Mirror>,
    server: String,
}

impl Tables {
    /// A service over the runs and the mirror of the server of this name.
    pub fn new(runs: Arc<Runs>, mirror: Arc<Mirror>, server: String) -> Self {
        Self { runs, mirror, server }
    }

    fn held(&self, id: SnapshotId, caller: &Caller) -> Result<Held, RestoreError> {
        let held = self.runs.snapshot(id).filter(|held| caller.may_list(&held.run.machine));
        held.ok_or_else(|| RestoreError::UnknownSnapshot { id, server: self.server.clone() })
    }
}

/// The tables of a snapshot, and of the one that it is compared with, where that can be.
type Pair = (TableStack, Option<(SnapshotId, TableStack)>);

/// Opens both. Blocks.
fn open(runs: &Runs, held: &Held, since: Option<Held>) -> Result<Pair, RestoreError> {
    let snapshot = held.snapshot();
    let fits = |other: &Held| {
        other.run.machine == held.run.machine
            && other.snapshot().disk == snapshot.disk
            && other.snapshot().size_bytes == snapshot.size_bytes
    };
    let since = since.filter(fits).map(|held| held.snapshot().id);
    let ids: Vec<SnapshotId> = std::iter::once(snapshot.id).chain(since).collect();
    let opened = runs.machine(&held.run.machine);
    let opened = opened.map(|machine| runs.open_tables(&machine, &ids)).unwrap_or_default();
    let mut opened = opened.into_iter().map(|(id, tables, _)| (id, tables)).peekable();
    match opened.next_if(|(id, _)| *id == snapshot.id) {
        Some((_, tables)) => Ok((tables, opened.next())),
        // It says why not.
        None => Ok((runs.open_for_reading(held)?.tables, None)),
    }
}

#[tonic::async_trait]
impl TableService for Tables {
    type ReadTableStream = ReceiverStream<Result<pb::ReadTableResponse, Status>>;

    async fn read_table(
        &self,
        request: Request<pb::ReadTableRequest>,
    ) -> Result<Response<Self::ReadTableStream>, Status> {
        let (caller, who) = (Caller::of(&request)?, Caller::who(&request));
        let request = request.into_inner();
        caller.has_proven(&Statement::table(&request))?;
        let held = self.held(request.snapshot_id.parse()?, &caller)?;
        let since = match request.since_snapshot_id.as_str() {
            "" => None,
            id => self.held(id.parse()?, &caller).ok(),
        };
        let (runs, of) = (self.runs.clone(), held.clone());
        let opening = move || {
            let opened = open(&runs, &of, since)?;
            let (run, snapshot) = (&of.run, of.snapshot());
            let event = Event::new(Action::Open).of_run(&run.machine, run.backup);
            let event = event.of_snapshot(&snapshot.disk, snapshot.id).noting("its table");
            runs.note(&who, event);
            Ok::<_, RestoreError>(opened)
        };
        let (tables, since) = blocking(opening).await??;
        let start = pb::TableStart {
            snapshot: Some(self.runs.to_wire(&held, &self.server)),
            since_snapshot_id: since.as_ref().map(|(id, _)| id.to_string()).unwrap_or_default(),
        };
        let (answers, stream) = mpsc::channel(QUEUE);
        let first = request.first_segment;
        spawn_work(async move {
            let since = since.map(|(_, tables)| tables);
            if let Err(error) = send(&tables, since, first, start, &answers).await {
                let _ = answers.send(Err(RestoreError::from(error).into())).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn list_tables(
        &self,
        request: Request<pb::ListTablesRequest>,
    ) -> Result<Response<pb::ListTablesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let machine = match request.get_ref().machine.as_str() {
            "" => caller.machine(request.metadata())?,
            named => named.parse::<MachineKey>()?,
        };
        if !caller.may_list(&machine) {
            let text = format!("{} may not read machine {machine}", caller.principal);
            return Err(status(ErrorReason::NotAllowed, text));
        }
        let request = request.into_inner();
        let all = self.mirror.of_machine(&machine);
        let first = match request.page_token.as_str() {
            "" => 0,
            token => {
                let after: SnapshotId = token.parse()?;
                let at = all.iter().position(|(description, _)| description.id == after);
                at.ok_or_else(|| gone(token))? + 1
            }
        };
        let size = if request.page_size == 0 { PAGE } else { request.page_size as usize };
        let page = all.get(first..).unwrap_or_default();
        let (page, rest) = page.split_at(size.min(MAX_PAGE).min(page.len()));
        let last = page.last().filter(|_| !rest.is_empty());
        Ok(Response::new(pb::ListTablesResponse {
            tables: page.iter().map(to_wire).collect(),
            next_page_token: last.map(|(last, _)| last.id.to_string()).unwrap_or_default(),
        }))
    }
}

fn gone(token: &str) -> WireError {
    let token = janus_proto::error::shorten(token);
    WireError::invalid(
        "page_token",
        format!("{token:?} is not from this list, or gone: begin again"),
    )
}

fn to_wire((description, share): &(Description, Option<Arc<Share>>)) -> pb::MirroredTable {
    let share = share.as_ref().map(|share| pb::TableShare {
        content_bytes: share.content_bytes,
        held_bytes: share.held_bytes,
        snapshot_ids: share.of.iter().map(ToString::to_string).collect(),
    });
    pb::MirroredTable { snapshot: Some(description.wire.clone()), share }
}

type Answers = mpsc::Sender<Result<pb::ReadTableResponse, Status>>;

/// Sends what differs, which blocks. A receiver that has gone ends it.
async fn send(
    tables: &TableStack,
    since: Option<TableStack>,
    first: u64,
    start: pb::TableStart,
    answers: &Answers,
) -> Result<(), TableError> {
    let since = match since {
        Some(since) => since,
        None => TableStack::new(Vec::new(), tables.disk_bytes())?,
    };
    let mut answer = pb::ReadTableResponse { start: Some(start), segments: Vec::new() };
    let mut bytes = 0;
    for differing in Difference::new(tables, &since, first)? {
        let differing = differing?;
        bytes += SEGMENT_BYTES + differing.hashes.len() * BlockHash::LEN;
        answer.segments.push(segment(&differing));
        if bytes >= MESSAGE_BYTES {
            bytes = 0;
            if answers.send(Ok(std::mem::take(&mut answer))).await.is_err() {
                return Ok(());
            }
        }
    }
    let is_told = answer.start.is_none() && answer.segments.is_empty();
    if !is_told {
        let _ = answers.send(Ok(answer)).await;
    }
    Ok(())
}

fn segment(differing: &Differing) -> pb::TableSegment {
    let present: Vec<u8> = differing.present.0.iter().flat_map(|word| word.to_le_bytes()).collect();
    let hashes: Vec<u8> = differing.hashes.iter().flat_map(|hash| hash.0).collect();
    pb::TableSegment {
        segment: differing.segment,
        digest: differing.digest.0.to_vec().into(),
        present: present.into(),
        hashes: hashes.into(),
    }
}
