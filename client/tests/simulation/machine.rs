//! What the machines do: back up again and again, through any janus, and go on after every failure as a client does.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use janus_proto::{
    channel::{self, ConnectOptions, Dialer},
    error::{ErrorReason, reason},
    hash::{hash_block, segment_digest, table_digest},
    ids::{BLOCK_BYTES, BackupId},
    metadata,
    model::{Batch, Extent},
    pb::{self, backup_service_client::BackupServiceClient},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Request, Status, transport::Channel};

use super::{
    network::Node,
    rules::{MARK, is_well},
    site::{JANUS, SERVERS, principal, server_id},
    world::World,
};

const BLOCKS: u64 = 4;
const DISK_BYTES: u64 = BLOCKS * BLOCK_BYTES;
/// Longest wait for the answer to anything.
const PATIENCE: Duration = Duration::from_secs(20);
/// A start is answered within this when all servers can take it, …
const START_LIMIT: Duration = Duration::from_millis(100);
/// … and within this when some can, however many can't.
const START_LIMIT_BESIDE_BAD: Duration = Duration::from_secs(2);
/// A server that was well for so long is known to be.
pub const KNOWN: Duration = Duration::from_secs(12);

/// How eagerly machines back up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Not at all.
    Rest,
    /// Now and then, whatever happens.
    Chaos,
    /// Often, and nothing may go wrong.
    Well,
}

/// One machine.
pub struct Machine {
    node: Node,
    world: Arc<World>,
    dialer: Dialer,
    rng: SmallRng,
    highest_use: u64,
    version: u64,
}

/// A run that its machine works on.
struct Run {
    id: String,
    server: Node,
    epoch: u64,
    session: pb::SessionInfo,
    /// The janus that has started it, and the number of its process.
    by: (usize, u64),
}

impl Machine {
    pub fn new(number: usize, world: Arc<World>, seed: u64) -> Self {
        let node = Node::Machine(number);
        let dialer = Arc::new(world.network.dialer(node, principal(node)));
        let rng = SmallRng::seed_from_u64(seed ^ (number as u64 + 1).wrapping_mul(0x9E37_79B9));
        Self { node, world, dialer, rng, highest_use: 0, version: 0 }
    }

    /// Backs up until nobody tells the pace any more.
    pub async fn run(mut self, mut pace: watch::Receiver<Pace>) {
        loop {
            let now = *pace.borrow_and_update();
            let pause = match now {
                Pace::Rest => Duration::MAX,
                Pace::Chaos => Duration::from_millis(self.rng.random_range(1_000..45_000)),
                Pace::Well => Duration::from_millis(self.rng.random_range(2_000..6_000)),
            };
            match timeout(pause, pace.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => return,
                Err(_) => {}
            }
            let backed_up = self.back_up(now).await;
            if let (Err(status), Pace::Well) = (&backed_up, now) {
                self.world.rules.fail(format!("{}: all is well, and yet: {status}", self.node));
            }
        }
    }

