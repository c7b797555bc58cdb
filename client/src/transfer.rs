//! A run on one server: started, taken over again after a failure, its disks written, committed.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use janus_proto::{
    error::WireError,
    ids::{BackupId, BlockHash, DiskId, MachineKey, ServerId, SessionId},
    metadata,
    pb::{self, Encoding, StartBackupRequest, StartBackupResponse},
};
use tonic::metadata::MetadataMap;

use crate::{
    cache::{CacheError, Head},
    link::{Address, Direct, Link, LinkError, Remedy},
    reconcile::ReconcileError,
    scan::ScanError,
    ways::Ways,
};

pub mod commit;
pub mod disk;
pub mod stream;

const STARTING: &str = "starting the backup";
/// First and longest pause between attempts to reach a lost server.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Why a run ended without a commit.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The disk can't be read, or a bug.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// A call failed for good.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The hash cache can't be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The server was lost and did not come back in time, or dropped the run.
    #[error("server {server} was lost: {source}")]
    Lost {
        /// The server.
        server: ServerId,
        /// The last failure.
        source: Box<LinkError>,
    },
    /// The server asks for something this client doesn't have.
    #[error(
        "server {server} needs features this client doesn't have: {features}; update the client"
    )]
    Features {
        /// The server.
        server: ServerId,
        /// Names, comma-separated.
        features: String,
    },
    /// The server's content kept differing from the disk's.
    #[error(
        "server {server} still has other content after everything was compared again: {source}; its disk or a memory is faulty: run `janus-server verify` there, test the memory of both, and back up again"
    )]
    Differs {
        /// The server.
        server: ServerId,
        /// What it said.
        source: Box<LinkError>,
    },
    /// Asked to stop; the run can be resumed.
    #[error("interrupted; the next backup goes on from here")]
    Interrupted,
}

impl From<ReconcileError> for TransferError {
    fn from(error: ReconcileError) -> Self {
        match error {
            ReconcileError::Link(error) => error.into(),
            ReconcileError::Cache(error) => error.into(),
            ReconcileError::Ended => Self::Interrupted,
        }
    }
}

impl TransferError {
    /// What this failure is good for.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Link(error) => error.remedy(),
            Self::Lost { .. } => Remedy::NewRun,
            _ => Remedy::None,
        }
    }
}

/// Where runs are started.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The ways to janus or servers.
    pub ways: Ways,
    /// How long a lost server is waited for in any case ...
    pub failover_after: Duration,
    /// ... and at most, where the run has taken long: see [`Gate::patience`].
    pub failover_wait: Duration,
    /// Whether streams may go past janus.
    pub direct: Direct,
    /// Whose backups these are, where they aren't of the caller's own machine.
    pub machine: Option<MachineKey>,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct StartPlan {
    /// The run.
    pub backup_id: BackupId,
    /// Its disks.
    pub disks: Vec<pb::DiskStart>,
    /// Highest use counter known + 1.
    pub use_counter: u64,
    /// As in [`Gate`].
    pub machine: Option<MachineKey>,
}

/// One disk's session, as the server described it.
#[derive(Debug, Clone)]
pub struct Session {
    /// The session.
    pub id: SessionId,
    /// The disk.
    pub disk_id: DiskId,
    /// The head it starts from.
    pub head: Option<Head>,
    /// It held blocks of an earlier process when this one started it.
    pub resumed: bool,
    /// Blocks below this one are settled.
    pub received_block: u64,
    /// Ranges to be sent again: first block and count.
    pub resend: Vec<(u64, u64)>,
}

/// An open run.
#[derive(Debug, Clone)]
pub struct Run {
    /// What was started.
    pub plan: StartPlan,
    /// When this process began it.
    pub begun: Instant,
    /// Connection it was started through.
    pub link: Link,
    /// Where its server can be reached without janus, as it says.
    pub server_urls: Vec<String>,
    /// Where it is.
    pub server: ServerId,
    /// Raised by each takeover.
    pub epoch: u64,
    /// Renewed by any message.
    pub lease: Duration,
    /// Counter of this start.
    pub use_counter: u64,
    /// Encodings that both ends know.
    pub encodings: Vec<Encoding>,
    /// Servers that were passed over: name and reason.
    pub skipped: Vec<(String, String)>,
    /// One for each disk of the plan, in its order.
    pub sessions: Vec<Session>,
}

