//! Proof that a backup can be restored: all of it is read as a restore reads it and compared with its hashes, its file
//! systems are opened and their files read, and where that is wished its machine is started.
//!
//! What came of it is kept ([`record`]) and told to every janus. A proof changes nothing but what is known, and it stops where it
//! is when it is told to: it then counts as not tried.

pub mod boot;
pub mod choice;
mod content;
mod files;
pub mod follow;
pub mod record;

use std::{
    cell::Cell,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use janus_client::source::medium::Medium;
use janus_proto::{
    ids::{BLOCK_BYTES, BackupId, DiskId, SEGMENT_BYTES, SnapshotId},
    pb::Consistency,
    show::{amount, date},
};
use tokio_util::sync::CancellationToken;

use self::{
    boot::QEMU,
    content::{Content, SnapshotDisk, read_all},
    files::Look,
    record::{Boot, DiskProof, Proof, Proofs, Said, VolumeProof},
};
use crate::{
    chain::{
        Held, Run,
        opened::{OpenError, OpenedSnapshot, Salvage, open_table},
    },
    runs::{Machine, Runs, now_ms},
    verify::{CheckError, Pace, pace::Limit},
};

/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Lost ranges, or segments, that are named of one disk.
const MOST_RANGES: usize = 8;

/// Why there is no proof, neither a good one nor a bad one.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// Asked to stop.
    #[error("stopped before it was proven")]
    Stopped,
    /// Retention or an operator was faster.
    #[error("snapshot {snapshot} is gone: it was dropped meanwhile")]
    Gone {
        /// Which.
        snapshot: SnapshotId,
    },
    /// It builds on a stub.
    #[error(
        "snapshot {snapshot} isn't complete here: `janus-server seed status` tells what still comes from other servers"
    )]
    Incomplete {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// A machine can't be started here.
    #[error(
        "{QEMU} isn't installed, so no machine can be started: install it (Debian: qemu-system-x86), or prove without --boot"
    )]
    NoQemu,
}

impl From<CheckError> for ProveError {
    fn from(_: CheckError) -> Self {
        // A pace fails with nothing else.
        Self::Stopped
    }
}

/// What is to be proven: a run, or one disk of it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The run.
    pub run: Arc<Run>,
    /// Only this disk of it.
    pub disk: Option<DiskId>,
}

impl Target {
    /// A run whose turn it is, of these machines. Of a named disk only runs that have it count.
    pub fn choose(machines: &[Arc<Machine>], disk: Option<&DiskId>) -> Option<Self> {
        let runs: Vec<Vec<Arc<Run>>> = machines.iter().map(|one| runs_of(one, disk)).collect();
        let known: Vec<_> =
            machines.iter().zip(&runs).map(|(one, runs)| tried(&one.proofs(), runs)).collect();
        let (machine, run) = choice::choose(&known, now_ms(), &mut files::below)?;
        let run = runs.get(machine)?.get(run)?.clone();
        Some(Self { run, disk: disk.cloned() })
    }

    fn disks(&self) -> Vec<Held> {
        let is_meant =
            |held: &Held| self.disk.as_ref().is_none_or(|disk| *disk == held.snapshot().disk);
        Held::all(&self.run).filter(is_meant).collect()
    }

    /// All disks of the run are meant.
    pub fn is_whole(&self) -> bool {
        self.disks().len() == self.run.snapshots.len()
    }
}

/// Its runs, oldest first.
fn runs_of(machine: &Machine, disk: Option<&DiskId>) -> Vec<Arc<Run>> {
    let mut runs: Vec<Arc<Run>> = Vec::new();
    for held in machine.snapshots().into_iter().rev() {
        // What a stub lacks is proven where it comes from.
        let mut all = held.run.snapshots.iter();
        let is_complete = all.all(|snapshot| machine.missing_blocks(snapshot.id) == 0);
        let is_new = runs.last().is_none_or(|last| last.backup != held.run.backup);
        if is_complete && is_new && disk.is_none_or(|disk| *disk == held.snapshot().disk) {
            runs.push(held.run);
        }
    }
    runs
}

fn tried(proofs: &Proofs, runs: &[Arc<Run>]) -> choice::Machine {
    let tried_ms = |backup: BackupId| proofs.tried_ms(backup);
    choice::Machine {
        tried_ms: proofs.standing().tried_ms,
        runs: runs.iter().map(|run| choice::Run { tried_ms: tried_ms(run.backup) }).collect(),
    }
}

/// How a proof is made.
pub struct Prover<'a> {
    /// Whose backups.
    pub runs: &'a Runs,
    /// Content of files that is read at most, of each volume.
    pub files_bytes: u64,
    /// How its machine is started, if it is.
    pub boot: Option<boot::Wish>,
    /// How fast is read.
    pub pace: Arc<dyn Pace + Send>,
    /// Ends it.
    pub stop: CancellationToken,
    /// Hears how far it is.
    pub tell: &'a dyn Fn(String),
}

