//! The backup service: blocks in, acknowledgements out, commit.

use std::{collections::HashSet, sync::Arc};

use janus_proto::{
    error::{ErrorReason, WireError, status},
    ids::{BackupId, BlockHash, DiskId, MAX_DISK_BYTES, MachineKey, SessionId},
    metadata,
    model::Batch,
    pb::{self, backup_service_server::BackupService},
    proof::Statement,
    trace,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use crate::{
    audit::{Action, Event},
    blocking,
    caller::Caller,
    chain::{Held, Run},
    runs::{ActiveRun, CommitDisk, RunError, RunState, Runs, WantedDisk, Writer},
    session::{Marks, Session},
    spawn_work,
};

const MAX_DISKS: usize = 64;
const MAX_SEAL_BYTES: usize = 4096;
/// Messages received but not yet written, at most 1 MiB each.
const QUEUE: usize = 8;
/// Messages after which an acknowledgement is due though more are waiting.
const ACK_EVERY: u64 = 8;

/// Encodings that this server reads and writes.
pub const ENCODINGS: [pb::Encoding; 3] =
    [pb::Encoding::None, pb::Encoding::Lz4, pb::Encoding::Zstd];

/// The service; see `backup.proto`.
pub struct Backup {
    runs: Arc<Runs>,
    here: pb::ServerAddresses,
}

impl Backup {
    /// A service over the runs of the server of this name and URLs.
    pub fn new(runs: Arc<Runs>, here: pb::ServerAddresses) -> Self {
        Self { runs, here }
    }

    fn started(&self, run: &ActiveRun) -> pb::StartBackupResponse {
        let record = run.record();
        pb::StartBackupResponse {
            backup_id: run.backup.to_string(),
            server_id: self.here.server_id.clone(),
            epoch: record.epoch,
            lease_seconds: self.runs.lease().as_secs() as u32,
            sessions: run.sessions().iter().map(|session| self.session_info(session)).collect(),
            use_counter: record.use_counter,
            encodings: ENCODINGS.map(i32::from).to_vec(),
            required_features: Vec::new(),
            warnings: Vec::new(),
            server_urls: self.here.urls.clone(),
        }
    }

    fn session_info(&self, session: &Session) -> pb::SessionInfo {
        let marks = session.marks();
        let head = session.head().map(|head| head.held.snapshot()).map(|snapshot| pb::Head {
            snapshot_id: snapshot.id.to_string(),
            table_digest: snapshot.table_digest.0.to_vec().into(),
            store_generation: self.runs.store().generation.to_string(),
            size_bytes: snapshot.size_bytes,
        });
        pb::SessionInfo {
            disk_id: session.disk.disk.to_string(),
            session_id: session.disk.session.to_string(),
            head,
            received_block: marks.received,
            durable_block: marks.durable,
            resumed: session.is_resumed(),
            resend: session.resend(),
        }
    }

    fn committed(&self, run: &Arc<Run>) -> pb::CommitBackupResponse {
        pb::CommitBackupResponse {
            snapshots: Held::all(run)
                .map(|held| self.runs.to_wire(&held, &self.here.server_id))
                .collect(),
            store_generation: self.runs.store().generation.to_string(),
        }
    }
}

fn wanted(disks: &[pb::DiskStart]) -> Result<Vec<WantedDisk>, Status> {
    if disks.is_empty() || disks.len() > MAX_DISKS {
        return Err(WireError::invalid(
            "disks",
            format!("{} of them, not 1 to {MAX_DISKS}", disks.len()),
        )
        .into());
    }
    let mut seen = HashSet::new();
    disks.iter().map(|start| wanted_disk(start, &mut seen)).collect()
}

fn wanted_disk(start: &pb::DiskStart, seen: &mut HashSet<String>) -> Result<WantedDisk, Status> {
    let disk: DiskId = start.disk_id.parse()?;
    // Some file systems don't tell cases apart, and the folders are theirs.
    if !seen.insert(disk.as_str().to_lowercase()) {
        return Err(status(
            ErrorReason::DiskTwice,
            format!("two disks of this run are called {disk}: name them apart"),
        ));
    }
    let logical_sector_bytes =
        if start.logical_sector_bytes == 0 { 512 } else { start.logical_sector_bytes };
    if !matches!(logical_sector_bytes, 512 | 4096) {
        return Err(WireError::invalid(
            "logical_sector_bytes",
            format!("{logical_sector_bytes} is neither 512 nor 4096"),
        )
        .into());
    }
    let size_bytes = start.size_bytes;
    if !size_bytes.is_multiple_of(u64::from(logical_sector_bytes)) || size_bytes > MAX_DISK_BYTES {
        let reason =
            format!("{size_bytes} is not a multiple of {logical_sector_bytes} up to 64 TiB");
        return Err(WireError::invalid("size_bytes", reason).into());
    }
    Ok(WantedDisk { disk, size_bytes, logical_sector_bytes })
}

fn commit_disk(commit: &pb::DiskCommit) -> Result<CommitDisk, Status> {
    let expected_head = match commit.expected_head_id.as_str() {
        "" => None,
        id => Some(id.parse()?),
    };
    Ok(CommitDisk {
        disk: commit.disk_id.parse()?,
        expected_head,
        table_digest: BlockHash::from_wire("table_digest", &commit.table_digest)?,
        consistency: commit.consistency,
        skipped_bytes: commit.skipped_bytes,
    })
}

fn use_counter<T>(request: &Request<T>) -> Result<u64, Status> {
    let Some(value) = request.metadata().get(metadata::USE) else { return Ok(0) };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| WireError::invalid("janus-use", "not a number").into())
}