impl Run {
    /// Where the run's calls go.
    pub fn address(&self) -> Address {
        let StartPlan { backup_id, machine, .. } = &self.plan;
        let (server, run) = (Some(self.server.clone()), Some(*backup_id));
        Address { server, run, machine: machine.clone() }
    }
}

impl Gate {
    /// Starts a run, or takes it over; on `server` when it is named, else where janus sends it.
    ///
    /// # Errors
    /// When no URL leads to a server that takes it; of several failures the first that isn't about reaching one.
    #[tracing::instrument(name = "start", skip_all)]
    pub async fn start(
        &self,
        plan: &StartPlan,
        server: Option<&ServerId>,
    ) -> Result<Run, TransferError> {
        let mut tries = self.ways.tries();
        let mut failed = None;
        while let Some((_, link)) = tries.next().await {
            match start_through(link, plan, server).await {
                Err(TransferError::Link(error)) if error.remedy() == Remedy::Reconnect => {
                    failed.get_or_insert(error);
                }
                Ok(run) if self.direct == Direct::Prefer => {
                    let Run { link, server, server_urls, .. } = &run;
                    let dialer = self.ways.dialer();
                    let link = link.clone().prefer_direct(server, server_urls, dialer).await;
                    return Ok(Run { link, ..run });
                }
                other => return other,
            }
        }
        Err(failed.unwrap_or_else(|| tries.unreachable()).into())
    }

    /// How long a lost server is waited for by a run that has taken so long: as long again. To begin anew elsewhere would
    /// cost about that much, so whatever becomes of the server, at most twice of what was best is spent.
    pub fn patience(&self, taken: Duration) -> Duration {
        patience(self.failover_after, self.failover_wait, taken)
    }

