//! The commit of a run, asked after when its answer is lost.

use std::time::{Duration, Instant};

use janus_proto::pb::{
    CommitBackupRequest, CommitBackupResponse, DiskCommit, ErrorReason, GetBackupRequest, RunState,
};
use tonic::Status;

use super::{Gate, Run, TransferError, disk::DiskTransfer};
use crate::link::{LinkError, QUICK, Remedy};

const COMMITTING: &str = "committing the backup";
const POLL: Duration = Duration::from_millis(500);

/// What a commit came to.
pub enum Committed {
    /// The snapshots.
    Done(CommitBackupResponse),
    /// The server's content isn't what was read: repair and commit again.
    Differs(LinkError),
}

/// Commits all disks of the run, however often the connection breaks. Its seal says that it was begun at `taken_ms`.
///
/// # Errors
/// When the server refuses, is lost, or has dropped the run.
pub async fn commit(
    gate: &Gate,
    run: &mut Run,
    disks: &[DiskTransfer],
    taken_ms: i64,
) -> Result<Committed, TransferError> {
    let message_disks: Vec<_> = run
        .sessions
        .iter()
        .zip(disks)
        .map(|(session, disk)| DiskCommit {
            disk_id: session.disk_id.to_string(),
            expected_head_id: session
                .head
                .map(|head| head.snapshot_id.to_string())
                .unwrap_or_default(),
            table_digest: disk.table_digest().0.to_vec().into(),
            consistency: disk.source.consistency().into(),
            skipped_bytes: disk.reading.zero_bytes(),
        })
        .collect();
    let client_seal = seal_of(disks, taken_ms);
    tracing::debug!(server = %run.server, backup_id = %run.plan.backup_id, "committing");
    for _ in 0..8 {
        let message = CommitBackupRequest {
            backup_id: run.plan.backup_id.to_string(),
            epoch: run.epoch,
            disks: message_disks.clone(),
            client_seal: client_seal.clone().into(),
        };
        let error = match run.link.commit_backup(&run.address(), message).await {
            Ok(answer) => return Ok(Committed::Done(answer.into_inner())),
            Err(status) => LinkError::call(COMMITTING)(status),
        };
        if error.reason() == Some(ErrorReason::DigestMismatch) {
            return Ok(Committed::Differs(error));
        }
        if error.remedy() != Remedy::Reconnect {
            return Err(error.into());
        }
        if let Some(done) = ask(gate, run, &error).await? {
            return Ok(Committed::Done(done));
        }
        // Open: the commit never arrived. The takeover also brings the epoch up to date.
        let (sessions, begun) = (run.sessions.clone(), run.begun);
        *run = Run { sessions, begun, ..gate.resume(run, error).await? };
    }
    let status = Status::unavailable("the answer was lost again and again");
    Err(TransferError::Lost {
        server: run.server.clone(),
        source: Box::new(LinkError::call(COMMITTING)(status)),
    })
}

/// The seal of the run; nothing where it isn't sealed.
fn seal_of(disks: &[DiskTransfer], taken_ms: i64) -> Vec<u8> {
    let Some(seal) = disks.iter().find_map(|disk| disk.seal.as_ref()) else { return Vec::new() };
    let content: Vec<_> = disks.iter().map(DiskTransfer::sealed_content).collect();
    seal.sealer().run(taken_ms, &content)
}

/// Asks how the run stands until it is known: committed, or open.
async fn ask(
    gate: &Gate,
    run: &Run,
    cause: &LinkError,
) -> Result<Option<CommitBackupResponse>, TransferError> {
    tracing::warn!(server = %run.server, error = %cause, "the answer of the commit was lost; asking after it");
    let mut heard = Instant::now();
    let mut last = LinkError::call(COMMITTING)(Status::unavailable(cause.to_string()));
    let patience = gate.patience(run.begun.elapsed());
    while heard.elapsed() <= patience {
        match state_of(gate, run).await {
            Ok((RunState::Committed, Some(result))) => return Ok(Some(result)),
            Ok((RunState::Open, _)) => return Ok(None),
            Ok((RunState::Committing, _)) => heard = Instant::now(),
            Ok((state, _)) => {
                let status = Status::unavailable(format!("the run is {}", state.as_str_name()));
                last = LinkError::call(COMMITTING)(status);
                break;
            }
            Err(error) => {
                let over = error.remedy() != Remedy::Reconnect;
                last = error;
                if over {
                    break;
                }
            }
        }
        tokio::time::sleep(POLL).await;
    }
    Err(TransferError::Lost { server: run.server.clone(), source: Box::new(last) })
}

async fn state_of(
    gate: &Gate,
    run: &Run,
) -> Result<(RunState, Option<CommitBackupResponse>), LinkError> {
    let mut tries = gate.ways.tries();
    let mut last = None;
    while let Some((_, link)) = tries.next().await {
        let message = GetBackupRequest { backup_id: run.plan.backup_id.to_string() };
        let request = run.address().request(message, Some(QUICK));
        match link
            .backup()
            .get_backup(request)
            .await
            .map_err(LinkError::call("asking after the commit"))
        {
            Ok(answer) => {
                let answer = answer.into_inner();
                return Ok((answer.state(), answer.result));
            }
            Err(error) if error.remedy() == Remedy::Reconnect => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| tries.unreachable()))
}