    async fn back_up(&mut self, pace: Pace) -> Result<(), Status> {
        let (id, any) = (BackupId::new().to_string(), self.rng.random_range(0..JANUS));
        let mut run = None;
        for attempt in 0..JANUS {
            let janus = (any + attempt) % JANUS;
            match self.start(&id, janus, None).await {
                Ok(started) => {
                    run = Some(started);
                    break;
                }
                Err(status) if pace == Pace::Well || attempt + 1 == JANUS => return Err(status),
                Err(_) => {}
            }
        }
        let Some(mut run) = run else { return Ok(()) };
        if pace == Pace::Chaos && self.rng.random_bool(0.08) {
            return self.leave(&run).await;
        }
        for attempt in 0..4 {
            let moved = self.transfer(&run, pace).await;
            match moved {
                Ok(()) => return Ok(()),
                Err(status) if pace == Pace::Well => return Err(status),
                Err(status) if !is_passing(&status) => return Ok(()),
                Err(_) => {}
            }
            // The same run again, where it is; its server may be away for good.
            sleep(Duration::from_millis(self.rng.random_range(500..6_000))).await;
            let janus = self.rng.random_range(0..JANUS);
            match self.start(&run.id, janus, Some(run.server)).await {
                Ok(taken_over) => run = taken_over,
                Err(status) if !is_passing(&status) => return Ok(()),
                Err(_) if attempt == 2 => {
                    // Elsewhere, as a client does after its failover time.
                    self.world.rules.count(|counts| counts.failovers += 1);
                    let id = BackupId::new().to_string();
                    let janus = self.rng.random_range(0..JANUS);
                    let Ok(elsewhere) = self.start(&id, janus, None).await else { return Ok(()) };
                    run = elsewhere;
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Gives a run up, or just goes away.
    async fn leave(&mut self, run: &Run) -> Result<(), Status> {
        if self.rng.random_bool(0.5) {
            let backup_id = run.id.clone();
            let request = self.call(run, pb::AbortBackupRequest { backup_id });
            let mut client = self.client(run.by.0).await?;
            self.world.rules.ending(&run.id);
            let _ = answered(client.abort_backup(request)).await;
        }
        Ok(())
    }

    async fn client(&self, janus: usize) -> Result<BackupServiceClient<Channel>, Status> {
        let url = format!("https://{}:7420", Node::Janus(janus));
        let connecting =
            channel::connect_through(&url, self.dialer.clone(), ConnectOptions::default());
        let connection =
            connecting.await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(BackupServiceClient::new(connection.channel))
    }

    async fn start(&mut self, id: &str, janus: usize, pin: Option<Node>) -> Result<Run, Status> {
        let by = (janus, self.world.janus_life(janus));
        let mut client = self.client(janus).await?;
        let meant = match pin {
            Some(Node::Server(n)) => n.to_string(),
            _ => "any".into(),
        };
        let disk =
            pb::DiskStart { disk_id: "disk".into(), size_bytes: DISK_BYTES, ..Default::default() };
        let mut request = Request::new(pb::StartBackupRequest {
            backup_id: id.into(),
            disks: vec![disk],
            features: vec![format!("{MARK}{meant}")],
            ..Default::default()
        });
        // So this janus knows from now on where the run is.
        set(&mut request, metadata::RUN, id);
        if let Some(server) = pin {
            set(&mut request, metadata::SERVER, server_id(server).as_str());
        }
        if self.rng.random_bool(0.5) {
            set(&mut request, metadata::USE, &(self.highest_use + 1).to_string());
        }
        let sent = Instant::now();
        let before = self.well_servers(janus);
        let lives: [u64; SERVERS] = std::array::from_fn(|n| self.world.server_life(n));
        let answer = answered(client.start_backup(request)).await;
        let took = sent.elapsed();
        if pin.is_none() && self.is_well_with(janus) {
            let after = self.well_servers(janus);
            let well = before.iter().zip(after).filter(|(before, after)| **before && *after);
            self.judge_start(janus, well.count(), &answer, took);
        }
        let answer = answer?.into_inner();
        let server =
            (0..SERVERS).map(Node::Server).find(|server| server.to_string() == answer.server_id);
        let server = server.ok_or_else(|| Status::internal("an unknown server"))?;
        if pin.is_some_and(|pin| pin != server) {
            self.world
                .rules
                .fail(format!("{}: a pinned start was answered by {server}", self.node));
        }
        let Node::Server(number) = server else { return Err(Status::internal("no server")) };
        self.highest_use = self.highest_use.max(answer.use_counter);
        // Where the server began anew meanwhile nobody can tell which process has answered.
        let life = Some(self.world.server_life(number)).filter(|life| *life == lives[number]);
        self.world.rules.started(self.node, server, life, sent, &answer);
        let session = answer.sessions.first().cloned().unwrap_or_default();
        Ok(Run { id: id.into(), server, epoch: answer.epoch, session, by })
    }

    fn is_well_with(&self, janus: usize) -> bool {
        is_well(&self.world.network, self.node, Node::Janus(janus), KNOWN)
    }

    /// Which servers can take a start, by all that anybody can know.
    fn well_servers(&self, janus: usize) -> [bool; SERVERS] {
        let (network, janus) = (&self.world.network, Node::Janus(janus));
        std::array::from_fn(|n| {
            !self.world.is_server_leaving(n) && is_well(network, janus, Node::Server(n), KNOWN)
        })
    }

    /// A start is answered in time whenever some server is ready.
    fn judge_start<T>(
        &self,
        janus: usize,
        well: usize,
        answer: &Result<T, Status>,
        took: Duration,
    ) {
        if well == 0 {
            return;
        }
        let (rules, slow) = (&self.world.rules, self.world.slowness());
        // Where lines are slow a probe's deadline is four round trips.
        let limit = match SERVERS - well {
            0 => START_LIMIT + 4 * slow,
            bad => START_LIMIT_BESIDE_BAD + (4 + 8 * bad as u32) * slow,
        };
        if took > limit {
            rules.fail(format!(
                "{}: janus-{janus} took {took:?} for a start, {well} servers are well",
                self.node
            ));
        }
        if let Err(status) = answer
            && status.code() == Code::Unavailable
        {
            rules.fail(format!("{}: a server is ready, but: {}", self.node, status.message()));
        }
    }

    /// A request of a run, pinned. Where this janus has started the run, knowing the run is enough for it.
    fn call<T>(&mut self, run: &Run, message: T) -> Request<T> {
        let mut request = Request::new(message);
        set(&mut request, metadata::RUN, &run.id);
        let knows = self.world.janus_life(run.by.0) == run.by.1;
        if !knows || self.rng.random_bool(0.7) {
            set(&mut request, metadata::SERVER, server_id(run.server).as_str());
        }
        request
    }

    async fn transfer(&mut self, run: &Run, pace: Pace) -> Result<(), Status> {
        // Without a pin the call must go the way of the start.
        let mut client = self.client(run.by.0).await?;
        self.version += 1;
        let content = self.content();
        let hashes: Vec<_> = content.chunks(BLOCK_BYTES as usize).map(hash_block).collect();
        let raw: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
        let extent = Extent { first: 0, count: BLOCKS, zero: false };
        let batch = Batch::new(DISK_BYTES, vec![extent], raw.into(), content);
        let batch = batch.map_err(|error| Status::internal(error.to_string()))?;
        let message = pb::WriteBlocksRequest {
            session_id: run.session.session_id.clone(),
            epoch: run.epoch,
            batch: Some(batch.into_wire(pb::Encoding::None)),
            settled_block: BLOCKS,
        };
        let request = self.call(run, message).map(tokio_stream::once);
        let sent = Instant::now();
        let written = async {
            let mut acks = client.write_blocks(request).await?.into_inner();
            while let Some(ack) = acks.message().await? {
                if ack.received_block == BLOCKS {
                    return Ok(());
                }
            }
            Err(Status::unavailable("no acknowledgement"))
        };
        answered(written).await?;
        self.world.rules.touched(&run.id, sent);
        if pace == Pace::Chaos {
            sleep(Duration::from_millis(self.rng.random_range(0..4_000))).await;
        }
        let digest = table_digest(DISK_BYTES, &[segment_digest(&hashes)]);
        let head = run.session.head.as_ref();
        let commit = pb::CommitBackupRequest {
            backup_id: run.id.clone(),
            epoch: run.epoch,
            disks: vec![pb::DiskCommit {
                disk_id: "disk".into(),
                expected_head_id: head.map(|head| head.snapshot_id.clone()).unwrap_or_default(),
                table_digest: digest.0.to_vec().into(),
                consistency: pb::Consistency::Frozen.into(),
                skipped_bytes: 0,
            }],
            ..Default::default()
        };
        let request = self.call(run, commit);
        self.world.rules.ending(&run.id);
        let answer = answered(client.commit_backup(request)).await?.into_inner();
        self.world.rules.note(format!("{} has committed at {}", self.node, run.server));
        self.world.rules.committed(run.server, &answer);
        Ok(())
    }

    /// What is on the disk now: something else each time.
    fn content(&self) -> Bytes {
        let mut content = vec![0; DISK_BYTES as usize];
        for block in content.chunks_mut(BLOCK_BYTES as usize) {
            block[..8].copy_from_slice(&self.version.to_le_bytes());
        }
        content.into()
    }
}

/// Whether the same run may be gone on with.
fn is_passing(status: &Status) -> bool {
    let ended = matches!(
        reason(status),
        Some(ErrorReason::SessionExpired | ErrorReason::RunState | ErrorReason::HeadMoved)
    );
    !ended
}

fn set<T>(request: &mut Request<T>, name: &'static str, value: &str) {
    request.metadata_mut().insert(name, value.parse().unwrap());
}

/// An answer, if it comes in time.
async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match timeout(PATIENCE, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded("no answer")),
    }
}