#[tonic::async_trait]
impl BackupService for Backup {
    async fn start_backup(
        &self,
        request: Request<pb::StartBackupRequest>,
    ) -> Result<Response<pb::StartBackupResponse>, Status> {
        let (caller, who) = (Caller::of(&request)?, Caller::who(&request));
        let machine = caller.machine_to_write(request.metadata())?;
        let used = use_counter(&request)?;
        let request = request.into_inner();
        caller.has_proven(&Statement::start(&request, caller.other(&machine)))?;
        let backup: BackupId = request.backup_id.parse()?;
        // A start has no run in its metadata yet.
        trace::note("backup_id", backup);
        let wanted = wanted(&request.disks)?;
        let runs = self.runs.clone();
        let key = machine.clone();
        let start = move || {
            let run = runs.start(&key, backup, &wanted, used)?;
            let epoch = format!("epoch {}", run.record().epoch);
            runs.note(&who, Event::new(Action::Start).of_run(&key, backup).noting(epoch));
            Ok::<_, RunError>(run)
        };
        let run = blocking(start).await??;
        let answer = self.started(&run);
        tracing::info!(%machine, backup_id = %backup, epoch = answer.epoch, use_counter = answer.use_counter, "run started");
        let used = answer.use_counter;
        let mut response = Response::new(answer);
        response.metadata_mut().insert(metadata::USE, used.into());
        Ok(response)
    }

    type WriteBlocksStream = ReceiverStream<Result<pb::WriteBlocksResponse, Status>>;

