//! Stubs are filled: in the background, from any server that has their blocks, each compared with its hash.
//!
//! Nothing but the blocks themselves says what is here: what is read and has its hash is, so that a crash costs a look at what
//! was fetched last. A stub is filled segment by segment, for a while, then comes the next one; a segment that somebody
//! reads comes first ([`Wanted`]). Its sources are tried one after another: newer snapshots here, which clients have sent again;
//! the snapshot that the hashes came from; others of the disk, the nearest in time first. What none has for some time is noted as
//! damage: the machine's next backup sends it again, and is complete. While a source is used it is open there, so that no
//! merge changes it; outside of the hours of the settings, too, when only what readers wait for is fetched. Everything here blocks,
//! on one thread, with a runtime of its own for the calls.

mod sources;
mod stub;
mod wanted;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use janus_proto::{
    bandwidth::{self, Zone},
    channel::Dialer,
    ids::{BLOCK_BYTES, ServerId, SnapshotId},
};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

pub use self::wanted::Wanted;
use self::{
    sources::{Source, Sources},
    stub::Stub,
};
use crate::{
    background,
    carry::CarryError,
    chain::{Held, ranges::BlockRanges},
    config::{Fill, replicate::Hours},
    fetching::{FILLING, Turn, kind},
    runs::{Runs, now_ms},
    seed::{SeedError, Seeder},
};

/// How often it is looked for stubs while there are none.
const LOOK: Duration = Duration::from_secs(2);
/// A stub that nothing was found for rests so long.
const REST: Duration = Duration::from_secs(2);
/// And longer each time, up to this.
const MOST_REST: Duration = Duration::from_secs(15);
/// Then others have their turn.
const SLICE: Duration = Duration::from_secs(10);
/// What was fetched is made durable, and told.
const KEEP_EVERY: Duration = Duration::from_secs(5);
/// Sources that aren't read are told that they are needed.
const TOUCH_EVERY: Duration = Duration::from_secs(120);
/// Most places that a client is asked to send again.
const MOST_ASKED: usize = 1024;

/// Why a stub isn't filled now.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// Its own files.
    #[error("the stub can't be written: {0}")]
    Own(String),
    /// Its file is lost.
    #[error("{0}: the machine's next backup begins a new base")]
    Lost(String),
    /// The other servers.
    #[error(transparent)]
    Source(#[from] CarryError),
    /// It is merged, filled or gone.
    #[error("it is no stub any more")]
    Gone,
}

/// What a server needs to fill its stubs.
pub struct Filler {
    /// Its runs.
    pub runs: Arc<Runs>,
    /// Its name.
    pub own: ServerId,
    /// Makes connections.
    pub dialer: Dialer,
    /// Where janus is.
    pub janus_urls: watch::Receiver<Vec<String>>,
    /// How it is to be done.
    pub settings: Fill,
}

impl Filler {
    /// Fills all stubs as far as that goes now.
    pub fn once(&self, stop: &CancellationToken) {
        let mut work = Work::new(self, stop);
        self.runs.stubs().iter().for_each(|held| work.fill(held));
    }

    /// Fills until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let filler = Arc::new(self);
        while !shutdown.is_cancelled() {
            if !filler.runs.stubs().is_empty() {
                let (filler, stop) = (filler.clone(), shutdown.clone());
                background(move || Work::new(&filler, &stop).all()).await;
            }
            shutdown.run_until_cancelled(sleep(LOOK)).await;
        }
    }
}

/// What is known of a stub while it is filled.
#[derive(Default)]
struct Known {
    sources: Option<Sources>,
    rests_until: Option<Instant>,
    /// How long the next time.
    rest: Duration,
    /// What it lacks is asked of the next backup.
    is_asked: bool,
    /// Since when nobody had anything of what it lacks.
    stuck_since: Option<Instant>,
    /// What kept it from being filled was told.
    said: String,
}

