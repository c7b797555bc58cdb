//! Stubs are filled: in the background, from any server that has their blocks, each compared with its hash.
//!
//! Nothing but the blocks themselves says what is here: what is read and has its hash is, so that a crash costs a look at what
//! was fetched last. A stub is filled segment by segment, for a while, then comes the next one; a segment that somebody
//! reads comes first ([`Wanted`]). Its sources are tried one after another: newer snapshots here, which clients have sent again;
//! the snapshot that the hashes came from; others of the disk, the nearest in time first. What none has for some time is noted as
//! damage: the machine's next backup sends it again, and is complete. While a source is used it is open there, so that no
//! merge changes it. Everything here blocks, on one thread, with a runtime of its own for the calls.

mod sources;
mod stub;
mod wanted;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use janus_proto::{
    channel::Dialer,
    ids::{ServerId, SnapshotId},
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
    config::Fill,
    runs::{Runs, now_ms},
    seed::{SeedError, Seeder},
};

/// How often it is looked for stubs while there are none.
const LOOK: Duration = Duration::from_secs(2);
/// A stub that nothing was found for rests so long.
const REST: Duration = Duration::from_secs(2);
/// And longer each time, up to this.
const MOST_REST: Duration = Duration::from_secs(60);
/// Then others have their turn.
const SLICE: Duration = Duration::from_secs(60);
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
    /// Since when nobody had anything of what it lacks.
    stuck_since: Option<Instant>,
    /// What kept it from being filled was told.
    said: String,
}

struct Work<'a> {
    filler: &'a Filler,
    stop: &'a CancellationToken,
    known: HashMap<SnapshotId, Known>,
    /// Connections, by what names the server.
    seeders: HashMap<String, Arc<Seeder>>,
    touched: Instant,
}

impl<'a> Work<'a> {
    fn new(filler: &'a Filler, stop: &'a CancellationToken) -> Self {
        let (known, seeders) = (HashMap::new(), HashMap::new());
        Self { filler, stop, known, seeders, touched: Instant::now() }
    }

