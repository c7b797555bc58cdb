//! A backup without a server: all disks into a folder, which is carried to a server and imported there.
//!
//! Disks are read as for a first backup: nothing is taken for unchanged. Once the folder is finished, the hash caches
//! know its content, so that the next backup to the server that imported it compares digests instead of fetching hashes.

use std::{path::Path, sync::Arc, time::Instant};

use janus_proto::{
    carried::{CarriedError, Claim, DiskEntry, DiskWriter, Manifest},
    error::WireError,
    hash::zero_hash,
    ids::{
        BLOCK_BYTES, BackupId, BlockHash, MachineKey, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count,
        block_len,
    },
    image::Geometry,
    pb::BlockBatch,
    storage,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backup::Disk,
    cache::{DiskCache, Stage},
    packing::Packing,
    progress::Progress,
    reading::Reading,
    scan::{Event, Nothing, ScanError, ScanJob, Scanned, Segments, SessionContent, Threads, scan},
    seal::SealedDisk,
    segment_bits::SegmentBits,
};

/// Why there is no folder.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The folder can't be written.
    #[error(transparent)]
    Carried(#[from] CarriedError),
    /// A disk can't be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It was stopped.
    #[error("interrupted; nothing is left in the folder")]
    Interrupted,
}

/// What was written of one disk.
#[derive(Debug)]
pub struct FolderDisk {
    /// As the manifest has it.
    pub entry: DiskEntry,
    /// Bytes read from the disk; holes cost none.
    pub read_bytes: u64,
    /// What was read.
    pub reading: Arc<Reading>,
}

/// A folder that was written.
#[derive(Debug)]
pub struct FolderReport {
    /// The run.
    pub backup_id: BackupId,
    /// How long it took.
    pub seconds: f64,
    /// All its disks.
    pub disks: Vec<FolderDisk>,
}

