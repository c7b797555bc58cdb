//! Seeding: the newest backups of another server's machines into this store, so that the next one here is a delta.
//!
//! What the other server has is read as what was carried here is ([`crate::carry`]): a snapshot there is the content of an
//! import ([`remote`]), only what its heads here don't hold travels, and a seeding that ends early is gone on with. Everything
//! here blocks, on a runtime of its own for the calls.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use janus_proto::{
    channel::{Dialer, Expect},
    ids::{BackupId, DiskId, MachineKey, ServerId},
    pb,
    tls::Role,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    carry::{CarryError, NewDisk, NewRun},
    peer::{self, Peers},
};

mod pace;
mod remote;

use self::{pace::Pace, remote::Remote};

/// Why nothing can be seeded.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A name of a server, and no janus to ask for it.
    #[error(
        "server {server} is reached through janus, and this server has no janus_urls: name its URL, --from https://HOST:PORT"
    )]
    NoJanus {
        /// As given.
        server: ServerId,
    },
    /// Neither a URL nor a name.
    #[error("--from {from}: neither a server's name nor a URL as https://HOST:PORT")]
    From {
        /// As given.
        from: String,
    },
    /// Nobody answers.
    #[error("the server to seed from can't be reached: {reason}")]
    Unreachable {
        /// Why.
        reason: String,
    },
    /// A janus stands between.
    #[error("{url} is a janus: name the server behind it, --from NAME")]
    Janus {
        /// As given.
        url: String,
    },
    /// This server itself.
    #[error("{server} is this server: name another one")]
    Own {
        /// Its name.
        server: ServerId,
    },
    /// It has no such machine.
    #[error(
        "server {server} has no backup of such a machine: `janus-server usage` there lists them"
    )]
    Nothing {
        /// Which server.
        server: ServerId,
    },
    /// A call failed.
    #[error("server {server}: {}", peer::told(status))]
    Call {
        /// Which server.
        server: ServerId,
        /// What came back.
        status: Box<Status>,
    },
    /// An answer that makes no sense.
    #[error("server {server}: its answer makes no sense: {source}")]
    Answer {
        /// Which server.
        server: ServerId,
        /// What is wrong with it.
        source: janus_proto::error::WireError,
    },
    /// The calls need threads.
    #[error("no threads for calls: {0}")]
    Threads(std::io::Error),
}

/// Which machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// One, with all its disks or one of them.
    Machine(MachineKey, Option<DiskId>),
    /// Those of a user.
    User(String),
    /// All.
    All,
}

impl Which {
    fn takes(&self, machine: &MachineKey) -> bool {
        match self {
            Self::Machine(wanted, _) => wanted == machine,
            Self::User(user) => machine.user() == user,
            Self::All => true,
        }
    }

    fn takes_disk(&self, disk: &DiskId) -> bool {
        match self {
            Self::Machine(_, Some(wanted)) => wanted == disk,
            _ => true,
        }
    }
}

/// Another server, to seed from.
pub struct Seeder {
    runtime: tokio::runtime::Runtime,
    link: Link,
    pace: Arc<Pace>,
}

/// How it is called.
#[derive(Clone)]
struct Link {
    peers: Peers,
    server: ServerId,
    stop: CancellationToken,
}

