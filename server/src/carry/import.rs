//! What lies on this machine into the store, as one run: only what its heads don't hold is read, compared and written.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use bytes::Bytes;
use janus_proto::{
    buffers::Buffer,
    carried::{CarriedDisk, DiskEntry, Manifest},
    hash::{TableDigester, hash_blocks, segment_digest, zero_hash},
    ids::{
        BLOCK_BYTES, BackupId, BlockHash, DiskId, MachineKey, SEGMENT_BLOCKS, SEGMENT_BYTES,
        block_count, block_len, segment_count,
    },
    model::{Batch, Extent, MAX_BATCH_BYTES},
};

use super::{CarryError, Content, Meter};
use crate::{
    chain::{Origin, Run},
    runs::{ActiveRun, CommitDisk, RunError, Runs, WantedDisk, Writer},
    session::Session,
    storage::Disk,
};

const BLOCK: usize = BLOCK_BYTES as usize;
/// Most blocks of data in a message.
const MESSAGE_BLOCKS: usize = MAX_BATCH_BYTES / BLOCK;
/// Runs begun for one import: one that finds its head damaged is begun again, as by clients.
const RUNS: usize = 3;

/// A disk to be imported.
pub struct NewDisk {
    /// What it is called.
    pub disk: DiskId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
    /// How the source was held still (number of `janus.v1.Consistency`).
    pub consistency: i32,
    /// Bytes that were counted as zeros unread.
    pub skipped_bytes: u64,
    /// Bytes of it that aren't zero, where that is known.
    pub data_bytes: Option<u64>,
    /// What is on it.
    pub content: Box<dyn Content>,
}

/// A run to be imported.
pub struct NewRun {
    /// Whose it will be.
    pub machine: MachineKey,
    /// The carried run.
    pub run: Option<BackupId>,
    /// Unix milliseconds: its content is of that time.
    pub taken_ms: i64,
    /// The client's seal.
    pub seal: Vec<u8>,
    /// The server it comes from, by its name or URL.
    pub from: Option<String>,
    /// Disks that have no chain here get only hashes, and are filled later.
    pub stubs: bool,
    /// All its disks.
    pub disks: Vec<NewDisk>,
}

/// What came of an import.
#[derive(Debug)]
pub struct Imported {
    /// The run in the store.
    pub run: Arc<Run>,
    /// It was there before.
    pub was_here: bool,
    /// It went on where an earlier import ended.
    pub went_on: bool,
    /// Bytes of data that were written.
    pub written_bytes: u64,
    /// Bytes of data that stubs get later.
    pub promised_bytes: u64,
}

/// Takes a run in.
///
/// # Errors
/// When something of it can't be read or is damaged, or there is no room: then the store holds nothing of it. When it was
/// stopped, or can't be read now: then it may be gone on with.
pub fn import(
    runs: &Arc<Runs>,
    new: &NewRun,
    hear: &dyn Fn(u64, u64) -> bool,
) -> Result<Imported, CarryError> {
    let disks: Vec<&DiskId> = new.disks.iter().map(|disk| &disk.disk).collect();
    if let Some(run) = new.run.and_then(|run| runs.imported(&new.machine, run, &disks)) {
        return Ok(Imported {
            run,
            was_here: true,
            went_on: false,
            written_bytes: 0,
            promised_bytes: 0,
        });
    }
    let mut again = 1;
    loop {
        match try_import(runs, new, hear) {
            Err(CarryError::Run(RunError::ChainDamaged { .. })) if again < RUNS => again += 1,
            done => return done,
        }
    }
}

fn try_import(
    runs: &Arc<Runs>,
    new: &NewRun,
    hear: &dyn Fn(u64, u64) -> bool,
) -> Result<Imported, CarryError> {
    let wanted: Vec<WantedDisk> = new.disks.iter().map(NewDisk::wanted).collect();
    let origin = Origin { run: new.run, taken_ms: new.taken_ms, from: new.from.clone() };
    let open = runs.start_import(&new.machine, &wanted, origin, new.stubs)?;
    let written = {
        let _renewing = Renewing::start(&open, runs.lease() / 3);
        Writing { runs, run: &open, epoch: open.record().epoch }.all(new, hear)
    };
    match &written {
        Ok(_) => {}
        Err(error) if error.may_go_on() => runs.leave_import(&open),
        // Somebody else has it, or nobody.
        Err(CarryError::Run(RunError::Superseded { .. } | RunError::Unknown { .. })) => {}
        Err(_) => {
            if let Err(error) = runs.abort(&new.machine, open.backup) {
                tracing::error!(%error, machine = %new.machine, backup_id = %open.backup, "a failed import can't be given up");
                // Whoever comes next tries again, and need not wait for its lease.
                runs.leave_import(&open);
            }
        }
    }
    written
}

