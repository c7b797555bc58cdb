//! Brings a disk back. What the target holds already is not fetched: its segments are compared with the snapshot's digests
//! (`survey.rs`), what differs is shared out to the servers that have it (`work.rs`, `serve.rs`), and threads check and
//! write it (`writers.rs`). A segment counts when the blocks that are there then have its digest, and all digests together
//! are the snapshot's. Killed at any moment, the same command goes on with what it left (`target.rs`).

use std::{
    fs::OpenOptions,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Instant,
};

use janus_proto::{
    hash::table_digest,
    ids::{BlockHash, SEGMENT_BYTES},
    pb::Snapshot,
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    catalog::Found,
    packing::Wish,
    progress::Progress,
    scan::Threads,
    seal::{DiskSeal, Keys},
    snapshot::{Opened, SnapshotMedium, opened::Reach, select},
    tables::Share,
};

mod away;
mod counts;
mod elsewhere;
mod error;
mod fit;
mod format;
mod image_file;
mod intake;
mod lost;
mod neighbours;
mod packing;
mod part;
mod place;
mod queue;
mod serve;
mod source;
mod survey;
mod table;
mod target;
mod verify;
mod work;
mod writers;

pub use self::{
    error::{DamageError, RestoreError},
    fit::FitError,
    format::{FORMATS, TargetFormat},
    lost::Lost,
    place::{Place, PlaceError},
    target::TargetError,
};

use self::{
    away::Away,
    counts::Counts,
    elsewhere::Elsewhere,
    queue::Queue,
    serve::SHORT,
    source::{Failure, Source},
    survey::Survey,
    table::Table,
    target::{Content, Target},
    work::Work,
    writers::Writers,
};

/// A restore to do.
pub struct Restore {
    /// How its snapshot and others are reached.
    pub reach: Reach,
    /// What opens sealed snapshots.
    pub keys: Arc<Keys>,
    /// Blocks come only from the snapshot's own server.
    pub alone: bool,
    /// Only this volume of the disk.
    pub volume: Option<u32>,
    /// File or block device.
    pub to: PathBuf,
    /// As what a file is written.
    pub format: TargetFormat,
    /// Replace a file, overwrite a device.
    pub force: bool,
    /// Overwrite a file where it stands instead of making a new one beside it.
    pub in_place: bool,
    /// Fetch all of it, whatever the target holds.
    pub full: bool,
    /// Read all of it back in the end.
    pub verify: bool,
    /// Restore what is left of a damaged snapshot, with zeros for what is lost, and write a map of that here.
    pub partial: Option<PathBuf>,
    /// How data may be packed.
    pub packing: Wish,
    /// Threads that read and hash the target, and those that check and write.
    pub threads: Threads,
    /// What is shown meanwhile.
    pub progress: Arc<Progress>,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

/// A disk that was restored.
#[derive(Debug)]
pub struct RestoreReport {
    /// From this snapshot.
    pub snapshot: Snapshot,
    /// What of it, and as what.
    pub place: Place,
    /// It went on from what an earlier restore had left.
    pub resumed: bool,
    /// Read of the target, or of the file that it replaces.
    pub read_bytes: u64,
    /// Data received, as packed.
    pub fetched_bytes: u64,
    /// How much of it from which server.
    pub sources: Vec<(String, u64)>,
    /// Data written; zeros are left out.
    pub written_bytes: u64,
    /// Bytes of the disk that have the snapshot's digests.
    pub verified_bytes: u64,
    /// Read again in the end.
    pub read_back_bytes: u64,
    /// What is lost, and zeros now.
    pub lost: Lost,
    /// How long it took.
    pub seconds: f64,
}

impl Restore {
    /// Whether a snapshot can be restored, as far as that can be told without writing anything.
    ///
    /// # Errors
    /// Those that [`Restore::run`] would begin with.
    pub async fn check(&self, found: &Found) -> Result<(), RestoreError> {
        select::check_size(&found.snapshot).map_err(|error| damaged(&found.snapshot, error))?;
        let seal = self.seal(&found.snapshot).await?;
        let (place, away) = self.place(found, seal).await?;
        if let Some(away) = away {
            away.table.close().await;
        }
        let wish = self.target_wish();
        let to = self.to.clone();
        let checking = tokio::task::spawn_blocking(move || Target::look(&to, &place, wish));
        checking.await.map_err(|_| RestoreError::Interrupted)??;
        Ok(())
    }

