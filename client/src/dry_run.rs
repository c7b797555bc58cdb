//! A backup that sends nothing: reads a disk as a backup would, and tells of each volume what was read and why, and what would
//! travel to which server.

use std::{ops::Range, sync::Arc};

use janus_proto::{
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BYTES, ServerId, block_count},
    ranges::Ranges,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backup::Disk,
    cache::{DiskCache, MustSend},
    packing::Packing,
    reading::{Reading, Surveyed, Zeros},
    scan::{
        Event, HashTable, Nothing, ScanError, ScanJob, Scanned, Segments, SessionContent, Threads,
        scan,
    },
    segment_bits::SegmentBits,
    transfer::disk::{CacheTable, count_below},
    volume::Volume,
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
    /// What servers lack.
    pub servers: Vec<(ServerId, Lacking)>,
    /// What was read and why.
    pub reading: Arc<Reading>,
    /// The same for each volume; what is in none, as the partition table, comes last. Empty when the disk has no volumes.
    pub parts: Vec<Part>,
}

/// What a server lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lacking {
    /// Bytes of the blocks that it lacks; zeros among them don't travel.
    pub bytes: u64,
    /// Of these, bytes that a backup to it reads beyond what was read here, but for zeros and holes: no journal says that they have changed,
    /// but the server doesn't have what they changed to earlier.
    pub unread_bytes: u64,
}

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The volume; `None`: all that is in none.
    pub volume: Option<Volume>,
    /// Its bytes.
    pub size_bytes: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that differ from what the cache knows.
    pub changed_bytes: u64,
    /// Why so much or so little is read.
    pub why: Vec<String>,
}

impl Part {
    fn of_volume(one: &Surveyed, reading: &Reading) -> Self {
        let volume = one.volume.clone();
        let journal = reading.why(&volume.name());
        let why = match &one.zeros {
            Zeros::All => vec!["left out by skip_volumes".into()],
            Zeros::Nothing => vec![journal],
            Zeros::Free(_) => vec!["free space skipped".into(), journal],
            Zeros::Unknown(error) => vec![format!("free space is read: {error}"), journal],
        };
        let size_bytes = volume.len;
        Self { volume: Some(volume), size_bytes, read_bytes: 0, changed_bytes: 0, why }
    }

    fn add(&mut self, range: &Range<u64>, read: &Ranges, changed: &Ranges) {
        let within = Ranges::from(range.clone());
        self.read_bytes += read.intersect(&within).total();
        self.changed_bytes += changed.intersect(&within).total();
    }
}

