//! What `ls`, `cat`, `cp` and `mount` have in common: the place that is meant, and its volume.

use std::{ffi::OsString, os::unix::ffi::OsStrExt, sync::Arc};

use clap::{Arg, ArgMatches, value_parser};
use tokio_util::sync::CancellationToken;

use super::{Context, Failure, chosen};
use crate::{
    browse::{
        BrowseError, Inside, PlaceError, Volume, place,
        volume::{Bounds, Window},
    },
    snapshot::SnapshotMedium,
    source::medium::Medium,
    volume::{self, Layout},
};

/// The arguments; the first one is the place.
pub(super) fn arguments() -> Vec<Arg> {
    let [_, others @ ..] = chosen::arguments();
    let place = Arg::new("place")
        .required(true)
        .value_name("WHAT:/VOLUME/PATH")
        .value_parser(value_parser!(OsString))
        .help("DISK, USER/MACHINE/DISK or SNAPSHOT; number or label of a volume (0: a disk without partitions); path on it");
    [place].into_iter().chain(others).collect()
}

/// A disk as it was, and the place on it that is meant.
pub(super) struct Chosen {
    pub(super) snapshot: SnapshotMedium,
    pub(super) medium: Arc<dyn Medium>,
    pub(super) inside: Inside,
    pub(super) stop: CancellationToken,
}

/// Finds the snapshot.
pub(super) async fn choose(matches: &ArgMatches, context: &Context) -> Result<Chosen, Failure> {
    let place = matches.get_one::<OsString>("place").cloned().unwrap_or_default();
    let inside = Inside::parse(place.as_bytes())?;
    let snapshot =
        context.medium(matches, &chosen::selection(matches, &inside.what, context)?).await?;
    let medium = Arc::new(snapshot.clone());
    Ok(Chosen { snapshot, medium, inside, stop: context.stop.clone() })
}

impl Chosen {
    /// Does work that waits for blocks, where waiting is allowed. The snapshot is closed after it, however it ends: what is open
    /// costs its server files.
    pub(super) async fn blocking<T: Send + 'static>(
        self,
        work: impl FnOnce(Self) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (span, snapshot) = (tracing::Span::current(), self.snapshot.clone());
        let work = tokio::task::spawn_blocking(move || span.in_scope(|| work(self)));
        let done = work.await;
        snapshot.close().await;
        done.map_err(Failure::failed)?
    }

    pub(super) fn layout(&self) -> Result<Layout, Failure> {
        Ok(place::layout(&self.medium)?)
    }

    /// The volume that the place names.
    pub(super) fn volume(&self) -> Result<Volume, Failure> {
        if self.inside.volume.is_none() {
            let (text, what) = (self.inside.what.clone(), self.inside.what.clone());
            return Err(PlaceError::Written { text, what }.into());
        }
        let layout = self.layout()?;
        Ok(self.open(self.inside.find(&layout)?)?)
    }

    /// A volume of the disk.
    pub(super) fn open(&self, volume: &volume::Volume) -> Result<Volume, BrowseError> {
        let kind = volume.file_system.ok_or_else(|| BrowseError::Unsupported {
            what: format!("{} has no file system that is known here", volume.name()),
        })?;
        let program = std::env::current_exe();
        let program = program.map_err(|error| BrowseError::Start { what: error.to_string() })?;
        let window = Window { medium: self.medium.clone(), range: volume.range() };
        Volume::open(program, window, kind, Bounds::default(), self.stop.clone())
    }
}