impl NewRun {
    /// What lies in a folder, as its manifest says.
    ///
    /// # Errors
    /// When a disk can't be opened or isn't what the manifest says.
    pub fn carried(storage: &Disk, folder: &Path, manifest: &Manifest) -> Result<Self, CarryError> {
        let disk = |entry: &DiskEntry| {
            Ok::<_, CarryError>(NewDisk {
                disk: entry.disk.clone(),
                size_bytes: entry.size_bytes,
                logical_sector_bytes: entry.logical_sector_bytes,
                consistency: entry.consistency,
                skipped_bytes: entry.skipped_bytes,
                data_bytes: Some(entry.data_bytes),
                content: Box::new(CarriedDisk::open(storage, folder, entry)?),
            })
        };
        Ok(Self {
            machine: manifest.machine.clone(),
            run: Some(manifest.run),
            taken_ms: manifest.committed_ms,
            seal: manifest.seal(),
            from: None,
            stubs: false,
            disks: manifest.disks.iter().map(disk).collect::<Result<_, _>>()?,
        })
    }
}

impl NewDisk {
    fn wanted(&self) -> WantedDisk {
        WantedDisk {
            disk: self.disk.clone(),
            size_bytes: self.size_bytes,
            logical_sector_bytes: self.logical_sector_bytes,
        }
    }

    /// Bytes that storing it in a session may need.
    fn needed_bytes(&self, session: &Session) -> Result<u64, CarryError> {
        let Some(data_bytes) = self.data_bytes else { return Ok(0) };
        let here = session.segment_digests().map_err(RunError::from)?;
        if session.head().is_none() && !session.is_resumed() {
            return Ok(data_bytes);
        }
        // Not more than what differs, wherever in it.
        let differing = (0..).zip(here).filter(|(segment, digest)| {
            self.content.digest(*segment).is_none_or(|known| known != *digest)
        });
        Ok(data_bytes.min(differing.count() as u64 * SEGMENT_BYTES))
    }
}

/// Keeps the lease of a run while its content is waited for, which may take longer.
struct Renewing {
    end: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Renewing {
    fn start(run: &Arc<ActiveRun>, every: Duration) -> Self {
        let (end, ended) = mpsc::channel();
        let run = run.clone();
        let renew = move || {
            while ended.recv_timeout(every) == Err(mpsc::RecvTimeoutError::Timeout) {
                run.renew();
            }
        };
        // Without a thread the lease lasts as long as it does.
        let thread = thread::Builder::new().name("lease".into()).spawn(renew).ok();
        Self { end: Some(end), thread }
    }
}

impl Drop for Renewing {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An import at work.
struct Writing<'a> {
    runs: &'a Arc<Runs>,
    run: &'a Arc<ActiveRun>,
    epoch: u64,
}

impl Writing<'_> {
    fn all(&self, new: &NewRun, hear: &dyn Fn(u64, u64) -> bool) -> Result<Imported, CarryError> {
        let sessions = self.run.sessions();
        let went_on = sessions.iter().any(|session| session.is_resumed());
        let mut needed = 0;
        for (session, disk) in sessions.iter().zip(&new.disks) {
            needed += disk.needed_bytes(session)?;
        }
        self.runs.check_room_for(needed)?;
        let mut meter = Meter::new(new.disks.iter().map(|disk| disk.size_bytes).sum(), hear);
        let mut commits = Vec::with_capacity(new.disks.len());
        let (mut written_bytes, mut promised_bytes) = (0, 0);
        for (session, disk) in sessions.iter().zip(&new.disks) {
            let writer = Writer::new(self.run.clone(), session.disk.session, self.epoch)?;
            let writer = writer.within_quota(self.runs.clone());
            let mut transfer = Transfer::new(self, session, disk, writer);
            transfer.run(&mut meter)?;
            written_bytes += transfer.written_bytes;
            if session.disk.stub {
                // Once full it takes so much.
                promised_bytes += session.stored_bytes();
                self.runs.check_room_for(promised_bytes)?;
            }
            commits.push(CommitDisk {
                disk: disk.disk.clone(),
                expected_head: session.disk.head,
                table_digest: transfer.digester.finish(),
                consistency: disk.consistency,
                skipped_bytes: disk.skipped_bytes,
            });
        }
        let (machine, backup) = (&new.machine, self.run.backup);
        let run = self.runs.commit(machine, backup, self.epoch, &commits, &new.seal)?;
        Ok(Imported { run, was_here: false, went_on, written_bytes, promised_bytes })
    }
}