struct Work<'a> {
    filler: &'a Filler,
    stop: &'a CancellationToken,
    /// When stubs are filled. The settings were checked.
    hours: Option<Hours>,
    /// Keeps all of them together to the limits.
    dialer: Dialer,
    known: HashMap<SnapshotId, Known>,
    /// Connections, by what names the server.
    seeders: HashMap<String, Arc<Seeder>>,
    touched: Instant,
}

impl<'a> Work<'a> {
    fn new(filler: &'a Filler, stop: &'a CancellationToken) -> Self {
        let (known, seeders) = (HashMap::new(), HashMap::new());
        let hours = filler.settings.hours().ok();
        let limits = filler.settings.limits().unwrap_or_default();
        let dialer = bandwidth::limited(filler.dialer.clone(), &limits, Zone::Utc);
        Self { filler, stop, hours, dialer, known, seeders, touched: Instant::now() }
    }

    /// Until there are no stubs, or it is to stop.
    fn all(mut self) {
        let runs = &self.filler.runs;
        let mut turn = 0;
        loop {
            let stubs = runs.stubs();
            let is_gone = |id: &SnapshotId| !stubs.iter().any(|held| held.snapshot().id == *id);
            for (_, known) in self.known.extract_if(|id, _| is_gone(id)) {
                known.sources.iter().for_each(Sources::release);
            }
            if stubs.is_empty() {
                return runs.fetching().note(FILLING, Turn::default());
            }
            if self.stop.is_cancelled() {
                return;
            }
            let wanted = runs.wanted().stub();
            if let Some(stub) =
                wanted.filter(|id| !stubs.iter().any(|held| held.snapshot().id == *id))
            {
                runs.wanted().give_up(stub);
            }
            let is_wanted = |held: &&Held| Some(held.snapshot().id) == wanted;
            let may_go_on = |held: &&Held| self.is_awake(held);
            let next = stubs.iter().find(is_wanted).or_else(|| {
                let from = turn % stubs.len();
                let (before, after) = stubs.split_at(from);
                after.iter().chain(before).find(may_go_on)
            });
            turn += 1;
            match next {
                Some(held) => self.fill(held),
                None => runs.wanted().wait(Duration::from_millis(500)),
            }
            self.touch();
        }
    }

    fn is_awake(&self, held: &Held) -> bool {
        let known = self.known.get(&held.snapshot().id);
        let is_rested = known.and_then(|known| known.rests_until);
        // Sources are looked for and kept at any time, and what none of them has is asked for. One that only needs its name can
        // have that at any time, too.
        let is_looked_after = known.is_some_and(|known| {
            known.sources.is_some() && (known.stuck_since.is_none() || known.is_asked)
        });
        (self.is_time() || !is_looked_after || self.missing_blocks(held) == 0)
            && is_rested.is_none_or(|until| until <= Instant::now())
    }

    /// True in the hours of the settings.
    fn is_time(&self) -> bool {
        self.hours.is_some_and(|hours| hours.left(now_ms()).is_some())
    }

    /// Tells the sources of resting stubs that they are needed.
    fn touch(&mut self) {
        if self.touched.elapsed() < TOUCH_EVERY {
            return;
        }
        self.touched = Instant::now();
        for known in self.known.values_mut() {
            // One that is lost meanwhile can't be relied on when the hours come: all are looked for anew.
            known.sources.take_if(|sources| !sources.touch());
        }
    }