    /// Restores a snapshot.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub async fn run(&self, found: Found) -> Result<RestoreReport, RestoreError> {
        let began = Instant::now();
        self.check_map()?;
        select::check_size(&found.snapshot).map_err(|error| damaged(&found.snapshot, error))?;
        let seal = self.seal(&found.snapshot).await?;
        let (place, away) = self.place(&found, seal.clone()).await?;
        let target = self.open_target(&place, &found.snapshot).await;
        if let (Err(_), Some(away)) = (&target, &away) {
            away.table.close().await;
        }
        let target = Arc::new(target?.sealed(seal));
        let done = self.restore_to(&target, place, found, away, began).await;
        if done.as_ref().is_err_and(RestoreError::is_full) {
            target.discard();
        }
        if let (Err(_), Some(partial)) = (&done, target.partial()) {
            tracing::warn!(
                partial = %partial.display(),
                "what was restored is kept there: the same command goes on from it; remove it to drop it"
            );
        }
        done
    }

    async fn restore_to(
        &self,
        target: &Arc<Target>,
        place: Place,
        found: Found,
        away: Option<Away>,
        began: Instant,
    ) -> Result<RestoreReport, RestoreError> {
        let snapshot = found.snapshot.clone();
        let (segments, size_bytes) = (place.segments(), snapshot.size_bytes);
        let end = (segments.end * SEGMENT_BYTES).min(size_bytes);
        self.progress.set_total(end - segments.start * SEGMENT_BYTES);
        let counts = Arc::new(Counts::new(self.progress.clone()));
        let is_away = !snapshot.reachable;
        let packing = self.packing.unless_sealed(target.seal().is_some());
        let sources = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(RestoreError::Interrupted),
            sources = async {
                match found.snapshot.reachable {
                    true => self.holder_and_others(found, packing).await,
                    false => self.others(found.snapshot, away, place.bytes() == size_bytes, packing).await,
                }
            } => sources?,
        };
        let (sources, digests, share) = sources;
        let work =
            Work { is_away, ..self.work(target, &counts, sources, segments.clone(), &digests) };
        let survey = Survey::new(target, &digests, size_bytes, segments, &counts);
        let mut survey = survey.start(self.threads.far);
        let worked = tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(RestoreError::Interrupted),
            worked = work.run(&mut survey.parts) => worked,
        };
        // What failed to be read or written is the cause where more failed.
        let surveyed = survey.finish().await;
        let Work { writers, sources, lost, .. } = work;
        writers.finish().await;
        let delivered = close(&sources).await;
        surveyed?;
        worked?;
        let lost = work::merged(lost);
        let missing = Lost::new(&lost, size_bytes).within(&place.window);
        self.conclude(&snapshot, &sources, &missing, place.bytes(), share)?;
        self.verify(target, size_bytes, &digests, lost, &counts).await?;
        self.publish(target, &place).await?;
        let [read_bytes, fetched_bytes, written_bytes, verified_bytes, read_back_bytes] =
            counts.all();
        Ok(RestoreReport {
            snapshot,
            place,
            resumed: target.is_resumed(),
            read_bytes,
            fetched_bytes,
            sources: delivered,
            written_bytes,
            verified_bytes,
            read_back_bytes,
            lost: missing,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// What opens the snapshot: asked before anything is written.
    async fn seal(&self, snapshot: &Snapshot) -> Result<Option<Arc<DiskSeal>>, RestoreError> {
        if snapshot.reachable || !snapshot.client_seal.is_empty() {
            return Ok(self.keys.open(snapshot)?);
        }
        // Janus keeps no seals; who mirrors the table does.
        let client_seal = away::client_seal(&self.reach, snapshot).await?;
        Ok(self.keys.open(&Snapshot { client_seal, ..snapshot.clone() })?)
    }

    fn work(
        &self,
        target: &Arc<Target>,
        counts: &Arc<Counts>,
        sources: Vec<Source>,
        segments: Range<u64>,
        digests: &Arc<[BlockHash]>,
    ) -> Work {
        // Where the target has data, whole hashes of all that differs would be more than what has changed. Only they say
        // of each block whether it is right, when something is lost for good.
        let hash_bytes = match target.content() {
            Content::Old if self.partial.is_none() => SHORT,
            _ => BlockHash::LEN,
        };
        Work {
            size_bytes: sources.first().map_or(0, Source::size_bytes),
            segments,
            table: Table::new(digests.clone(), hash_bytes),
            queue: Queue::new(sources.len()),
            writers: Writers::start(self.threads.for_messages(), target),
            counts: counts.clone(),
            sources,
            is_away: false,
            failover_after: self.reach.failover_after,
            zero_lost: self.partial.is_some(),
            lost: Mutex::default(),
        }
    }

    /// The digests of a snapshot whose server is there, and who delivers.
    async fn holder_and_others(
        &self,
        found: Found,
        packing: Wish,
    ) -> Result<Sources, RestoreError> {
        let holder = Opened::new(self.reach.clone(), found)?;
        let (sources, digests) = self.sources(holder, packing).await?;
        Ok((sources, digests, None))
    }

    /// The same of a snapshot whose server is away, with what others say they have of it.
    async fn others(
        &self,
        snapshot: Snapshot,
        away: Option<Away>,
        is_whole: bool,
        packing: Wish,
    ) -> Result<Sources, RestoreError> {
        let away = match away {
            Some(known) => known,
            None => away::find(&self.reach, &snapshot).await?,
        };
        let Snapshot { snapshot_id, server_id, .. } = snapshot;
        let Away { table, digests, neighbours, share } = away;
        // Of a part it may be all.
        let is_short = |share: &Share| is_whole && share.held_bytes < share.content_bytes;
        if let Some(share) = share.filter(is_short).filter(|_| self.partial.is_none()) {
            table.close().await;
            return Err(RestoreError::Elsewhere {
                snapshot: snapshot_id,
                server: server_id,
                held_bytes: share.held_bytes,
                content_bytes: share.content_bytes,
                missing: Lost::default(),
            });
        }
        tracing::warn!(server = server_id, table = %table.snapshot().server_id, "the snapshot's server can't be reached; its table is known, and others deliver what they have of it");
        let sources = self.with_neighbours(table, neighbours, packing);
        Ok((sources, digests.into(), share))
    }

    /// The snapshot's digests, and who delivers.
    async fn sources(
        &self,
        holder: Opened,
        packing: Wish,
    ) -> Result<(Vec<Source>, Arc<[BlockHash]>), RestoreError> {
        let snapshot = holder.snapshot().clone();
        let neighbours = async {
            match self.alone {
                true => Vec::new(),
                false => neighbours::find(&self.reach, &snapshot).await,
            }
        };
        let (digests, neighbours) = tokio::join!(holder.segment_digests(), neighbours);
        let digests = digests?;
        check_digests(&snapshot, &digests).map_err(|error| damaged(&snapshot, error))?;
        let sources = self.with_neighbours(holder, neighbours, packing);
        if let Some(holder) = sources.first() {
            holder.set_digests(digests.clone());
        }
        Ok((sources, digests.into()))
    }

    fn with_neighbours(&self, first: Opened, others: Vec<Found>, packing: Wish) -> Vec<Source> {
        let mut sources = vec![Source::new(0, first, packing)];
        for found in others {
            // One whose entry makes no sense is of no use.
            let Ok(opened) = Opened::new(self.reach.clone(), found) else { continue };
            sources.push(Source::new(sources.len(), opened, packing));
        }
        sources
    }

    fn target_wish(&self) -> target::Wish {
        target::Wish { force: self.force, in_place: self.in_place, full: self.full }
    }

    /// What goes onto the target, and who stands for a server that is away, if that was asked. The disk's partition table is read only
    /// where the place depends on it.
    async fn place(
        &self,
        found: &Found,
        seal: Option<Arc<DiskSeal>>,
    ) -> Result<(Place, Option<Away>), RestoreError> {
        let Snapshot { size_bytes, logical_sector_bytes, .. } = found.snapshot;
        let (to, volume, format) = (self.to.clone(), self.volume, self.format);
        let measuring = tokio::task::spawn_blocking(move || place::device_bytes(&to));
        let device_bytes = measuring.await.map_err(|_| RestoreError::Interrupted)?;
        if volume.is_none() && device_bytes.is_none_or(|bytes| bytes == size_bytes) {
            return Ok((Place::whole(size_bytes, logical_sector_bytes, format), None));
        }
        if !found.snapshot.reachable {
            let away = away::find(&self.reach, &found.snapshot).await?;
            let disk = Elsewhere::new(self, away, Handle::current());
            let planning = tokio::task::spawn_blocking(move || {
                (place::plan(&disk, volume, device_bytes, format), disk)
            });
            let (place, disk) = planning.await.map_err(|_| RestoreError::Interrupted)?;
            let away = disk.into_away().await;
            return match place {
                Ok(place) => Ok((place, Some(away))),
                Err(error) => {
                    away.table.close().await;
                    Err(error.into())
                }
            };
        }
        let opened = Opened::new(self.reach.clone(), found.clone())?;
        let disk = SnapshotMedium::new(opened, seal, self.packing, 0, Handle::current());
        let reading = disk.clone();
        let planning = tokio::task::spawn_blocking(move || {
            place::plan(&reading, volume, device_bytes, format)
        });
        let place = planning.await.map_err(|_| RestoreError::Interrupted)?;
        disk.close().await;
        Ok((place?, None))
    }

    async fn open_target(
        &self,
        place: &Place,
        snapshot: &Snapshot,
    ) -> Result<Target, RestoreError> {
        let wish = self.target_wish();
        let (to, place) = (self.to.clone(), place.clone());
        // A part is not the beginning of the whole.
        let id = match self.volume {
            Some(number) => format!("{}-{number}", snapshot.snapshot_id),
            None => snapshot.snapshot_id.clone(),
        };
        let opening = tokio::task::spawn_blocking(move || Target::open(&to, &place, &id, wish));
        Ok(opening.await.map_err(|_| RestoreError::Interrupted)??)
    }

    /// Completes the target.
    async fn publish(&self, target: &Arc<Target>, place: &Place) -> Result<(), RestoreError> {
        let (publishing, table, to) = (target.clone(), place.table, self.to.clone());
        let done = tokio::task::spawn_blocking(move || {
            publishing.publish()?;
            let Some(table) = table else { return Ok(()) };
            let opened = OpenOptions::new().read(true).write(true).open(to);
            let moved =
                opened.map_err(FitError::Io).and_then(|mut file| table.move_to_end(&mut file));
            Ok(moved.map_err(PlaceError::from)?)
        });
        done.await.map_err(|_| RestoreError::Interrupted)?
    }

    /// Says what is lost, where that is an error, or writes the map of it.
    fn conclude(
        &self,
        snapshot: &Snapshot,
        sources: &[Source],
        lost: &Lost,
        size_bytes: u64,
        share: Option<Share>,
    ) -> Result<(), RestoreError> {
        if lost.is_empty() {
            return Ok(());
        }
        let server = snapshot.server_id.clone();
        if let Some(path) = self.partial.clone() {
            tracing::warn!(server, snapshot = %snapshot.snapshot_id, bytes = lost.said(), "lost: zeros take their place");
            let written = lost.write_map(&path, size_bytes);
            return written.map_err(|source| RestoreError::Map { path, source });
        }
        let missing = lost.clone();
        if !snapshot.reachable {
            let content_bytes = share.map_or(size_bytes, |share| share.content_bytes);
            return Err(RestoreError::Elsewhere {
                snapshot: snapshot.snapshot_id.clone(),
                server,
                held_bytes: content_bytes.saturating_sub(missing.bytes()),
                content_bytes,
                missing,
            });
        }
        Err(match sources.first().and_then(Source::take_failure) {
            Some(Failure::Link(source)) => {
                let percent = missing.bytes() as f64 * 100.0 / size_bytes.max(1) as f64;
                RestoreError::Missing { server, missing, size_bytes, percent, source }
            }
            Some(Failure::Damage(source)) => RestoreError::Damaged { server, source },
            None if snapshot.missing_blocks > 0 => RestoreError::Incomplete { server, missing },
            None => RestoreError::Lost { server, lost: missing },
        })
    }

    async fn verify(
        &self,
        target: &Arc<Target>,
        size_bytes: u64,
        digests: &Arc<[BlockHash]>,
        lost: Vec<Range<u64>>,
        counts: &Arc<Counts>,
    ) -> Result<(), RestoreError> {
        if !self.verify {
            return Ok(());
        }
        let read_back =
            verify::read_back(target, size_bytes, digests, lost, counts, self.threads.far);
        let differs = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(RestoreError::Interrupted),
            differs = read_back => differs?,
        };
        match differs {
            None => Ok(()),
            Some(offset) => Err(RestoreError::ReadBack { path: self.to.clone(), offset }),
        }
    }

    /// The map can be written in the end: before the disk was restored for nothing.
    fn check_map(&self) -> Result<(), RestoreError> {
        let Some(path) = self.partial.clone() else { return Ok(()) };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let kind = if path.exists() {
            std::io::ErrorKind::AlreadyExists
        } else if !folder.unwrap_or(Path::new(".")).is_dir() {
            std::io::ErrorKind::NotADirectory
        } else {
            return Ok(());
        };
        Err(RestoreError::Map { path, source: kind.into() })
    }
}