/// One disk on its way into its session.
struct Transfer<'a> {
    writing: &'a Writing<'a>,
    session: &'a Session,
    disk: &'a NewDisk,
    writer: Writer,
    digester: TableDigester,
    /// Bytes of the segment at hand.
    buffer: Vec<u8>,
    found: Vec<BlockHash>,
    written_bytes: u64,
}

impl<'a> Transfer<'a> {
    fn new(
        writing: &'a Writing<'a>,
        session: &'a Session,
        disk: &'a NewDisk,
        writer: Writer,
    ) -> Self {
        Self {
            writing,
            session,
            disk,
            writer,
            digester: TableDigester::new(disk.size_bytes),
            buffer: vec![0; SEGMENT_BYTES.min(disk.size_bytes) as usize],
            found: Vec::with_capacity(SEGMENT_BLOCKS as usize),
            written_bytes: 0,
        }
    }

    fn run(&mut self, meter: &mut Meter<'_>) -> Result<(), CarryError> {
        let size = self.disk.size_bytes;
        let here = self.session.segment_digests().map_err(|error| self.cannot_compare(error))?;
        let blocks_of = |segment: u64| {
            segment * SEGMENT_BLOCKS..((segment + 1) * SEGMENT_BLOCKS).min(block_count(size))
        };
        let is_here = |segment: u64, here: &BlockHash| {
            self.disk.content.digest(segment).as_ref() == Some(here)
                && !self.is_lost(&blocks_of(segment))
        };
        let wanted = (0..).zip(&here).filter(|(segment, here)| !is_here(*segment, here));
        let wanted: Vec<u64> = wanted.map(|(segment, _)| segment).collect();
        self.disk.content.expect_segments(&wanted);
        let mut wanted = wanted.into_iter().peekable();
        for (segment, here) in (0..segment_count(size)).zip(here) {
            let blocks = blocks_of(segment);
            match wanted.next_if_eq(&segment) {
                Some(_) => self.segment(segment, blocks.clone())?,
                None => self.digester.push(&here),
            }
            let end = (blocks.end * BLOCK_BYTES).min(size);
            meter.add(end - blocks.start * BLOCK_BYTES)?;
        }
        self.writer.apply(None, block_count(size))?;
        Ok(())
    }

    /// Writes what of a segment is not in the session.
    fn segment(&mut self, segment: u64, blocks: Range<u64>) -> Result<(), CarryError> {
        let here = self.session.segment(segment).map_err(|error| self.cannot_compare(error))?;
        let known = self.disk.content.hashes(segment)?;
        let hashes = match &known {
            Some(hashes) => hashes.clone(),
            None => self.read_whole(&blocks)?,
        };
        self.digester.push(&segment_digest(&hashes));
        let differs = |index: usize| {
            let block = blocks.start + index as u64;
            hashes.get(index) != here.get(index) || self.is_lost(&(block..block + 1))
        };
        let size = self.disk.size_bytes;
        let mut wanted: Vec<Extent> = Vec::new();
        for index in (0..hashes.len()).filter(|index| differs(*index)) {
            let first = blocks.start + index as u64;
            let zero = hashes[index] == zero_hash(block_len(size, first));
            match wanted.last_mut() {
                Some(last) if last.end() == first && last.zero == zero => last.count += 1,
                _ => wanted.push(Extent { first, count: 1, zero }),
            }
        }
        if self.session.disk.stub {
            return self.promise(&wanted, &hashes, &blocks);
        }
        if known.is_some() {
            let data: Vec<Extent> = wanted.iter().filter(|extent| !extent.zero).copied().collect();
            if !data.is_empty() {
                self.disk.content.expect(&data)?;
            }
            for extent in &data {
                self.read_known(extent, &hashes, blocks.start)?;
            }
        }
        self.send(&wanted, &hashes, &blocks)
    }

    /// Reads a whole segment of which no hashes are known, and makes them.
    fn read_whole(&mut self, blocks: &Range<u64>) -> Result<Vec<BlockHash>, CarryError> {
        let size = self.disk.size_bytes;
        let range = blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(size);
        if self.disk.content.is_zero(range.clone()) {
            let zeros = blocks.clone().map(|block| zero_hash(block_len(size, block)));
            return Ok(zeros.collect());
        }
        let bytes = &mut self.buffer[..(range.end - range.start) as usize];
        for (at, piece) in
            (range.start..).step_by(MAX_BATCH_BYTES).zip(bytes.chunks_mut(MAX_BATCH_BYTES))
        {
            self.disk.content.read_at(at, piece)?;
        }
        let mut hashes = Vec::with_capacity(SEGMENT_BLOCKS as usize);
        hash_blocks(bytes, &mut hashes);
        Ok(hashes)
    }

