//! A backup of this machine: all its disks to one server, to another one when that is lost.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use janus_proto::{
    error::WireError,
    ids::{BLOCK_BYTES, BackupId, BlockHash, SEGMENT_BLOCKS, ServerId},
    pb::{self, CommitBackupResponse, DiskStart, ErrorReason},
    trace,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cache::{CacheError, DiskCache, Head},
    link::{LinkError, PATIENCE, Remedy},
    packing,
    progress::Progress,
    reading::{Planned, Reading},
    scan::{ScanError, Segments},
    seal::DiskSeal,
    source::Source,
    state::{MachineState, RunRecord, StateError, Success},
    transfer::{
        Gate, Run, Session, StartPlan, TransferError,
        commit::{Committed, commit},
        disk::{Compare, DiskFigures, DiskTransfer},
        stream::{ScanSettings, send},
    },
};

/// Runs begun for one backup before it fails.
const RUNS: usize = 3;
/// Failures of one disk's stream without a block of progress between them.
const BREAKS: usize = 5;
/// New hash caches begun for one disk before the backup goes on without one.
const RESETS: usize = 2;
/// Pause after a lost run was told to end, while it is being committed.
const HOLDER_PAUSE: Duration = Duration::from_millis(500);
/// Pause before the server of an open run is looked for again, when nobody could be reached.
const REACH_PAUSE: Duration = Duration::from_secs(1);

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The transfer failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The state file can't be kept.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A disk with its cache.
pub struct Disk {
    /// What is read.
    pub source: Arc<Source>,
    /// What seals it.
    pub seal: Option<Arc<DiskSeal>>,
    /// What is known of it; nothing where there is no room to remember it.
    pub cache: Option<DiskCache>,
    /// What of it is read.
    pub reading: Arc<Planned>,
}