impl Prover<'_> {
    /// Proves a run. Blocks for long.
    ///
    /// # Errors
    /// When it was stopped or the run is gone. That a backup can't be restored is no error, but what the proof says.
    pub fn prove(&self, target: &Target) -> Result<Proof, ProveError> {
        let began_ms = now_ms();
        // All of them first: while they are open no merge takes anything away.
        let opened: Vec<_> =
            target.disks().into_iter().map(|held| self.open(held)).collect::<Result<_, _>>()?;
        let mut disks = Vec::with_capacity(opened.len());
        for (held, opened) in &opened {
            disks.push(self.disk(held, opened)?);
        }
        let boot = self.boot(target, &opened, &disks)?;
        Ok(Proof {
            backup: target.run.backup,
            committed_ms: target.run.committed_ms,
            began_ms,
            ended_ms: now_ms(),
            is_whole: target.is_whole(),
            disks,
            boot,
        })
    }

    /// Starts the machine, where that is wished and makes sense.
    fn boot(
        &self,
        target: &Target,
        opened: &[(Held, Result<Arc<OpenedSnapshot>, OpenError>)],
        disks: &[DiskProof],
    ) -> Result<Boot, ProveError> {
        let not_tried = |why: &str| Ok(Boot::NotTried { why: why.into() });
        let Some(wish) = &self.boot else { return Ok(Boot::NotWanted) };
        if disks.iter().any(|disk| !disk.failures.is_empty()) {
            return not_tried("its content is damaged");
        }
        if !target.run.client_seal.is_empty() {
            return not_tried("it is sealed: only its client can read what is in it");
        }
        // A machine that waits for its disk would not be up in time: this is read as fast as it goes.
        let pace = Arc::new(Limit::new(0, self.stop.clone(), || false));
        let disk = |opened: &Arc<OpenedSnapshot>| -> Arc<dyn Medium> {
            Arc::new(SnapshotDisk::new(opened.clone(), pace.clone()))
        };
        let disks: Vec<_> =
            opened.iter().filter_map(|(_, opened)| opened.as_ref().ok()).map(disk).collect();
        (self.tell)(format!("{}: started, waiting for {:?}", target.run.machine, wish.pattern));
        let boot = boot::boot(wish, &disks, &self.stop)?;
        Ok(match boot {
            Boot::Failed { why } => {
                let (machine, at) = (&target.run.machine, date(target.run.committed_ms));
                Boot::Failed { why: format!("{machine}, started from its backup of {at}: {why}") }
            }
            boot => boot,
        })
    }

    fn open(
        &self,
        held: Held,
    ) -> Result<(Held, Result<Arc<OpenedSnapshot>, OpenError>), ProveError> {
        let snapshot = held.snapshot().id;
        let held = self.runs.snapshot(snapshot).ok_or(ProveError::Gone { snapshot })?;
        let machine = self.runs.machine(&held.run.machine);
        if machine.is_some_and(|machine| machine.missing_blocks(snapshot) > 0) {
            return Err(ProveError::Incomplete { snapshot });
        }
        let opened = self.runs.open_for_reading(&held).map(Arc::new);
        match opened {
            Err(_) if self.runs.snapshot(snapshot).is_none() => Err(ProveError::Gone { snapshot }),
            opened => Ok((held, opened)),
        }
    }

    fn disk(
        &self,
        held: &Held,
        opened: &Result<Arc<OpenedSnapshot>, OpenError>,
    ) -> Result<DiskProof, ProveError> {
        let snapshot = held.snapshot();
        let mut proof = DiskProof {
            disk: snapshot.disk.clone(),
            snapshot: snapshot.id,
            size_bytes: snapshot.size_bytes,
            read_bytes: 0,
            lost_blocks: 0,
            volumes: Vec::new(),
            failures: Said::default(),
            warnings: Said::default(),
        };
        match opened {
            Ok(opened) => {
                self.content(held, opened, &mut proof)?;
                self.files(held, opened, &mut proof)?;
            }
            Err(error) => proof.failures.say(format!("it can't be opened: {error}")),
        }
        let name = name(held);
        for said in [&mut proof.failures, &mut proof.warnings] {
            said.lines.iter_mut().for_each(|line| *line = format!("{name}: {line}"));
        }
        Ok(proof)
    }

    /// Reads all and compares it.
    fn content(
        &self,
        held: &Held,
        opened: &OpenedSnapshot,
        proof: &mut DiskProof,
    ) -> Result<(), ProveError> {
        let digests = match opened.tables.segment_digests() {
            Ok(digests) => digests,
            Err(error) => {
                proof.failures.say(format!("the digests of its segments can't be read: {error}"));
                return Ok(());
            }
        };
        match opened.tables.table_digest() {
            Ok(digest) if digest == held.snapshot().table_digest => {}
            Ok(_) => proof.failures.say("its tables don't give the digest that was committed"),
            Err(error) => proof.failures.say(format!("its digest can't be made: {error}")),
        }
        let (name, size) = (name(held), held.snapshot().size_bytes);
        let is_time = each_second();
        let tell = |block: u64| {
            if !is_time() {
                return;
            }
            let read = (block * BLOCK_BYTES).min(size);
            (self.tell)(format!("{name}: {} of {} compared", amount(read), amount(size)));
        };
        let content = read_all(opened, &digests, &*self.pace, &tell)?;
        proof.read_bytes = content.read_bytes;
        proof.lost_blocks = content.lost.blocks();
        self.say(opened, &content, &mut proof.failures);
        // As a restore that meets them: they are asked for again by the next backup.
        self.runs.note_lost(opened, &content.lost);
        Ok(())
    }

    /// Says what is wrong with the content, by the files that have it.
    fn say(&self, opened: &OpenedSnapshot, content: &Content, failures: &mut Said) {
        let size = opened.held.snapshot().size_bytes;
        opened.lost.iter().for_each(|(_, error)| failures.say(error.to_string()));
        let mut salvage = Salvage::new(opened);
        for range in content.lost.iter().take(MOST_RANGES) {
            let image = salvage.to_blame(range.start).and_then(|place| opened.chain.get(place));
            let image = image.map_or_else(
                || "an image that can't be opened".to_owned(),
                |held| format!("image {}", held.snapshot().image),
            );
            let bytes = range.start * BLOCK_BYTES..(range.end * BLOCK_BYTES).min(size);
            let which = match range.end - range.start {
                1 => format!("block {} is lost", range.start),
                count => format!("blocks {} to {} ({count}) are lost", range.start, range.end - 1),
            };
            failures.say(format!(
                "{which}, bytes {} to {} of the disk, in {image}",
                bytes.start,
                bytes.end - 1
            ));
        }
        let counts = [content.lost.len(), content.unhashed.len(), content.wrong.len()];
        failures.more +=
            counts.map(|count| count.saturating_sub(MOST_RANGES) as u64).iter().sum::<u64>();
        let folder = self.runs.store().machine_folder(&opened.held.run.machine);
        for segment in content.unhashed.iter().take(MOST_RANGES) {
            let table = self.damaged_table(opened, &folder, *segment);
            let from = segment * SEGMENT_BYTES;
            failures.say(format!("hashes of segment {segment} (4 MiB from byte {from} of the disk) can't be read, in {table}"));
        }
        for segment in content.wrong.iter().take(MOST_RANGES) {
            failures.say(format!("the blocks of segment {segment} don't give its digest"));
        }
        if let Some(why) = &content.broken {
            failures.say(format!("reading it broke off: {why}"));
        }
    }

    fn damaged_table(&self, opened: &OpenedSnapshot, folder: &Path, segment: u64) -> String {
        let storage = self.runs.store().storage();
        let is_damaged = |held: &&Held| {
            let table = open_table(storage, folder, held.snapshot());
            table.map_or(true, |table| table.page(segment).is_err())
        };
        match opened.chain.iter().find(is_damaged) {
            Some(held) => format!("table {}", held.snapshot().table),
            None => "one of its tables".into(),
        }
    }

    fn files(
        &self,
        held: &Held,
        opened: &Arc<OpenedSnapshot>,
        proof: &mut DiskProof,
    ) -> Result<(), ProveError> {
        if !held.run.client_seal.is_empty() {
            proof.volumes.push(VolumeProof {
                name: "the whole disk".into(),
                not_read: "it is sealed: only its client can read what is in it".into(),
                ..VolumeProof::default()
            });
            return Ok(());
        }
        let name = name(held);
        let is_time = each_second();
        let tell = |volume: &VolumeProof| {
            if !is_time() {
                return;
            }
            let (files, read) = (volume.files, amount(volume.read_bytes));
            (self.tell)(format!("{name}: {}: {files} files, {read} of them read", volume.name));
        };
        let look = Look {
            medium: Arc::new(SnapshotDisk::new(opened.clone(), self.pace.clone())),
            consistency: Consistency::try_from(held.snapshot().consistency).unwrap_or_default(),
            most_bytes: self.files_bytes,
            stop: &self.stop,
            tell: &tell,
        };
        look.through(proof)
    }
}

/// Says when it is time to tell how far it is.
fn each_second() -> impl Fn() -> bool {
    let told = Cell::new(Instant::now());
    move || {
        let is_time = told.get().elapsed() >= TELL_EVERY;
        if is_time {
            told.set(Instant::now());
        }
        is_time
    }
}

/// How messages name a snapshot.
fn name(held: &Held) -> String {
    let (machine, at) = (&held.run.machine, date(held.run.committed_ms));
    let snapshot = held.snapshot();
    format!("{machine}/{} of {at} (snapshot {})", snapshot.disk, snapshot.id)
}