    /// Until there are no stubs, or it is to stop.
    fn all(mut self) {
        let runs = &self.filler.runs;
        let mut turn = 0;
        loop {
            let stubs = runs.stubs();
            self.known.retain(|id, _| stubs.iter().any(|held| held.snapshot().id == *id));
            if stubs.is_empty() || self.stop.is_cancelled() {
                return;
            }
            let wanted = runs.wanted().stub();
            if let Some(stub) =
                wanted.filter(|id| !stubs.iter().any(|held| held.snapshot().id == *id))
            {
                runs.wanted().give_up(stub);
            }
            let is_wanted = |held: &&Held| Some(held.snapshot().id) == wanted;
            let may_go_on = |held: &&Held| self.is_awake(held.snapshot().id);
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

    fn is_awake(&self, stub: SnapshotId) -> bool {
        self.is_time()
            && self
                .known
                .get(&stub)
                .and_then(|known| known.rests_until)
                .is_none_or(|until| until <= Instant::now())
    }

    /// True in the hours of the settings.
    fn is_time(&self) -> bool {
        self.filler.settings.hours().is_ok_and(|hours| hours.left(now_ms()).is_some())
    }

    /// Tells the sources of resting stubs that they are needed.
    fn touch(&mut self) {
        if self.touched.elapsed() < TOUCH_EVERY {
            return;
        }
        self.touched = Instant::now();
        for known in self.known.values_mut() {
            if let Some(sources) = &mut known.sources {
                sources.touch();
            }
        }
    }

    /// Fills a stub for a while.
    fn fill(&mut self, held: &Held) {
        let id = held.snapshot().id;
        let mut known = self.known.remove(&id).unwrap_or_default();
        let before = self.missing_blocks(held);
        let filled = self.fill_from_all(held, &mut known);
        // Whoever still waits does so in vain.
        self.filler.runs.wanted().give_up(id);
        let said = match &filled {
            Ok(()) | Err(FillError::Gone | FillError::Source(CarryError::Stopped)) => String::new(),
            Err(error) => error.to_string(),
        };
        if !said.is_empty() && said != known.said {
            let (machine, disk) = (&held.run.machine, &held.snapshot().disk);
            tracing::warn!(%machine, %disk, error = said, "a stub is not filled now");
        }
        known.said = said;
        if self.missing_blocks(held) < before {
            (known.stuck_since, known.rest) = (None, REST);
        } else {
            known.rests_until = Some(Instant::now() + known.rest);
            known.rest = (known.rest * 2).clamp(REST, MOST_REST);
        }
        self.known.insert(id, known);
    }

    fn missing_blocks(&self, held: &Held) -> u64 {
        let machine = self.filler.runs.machine(&held.run.machine);
        let health = machine.map(|machine| machine.health()).unwrap_or_default();
        health.missing(held.snapshot()).map_or(0, BlockRanges::blocks)
    }

    fn fill_from_all(&mut self, held: &Held, known: &mut Known) -> Result<(), FillError> {
        let runs = &self.filler.runs;
        let mut stub = Stub::open(runs, held)?;
        let began = Instant::now();
        let mut failed = None;
        while !stub.missing.is_empty() {
            if known.sources.is_none() {
                match self.look_for_sources(held, &stub) {
                    Ok(found) => known.sources = Some(found),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            let Some(sources) = &mut known.sources else { break };
            let source = match sources.current(&stub.missing) {
                Ok(Some(source)) => source,
                Ok(None) => {
                    // All were tried.
                    known.sources = None;
                    break;
                }
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            match self.fill_from(&mut stub, source, began) {
                Ok(true) => sources.next(),
                Ok(false) => break,
                Err(FillError::Source(CarryError::Stopped)) => break,
                Err(FillError::Source(error)) => {
                    failed = Some(error);
                    sources.next();
                }
                Err(error) => return Err(error),
            }
        }
        stub.keep()?;
        if stub.missing.is_empty() {
            stub.finish()?;
            let (machine, disk, backup_id) =
                (&held.run.machine, &held.snapshot().disk, held.run.backup);
            tracing::info!(%machine, %disk, %backup_id, "a stub is full");
            return Ok(());
        }
        if known.sources.is_none() && !self.stop.is_cancelled() {
            let since = *known.stuck_since.get_or_insert_with(Instant::now);
            let ask_after = Duration::from_secs(self.filler.settings.ask_clients_after_seconds);
            if since.elapsed() >= ask_after {
                stub.ask_clients(MOST_ASKED);
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Fills from one source: true when it has nothing more of what is missing, false when others have their turn.
    fn fill_from(
        &self,
        stub: &mut Stub<'_>,
        source: &mut Source,
        began: Instant,
    ) -> Result<bool, FillError> {
        let wanted = self.filler.runs.wanted();
        let mut kept = Instant::now();
        loop {
            if self.stop.is_cancelled() {
                return Ok(false);
            }
            if let Some(segment) = wanted.next(stub.id()) {
                if stub.lacks(segment) {
                    stub.fill_segment(segment, source)?;
                }
                wanted.done(stub.id(), segment);
            } else if began.elapsed() > SLICE || wanted.stub().is_some() || !self.is_time() {
                return Ok(false);
            } else {
                match source.todo.pop_front() {
                    Some(segment) if stub.lacks(segment) => stub.fill_segment(segment, source)?,
                    Some(_) => {}
                    None => return Ok(true),
                }
            }
            if kept.elapsed() > KEEP_EVERY {
                stub.keep()?;
                kept = Instant::now();
            }
        }
    }

    /// Looks who has blocks of the disk.
    fn look_for_sources(&mut self, held: &Held, stub: &Stub<'_>) -> Result<Sources, CarryError> {
        let mut sources = Sources::here(&self.filler.runs, held, &stub.missing);
        match self.seeder(held) {
            Ok(seeder) => sources.add_there(&seeder, held, &self.filler.own)?,
            // What is here helps all the same.
            Err(error) if sources.is_empty() => return Err(error),
            Err(_) => {}
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
        let bytes_per_second = match self.filler.settings.mib_per_second {
            0 => None,
            mib => Some(u64::from(mib) << 20),
        };
        let own = (&self.filler.own, &self.filler.dialer);
        let seeder = Seeder::connect(&from, own, &janus_urls, bytes_per_second, self.stop)?;
        let seeder = Arc::new(seeder.with_patience(Duration::from_secs(5)));
        self.seeders.insert(from, seeder.clone());
        Ok(seeder)
    }
}
