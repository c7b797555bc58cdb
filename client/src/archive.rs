//! An archive, read as if it were a server: the calls of a restore, of `list` and of what looks into snapshots are answered in this
//! process out of an object store. So all that reads snapshots reads archives too, and compares what it gets in the same way.
//!
//! The catalog is read at the beginning. A disk is opened when it is first read, and stays open.

mod serve;

use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, time::Duration};

use janus_proto::{
    archive::{ArchiveError, Manifest, Place, Store, runs},
    channel::{ConnectError, ConnectOptions, Dial, Dialing, Stream, Target},
    ids::{MachineKey, ServerId, SnapshotId},
    listener::{Door, Known, Limits},
    pb::{
        self, catalog_service_server::CatalogServiceServer,
        restore_service_server::RestoreServiceServer,
    },
    proof::Statement,
    tls::{Principal, Role},
};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::service::Routes;

use crate::ways::Ways;

/// What leads there; nobody looks the name up.
const URL: &str = "https://archive:1";
/// Bytes on their way between the two ends.
const PIPE_BYTES: usize = 1 << 20;
/// Who may call without end: nobody but ourselves does.
const CALLS: usize = 4096;

/// A snapshot of an archive.
struct Found {
    wire: pb::Snapshot,
    manifest: Arc<Manifest>,
}

/// What is in an archive.
struct Catalog {
    snapshots: BTreeMap<SnapshotId, Found>,
    /// Whose snapshots are meant where nobody is named.
    own: Option<MachineKey>,
}

/// Reads what is in the archive at `place`, of one machine if one is named, and returns the way to it. `own` is the machine that is
/// meant where none is.
///
/// # Errors
/// When it can't be read. What is wrong with single runs is logged, the others can be restored.
pub async fn open(
    place: &Place,
    machine: Option<&MachineKey>,
    own: Option<MachineKey>,
    stop: &CancellationToken,
) -> Result<Ways, ArchiveError> {
    let store = place.open(stop)?;
    let catalog = read(&store, machine, own).await?;
    let service = Arc::new(serve::Archive::new(store, catalog));
    let routes = Routes::new(RestoreServiceServer::from_arc(service.clone()))
        .add_service(CatalogServiceServer::from_arc(service));
    let (connections, door) = mpsc::channel(1);
    let limits = Limits {
        max_connections_per_caller: CALLS,
        max_calls_per_caller: CALLS,
        // It never goes away before its caller.
        keepalive_timeout: Duration::from_secs(600),
        stall: Duration::MAX,
        ..Limits::default()
    };
    let serving = Door::Known(door).serve(routes.prepare(), limits, stop.clone());
    let server = AbortOnDropHandle::new(tokio::spawn(serving));
    Ok(Ways::new(vec![URL.into()], Arc::new(Inside { connections, _server: server })))
}

async fn read(
    store: &Store,
    machine: Option<&MachineKey>,
    own: Option<MachineKey>,
) -> Result<Catalog, ArchiveError> {
    let mut snapshots = BTreeMap::new();
    for (server, machine) in runs::machines(store, None, machine).await? {
        for listed in runs::runs(store, &server, &machine).await? {
            match listed.manifest {
                Ok(manifest) => add(&mut snapshots, manifest),
                Err(error) => tracing::warn!(%error, "a run of the archive can't be read"),
            }
        }
    }
    Ok(Catalog { snapshots, own })
}

fn add(snapshots: &mut BTreeMap<SnapshotId, Found>, manifest: Manifest) {
    let manifest = Arc::new(manifest);
    for entry in &manifest.disks {
        let Some(link) = entry.links.first() else { continue };
        let wire = pb::Snapshot {
            snapshot_id: link.snapshot.to_string(),
            server_id: manifest.server.to_string(),
            machine: manifest.machine.to_string(),
            disk_id: entry.disk.to_string(),
            backup_id: manifest.run.to_string(),
            committed_ms: manifest.committed_ms,
            size_bytes: entry.size_bytes,
            logical_sector_bytes: entry.logical_sector_bytes,
            table_digest: entry.table_digest.0.to_vec().into(),
            parent_snapshot_id: entry
                .links
                .get(1)
                .map(|link| link.snapshot.to_string())
                .unwrap_or_default(),
            image: format!("{}.{}", link.edition(), entry.format.extension()),
            image_allocated_bytes: link.image.stored_bytes,
            image_length_bytes: link.image.length_bytes,
            consistency: entry.consistency,
            skipped_bytes: entry.skipped_bytes,
            reachable: true,
            client_seal: manifest.seal().into(),
            ..pb::Snapshot::default()
        };
        snapshots.insert(link.snapshot, Found { wire, manifest: manifest.clone() });
    }
}

/// Makes connections to ourselves.
struct Inside {
    connections: mpsc::Sender<Known>,
    /// It ends with who uses it.
    _server: AbortOnDropHandle<()>,
}

impl Dial for Inside {
    fn dial<'a>(&'a self, target: &'a Target, _: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            let refused = || ConnectError::Refused { target: target.to_string() };
            let server: ServerId = "archive".parse().map_err(|_| refused())?;
            let role = Role::Server(server);
            let principal = Principal::new("archive", role, Default::default(), Default::default());
            let address = (Ipv4Addr::LOCALHOST, 0).into();
            let known = Known { stream: Box::new(theirs), principal: principal.clone(), address };
            self.connections.send(known).await.map_err(|_| refused())?;
            Ok((Box::new(ours) as Stream, principal))
        })
    }

    fn prove(&self, _: &Statement, _: Option<&ServerId>) -> Option<String> {
        None
    }
}