    /// Reads blocks to their places in the buffer and compares them with their hashes.
    fn read_known(
        &mut self,
        extent: &Extent,
        hashes: &[BlockHash],
        start: u64,
    ) -> Result<(), CarryError> {
        let place = self.place(extent, start);
        let offset = extent.first * BLOCK_BYTES;
        let bytes = &mut self.buffer[place];
        self.disk.content.read_at(offset, bytes)?;
        self.found.clear();
        hash_blocks(bytes, &mut self.found);
        let expected = hashes.iter().skip((extent.first - start) as usize);
        match self.found.iter().zip(expected).position(|(found, expected)| found != expected) {
            Some(index) => Err(self.disk.content.wrong(extent.first + index as u64)),
            None => Ok(()),
        }
    }

    /// Where an extent is in the buffer, which begins at block `start`.
    fn place(&self, extent: &Extent, start: u64) -> Range<usize> {
        let end = (extent.end() * BLOCK_BYTES).min(self.disk.size_bytes) - start * BLOCK_BYTES;
        (extent.first - start) as usize * BLOCK..end as usize
    }

    /// Sends extents of a segment whose data is in the buffer.
    fn send(
        &mut self,
        wanted: &[Extent],
        hashes: &[BlockHash],
        blocks: &Range<u64>,
    ) -> Result<(), CarryError> {
        let mut message = Message::default();
        for extent in wanted {
            let mut first = extent.first;
            while first < extent.end() {
                let room = (MESSAGE_BLOCKS - message.blocks) as u64;
                let count = match extent.zero {
                    true => extent.count,
                    false => (extent.end() - first).min(room),
                };
                let part = Extent { first, count, zero: extent.zero };
                let from = (first - blocks.start) as usize;
                let bytes = &self.buffer[self.place(&part, blocks.start)];
                message.add(part, &hashes[from..from + count as usize], bytes);
                first += count;
                if message.blocks == MESSAGE_BLOCKS {
                    self.flush(&mut message, first)?;
                }
            }
        }
        self.flush(&mut message, blocks.end)
    }

    /// Says what the blocks of a segment are, whose data comes later.
    fn promise(
        &mut self,
        wanted: &[Extent],
        hashes: &[BlockHash],
        blocks: &Range<u64>,
    ) -> Result<(), CarryError> {
        let data = wanted.iter().filter(|extent| !extent.zero);
        let of = |extent: &Extent| {
            let from = (extent.first - blocks.start) as usize;
            hashes.iter().skip(from).take(extent.count as usize)
        };
        let told: Vec<u8> = data.flat_map(of).flat_map(|hash| hash.0).collect();
        self.writer.promise(wanted, &told, blocks.end)?;
        Ok(())
    }

    fn flush(&mut self, message: &mut Message, settled: u64) -> Result<(), CarryError> {
        let message = std::mem::take(message);
        self.written_bytes += message.used as u64;
        let data = message.data.map_or_else(Bytes::new, |data| data.into_bytes(message.used));
        let batch = Batch::new(self.disk.size_bytes, message.extents, message.hashes.into(), data);
        // Its parts were made above: an error is a bug, kept from being a panic.
        let batch = batch.map_err(|error| {
            let reason = error.to_string();
            CarryError::Unfit { path: self.disk.disk.to_string().into(), reason }
        })?;
        self.writer.apply(Some(&batch), settled)?;
        Ok(())
    }

    /// True when the head has lost one of these blocks, so that it counts as different whatever its hash is.
    fn is_lost(&self, blocks: &Range<u64>) -> bool {
        self.session.head().is_some_and(|head| head.damaged.intersects(blocks))
    }

    fn cannot_compare(&self, error: crate::session::SessionError) -> CarryError {
        self.writing.runs.cannot_compare(self.session, error).into()
    }
}

/// A message in the making.
#[derive(Default)]
struct Message {
    extents: Vec<Extent>,
    hashes: Vec<u8>,
    data: Option<Buffer>,
    used: usize,
    /// Blocks of data.
    blocks: usize,
}

impl Message {
    fn add(&mut self, extent: Extent, hashes: &[BlockHash], bytes: &[u8]) {
        self.extents.push(extent);
        if extent.zero {
            return;
        }
        self.hashes.extend(hashes.iter().flat_map(|hash| hash.0));
        let data = self.data.get_or_insert_with(Buffer::take);
        data[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
        self.blocks += hashes.len();
    }
}
