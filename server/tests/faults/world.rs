//! A machine that backs its disks up to a store on a given disk. Its methods are the words that scenarios are made of.
//!
//! It does what the real client does: keeps the id of a run until it knows what became of it, compares what a session holds
//! before it sends, and tries again when something fails. All that it is told goes into [`Promised`].

mod carrying;
mod damage;
mod keeping;
mod moving;

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use janus_proto::ids::{BackupId, DiskId, MachineKey, SEGMENT_BLOCKS};
use janus_server::{
    chain::{
        Run,
        store::{Store, StoreError, rebuild},
    },
    image::Format,
    runs::{ActiveRun, CommitDisk, PurgeOptions, RunError, RunState, Runs, WantedDisk, Writer},
    session::{Marks, Session},
    storage::Disk,
};

use tokio_util::sync::CancellationToken;

pub use self::moving::bring_home;
use crate::{
    content::Content,
    promises::{Contents, Promise, Promised},
    recorder::Recorder,
};

/// Blocks in a message.
const MESSAGE_BLOCKS: usize = 32;
/// How often a client tries before it gives up. Half-way somebody makes room on a full disk.
const ATTEMPTS: usize = 6;

/// What a session must still hold after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survives {
    /// All that was acknowledged as received: the process was killed.
    Received,
    /// All that was acknowledged as durable: the power failed.
    Durable,
}

/// The machine and its server.
pub struct World {
    folder: PathBuf,
    storage: Disk,
    recorder: Option<Arc<Recorder>>,
    runs: Option<Arc<Runs>>,
    machine: MachineKey,
    /// Of new chains.
    format: Format,
    contents: Contents,
    promised: Promised,
    /// After a crash: what the next takeover must find.
    survives: Option<Survives>,
    /// What is being imported.
    carried: Option<carrying::Carried>,
}

impl World {
    /// A machine without disks, and a store to be made in `folder`.
    pub fn new(folder: PathBuf, storage: Disk, recorder: Option<Arc<Recorder>>) -> Self {
        let machine = MachineKey::new("user", "machine").unwrap();
        let (contents, promised) = Default::default();
        Self {
            folder,
            storage,
            recorder,
            runs: None,
            machine,
            format: Format::Vhdx,
            contents,
            promised,
            survives: None,
            carried: None,
        }
    }

    /// The machine after its server crashed, with what it knows.
    pub fn after_crash(
        folder: PathBuf,
        storage: Disk,
        promised: Promised,
        survives: Survives,
    ) -> Self {
        let contents = promised.contents();
        let survives = Some(survives);
        Self { contents, promised, survives, ..Self::new(folder, storage, None) }
    }

    /// The same, with what it does and is told written down.
    pub fn recorded_by(self, recorder: Arc<Recorder>) -> Self {
        if self.promised.shares {
            recorder.share_blocks();
        }
        Self { recorder: Some(recorder), ..self }
    }

    /// What the store has acknowledged so far.
    pub fn promised(&self) -> Promised {
        self.promised.clone()
    }

    /// New chains are in this format from now on.
    pub fn prefer(&mut self, format: Format) {
        self.format = format;
    }

    /// A new disk, or another size of an old one.
    pub fn disk(&mut self, name: &str, bytes: usize) {
        let id: DiskId = name.parse().unwrap();
        let old = self.contents.get(&id).cloned();
        let old = old.unwrap_or_else(|| Arc::new(Content::new(Vec::new())));
        self.contents.insert(id, Arc::new(old.resized(bytes)));
    }

    /// Other data in some blocks of all disks, zeros in some.
    pub fn change(&mut self, seed: u64) {
        for content in self.contents.values_mut() {
            *content = Arc::new(content.changed(seed));
        }
    }

    /// Other data in a long stretch of all disks: blocks that are worth sharing.
    pub fn overwrite(&mut self, first: usize, count: usize, seed: u64) {
        for content in self.contents.values_mut() {
            *content = Arc::new(content.overwritten(first, count, seed));
        }
    }

    /// The disk is one whose files can share blocks, from now on.
    pub fn share_blocks(&mut self) {
        self.promise(Promise::Shares);
        if let Some(recorder) = &self.recorder {
            recorder.share_blocks();
        }
    }

    /// Backs all disks up: goes on with the open run, or makes a new one.
    pub fn backup(&mut self) -> Result<(), String> {
        self.until_done("back up", |world| {
            let Some(run) = world.start()? else { return Ok(()) };
            world.send(&run, usize::MAX)?;
            world.commit(&run)
        })
    }

    /// Begins a run, or goes on with it, and sends so many messages for each disk.
    pub fn send_some(&mut self, messages: usize) -> Result<(), String> {
        self.until_done("send", |world| match world.start()? {
            Some(run) => world.send(&run, messages),
            None => Ok(()),
        })
    }

