//! One WriteBlocks stream: the scan on threads, a bounded channel, the call, its acknowledgements.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use janus_proto::{
    ids::{SEGMENT_BLOCKS, block_count},
    pb::WriteBlocksRequest,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Run, Session, TransferError, disk::DiskTransfer};
use crate::{
    link::LinkError,
    packing::{Packing, Sent},
    scan::{Event, HashTable, ScanError, ScanJob, Scanned, Segments, Threads, scan},
};

const WRITING: &str = "sending blocks";
/// Messages between the scan and the network, 1 MiB each at most.
const QUEUED: usize = 4;
/// Messages on their way while nothing is known of the line: windows and socket buffers would take in 12 MiB before it was seen to be
/// slow, more than most deltas have.
const ON_A_NEW_LINE: u64 = 2;
/// Longest wait for one of them; a server that doesn't count what it received is never waited for again.
const COUNTED_WITHIN: Duration = Duration::from_secs(5);
/// A stream on which nothing moves for this long is given up.
const STALL: Duration = Duration::from_secs(90);

/// How a scan is done, and how what it finds is sent.
#[derive(Debug, Clone)]
pub struct ScanSettings {
    /// Threads that read and hash.
    pub threads: Threads,
    /// How data is packed.
    pub packing: Arc<Packing>,
}

/// Scans `segments` of a disk and sends what has to travel. The disk comes back in any case.
///
/// # Errors
/// When the disk, the cache or the stream fails, or `stop` asks.
pub async fn send(
    run: &Run,
    session: &Session,
    mut disk: DiskTransfer,
    segments: Segments,
    settings: &ScanSettings,
    stop: &CancellationToken,
) -> (Option<DiskTransfer>, Result<(), TransferError>) {
    let (sender, receiver) = mpsc::channel(QUEUED);
    let ended = CancellationToken::new();
    let life = Arc::new(Life::new());
    let mut writer = Writer {
        sender,
        ended: ended.clone(),
        life: life.clone(),
        sent: 0,
        counted: life.counted.subscribe(),
        is_counted: true,
        handle: Handle::current(),
        first: Some((session.id.to_string(), run.epoch)),
        settled: 0,
        heartbeat: run.lease / 3,
        last_sent: Instant::now(),
        packing: settings.packing.clone(),
    };
    settings.packing.begin(&run.encodings);
    let (threads, table) = (settings.threads, disk.table(run, session));
    let scanning = tokio::task::spawn_blocking(move || {
        let result = scan_into(&mut disk, &*table, (segments, threads), &mut writer);
        (disk, result)
    });
    let request = run.address().request(ReceiverStream::new(receiver), None);
    let call = tokio::select! {
        answer = write(run, request, &life) => answer.map_err(TransferError::from),
        error = life.watch() => Err(error.into()),
        () = stop.cancelled() => Err(TransferError::Interrupted),
    };
    // Whatever the call came to, the scan must not wait for it.
    ended.cancel();
    let Ok((mut disk, scanned)) = scanning.await else {
        return (None, Err(TransferError::Interrupted));
    };
    disk.acknowledge(life.acknowledged.load(Ordering::Relaxed));
    let result = match (scanned, call) {
        // The stream ended first, and the scan for its sake.
        (Ok(()) | Err(ScanError::Stopped), Err(call)) => Err(call),
        (Err(ScanError::Stopped), Ok(())) => {
            Err(LinkError::call(WRITING)(Status::unavailable("the server ended the stream early"))
                .into())
        }
        (Err(ScanError::Link(error)), _) => Err((*error).into()),
        (Err(error), _) => Err(error.into()),
        (Ok(()), Ok(())) => Ok(()),
    };
    (Some(disk), result)
}

async fn write(
    run: &Run,
    request: tonic::Request<ReceiverStream<WriteBlocksRequest>>,
    life: &Life,
) -> Result<(), LinkError> {
    let mut answers = run
        .link
        .bulk_backup()
        .write_blocks(request)
        .await
        .map_err(LinkError::call(WRITING))?
        .into_inner();
    life.note();
    while let Some(answer) = answers.message().await.map_err(LinkError::call(WRITING))? {
        life.note();
        life.acknowledged.fetch_max(answer.received_block, Ordering::Relaxed);
        life.counted.send_replace(answer.received_messages);
        tracing::trace!(
            received = answer.received_block,
            durable = answer.durable_block,
            "acknowledged"
        );
    }
    Ok(())
}