/// A backup to make.
pub struct Backup {
    /// Where it can go.
    pub gate: Gate,
    /// Only there; else where janus sends it.
    pub server: Option<ServerId>,
    /// What is backed up.
    pub disks: Vec<Disk>,
    /// What this machine remembers.
    pub state: MachineState,
    /// Unix milliseconds before anything of the disks was read or held still.
    pub taken_ms: i64,
    /// How disks are scanned, and what is found is sent.
    pub scan: ScanSettings,
    /// What is shown meanwhile.
    pub progress: Arc<Progress>,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

/// A disk that was backed up.
#[derive(Debug)]
pub struct DiskReport {
    /// Its snapshot.
    pub snapshot: pb::Snapshot,
    /// What it took.
    pub figures: DiskFigures,
    /// Blocks that were sent.
    pub changed_blocks: u64,
    /// How they were found.
    pub compare: Compare,
    /// What was read.
    pub reading: Arc<Reading>,
}

/// A backup that was made.
#[derive(Debug)]
pub struct BackupReport {
    /// The run.
    pub backup_id: BackupId,
    /// The server that has it.
    pub server: String,
    /// Counter of its start.
    pub use_counter: u64,
    /// Servers passed over: name and reason.
    pub skipped: Vec<(String, String)>,
    /// It went on with a run that an earlier process began.
    pub resumed: bool,
    /// Unix milliseconds: its content is not older than that, by this machine's clock.
    pub taken_ms: i64,
    /// How long it took.
    pub seconds: f64,
    /// How what was sent was packed; of a backup that began again, all of it.
    pub packing: packing::Summary,
    /// Its disks.
    pub disks: Vec<DiskReport>,
}

/// What comes after a failed run.
enum GivenUp {
    /// Nothing.
    Final,
    /// A new run may do better. With the failed one when its server could not be told, so that it is still open there.
    Again(Option<RunRecord>),
}

impl Backup {
    /// Makes the backup.
    ///
    /// # Errors
    /// When a disk can't be read, no server takes it, or it was stopped; the run can then be resumed.
    pub async fn run(&mut self) -> Result<BackupReport, BackupError> {
        let began = Instant::now();
        let mut skipped = Vec::new();
        let mut last = None;
        let mut lost = None;
        for _ in 0..RUNS {
            let (mut run, resumed) = match self.start().await {
                Ok(started) => started,
                Err(error) => {
                    // Nobody took over from the lost server: the next backup goes on with what that one has.
                    if let Some(open) = lost {
                        self.state.set_open(open)?;
                    }
                    // Why the first server was lost says more than that no other took it.
                    return Err(last.unwrap_or(error));
                }
            };
            trace::note("backup_id", run.plan.backup_id);
            trace::note("server", &run.server);
            skipped.append(&mut run.skipped.clone());
            let line = self.gate.ways.memory().line(run.link.url(), &run.server);
            self.scan.packing.expect_line(line);
            let transferred = self.transfer(&mut run).await;
            if let Some(rate) = self.scan.packing.line() {
                self.gate.ways.memory().note_line(run.link.url(), &run.server, rate);
            }
            match transferred {
                Ok(disks) => {
                    return Ok(BackupReport {
                        backup_id: run.plan.backup_id,
                        server: run.server.to_string(),
                        use_counter: run.use_counter,
                        skipped,
                        resumed,
                        taken_ms: self.taken_ms,
                        seconds: began.elapsed().as_secs_f64(),
                        packing: self.scan.packing.summary(),
                        disks,
                    });
                }
                Err(error) => {
                    match self.give_up(&run, &error).await? {
                        GivenUp::Final => return Err(error),
                        GivenUp::Again(open) => lost = open,
                    }
                    tracing::warn!(server = %run.server, %error, "starting again, elsewhere if possible");
                    skipped.push((run.server.to_string(), error.to_string()));
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or(BackupError::Transfer(TransferError::Interrupted)))
    }

    /// Ends a failed run, unless it is left open for being resumed.
    async fn give_up(&mut self, run: &Run, error: &BackupError) -> Result<GivenUp, StateError> {
        let BackupError::Transfer(error) = error else { return Ok(GivenUp::Final) };
        if matches!(error, TransferError::Interrupted) {
            return Ok(GivenUp::Final);
        }
        let is_told = self.gate.abort(run.plan.backup_id, &run.server).await.is_ok();
        let open = self.state.open_run().filter(|_| !is_told).cloned();
        self.state.close_run()?;
        if error.remedy() == Remedy::None || self.stop.is_cancelled() {
            return Ok(GivenUp::Final);
        }
        Ok(GivenUp::Again(open))
    }

    /// Starts a run, first of all the one that an earlier process left open. True when it is that one.
    async fn start(&mut self) -> Result<(Run, bool), BackupError> {
        let disks: Vec<_> = self
            .disks
            .iter()
            .map(|d| (d.source.disk_id().clone(), d.source.size_bytes()))
            .collect();
        let mut lost = None;
        if let Some(open) = self.state.open_run().cloned() {
            let fits = self.server.is_none() || self.server == open.server;
            if fits
                && open.disks == disks
                && let Some(run) = self.start_open(&open).await?
            {
                return Ok((run, true));
            }
            lost = self.drop_open(open).await?;
        }
        let plan = self.plan(BackupId::new());
        self.state.set_open(RunRecord {
            backup_id: plan.backup_id,
            server: None,
            disks: disks.clone(),
        })?;
        let run = match self.start_new(&plan).await {
            Ok(run) => run,
            Err(error) => {
                // A server may have taken the start though its answer was lost: see `start_new`.
                match lost.filter(|_| error.remedy() == Remedy::Reconnect) {
                    // Nobody can be reached: once somebody can, that one may be gone on with after all.
                    Some(open) => self.state.set_open(open)?,
                    None => self.state.close_run()?,
                }
                return Err(error.into());
            }
        };
        let server = Some(run.server.clone());
        self.state.set_open(RunRecord { backup_id: plan.backup_id, server, disks })?;
        self.state.raise_use_counter(run.use_counter)?;
        Ok((run, false))
    }

    /// Goes on with an open run where it was; `None` when that server is away or has dropped it.
    async fn start_open(&mut self, open: &RunRecord) -> Result<Option<Run>, BackupError> {
        // A run whose StartBackup was never answered may be anywhere, and nothing is lost with it: see `start_new`.
        let Some(server) = &open.server else { return Ok(None) };
        let plan = self.plan(open.backup_id);
        let mut started = self.cancellable(self.gate.start(&plan, Some(server))).await;
        if let Err(TransferError::Link(LinkError::Unreachable(_))) = &started {
            // A line that has just come back refuses for a moment. What is there already is worth a second look.
            self.pause(REACH_PAUSE).await?;
            started = self.cancellable(self.gate.start(&plan, Some(server))).await;
        }
        match started {
            Ok(run) => {
                self.state.raise_use_counter(run.use_counter)?;
                tracing::info!(server = %run.server, run = %open.backup_id, "going on with the open backup");
                Ok(Some(run))
            }
            Err(error @ (TransferError::Interrupted | TransferError::Features { .. })) => {
                Err(error.into())
            }
            Err(error) => {
                tracing::info!(%server, run = %open.backup_id, %error, "can't go on with the open backup; starting a new one");
                Ok(None)
            }
        }
    }

    /// Tells a run's server that it is given up; returns the run when the server could not be told.
    async fn drop_open(&mut self, open: RunRecord) -> Result<Option<RunRecord>, StateError> {
        self.state.close_run()?;
        let Some(server) = &open.server else { return Ok(None) };
        let told = self.gate.abort(open.backup_id, server).await;
        Ok(told.is_err().then_some(open))
    }

    /// Starts a new run. Where a lost run of ours still holds the lease, its server is told first.
    ///
    /// Such a run may be one that nobody knows of: a start that janus sent to another server when the first one did not
    /// answer, and that reached the first one all the same once the line was whole again.
    async fn start_new(&mut self, plan: &StartPlan) -> Result<Run, TransferError> {
        let until = Instant::now() + self.gate.failover_after;
        loop {
            let started = self.cancellable(self.gate.start(plan, self.server.as_ref())).await;
            let Err(TransferError::Link(error)) = &started else { return started };
            if error.reason() != Some(ErrorReason::LeaseHeld) || !self.end_holder(error).await {
                return started;
            }
            // One that is being committed goes on to its end.
            if Instant::now() > until {
                return started;
            }
            self.pause(HOLDER_PAUSE).await?;
        }
    }

    /// Tells a server to give up the run that keeps ours away. False when it isn't ours to give up.
    async fn end_holder(&mut self, error: &LinkError) -> bool {
        let (Some(run), Some(server)) = (error.lease_holder(), error.answered_by()) else {
            return false;
        };
        if !self.state.is_ours(run) {
            return false;
        }
        tracing::info!(%server, %run, "a lost run of this machine is still open there; ending it");
        if let Err(error) = self.gate.abort(run, &server).await {
            tracing::warn!(%server, %run, %error, "can't end a lost run");
        }
        true
    }

    fn plan(&self, backup_id: BackupId) -> StartPlan {
        let start = |disk: &Disk| DiskStart {
            disk_id: disk.source.disk_id().to_string(),
            size_bytes: disk.source.size_bytes(),
            logical_sector_bytes: disk.source.sector_bytes(),
        };
        StartPlan {
            backup_id,
            disks: self.disks.iter().map(start).collect(),
            use_counter: self.state.use_counter().saturating_add(1),
            machine: self.gate.machine.clone(),
        }
    }

    async fn cancellable<T>(
        &self,
        work: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        tokio::select! {
            result = work => result,
            () = self.stop.cancelled() => Err(TransferError::Interrupted),
        }
    }

    async fn pause(&self, pause: Duration) -> Result<(), TransferError> {
        let over = self.stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        over.ok_or(TransferError::Interrupted)
    }

    /// Sends all disks and commits them.
    async fn transfer(&mut self, run: &mut Run) -> Result<Vec<DiskReport>, BackupError> {
        let mut transfers = Vec::with_capacity(self.disks.len());
        for (disk, session) in self.disks.iter().zip(run.sessions.clone()) {
            let transfer = DiskTransfer::new(disk, self.progress.clone(), run, &session);
            transfers.push(self.send_disk(run, &session, transfer, Segments::From(0)).await?);
        }
        let (transfers, committed) = self.commit(run, transfers).await?;
        // The backup is made: the next one finds out by itself that this run is over.
        let (backup_id, server) = (run.plan.backup_id, run.server.clone());
        let success = Success { taken_ms: self.taken_ms, backup_id, server };
        if let Err(error) = self.state.succeeded(success) {
            tracing::warn!(%error, "can't note the end of the run");
        }
        let mut reports = Vec::with_capacity(transfers.len());
        for disk in transfers {
            reports.push(finish(run, disk, &committed).await?);
        }
        Ok(reports)
    }

    /// Sends one disk, over as many streams as it takes.
    #[tracing::instrument(name = "disk", skip_all, fields(disk = %session.disk_id))]
    async fn send_disk(
        &self,
        run: &mut Run,
        session: &Session,
        mut disk: DiskTransfer,
        mut segments: Segments,
    ) -> Result<DiskTransfer, TransferError> {
        let (mut breaks, mut best, mut resets, mut busy_since) = (0, 0, 0, None);
        loop {
            let (back, result) = self.send_once(run, session, disk, &segments).await;
            disk = back.ok_or(TransferError::Interrupted)?;
            let Err(error) = result else { return Ok(disk) };
            match error {
                TransferError::Scan(ScanError::Table(why)) if disk.cache.is_some() => {
                    resets += 1;
                    let error =
                        CacheError::Damaged { path: session.disk_id.as_str().into(), what: why };
                    disk = renew(disk, error, resets).await?;
                    segments = Segments::From(0);
                }
                TransferError::Cache(error) if disk.cache.is_some() => {
                    resets += 1;
                    disk = renew(disk, error, resets).await?;
                    segments = Segments::From(0);
                }
                TransferError::Scan(ScanError::Missed { offset })
                    if disk.reading.has_promises() =>
                {
                    disk.miss(offset);
                    segments = Segments::From(0);
                }
                TransferError::Link(error) if error.busy().is_some() => {
                    let since = *busy_since.get_or_insert_with(Instant::now);
                    self.wait_for_place(run, since, error).await?;
                    continue;
                }
                TransferError::Link(error) if error.remedy() == Remedy::Reconnect => {
                    let received = self.take_over(run, session, error).await?;
                    let unacknowledged_bytes = disk.unacknowledged_blocks() * BLOCK_BYTES;
                    tracing::info!(server = %run.server, disk = %session.disk_id, received_block = received, unacknowledged_bytes, "took the run over; what had not been acknowledged may be sent again");
                    let received = received / SEGMENT_BLOCKS;
                    // The server's mark may be older than this process: only what was also read here needs no second look.
                    let reached = received.min(disk.scanned());
                    breaks = if reached > best { 1 } else { breaks + 1 };
                    best = best.max(reached);
                    if breaks > BREAKS {
                        let status =
                            tonic::Status::unavailable("the connection breaks again and again");
                        let source = Box::new(LinkError::call("sending blocks")(status));
                        return Err(TransferError::Lost { server: run.server.clone(), source });
                    }
                    if let Segments::From(first) = &mut segments {
                        *first = reached;
                    }
                }
                other => return Err(other),
            }
            busy_since = None;
        }
    }

    /// Waits as long as a busy janus or server asks; for [`PATIENCE`] in all.
    async fn wait_for_place(
        &self,
        run: &Run,
        since: Instant,
        error: LinkError,
    ) -> Result<(), TransferError> {
        let Some(pause) = error.busy().filter(|_| since.elapsed() < PATIENCE) else {
            return Err(error.into());
        };
        tracing::warn!(server = %run.server, %error, ?pause, "waiting for a place");
        self.pause(pause).await
    }

    async fn send_once(
        &self,
        run: &Run,
        session: &Session,
        mut disk: DiskTransfer,
        segments: &Segments,
    ) -> (Option<DiskTransfer>, Result<(), TransferError>) {
        if disk.must_reconcile()
            && let Err(error) = self.cancellable(disk.reconcile(run, session)).await
        {
            return (Some(disk), Err(error));
        }
        send(run, session, disk, segments.clone(), &self.scan, &self.stop).await
    }

    /// Takes the run over after its connection broke; returns what the server has received of this disk.
    async fn take_over(
        &self,
        run: &mut Run,
        session: &Session,
        cause: LinkError,
    ) -> Result<u64, TransferError> {
        let resumed = self.cancellable(self.gate.resume(run, cause)).await?;
        let Some(now) = resumed.sessions.iter().find(|now| now.id == session.id) else {
            let status = tonic::Status::not_found("the server has replaced the session");
            let source = Box::new(LinkError::call("going on with the backup")(status));
            return Err(TransferError::Lost { server: run.server.clone(), source });
        };
        let received = now.received_block;
        // What the sessions held when this process began, and whom the start passed over, stays as it was.
        let (sessions, skipped) =
            (std::mem::take(&mut run.sessions), std::mem::take(&mut run.skipped));
        *run = Run { sessions, skipped, begun: run.begun, ..resumed };
        Ok(received)
    }

    /// Commits; what differs on the server is sent again, and if that isn't enough everything is compared.
    #[tracing::instrument(name = "commit", skip_all)]
    async fn commit(
        &self,
        run: &mut Run,
        mut transfers: Vec<DiskTransfer>,
    ) -> Result<(Vec<DiskTransfer>, CommitBackupResponse), TransferError> {
        for compare_all in [false, true] {
            let error =
                match self.cancellable(commit(&self.gate, run, &transfers, self.taken_ms)).await? {
                    Committed::Done(answer) => return Ok((transfers, answer)),
                    Committed::Differs(error) => error,
                };
            tracing::warn!(server = %run.server, %error, compare_all, "the server's content differs; sending it again");
            let mut repaired = Vec::with_capacity(transfers.len());
            for (mut disk, session) in transfers.into_iter().zip(run.sessions.clone()) {
                let segments = if compare_all {
                    disk.compare_again();
                    Segments::From(0)
                } else {
                    let theirs = disk.reader(run, &session).segment_digests().await?;
                    let ours = disk.digests();
                    let differing = (0..)
                        .zip(ours.iter().zip(&theirs))
                        .filter(|(_, (a, b))| a != b)
                        .map(|(s, _)| s);
                    let differing: Vec<u64> = differing.collect();
                    disk.distrust(&differing);
                    Segments::List(differing)
                };
                repaired.push(self.send_disk(run, &session, disk, segments).await?);
            }
            transfers = repaired;
        }
        match self.cancellable(commit(&self.gate, run, &transfers, self.taken_ms)).await? {
            Committed::Done(answer) => Ok((transfers, answer)),
            Committed::Differs(error) => {
                Err(TransferError::Differs { server: run.server.clone(), source: Box::new(error) })
            }
        }
    }
}

/// Begins a new cache; where that can't be, or was of no use before, goes on without one.
async fn renew(
    mut disk: DiskTransfer,
    error: CacheError,
    resets: usize,
) -> Result<DiskTransfer, TransferError> {
    let work = move || {
        let made = match error.is_no_room() || resets > RESETS {
            true => Err(error),
            false => disk.reset_cache(&error),
        };
        if let Err(error) = made {
            disk.drop_cache(&error);
        }
        disk
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| TransferError::Interrupted)
}

/// Remembers what the server has now. The backup is made already: a cache that fails costs time next time, no more.
async fn finish(
    run: &Run,
    mut disk: DiskTransfer,
    committed: &CommitBackupResponse,
) -> Result<DiskReport, TransferError> {
    const FINISHING: &str = "committing the backup";
    let disk_id = disk.source.disk_id().clone();
    let snapshot =
        committed.snapshots.iter().find(|snapshot| snapshot.disk_id == disk_id.as_str()).cloned();
    let missing = || WireError::Missing { field: "snapshots" };
    let snapshot = snapshot.ok_or_else(missing).map_err(LinkError::answer(FINISHING))?;
    let head =
        head_of(&snapshot, &committed.store_generation).map_err(LinkError::answer(FINISHING))?;
    let server = run.server.clone();
    let (figures, changed_blocks, compare) = (disk.figures, disk.changed_blocks(), disk.compare);
    let reading = disk.reading.clone();
    let remembered = tokio::task::spawn_blocking(move || {
        // Without room for it, which was said.
        let Some((stage, cache)) = disk.take_stage().zip(disk.cache.clone()) else { return Ok(()) };
        cache.commit(stage, &server, head, disk.cursor())?;
        // Not before: without what the cache says now, the next run needs what this one needed.
        disk.source.committed();
        Ok::<(), CacheError>(())
    });
    match remembered.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(disk = %disk_id, %error, "the hash cache can't be kept; the next backup compares with the server")
        }
        Err(error) => {
            tracing::warn!(disk = %disk_id, %error, "the hash cache failed; the next backup compares with the server")
        }
    }
    Ok(DiskReport { snapshot, figures, changed_blocks, compare, reading })
}

fn head_of(snapshot: &pb::Snapshot, store_generation: &str) -> Result<Head, WireError> {
    Ok(Head {
        snapshot_id: snapshot.snapshot_id.parse()?,
        table_digest: BlockHash::from_wire("table_digest", &snapshot.table_digest)?,
        store_generation: store_generation.parse()?,
    })
}