    /// Gives the open run up.
    pub fn give_up(&mut self) -> Result<(), String> {
        let Some(backup) = self.promised.trying else { return Ok(()) };
        self.promise(Promise::GivenUp);
        self.until_done("give up", |world| {
            let machine = world.machine.clone();
            world.runs()?.abort(&machine, backup).map_err(told)
        })
    }

    /// Drops the oldest runs.
    pub fn drop_oldest(&mut self, count: usize) -> Result<(), String> {
        let machine = self.machine.clone();
        let known = self.runs()?.machine(&machine).map(|known| known.snapshots());
        let mut runs: Vec<_> = known.unwrap_or_default().into_iter().map(|held| held.run).collect();
        runs.reverse();
        runs.dedup_by_key(|run| run.backup);
        for run in runs.into_iter().take(count) {
            for snapshot in &run.snapshots {
                self.promise(Promise::MayGo(snapshot.id));
            }
            self.until_done("drop", |world| {
                let dropped = world.runs()?.trash(&machine, &[run.backup], "scenario", 0);
                dropped.map_err(told)
            })?;
        }
        Ok(())
    }

    /// Purges what was dropped.
    pub fn purge(&mut self) -> Result<(), String> {
        let machine = self.machine.clone();
        let options = PurgeOptions { now_ms: i64::MAX, reserve_bytes: 0, copy: true };
        self.until_done("purge", |world| {
            let report = world.runs()?.purge_due(&machine, &options, &CancellationToken::new());
            world.check()?;
            match report.waiting.first() {
                Some((_, wait)) => Err(wait.to_string()),
                None => Ok(()),
            }
        })
    }

    /// Ends the server and starts it again.
    pub fn restart(&mut self) -> Result<(), String> {
        self.runs = None;
        self.until_done("start the server", |world| world.runs().map(drop))
    }

    /// The client is gone for good: nothing of its open run needs to stay.
    pub fn walk_away(&mut self) {
        self.promise(Promise::GivenUp);
    }

    /// Ends the server and makes the catalog from the folders.
    pub fn rebuild(&mut self) -> Result<(), String> {
        self.runs = None;
        self.until_done("rebuild", |world| {
            let rebuilt = rebuild::rebuild(&world.storage, &world.folder, true);
            let rebuilt = rebuilt.map_err(|error| error.to_string())?;
            if let Some((path, reason)) = rebuilt.plan.unread.first() {
                return Err(format!("{}: {reason}", path.display()));
            }
            let lease = Duration::from_secs(60);
            world.runs = Some(usable(Runs::new(rebuilt.store, rebuilt.machines, lease))?);
            Ok(())
        })
    }

    /// Compares all that the store has with all that it promised.
    pub fn check(&mut self) -> Result<(), String> {
        let (promised, machine) = (self.promised.clone(), self.machine.clone());
        promised.check(self.runs()?, &machine)
    }

    /// The store, opened if it is not.
    pub fn runs(&mut self) -> Result<&Runs, String> {
        if self.runs.is_none() {
            let mut opened = Store::open_on(self.storage.clone(), &self.folder, true);
            if matches!(opened, Err(StoreError::Moved { .. })) {
                self.follow()?;
                opened = Store::open_on(self.storage.clone(), &self.folder, true);
            }
            let (store, machines) = opened.map_err(|e| format!("open the store: {e}"))?;
            let runs = Runs::new(store, machines, Duration::from_secs(60));
            self.runs = Some(usable(runs.with_new_chains(self.format))?);
        }
        Ok(self.runs.as_ref().unwrap())
    }

    /// Notes what the client was told.
    pub fn promise(&mut self, promise: Promise) {
        if let Some(recorder) = &self.recorder {
            recorder.promise(promise.clone());
        }
        self.promised.take(promise);
    }

    /// Repeats a step that fails: for ever in life, here some times. Without a live fault nothing may fail.
    pub fn until_done<T>(
        &mut self,
        what: &str,
        mut step: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        let mut errors = Vec::new();
        for attempt in 0..ATTEMPTS {
            match step(self) {
                Ok(done) => return Ok(done),
                Err(error) => errors.push(error),
            }
            match &self.recorder {
                Some(recorder) if recorder.hit().is_some() => {
                    if attempt == ATTEMPTS / 2 {
                        recorder.heal();
                    }
                }
                _ => break,
            }
        }
        Err(format!("cannot {what}: {}", errors.join("; then: ")))
    }