/// The parts of a disk, volumes first.
fn parts_of(reading: &Reading, size_bytes: u64) -> Vec<Part> {
    if reading.volumes.is_empty() {
        return Vec::new();
    }
    let mut parts: Vec<_> =
        reading.volumes.iter().map(|one| Part::of_volume(one, reading)).collect();
    let inside: u64 = parts.iter().map(|part| part.size_bytes).sum();
    let size_bytes = size_bytes.saturating_sub(inside);
    let why = vec![reading.why("")];
    parts.push(Part { volume: None, size_bytes, read_bytes: 0, changed_bytes: 0, why });
    parts
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
    threads: Threads,
    stop: &CancellationToken,
) -> Result<Forecast, DryRunError> {
    let reading = disk.reading.now(disk.cache.as_ref().and_then(DiskCache::cursor_digest));
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
    threads: Threads,
    stop: &CancellationToken,
) -> Result<Forecast, DryRunError> {
    let servers = disk.cache.as_ref().map(DiskCache::servers).unwrap_or_default();
    let must = |cache: &DiskCache| servers.iter().map(|server| cache.must_send(server)).collect();
    let musts: Vec<MustSend> = disk.cache.as_ref().map(must).unwrap_or_default();
    let table: Box<dyn HashTable> = match disk.cache.clone() {
        Some(cache) => Box::new(CacheTable::new(cache)),
        None => Box::new(Nothing),
    };
    let packing = Packing::off();
    let job = ScanJob {
        source: &disk.source,
        seal: disk.seal.as_deref(),
        table: &*table,
        content: if servers.is_empty() { SessionContent::Zeros } else { SessionContent::Table },
        reading: &reading,
        must: &|_| SegmentBits::default(),
        segments: Segments::From(0),
        packing: &packing,
        threads,
    };
    let blocks = block_count(disk.source.size_bytes());
    let parts = parts_of(&reading, disk.source.size_bytes());
    let servers_sums = vec![Lacking::default(); servers.len()];
    let mut sums = Sums { servers: servers_sums, parts, ..Sums::default() };
    let ended = scan(&job, |event| {
        if let Event::Scanned(scanned) = event {
            let size_bytes = disk.source.size_bytes();
            let unread = reading.segment(scanned.segment, size_bytes).known;
            sums.add(&scanned, &musts, &unread, blocks);
        }
        if stop.is_cancelled() { Err(DryRunError::Interrupted) } else { Ok(()) }
    });
    ended??;
    let bytes = |count: &u64| count * BLOCK_BYTES;
    Ok(Forecast {
        read_bytes: sums.read_bytes,
        changed_bytes: bytes(&sums.changed),
        first_bytes: servers.is_empty().then_some(sums.data_bytes),
        servers: servers.iter().cloned().zip(sums.servers).collect(),
        reading,
        parts: sums.parts,
    })
}

#[derive(Default)]
struct Sums {
    parts: Vec<Part>,
    read_bytes: u64,
    data_bytes: u64,
    /// Blocks.
    changed: u64,
    servers: Vec<Lacking>,
}

impl Sums {
    fn add(&mut self, scanned: &Scanned, musts: &[MustSend], unread: &SegmentBits, blocks: u64) {
        self.read_bytes += scanned.read.total();
        self.add_to_parts(scanned);
        self.data_bytes += scanned.messages.iter().map(|message| message.raw_bytes).sum::<u64>();
        self.changed += scanned.changes.len() as u64;
        let mut changed = SegmentBits::default();
        for (place, _) in &scanned.changes {
            changed[usize::from(place / 64)] |= 1 << (place % 64);
        }
        for (sum, must) in self.servers.iter_mut().zip(musts) {
            let mut bits = must.segment_bits(scanned.segment);
            let mut again = bits;
            again.iter_mut().zip(unread).for_each(|(word, unread)| *word &= unread);
            sum.unread_bytes += count_below(scanned.segment, &again, blocks) * BLOCK_BYTES;
            bits.iter_mut().zip(changed).for_each(|(word, changed)| *word |= changed);
            sum.bytes += count_below(scanned.segment, &bits, blocks) * BLOCK_BYTES;
        }
    }

    fn add_to_parts(&mut self, scanned: &Scanned) {
        let Some((rest, volumes)) = self.parts.split_last_mut() else { return };
        let first = scanned.segment * SEGMENT_BYTES;
        let block = |(place, _): &(u16, BlockHash)| {
            let start = first + u64::from(*place) * BLOCK_BYTES;
            start..start + BLOCK_BYTES
        };
        let changed: Ranges = scanned.changes.iter().map(block).collect();
        let mut left = (scanned.read.total(), changed.total());
        let segment = first..first + SEGMENT_BYTES;
        for part in volumes {
            let Some(range) = part.volume.as_ref().map(Volume::range) else { continue };
            if range.start < segment.end && range.end > segment.start {
                let before = (part.read_bytes, part.changed_bytes);
                part.add(&range, &scanned.read, &changed);
                left.0 = left.0.saturating_sub(part.read_bytes - before.0);
                left.1 = left.1.saturating_sub(part.changed_bytes - before.1);
            }
        }
        rest.read_bytes += left.0;
        rest.changed_bytes += left.1;
    }
}