fn scan_into(
    disk: &mut DiskTransfer,
    table: &dyn HashTable,
    (segments, threads): (Segments, Threads),
    writer: &mut Writer,
) -> Result<(), ScanError> {
    let whole = matches!(segments, Segments::From(_));
    let blocks = block_count(disk.source.size_bytes());
    let (source, seal) = (disk.source.clone(), disk.seal.clone());
    let reading = disk.plan_scan();
    // The bits as they are now: what this scan sends itself must not feed back into it.
    let must = disk.must();
    let must = move |segment| must.bits(segment);
    let packing = writer.packing.clone();
    let job = ScanJob {
        source: &source,
        seal: seal.as_deref(),
        table,
        content: disk.content,
        reading: &reading,
        must: &must,
        segments,
        packing: &packing,
        threads,
    };
    writer.heartbeat()?;
    let ended = scan(&job, |event| {
        if let Event::Scanned(scanned) = event {
            disk.note(&scanned).map_err(|error| ScanError::Table(error.to_string()))?;
            let end = if whole { ((scanned.segment + 1) * SEGMENT_BLOCKS).min(blocks) } else { 0 };
            writer.segment(disk, *scanned, end)?;
        }
        writer.heartbeat_if_due()
    });
    ended??;
    // Tells the server that the rest is settled, too.
    writer.heartbeat()
}

/// The scan's end of the stream.
struct Writer {
    sender: mpsc::Sender<WriteBlocksRequest>,
    ended: CancellationToken,
    life: Arc<Life>,
    /// Messages of this stream so far.
    sent: u64,
    /// How many of them the server has received, as far as is known here.
    counted: watch::Receiver<u64>,
    /// As far as was seen, the server says so in time.
    is_counted: bool,
    handle: Handle,
    /// Session and epoch, for the first message.
    first: Option<(String, u64)>,
    settled: u64,
    heartbeat: Duration,
    last_sent: Instant,
    packing: Arc<Packing>,
}

impl Writer {
    /// Sends a segment's messages; the last one says that everything below `end` is settled.
    fn segment(
        &mut self,
        disk: &mut DiskTransfer,
        scanned: Scanned,
        end: u64,
    ) -> Result<(), ScanError> {
        let last = scanned.messages.len();
        for (index, message) in scanned.messages.into_iter().enumerate() {
            let message = self.packing.pack_late(message);
            let (raw_bytes, wire_bytes) = (message.raw_bytes, message.batch.data.len() as u64);
            disk.figures.sent_bytes += raw_bytes;
            disk.figures.wire_bytes += wire_bytes;
            disk.progress.sent(raw_bytes, wire_bytes);
            if index + 1 == last {
                self.settled = end;
            }
            let began = Instant::now();
            self.send(Some(message.batch))?;
            let sent = Sent { raw_bytes, wire_bytes };
            self.packing.sent((message.tried, sent), began.elapsed());
        }
        self.settled = end;
        Ok(())
    }

    fn send(&mut self, batch: Option<janus_proto::pb::BlockBatch>) -> Result<(), ScanError> {
        let (session_id, epoch) = self.first.take().unwrap_or_default();
        let message = WriteBlocksRequest { session_id, epoch, batch, settled_block: self.settled };
        self.sent += 1;
        let (sent, is_careful) = (self.sent, self.is_counted && self.packing.is_new_to_line());
        let sent = self.handle.block_on(async {
            let send = async {
                if is_careful {
                    let few = self.counted.wait_for(|counted| counted + ON_A_NEW_LINE >= sent);
                    self.is_counted = timeout(COUNTED_WITHIN, few).await.is_ok();
                }
                self.sender.send(message).await.is_ok()
            };
            tokio::select! {
                sent = send => sent,
                () = self.ended.cancelled() => false,
            }
        });
        self.last_sent = Instant::now();
        self.life.note();
        if sent { Ok(()) } else { Err(ScanError::Stopped) }
    }

    fn heartbeat(&mut self) -> Result<(), ScanError> {
        self.send(None)
    }

    fn heartbeat_if_due(&mut self) -> Result<(), ScanError> {
        if self.ended.is_cancelled() {
            return Err(ScanError::Stopped);
        }
        if self.last_sent.elapsed() >= self.heartbeat { self.heartbeat() } else { Ok(()) }
    }
}

/// What has come of a stream.
struct Life {
    began: Instant,
    /// When something moved last, in milliseconds since the stream began.
    moved_ms: AtomicU64,
    /// The server has told that blocks below this one are settled.
    acknowledged: AtomicU64,
    /// Messages that it has told to have received.
    counted: watch::Sender<u64>,
}

impl Life {
    fn new() -> Self {
        let (moved_ms, acknowledged) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { began: Instant::now(), moved_ms, acknowledged, counted: watch::Sender::new(0) }
    }

    fn note(&self) {
        self.moved_ms.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Ends when nothing has moved for too long: a peer that answers pings but nothing else.
    async fn watch(&self) -> LinkError {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = self.began.elapsed().as_millis() as u64;
            // Something may have moved since `now`.
            let still = now.saturating_sub(self.moved_ms.load(Ordering::Relaxed));
            if still > STALL.as_millis() as u64 {
                let seconds = STALL.as_secs();
                let status = Status::unavailable(format!("nothing moved for {seconds} s"));
                return LinkError::call(WRITING)(status);
            }
        }
    }
}