/// Who delivers, the first one with the snapshot or its table; its digests; what others say they have of it.
type Sources = (Vec<Source>, Arc<[BlockHash]>, Option<Share>);

/// Gives all handles back; returns how much each server delivered.
async fn close(sources: &[Source]) -> Vec<(String, u64)> {
    let mut delivered: Vec<(String, u64)> = Vec::new();
    for source in sources {
        let bytes = source.opened.fetched_bytes();
        match delivered.iter_mut().find(|(server, _)| server == source.server()) {
            Some((_, sum)) => *sum += bytes,
            None => delivered.push((source.server().to_owned(), bytes)),
        }
    }
    delivered.retain(|(_, bytes)| *bytes > 0);
    futures::future::join_all(sources.iter().map(|source| source.opened.close())).await;
    delivered
}

/// Segment digests are a snapshot's when together they give its table digest.
fn check_digests(snapshot: &Snapshot, digests: &[BlockHash]) -> Result<(), DamageError> {
    let actual = table_digest(snapshot.size_bytes, digests);
    let expected = BlockHash::from_wire("table_digest", &snapshot.table_digest)?;
    match actual == expected {
        true => Ok(()),
        false => Err(DamageError::Whole { actual, expected }),
    }
}

fn damaged(snapshot: &Snapshot, source: impl Into<DamageError>) -> RestoreError {
    RestoreError::Damaged { server: snapshot.server_id.clone(), source: source.into() }
}