    /// Takes a run over after `cause`, with pauses, for as long as [`Gate::patience`] allows.
    ///
    /// # Errors
    /// `Lost` when the server stays away or doesn't know the run any more.
    pub async fn resume(&self, run: &Run, cause: LinkError) -> Result<Run, TransferError> {
        let lost_at = Instant::now();
        let patience = self.patience(run.begun.elapsed());
        let mut pause = PAUSES.0;
        let mut cause = cause;
        tracing::warn!(server = %run.server, error = %cause, "connection lost; going on as soon as the server answers");
        loop {
            match self.start(&run.plan, Some(&run.server)).await {
                Ok(resumed) => return Ok(resumed),
                Err(TransferError::Link(error)) => {
                    let remedy = error.remedy();
                    cause = error;
                    if remedy != Remedy::Reconnect {
                        break;
                    }
                }
                Err(other) => return Err(other),
            }
            if lost_at.elapsed() + pause > patience {
                break;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
        Err(TransferError::Lost { server: run.server.clone(), source: Box::new(cause) })
    }

    /// Tells a server that a run is given up.
    ///
    /// # Errors
    /// When it can't be told through any URL.
    pub async fn abort(&self, backup_id: BackupId, server: &ServerId) -> Result<(), LinkError> {
        let (server, machine) = (Some(server.clone()), self.machine.clone());
        let address = Address { server, run: Some(backup_id), machine };
        let mut tries = self.ways.tries();
        let mut last = None;
        while let Some((_, link)) = tries.next().await {
            let message = pb::AbortBackupRequest { backup_id: backup_id.to_string() };
            let request = address.request(message, Some(crate::link::QUICK));
            match link
                .backup()
                .abort_backup(request)
                .await
                .map_err(LinkError::call("giving the run up"))
            {
                // NewRun: the server has no such run any more, or has committed it.
                Err(error) if error.remedy() != Remedy::NewRun => last = Some(error),
                _ => return Ok(()),
            }
        }
        Err(last.unwrap_or_else(|| tries.unreachable()))
    }
}

fn patience(least: Duration, most: Duration, taken: Duration) -> Duration {
    least.max(taken.min(most))
}

async fn start_through(
    link: Link,
    plan: &StartPlan,
    server: Option<&ServerId>,
) -> Result<Run, TransferError> {
    let message = StartBackupRequest {
        backup_id: plan.backup_id.to_string(),
        disks: plan.disks.clone(),
        encodings: vec![Encoding::None.into(), Encoding::Lz4.into(), Encoding::Zstd.into()],
        features: vec![],
    };
    let (run, machine) = (server.map(|_| plan.backup_id), plan.machine.clone());
    let address = Address { server: server.cloned(), run, machine };
    let started = link.start_backup(&address, message, plan.use_counter).await;
    let (headers, answer, _) = started.map_err(LinkError::call(STARTING))?.into_parts();
    let run = parse_start(link, plan, &headers, &answer).map_err(LinkError::answer(STARTING))?;
    let of_janus = values(&headers, metadata::WARNING);
    for warning in of_janus.chain(answer.warnings.iter().map(String::as_str)) {
        tracing::warn!(server = %run.server, "{warning}");
    }
    tracing::debug!(server = %run.server, backup_id = %plan.backup_id, url = run.link.url(), epoch = run.epoch, "started");
    if !answer.required_features.is_empty() {
        return Err(TransferError::Features {
            server: run.server,
            features: answer.required_features.join(", "),
        });
    }
    Ok(run)
}

fn parse_start(
    link: Link,
    plan: &StartPlan,
    headers: &MetadataMap,
    answer: &StartBackupResponse,
) -> Result<Run, WireError> {
    let server: ServerId = answer.server_id.parse()?;
    let mut sessions = answer.sessions.iter().map(parse_session).collect::<Result<Vec<_>, _>>()?;
    let place =
        |disk: &DiskId| plan.disks.iter().position(|planned| planned.disk_id == disk.as_str());
    let disks: BTreeSet<_> =
        sessions.iter().filter_map(|session| place(&session.disk_id)).collect();
    if disks.len() != plan.disks.len() || sessions.len() != plan.disks.len() {
        return Err(WireError::Invalid {
            field: "sessions",
            reason: "not one for each disk".into(),
        });
    }
    sessions.sort_by_key(|session| place(&session.disk_id));
    let counter = headers.get(metadata::USE).and_then(|value| value.to_str().ok()?.parse().ok());
    Ok(Run {
        plan: plan.clone(),
        begun: Instant::now(),
        link,
        server_urls: answer.server_urls.clone(),
        server,
        epoch: answer.epoch,
        lease: Duration::from_secs(answer.lease_seconds.clamp(3, 3600).into()),
        use_counter: answer.use_counter.max(counter.unwrap_or(0)),
        encodings: answer.encodings().collect(),
        skipped: skipped(headers),
        sessions,
    })
}

fn parse_session(info: &pb::SessionInfo) -> Result<Session, WireError> {
    let head = info.head.as_ref().map(|head| {
        Ok::<_, WireError>(Head {
            snapshot_id: head.snapshot_id.parse()?,
            table_digest: BlockHash::from_wire("table_digest", &head.table_digest)?,
            store_generation: head.store_generation.parse()?,
        })
    });
    Ok(Session {
        id: info.session_id.parse()?,
        disk_id: info.disk_id.parse()?,
        head: head.transpose()?,
        resumed: info.resumed,
        received_block: info.received_block,
        resend: info.resend.iter().map(|range| (range.first_block, range.block_count)).collect(),
    })
}

fn skipped(headers: &MetadataMap) -> Vec<(String, String)> {
    values(headers, metadata::SKIPPED)
        .map(|text| {
            let (server, reason) = text.split_once(": ").unwrap_or((text, ""));
            (server.trim().to_owned(), reason.trim().to_owned())
        })
        .collect()
}

fn values<'a>(headers: &'a MetadataMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_that_stays_other_is_told_with_what_to_do() {
        let source = Box::new(LinkError::call("committing")(tonic::Status::aborted("differs")));
        let error = TransferError::Differs { server: "north".parse().unwrap(), source };
        let text = error.to_string();
        assert!(text.contains("north") && text.contains("`janus-server verify`"), "{text}");
    }

    #[test]
    fn the_longer_a_run_has_taken_the_longer_its_server_is_waited_for() {
        let seconds = Duration::from_secs;
        let wait = |after, most, taken| patience(seconds(after), seconds(most), seconds(taken));
        assert_eq!(wait(60, 600, 0), seconds(60));
        assert_eq!(wait(60, 600, 300), seconds(300));
        assert_eq!(wait(60, 600, 86_400), seconds(600));
        assert_eq!(
            wait(60, 10, 86_400),
            seconds(60),
            "the shorter setting is the least in any case"
        );
    }
}