    async fn write_blocks(
        &self,
        request: Request<Streaming<pb::WriteBlocksRequest>>,
    ) -> Result<Response<Self::WriteBlocksStream>, Status> {
        let machine = Caller::of(&request)?.machine_to_write(request.metadata())?;
        let (acks, answers) = mpsc::channel(QUEUE);
        let stream = request.into_inner();
        let runs = self.runs.clone();
        // Ends with the stream: its transport drops it, or the receiver of the acknowledgements is gone.
        let receiving = async move {
            let result = receive(&runs, &machine, stream, &acks).await;
            if let Err(error) = result {
                let _ = acks.send(Err(error)).await;
            }
        };
        tokio::spawn(receiving.in_current_span());
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn commit_backup(
        &self,
        request: Request<pb::CommitBackupRequest>,
    ) -> Result<Response<pb::CommitBackupResponse>, Status> {
        let (caller, who) = (Caller::of(&request)?, Caller::who(&request));
        let machine = caller.machine_to_write(request.metadata())?;
        let request = request.into_inner();
        caller.has_proven(&Statement::commit(&request, caller.other(&machine)))?;
        let backup: BackupId = request.backup_id.parse()?;
        if request.client_seal.len() > MAX_SEAL_BYTES {
            return Err(WireError::invalid(
                "client_seal",
                format!("longer than {MAX_SEAL_BYTES} bytes"),
            )
            .into());
        }
        let disks = request.disks.iter().map(commit_disk).collect::<Result<Vec<_>, _>>()?;
        let (runs, key, seal) = (self.runs.clone(), machine.clone(), request.client_seal);
        // Goes on when the caller has gone: the commit is idempotent and GetBackup tells of it.
        // Recorded before it is acknowledged. A log that can't be written doesn't keep the backup from being one.
        let commit = move || {
            let is_known = runs.is_known(&key, backup);
            let run = runs.commit(&key, backup, request.epoch, &disks, &seal);
            if is_known {
                runs.note(&who, Event::new(Action::Commit).of_run(&key, backup).with_result(&run));
            }
            run
        };
        let run = blocking(commit).await??;
        tracing::info!(%machine, backup_id = %backup, disks = run.snapshots.len(), "run committed");
        Ok(Response::new(self.committed(&run)))
    }

    async fn abort_backup(
        &self,
        request: Request<pb::AbortBackupRequest>,
    ) -> Result<Response<pb::AbortBackupResponse>, Status> {
        let machine = Caller::of(&request)?.machine_to_write(request.metadata())?;
        let who = Caller::who(&request);
        let backup: BackupId = request.into_inner().backup_id.parse()?;
        let (runs, key) = (self.runs.clone(), machine.clone());
        let abort = move || {
            let is_known = runs.is_known(&key, backup);
            let aborted = runs.abort(&key, backup);
            if is_known {
                let event = Event::new(Action::Abort).of_run(&key, backup);
                runs.note(&who, event.with_result(&aborted));
            }
            aborted
        };
        blocking(abort).await??;
        tracing::info!(%machine, backup_id = %backup, "run aborted");
        Ok(Response::new(pb::AbortBackupResponse {}))
    }

    async fn get_backup(
        &self,
        request: Request<pb::GetBackupRequest>,
    ) -> Result<Response<pb::GetBackupResponse>, Status> {
        let (caller, who) = (Caller::of(&request)?, Caller::who(&request));
        let machine = caller.machine(request.metadata())?;
        let may_write = caller.machine_to_write(request.metadata()).is_ok();
        let backup: BackupId = request.into_inner().backup_id.parse()?;
        let mut answer =
            pb::GetBackupResponse { backup_id: backup.to_string(), ..Default::default() };
        let state = match self.runs.state(&machine, backup)? {
            RunState::Open(run) => {
                answer.sessions =
                    run.sessions().iter().map(|session| self.session_info(session)).collect();
                pb::RunState::Open
            }
            RunState::Committing => pb::RunState::Committing,
            RunState::Committed(run) => {
                // Its client has lost the answer of the commit, and the log perhaps its record.
                if may_write {
                    let (runs, key) = (self.runs.clone(), machine.clone());
                    let event = Event::new(Action::Commit).of_run(&key, backup);
                    let event = event.with_result(&Ok::<_, RunError>(()));
                    blocking(move || runs.note(&who, event)).await?;
                }
                answer.result = Some(self.committed(&run));
                pb::RunState::Committed
            }
            RunState::Aborted => pb::RunState::Aborted,
        };
        answer.state = state.into();
        Ok(Response::new(answer))
    }
}

type Acks = mpsc::Sender<Result<pb::WriteBlocksResponse, Status>>;

/// Receives one stream: messages come in here, a thread of its own writes them, so that neither waits for the other.
async fn receive(
    runs: &Arc<Runs>,
    machine: &MachineKey,
    mut stream: Streaming<pb::WriteBlocksRequest>,
    acks: &Acks,
) -> Result<(), Status> {
    let Some(first) = stream.message().await? else { return Ok(()) };
    let session: SessionId = first.session_id.parse()?;
    let writer = Writer::new(runs.run_of(session, machine)?, session, first.epoch)?;
    let writer = writer.within_quota(runs.clone());
    let (queue, messages) = mpsc::channel(QUEUE);
    let thread_acks = acks.clone();
    let thread = spawn_work(async move { write(&writer, messages, &thread_acks).await });
    let mut next = Some(first);
    let mut broken = Ok(());
    while let Some(message) = next {
        if queue.send(message).await.is_err() {
            break;
        }
        next = tokio::select! {
            biased;
            message = stream.message() => message.unwrap_or_else(|error| { broken = Err(error); None }),
            () = acks.closed() => None,
        };
    }
    drop(queue);
    let written =
        thread.await.map_err(|error| status(ErrorReason::StoreFailed, error.to_string()))?;
    written.and(broken)
}

/// Writes what comes through the queue until it ends. Blocks the thread.
async fn write(
    writer: &Writer,
    mut messages: mpsc::Receiver<pb::WriteBlocksRequest>,
    acks: &Acks,
) -> Result<(), Status> {
    let (mut received, mut unacknowledged) = (0, 0);
    let mut marks = writer.session().marks();
    while let Some(message) = messages.recv().await {
        marks = take(writer, message)?;
        (received, unacknowledged) = (received + 1, unacknowledged + 1);
        if messages.is_empty() || unacknowledged >= ACK_EVERY {
            unacknowledged = 0;
            if acks.send(Ok(ack(marks, received))).await.is_err() {
                return Ok(());
            }
        }
    }
    if unacknowledged > 0 {
        let _ = acks.send(Ok(ack(marks, received))).await;
    }
    Ok(())
}

fn take(writer: &Writer, message: pb::WriteBlocksRequest) -> Result<Marks, Status> {
    let batch = match message.batch {
        Some(batch) => Some(Batch::from_wire(writer.session().disk.size_bytes, batch)?),
        None => None,
    };
    if let Some(batch) = &batch {
        batch.verify().map_err(|wrong| {
            let disk = &writer.session().disk.disk;
            status(
                ErrorReason::BlockHashMismatch,
                format!("disk {disk}: {wrong}; read the block again and repeat it"),
            )
        })?;
    }
    Ok(writer.apply(batch.as_ref(), message.settled_block)?)
}

fn ack(marks: Marks, received_messages: u64) -> pb::WriteBlocksResponse {
    pb::WriteBlocksResponse {
        received_block: marks.received,
        durable_block: marks.durable,
        received_messages,
    }
}