    /// Fills a stub for a while.
    fn fill(&mut self, held: &Held) {
        let id = held.snapshot().id;
        let mut known = self.known.remove(&id).unwrap_or_default();
        let before = self.missing_blocks(held);
        let filled = self.fill_from_all(held, &mut known);
        let runs = &self.filler.runs;
        if let Err(FillError::Lost(reason)) = &filled {
            runs.note_stub_lost(held, reason);
        }
        if filled.is_err() {
            // Whoever still waits does so in vain.
            runs.wanted().give_up(id);
        }
        let said = match &filled {
            Ok(()) | Err(FillError::Gone | FillError::Source(CarryError::Stopped)) => String::new(),
            Err(error) => error.to_string(),
        };
        if !said.is_empty() && said != known.said {
            let (machine, disk) = (&held.run.machine, &held.snapshot().disk);
            tracing::warn!(%machine, %disk, error = said, "a stub is not filled now");
        }
        known.said = said;
        let came = before.saturating_sub(self.missing_blocks(held));
        self.note(&filled, came);
        if came > 0 {
            (known.stuck_since, known.rest, known.is_asked) = (None, REST, false);
        } else {
            known.rests_until = Some(Instant::now() + known.rest);
            known.rest = (known.rest * 2).clamp(REST, MOST_REST);
        }
        self.known.insert(id, known);
    }

    /// Takes note of what a turn has brought. One that waits, or was stopped, says nothing.
    fn note(&self, filled: &Result<(), FillError>, came: u64) {
        let mut turn = Turn::of(came.saturating_mul(BLOCK_BYTES));
        match filled {
            Err(FillError::Gone | FillError::Source(CarryError::Stopped)) => return,
            Err(FillError::Source(error)) => turn.fail(kind(error), error.to_string()),
            Err(error) => turn.fail("here", error.to_string()),
            Ok(()) if came == 0 => return,
            Ok(()) => {}
        }
        self.filler.runs.fetching().note(FILLING, turn);
    }

    fn missing_blocks(&self, held: &Held) -> u64 {
        let machine = self.filler.runs.machine(&held.run.machine);
        let missing = machine.and_then(|machine| machine.missing(held.snapshot()));
        missing.map_or(0, |missing| missing.blocks())
    }

    fn fill_from_all(&mut self, held: &Held, known: &mut Known) -> Result<(), FillError> {
        let runs = &self.filler.runs;
        let mut stub = Stub::open(runs, held)?;
        if !stub.missing.is_empty() {
            let mut sources = match known.sources.take() {
                Some(sources) => sources,
                None => self.look_for_sources(held, &stub)?,
            };
            let has_more = self.fill_some(&mut stub, &mut sources);
            // What came stays, whatever ended it.
            stub.keep()?;
            if has_more? {
                if !self.is_time() {
                    return self.look_after(&mut stub, held, sources, known);
                }
                known.sources = Some(sources).filter(|sources| !sources.has_failed());
                return Ok(());
            }
            if !stub.missing.is_empty() {
                self.ask_clients(held, known, &stub.missing);
                return sources.failed.map_or(Ok(()), |error| Err(error.into()));
            }
            known.sources = Some(sources);
        }
        stub.finish()?;
        let (machine, disk, backup_id) =
            (&held.run.machine, &held.snapshot().disk, held.run.backup);
        tracing::info!(%machine, %disk, %backup_id, "a stub is full");
        Ok(())
    }

    /// Fills until all sources were asked for all that is missing, which is false, or others have their turn.
    fn fill_some(&self, stub: &mut Stub<'_>, sources: &mut Sources) -> Result<bool, FillError> {
        let wanted = self.filler.runs.wanted();
        let (began, mut kept) = (Instant::now(), Instant::now());
        loop {
            if self.stop.is_cancelled() {
                return Ok(true);
            }
            if let Some(segment) = wanted.next(stub.id()) {
                // Even if it should be here: who asks has not found it.
                for source in sources.all() {
                    fill_segment(stub, segment, source)?;
                    if !stub.lacks(segment) {
                        break;
                    }
                }
                wanted.done(stub.id(), segment, !stub.lacks(segment));
            } else if began.elapsed() > SLICE || wanted.stub().is_some() || !self.is_time() {
                return Ok(true);
            } else {
                match sources.next(&stub.missing) {
                    Some((segment, source)) if stub.lacks(segment) => {
                        fill_segment(stub, segment, source)?;
                    }
                    Some(_) => {}
                    None => return Ok(false),
                }
            }
            if kept.elapsed() > KEEP_EVERY {
                stub.keep()?;
                kept = Instant::now();
            }
        }
    }