    /// Starts or takes over; `None` when it turns out that the run was committed.
    fn start(&mut self) -> Result<Option<Arc<ActiveRun>>, String> {
        let backup = self.promised.trying.unwrap_or_else(BackupId::new);
        self.promise(Promise::Trying { backup, contents: self.contents.clone() });
        let wanted: Vec<WantedDisk> = self
            .contents
            .iter()
            .map(|(disk, content)| WantedDisk {
                disk: disk.clone(),
                size_bytes: content.bytes.len() as u64,
                logical_sector_bytes: 512,
            })
            .collect();
        let (machine, counter) = (self.machine.clone(), self.promised.counter + 1);
        match self.runs()?.start(&machine, backup, &wanted, counter) {
            Ok(run) => {
                self.promise(Promise::Counter(run.record().use_counter));
                if let Some(survives) = self.survives.take() {
                    self.check_survived(&run, survives)?;
                }
                Ok(Some(run))
            }
            Err(RunError::State { state: "committed already", .. }) => {
                if let RunState::Committed(run) =
                    self.runs()?.state(&machine, backup).map_err(told)?
                {
                    self.committed(&run);
                }
                Ok(None)
            }
            Err(error @ RunError::State { state: "aborted", .. }) => {
                self.promise(Promise::GivenUp);
                Err(told(error))
            }
            Err(error) => Err(told(error)),
        }
    }

    /// Blocks below the mark that survives must be there.
    fn check_survived(&self, run: &ActiveRun, survives: Survives) -> Result<(), String> {
        for session in run.sessions() {
            let disk = &session.disk.disk;
            let Some(promised) = self.promised.settled.get(disk) else { continue };
            let (promised, found) = match survives {
                Survives::Received => (promised.received, session.marks().received),
                Survives::Durable => (promised.durable, session.marks().durable),
            };
            if found < promised {
                return Err(format!("disk {disk}: mark {found}, {promised} was acknowledged"));
            }
            let wrong = differing(&session, &self.contents[disk])?;
            if let Some(block) = wrong.first().filter(|block| **block < promised) {
                return Err(format!("block {block} of disk {disk} is lost, mark {promised}"));
            }
        }
        Ok(())
    }

    fn send(&mut self, run: &Arc<ActiveRun>, messages: usize) -> Result<(), String> {
        let epoch = run.record().epoch;
        for session in run.sessions() {
            let disk = session.disk.disk.clone();
            let content = self.contents[&disk].clone();
            let lost = session.resend();
            let lost = lost.iter().flat_map(|r| r.first_block..r.first_block + r.block_count);
            // In order, as all blocks travel.
            let mut blocks: BTreeSet<u64> = differing(&session, &content)?.into_iter().collect();
            blocks.extend(lost);
            let blocks: Vec<u64> = blocks.into_iter().collect();
            let total = content.hashes.len() as u64;
            let writer = Writer::new(run.clone(), session.disk.session, epoch).map_err(told)?;
            let mut pieces = blocks.chunks(MESSAGE_BLOCKS).peekable();
            for _ in 0..messages {
                let Some(piece) = pieces.next() else { break };
                let settled = pieces.peek().map_or(total, |next| next[0]);
                let batch = content.batch(piece);
                let marks = writer.apply(Some(&batch), settled).map_err(told)?;
                self.settled(&disk, marks);
            }
            if pieces.peek().is_none() {
                let marks = writer.apply(None, total).map_err(told)?;
                self.settled(&disk, marks);
            }
        }
        Ok(())
    }

    fn settled(&mut self, disk: &DiskId, marks: Marks) {
        self.promise(Promise::Settled { disk: disk.clone(), marks });
    }

    fn commit(&mut self, run: &ActiveRun) -> Result<(), String> {
        let record = run.record();
        let disks: Vec<CommitDisk> = record
            .disks
            .iter()
            .map(|open| CommitDisk {
                disk: open.disk.clone(),
                expected_head: open.head,
                table_digest: self.contents[&open.disk].digest(),
                consistency: 1,
                skipped_bytes: 0,
            })
            .collect();
        let (machine, backup) = (self.machine.clone(), record.backup);
        let run = self.runs()?.commit(&machine, backup, record.epoch, &disks, b"seal");
        let run = run.map_err(told)?;
        self.committed(&run);
        Ok(())
    }

    fn committed(&mut self, run: &Run) {
        let snapshots =
            run.snapshots.iter().map(|snapshot| (snapshot.id, snapshot.disk.clone())).collect();
        self.promise(Promise::Committed { backup: run.backup, snapshots });
    }
}

/// A server that couldn't read all of it says so, and that it is to be started again.
fn usable(runs: Runs) -> Result<Arc<Runs>, String> {
    match runs.faults(None).first() {
        Some(fault) => Err(format!("start the server: {fault}")),
        None => Ok(Arc::new(runs)),
    }
}

fn told(error: RunError) -> String {
    use std::error::Error;
    let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

/// Blocks that a session holds otherwise than they are, ascending.
fn differing(session: &Session, content: &Content) -> Result<Vec<u64>, String> {
    let mut differing = Vec::new();
    for (number, hashes) in content.segments() {
        let known = session.segment(number).map_err(|e| e.to_string())?;
        let blocks = (number * SEGMENT_BLOCKS..).zip(hashes).enumerate();
        differing.extend(
            blocks.filter(|(at, (_, hash))| known.get(*at) != Some(hash)).map(|(_, (b, _))| b),
        );
    }
    Ok(differing)
}
