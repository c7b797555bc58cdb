//! The disks of a backup or a dry run: kept from other backups, held still, opened, and what to read of them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::ids::MachineKey;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::{
    backup::Disk,
    cache::{DiskCache, warn_no_cache},
    config::{DiskSpec, Encryption, Settings},
    frozen::{self, SnapshotError, Snapshots, Wish},
    reading::Policy,
    seal::{MasterKey, SealError, Sealer},
    source::Source,
    state::MachineState,
    survey::Choice,
};

/// Keeps other backups of this machine away.
pub(super) async fn lock(settings: &Settings) -> Result<MachineState, Failure> {
    let folder = settings.cache_path.clone();
    let state = tokio::task::spawn_blocking(move || MachineState::lock(&folder));
    Ok(state.await.map_err(Failure::failed)??)
}

/// How disks that are mounted writable are held still.
#[derive(Default)]
pub(super) struct Stillness {
    pub(super) snapshots: Snapshots,
    /// A backup would make snapshots of these; nothing is kept of what a dry run reads.
    pub(super) possible: Vec<PathBuf>,
    /// The dirty bitmap that a hook was asked to begin in each NBD export.
    pub(super) bitmap: Option<String>,
}

impl Stillness {
    pub(super) fn make(
        specs: &[DiskSpec],
        wish: &Wish,
        stop: &CancellationToken,
    ) -> Result<Self, SnapshotError> {
        let paths = specs.iter().map(|spec| spec.path.as_path());
        let snapshots = Snapshots::make(paths, wish, stop)?;
        Ok(Self { snapshots, ..Self::default() })
    }

    pub(super) fn of_dry_run(specs: &[DiskSpec]) -> Result<Self, SnapshotError> {
        let mut possible = Vec::new();
        for spec in specs {
            if frozen::is_possible(&spec.path)? {
                possible.push(spec.path.clone());
            }
        }
        Ok(Self { snapshots: Snapshots::default(), possible, bitmap: None })
    }
}

/// Opens the disks of the settings, and plans what to read of them. Those of a machine that seals its backups are sealed as `machine`.
pub(super) async fn open_all(
    settings: &Settings,
    machine: Option<&MachineKey>,
    still: Arc<Stillness>,
    stop: &CancellationToken,
) -> Result<Vec<Disk>, Failure> {
    let specs = settings.disk_specs()?;
    let (allow_live, folder) = (settings.allow_live, settings.cache_path.clone());
    let (policy, choice) = (settings.policy()?, settings.choice()?);
    let sealing = match (settings.encryption, machine) {
        (Encryption::None, _) => None,
        (Encryption::Client, Some(machine)) => Some((settings.seal_key_path(), machine.clone())),
        (Encryption::Client, None) => {
            return Err(Failure::usage(
                "setting cert: a machine's disks are sealed by its name, which the certificate says: one of `janus-server pki issue client` is needed",
            ));
        }
    };
    let opening = tokio::task::spawn_blocking(move || {
        let sealer = sealing.map(|(path, machine)| sealer(&path, machine)).transpose()?;
        open(&specs, sealer.as_ref(), &still, allow_live, (&choice, policy), &folder)
    });
    // A disk that hangs must not keep a user who wants to go.
    let opened = stop.run_until_cancelled(opening).await.ok_or_else(Failure::interrupted)?;
    opened.map_err(Failure::failed)?
}

/// What seals the disks of a machine.
fn sealer(path: &Path, machine: MachineKey) -> Result<Sealer, SealError> {
    let key = MasterKey::find(path)?.ok_or_else(|| SealError::NoKey(path.into()))?;
    tracing::debug!(key = %key.id(), "backups are sealed");
    Ok(Sealer::new(Arc::new(key), machine))
}

fn open(
    specs: &[DiskSpec],
    sealer: Option<&Sealer>,
    still: &Stillness,
    allow_live: bool,
    (choice, policy): (&Choice, Policy),
    folder: &Path,
) -> Result<Vec<Disk>, Failure> {
    let may_live = |spec: &DiskSpec| allow_live || still.possible.contains(&spec.path);
    let sources = Source::open_all(specs, &still.snapshots, may_live)?;
    let mut disks = Vec::with_capacity(sources.len());
    for mut source in sources {
        if let Some(bitmap) = &still.bitmap {
            source.bitmap_begun(bitmap);
        }
        let cache = match DiskCache::open(folder, source.disk_id(), source.size_bytes()) {
            Err(error) if error.is_no_room() => {
                warn_no_cache(source.disk_id(), &error);
                None
            }
            opened => Some(opened?),
        };
        if let Some(reason) = cache.as_ref().and_then(DiskCache::fresh_reason) {
            tracing::debug!(disk = %source.disk_id(), ?reason, "the hash cache starts empty");
        }
        let seal = sealer.map(|sealer| sealer.disk(source.disk_id(), source.size_bytes()));
        let seal = seal.transpose()?.map(Arc::new);
        let reading = choice.plan(&source, cache.as_ref(), policy, seal.as_deref())?;
        disks.push(Disk { source: Arc::new(source), seal, cache, reading: Arc::new(reading) });
    }
    Ok(disks)
}