    /// Outside of the hours: the sources are opened, so that they stay, and what none of them has is asked of clients.
    fn look_after(
        &self,
        stub: &mut Stub<'_>,
        held: &Held,
        mut sources: Sources,
        known: &mut Known,
    ) -> Result<(), FillError> {
        let nobodys = sources.nobodys(stub)?;
        if !nobodys.is_empty() {
            self.ask_clients(held, known, &nobodys);
            let failed = sources.failed.take();
            known.sources = Some(sources).filter(|it| failed.is_none() && !it.has_failed());
            return failed.map_or(Ok(()), |error| Err(error.into()));
        }
        (known.stuck_since, known.is_asked) = (None, false);
        if stub.is_asked_for() {
            // The sources are back: it needn't be sent again.
            self.filler.runs.note_nobodys(held, nobodys, MOST_ASKED);
        }
        // Others that are away aren't needed.
        known.sources = Some(sources).filter(|sources| !sources.has_lost());
        Ok(())
    }

    /// No source has these blocks: after some time the machine's next backup is asked for them.
    fn ask_clients(&self, held: &Held, known: &mut Known, nobodys: &BlockRanges) {
        let since = *known.stuck_since.get_or_insert_with(Instant::now);
        let ask_after = Duration::from_secs(self.filler.settings.ask_clients_after_seconds);
        if since.elapsed() < ask_after || self.stop.is_cancelled() {
            return;
        }
        if !std::mem::replace(&mut known.is_asked, true) {
            let (machine, disk) = (&held.run.machine, &held.snapshot().disk);
            tracing::warn!(%machine, %disk, "no server has the rest of a stub: the machine's next backup is asked for it");
        }
        self.filler.runs.note_nobodys(held, nobodys.clone(), MOST_ASKED);
    }

    /// Looks who has blocks of the disk.
    fn look_for_sources(&mut self, held: &Held, stub: &Stub<'_>) -> Result<Sources, CarryError> {
        let mut sources = Sources::here(&self.filler.runs, held, &stub.missing);
        let added =
            self.seeder(held).and_then(|seeder| sources.add_there(&seeder, held, &self.filler.own));
        match added {
            Err(CarryError::Stopped) => return Err(CarryError::Stopped),
            // What is here helps all the same; others are called anew.
            Err(error) => {
                self.seeders.clear();
                sources.failed = Some(error);
            }
            Ok(()) => {}
        }
        Ok(sources)
    }

    /// The way to the other servers: through janus, or to the one that the hashes came from.
    fn seeder(&mut self, held: &Held) -> Result<Arc<Seeder>, CarryError> {
        let janus_urls = self.filler.janus_urls.borrow().clone();
        let from = held.run.origin.as_ref().and_then(|origin| origin.from.clone());
        let from = from.unwrap_or_default();
        if from.is_empty() && janus_urls.is_empty() {
            return Err(SeedError::From { from }.into());
        }
        if let Some(seeder) = self.seeders.get(&from) {
            return Ok(seeder.clone());
        }
        let own = (&self.filler.own, &self.dialer);
        let seeder = Seeder::connect(&from, own, &janus_urls, self.stop)?;
        let seeder = Arc::new(seeder.with_patience(Duration::ZERO));
        self.seeders.insert(from, seeder.clone());
        Ok(seeder)
    }
}

/// A source that fails is not asked again; what is wrong with the stub itself ends it.
fn fill_segment(stub: &mut Stub<'_>, segment: u64, source: &mut Source) -> Result<(), FillError> {
    match stub.fill_segment(segment, source) {
        Err(FillError::Source(CarryError::Stopped)) => Err(CarryError::Stopped.into()),
        Err(FillError::Source(error)) => {
            source.fail(&error);
            Ok(())
        }
        done => done,
    }
}
