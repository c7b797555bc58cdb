//! A backup that sends nothing: reads a disk as a backup would, and tells what would travel to which server.

use std::sync::Arc;

use janus_proto::{
    ids::{BLOCK_BYTES, ServerId, block_count},
    pb::Encoding,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backup::Disk,
    cache::MustSend,
    delta::SegmentBits,
    reading::Reading,
    scan::{Event, ScanError, ScanJob, Scanned, Segments, SessionContent, scan},
    transfer::disk::{CacheTable, count_below},
};

/// What a backup of one disk would do.
#[derive(Debug)]
pub struct Forecast {
    /// Bytes that were read, as a backup would.
    pub read_bytes: u64,
    /// Bytes that differ from what the cache knows.
    pub changed_bytes: u64,
    /// Data for a server that has nothing of this disk; `None` when some server has.
    pub first_bytes: Option<u64>,
    /// Bytes of the blocks that servers lack; zeros among them don't travel.
    pub servers: Vec<(ServerId, u64)>,
    /// What was read and why.
    pub reading: Arc<Reading>,
}

/// Why there is no forecast.
#[derive(Debug, thiserror::Error)]
pub enum DryRunError {
    /// The disk or the cache can't be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It was stopped.
    #[error("interrupted")]
    Interrupted,
}

/// Reads a disk. Blocks; meant for a thread.
///
/// # Errors
/// When the disk or its cache can't be read, or `stop` asks.
pub fn forecast(
    disk: &Disk,
    threads: usize,
    stop: &CancellationToken,
) -> Result<Forecast, DryRunError> {
    let reading = disk.reading.now(disk.cache.cursor_digest());
    match read(disk, reading, threads, stop) {
        Err(DryRunError::Scan(ScanError::Missed { offset })) => {
            disk.reading.miss(offset, time::OffsetDateTime::now_utc().unix_timestamp());
            read(disk, disk.reading.now(None), threads, stop)
        }
        other => other,
    }
}

fn read(
    disk: &Disk,
    reading: Arc<Reading>,
    threads: usize,
    stop: &CancellationToken,
) -> Result<Forecast, DryRunError> {
    let servers = disk.cache.servers();
    let musts: Vec<MustSend> = servers.iter().map(|server| disk.cache.must_send(server)).collect();
    let table = CacheTable::new(disk.cache.clone());
    let job = ScanJob {
        source: &disk.source,
        table: &table,
        content: if servers.is_empty() { SessionContent::Zeros } else { SessionContent::Table },
        reading: &reading,
        must: &|_| SegmentBits::default(),
        segments: Segments::From(0),
        encoding: Encoding::None,
        threads,
    };
    let blocks = block_count(disk.source.size_bytes());
    let mut sums = Sums { servers: vec![0; servers.len()], ..Sums::default() };
    let ended = scan(&job, |event| {
        if let Event::Scanned(scanned) = event {
            sums.add(&scanned, &musts, blocks);
        }
        if stop.is_cancelled() { Err(DryRunError::Interrupted) } else { Ok(()) }
    });
    ended??;
    let bytes = |count: &u64| count * BLOCK_BYTES;
    let each = sums.servers.iter().map(bytes);
    Ok(Forecast {
        read_bytes: sums.read_bytes,
        changed_bytes: bytes(&sums.changed),
        first_bytes: servers.is_empty().then_some(sums.data_bytes),
        servers: servers.iter().cloned().zip(each).collect(),
        reading,
    })
}

#[derive(Default)]
struct Sums {
    read_bytes: u64,
    data_bytes: u64,
    /// Blocks.
    changed: u64,
    /// Blocks, for each server.
    servers: Vec<u64>,
}

impl Sums {
    fn add(&mut self, scanned: &Scanned, musts: &[MustSend], blocks: u64) {
        self.read_bytes += scanned.read_bytes;
        self.data_bytes += scanned.messages.iter().map(|message| message.raw_bytes).sum::<u64>();
        self.changed += scanned.changes.len() as u64;
        let mut changed = SegmentBits::default();
        for (place, _) in &scanned.changes {
            changed[usize::from(place / 64)] |= 1 << (place % 64);
        }
        for (sum, must) in self.servers.iter_mut().zip(musts) {
            let mut bits = must.segment_bits(scanned.segment);
            bits.iter_mut().zip(changed).for_each(|(word, changed)| *word |= changed);
            *sum += count_below(scanned.segment, &bits, blocks);
        }
    }
}