impl Seeder {
    /// Connects to the server `from` names, by its URL or through one of `janus_urls`. At most `bytes_per_second` are fetched.
    ///
    /// # Errors
    /// As [`SeedError`] says.
    pub fn connect(
        from: &str,
        (own, dialer): (&ServerId, &Dialer),
        janus_urls: &[String],
        bytes_per_second: Option<u64>,
        stop: &CancellationToken,
    ) -> Result<Self, SeedError> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().map_err(SeedError::Threads)?;
        let unreachable = |reason| SeedError::Unreachable { reason };
        let (peers, server) = match from.contains("://") {
            true => {
                let urls = [from.to_owned()];
                let connecting = peer::connect(&urls, Expect::ServerOrJanus, dialer);
                let peers = runtime.block_on(connecting).map_err(unreachable)?;
                let Role::Server(server) = peers.role.clone() else {
                    return Err(SeedError::Janus { url: from.to_owned() });
                };
                (peers, server)
            }
            false => {
                let server: ServerId =
                    from.parse().map_err(|_| SeedError::From { from: from.to_owned() })?;
                if janus_urls.is_empty() {
                    return Err(SeedError::NoJanus { server });
                }
                let connecting = peer::connect(janus_urls, Expect::Janus, dialer);
                (runtime.block_on(connecting).map_err(unreachable)?, server)
            }
        };
        if server == *own {
            return Err(SeedError::Own { server });
        }
        let link = Link { peers, server, stop: stop.clone() };
        Ok(Self { runtime, link, pace: Arc::new(Pace::new(bytes_per_second)) })
    }

    /// The other server.
    pub fn server(&self) -> &ServerId {
        &self.link.server
    }

    /// The machines that are meant and have backups there.
    ///
    /// # Errors
    /// When the list can't be had.
    pub fn machines(&self, which: &Which) -> Result<Vec<MachineKey>, SeedError> {
        let all = self.runtime.block_on(self.link.peers.machines());
        let mut machines = Vec::new();
        for info in all.map_err(|status| self.failed(status))? {
            let is_there = info.servers.iter().any(|there| {
                there.server_id == self.link.server.as_str() && there.snapshot_count > 0
            });
            let key = info.machine.parse::<MachineKey>();
            let key = key.map_err(|error| self.nonsense(error))?;
            if is_there && which.takes(&key) {
                machines.push(key);
            }
        }
        Ok(machines)
    }

    /// The newest snapshots of a machine's disks there, as the runs to be made of them here, oldest first. One that was
    /// begun comes before: there may be a newer one each day that a large disk takes.
    ///
    /// # Errors
    /// When they can't be listed or opened.
    pub fn newest(
        &self,
        machine: &MachineKey,
        which: &Which,
        begun: Option<BackupId>,
    ) -> Result<Vec<NewRun>, CarryError> {
        let refused = |error: SeedError| self.link.error(error.to_string());
        let all = self.runtime.block_on(self.link.peers.snapshots(&self.link.server, machine));
        let all = all.map_err(|status| refused(self.failed(status)))?;
        let mut runs: BTreeMap<(i64, String), Vec<pb::Snapshot>> = BTreeMap::new();
        let newest = newest(&all);
        let begun = begun.map(|begun| begun.to_string());
        for snapshot in &all {
            let disk = snapshot.disk_id.parse().map_err(|error| refused(self.nonsense(error)))?;
            let is_newest = newest.get(snapshot.disk_id.as_str()) == Some(&snapshot);
            let is_begun = begun.as_ref() == Some(&snapshot.backup_id);
            if (is_newest || is_begun) && which.takes_disk(&disk) {
                let key = (snapshot.committed_ms, snapshot.backup_id.clone());
                runs.entry(key).or_default().push(snapshot.clone());
            }
        }
        runs.into_iter().map(|((_, run), disks)| self.run(machine, &run, &disks)).collect()
    }

    fn run(
        &self,
        machine: &MachineKey,
        run: &str,
        snapshots: &[pb::Snapshot],
    ) -> Result<NewRun, CarryError> {
        let nonsense = |error| self.link.error(self.nonsense(error).to_string());
        let first = snapshots.first();
        let disk = |snapshot: &pb::Snapshot| {
            let content = Remote::open(self, snapshot.clone())?;
            Ok::<_, CarryError>(NewDisk {
                disk: snapshot.disk_id.parse().map_err(nonsense)?,
                size_bytes: snapshot.size_bytes,
                logical_sector_bytes: snapshot.logical_sector_bytes,
                consistency: snapshot.consistency,
                skipped_bytes: snapshot.skipped_bytes,
                data_bytes: Some(content.data_bytes()),
                content: Box::new(content),
            })
        };
        Ok(NewRun {
            machine: machine.clone(),
            run: Some(run.parse().map_err(nonsense)?),
            taken_ms: first.map_or(0, |snapshot| snapshot.committed_ms),
            seal: first.map(|snapshot| snapshot.client_seal.to_vec()).unwrap_or_default(),
            disks: snapshots.iter().map(disk).collect::<Result<_, _>>()?,
        })
    }

    fn failed(&self, status: Status) -> SeedError {
        SeedError::Call { server: self.link.server.clone(), status: Box::new(status) }
    }

    fn nonsense(&self, source: janus_proto::error::WireError) -> SeedError {
        SeedError::Answer { server: self.link.server.clone(), source }
    }
}

impl Link {
    fn error(&self, reason: String) -> CarryError {
        CarryError::Source { server: self.server.clone(), reason }
    }
}

/// Of each disk the newest snapshot without known damage, or the newest if there is none.
fn newest(snapshots: &[pb::Snapshot]) -> HashMap<&str, &pb::Snapshot> {
    let mut newest: HashMap<&str, &pb::Snapshot> = HashMap::new();
    let rank = |snapshot: &pb::Snapshot| (snapshot.damaged_blocks == 0, snapshot.committed_ms);
    for snapshot in snapshots {
        let known = newest.entry(&snapshot.disk_id).or_insert(snapshot);
        if rank(snapshot) > rank(known) {
            *known = snapshot;
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(disk: &str, committed_ms: i64, damaged_blocks: u64) -> pb::Snapshot {
        pb::Snapshot { disk_id: disk.into(), committed_ms, damaged_blocks, ..Default::default() }
    }

    #[test]
    fn the_newest_whole_snapshot_of_each_disk_is_taken() {
        let all = [
            snapshot("a", 3, 7),
            snapshot("a", 2, 0),
            snapshot("a", 1, 0),
            snapshot("b", 9, 1),
            snapshot("b", 8, 1),
        ];
        let newest = newest(&all);
        assert_eq!((newest["a"].committed_ms, newest["b"].committed_ms), (2, 9));
    }
}