/// How a folder is written.
#[derive(Debug, Clone)]
pub struct FolderJob {
    /// Whose disks they are.
    pub machine: MachineKey,
    /// Unix milliseconds before anything of the disks was read or held still.
    pub taken_ms: i64,
    /// Threads that read and hash.
    pub threads: Threads,
    /// What is shown meanwhile.
    pub progress: Arc<Progress>,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

impl FolderJob {
    /// Writes all disks. Blocks; meant for a thread.
    ///
    /// # Errors
    /// When a disk can't be read, the folder can't be written, or it was stopped: the folder then holds nothing.
    pub fn write(&self, disks: &[Disk], folder: &Path) -> Result<FolderReport, FolderError> {
        let began = Instant::now();
        let names = disks.iter().map(|disk| disk.source.disk_id().clone());
        let claim = Claim::take(&storage::Disk::default(), folder, names)?;
        let written = disks.iter().map(|disk| self.write_disk(&claim, disk));
        let written = match written.collect::<Result<Vec<_>, FolderError>>() {
            Ok(written) => written,
            Err(error) => {
                claim.give_up();
                return Err(error);
            }
        };
        let (written, stages): (Vec<_>, Vec<_>) = written.into_iter().unzip();
        let entries: Vec<_> = written.iter().map(|disk| disk.entry.clone()).collect();
        let backup_id = BackupId::new();
        let (machine, seal) = (self.machine.clone(), self.seal_of(disks, &entries));
        let manifest = Manifest::new(backup_id, machine, self.taken_ms, &seal, entries);
        claim.finish(&manifest)?;
        for (disk, stage) in disks.iter().zip(stages) {
            let learned = stage.zip(disk.cache.as_ref()).map(|(stage, cache)| cache.learn(stage));
            if let Some(Err(error)) = learned {
                tracing::warn!(disk = %disk.source.disk_id(), %error, "the hash cache can't be kept; the next backup fetches hashes");
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok(FolderReport { backup_id, seconds, disks: written })
    }

    /// The seal of the run; nothing where it isn't sealed.
    fn seal_of(&self, disks: &[Disk], entries: &[DiskEntry]) -> Vec<u8> {
        let Some(seal) = disks.iter().find_map(|disk| disk.seal.as_ref()) else {
            return Vec::new();
        };
        let content: Vec<_> = entries.iter().map(sealed_content).collect();
        seal.sealer().run(self.taken_ms, &content)
    }

    fn write_disk(
        &self,
        claim: &Claim,
        disk: &Disk,
    ) -> Result<(FolderDisk, Option<Stage>), FolderError> {
        let source = &disk.source;
        let reading = disk.reading.now(None);
        let geometry = Geometry {
            disk_bytes: source.size_bytes(),
            logical_sector_bytes: source.sector_bytes(),
        };
        let packing = Packing::off();
        let job = ScanJob {
            source,
            seal: disk.seal.as_deref(),
            table: &Nothing,
            content: SessionContent::Zeros,
            reading: &reading,
            must: &|_| SegmentBits::default(),
            segments: Segments::From(0),
            packing: &packing,
            threads: self.threads,
        };
        let mut writing = Writing {
            writer: DiskWriter::create(claim, source.disk_id(), geometry)?,
            size_bytes: source.size_bytes(),
            bytes: vec![0; SEGMENT_BYTES.min(source.size_bytes()) as usize],
            stage: disk.cache.as_ref().map(DiskCache::stage),
            read_bytes: 0,
        };
        let ended = scan(&job, |event| {
            if let Event::Scanned(scanned) = event {
                self.progress.read(scanned.read.total());
                self.progress.scanned(1);
                let before = writing.writer.data_bytes();
                writing.segment(&scanned)?;
                let written = writing.writer.data_bytes() - before;
                self.progress.sent(written, written);
            }
            if self.stop.is_cancelled() { Err(FolderError::Interrupted) } else { Ok(()) }
        });
        ended??;
        let entry = writing.writer.finish(source.consistency().into(), reading.zero_bytes())?;
        let done = FolderDisk { entry, read_bytes: writing.read_bytes, reading };
        Ok((done, writing.stage))
    }
}

/// What was written of a disk, as a run's seal speaks of it.
fn sealed_content(entry: &DiskEntry) -> SealedDisk<'_> {
    let DiskEntry { disk, size_bytes, logical_sector_bytes, table_digest, .. } = entry;
    SealedDisk {
        disk,
        size_bytes: *size_bytes,
        logical_sector_bytes: *logical_sector_bytes,
        table_digest: *table_digest,
    }
}

/// One disk on its way into the folder.
struct Writing {
    writer: DiskWriter,
    size_bytes: u64,
    /// Bytes of the segment at hand.
    bytes: Vec<u8>,
    /// For the hash cache; none once that has failed, which is no reason to have no backup.
    stage: Option<Stage>,
    read_bytes: u64,
}

impl Writing {
    fn segment(&mut self, scanned: &Scanned) -> Result<(), FolderError> {
        self.read_bytes += scanned.read.total();
        let first = scanned.segment * SEGMENT_BLOCKS;
        let blocks = block_count(self.size_bytes).saturating_sub(first).min(SEGMENT_BLOCKS);
        let zeros =
            (first..first + blocks).map(|block| zero_hash(block_len(self.size_bytes, block)));
        let mut hashes: Vec<BlockHash> = zeros.collect();
        for (place, hash) in &scanned.changes {
            if let Some(known) = hashes.get_mut(usize::from(*place)) {
                *known = *hash;
            }
        }
        if let Some(stage) = &self.stage
            && let Err(error) = stage.put_hashes(scanned.segment, &hashes)
        {
            tracing::warn!(%error, "the hash cache doesn't take what is read; the next backup fetches hashes");
            self.stage = None;
        }
        if scanned.changes.is_empty() {
            return Ok(());
        }
        self.bytes.fill(0);
        for message in &scanned.messages {
            self.take(scanned.segment, &message.batch)?;
        }
        let start = scanned.segment * SEGMENT_BYTES;
        let len = (self.size_bytes - start).min(SEGMENT_BYTES) as usize;
        Ok(self.writer.segment(scanned.segment, &hashes, &self.bytes[..len])?)
    }

    /// Puts the data of a message that isn't packed to its places.
    fn take(&mut self, segment: u64, batch: &BlockBatch) -> Result<(), FolderError> {
        let start = segment * SEGMENT_BYTES;
        let mut data = &batch.data[..];
        for extent in batch.extents.iter().filter(|extent| !extent.zero) {
            let from = extent.first_block * BLOCK_BYTES;
            let to = ((extent.first_block + extent.block_count) * BLOCK_BYTES).min(self.size_bytes);
            let place = from.checked_sub(start).zip(to.checked_sub(start));
            let place = place.map(|(from, to)| from as usize..to as usize);
            let target = place.and_then(|place| self.bytes.get_mut(place));
            // The scan made it: an error is a bug, kept from being a panic.
            let wrong = || ScanError::Message(WireError::invalid("extents", "not as its data"));
            let target = target.ok_or_else(wrong)?;
            let (piece, rest) = data.split_at_checked(target.len()).ok_or_else(wrong)?;
            target.copy_from_slice(piece);
            data = rest;
        }
        Ok(())
    }
}
