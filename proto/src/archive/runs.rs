//! What is in an archive: servers, machines, and the manifests of their runs.

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;

use super::{
    ArchiveError, Manifest, Store, manifest::MAX_MANIFEST_BYTES, names::MachinePlace, told,
};
use crate::ids::{MachineKey, ServerId};

/// Manifests that are fetched side by side.
const AT_ONCE: usize = 8;

/// A manifest, or what is wrong with it.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub object: Path,
    /// What it says.
    pub manifest: Result<Manifest, ArchiveError>,
}

/// The machines in an archive; only those of a server, or of that name, where one is named. Names that are none are left out.
///
/// # Errors
/// When the store can't be asked.
pub async fn machines(
    store: &Store,
    server: Option<&ServerId>,
    machine: Option<&MachineKey>,
) -> Result<Vec<(ServerId, MachineKey)>, ArchiveError> {
    let servers = match server {
        Some(server) => vec![server.to_string()],
        None => store.folders(store.prefix()).await?,
    };
    let mut found = Vec::new();
    for server in servers.iter().filter_map(|name| name.parse::<ServerId>().ok()) {
        if let Some(machine) = machine {
            found.push((server, machine.clone()));
            continue;
        }
        let of_server = store.prefix().clone().join(server.as_str());
        for user in store.folders(&of_server).await? {
            for name in store.folders(&of_server.clone().join(user.as_str())).await? {
                if let Ok(key) = MachineKey::new(&user, &name) {
                    found.push((server.clone(), key));
                }
            }
        }
    }
    Ok(found)
}

/// The runs of a machine that a server archived, the oldest first.
///
/// # Errors
/// When the store can't be asked. What is wrong with one manifest is told in its place.
pub async fn runs(
    store: &Store,
    server: &ServerId,
    machine: &MachineKey,
) -> Result<Vec<Listed>, ArchiveError> {
    let place = MachinePlace::new(store.prefix(), server, machine);
    let objects = store.list(&place.runs).await?;
    let fetch = |(object, _): (Path, u64)| {
        let place = &place;
        async move {
            let manifest = match store.get(&object, MAX_MANIFEST_BYTES).await {
                Ok(bytes) => read(&object, &bytes, place, (server, machine)),
                // Dropped since it was listed.
                Err(ArchiveError::Missing { .. }) => return Ok(None),
                Err(error @ ArchiveError::Damaged { .. }) => Err(error),
                Err(error) => return Err(error),
            };
            Ok(Some(Listed { object, manifest }))
        }
    };
    let is_manifest = |(object, _): &(Path, u64)| object.extension() == Some("json");
    let fetching = objects.into_iter().filter(is_manifest).map(fetch);
    let found: Vec<Option<Listed>> =
        futures::stream::iter(fetching).buffered(AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// A manifest that lies where one like it must.
fn read(
    object: &Path,
    bytes: &[u8],
    place: &MachinePlace,
    (server, machine): (&ServerId, &MachineKey),
) -> Result<Manifest, ArchiveError> {
    let manifest = Manifest::parse(&told(object), bytes)?;
    let alone = manifest.disks.first().filter(|_| manifest.disks.len() == 1);
    let names = [None, alone.map(|entry| &entry.disk)];
    let is_at_home = manifest.server == *server
        && manifest.machine == *machine
        && names
            .iter()
            .any(|alone| place.manifest(manifest.committed_ms, manifest.run, *alone) == *object);
    match is_at_home {
        true => Ok(manifest),
        false => Err(ArchiveError::damaged(told(object), "it is of another run")),
    }
}
