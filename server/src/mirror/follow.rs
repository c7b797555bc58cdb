//! The task that keeps the mirror: looks what the other servers have, reads what is missing, drops what they have no more, looks
//! over what is here, and counts how much of it this server has.
//!
//! One list of machines tells, through janus, where something is new; only then the server itself is asked. What is here of a
//! server goes only when that server has answered without it: never since it is away.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use janus_proto::{
    channel::{Dialer, Expect},
    ids::{MachineKey, ServerId, SnapshotId},
    pb,
};
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Mirror, MirrorError, pull::pull, record::Description};
use crate::{
    background, blocking,
    peer::{self, Peers, is_away, told},
    runs::Change,
};

/// All servers are asked again, whether something seems to be new or not.
const AGAIN: Duration = Duration::from_secs(3600);
/// A table that could not be read is left alone for so long.
const LATER: Duration = Duration::from_secs(600);

/// Whose snapshots: a machine's, on a server.
type Owner = (ServerId, MachineKey);

/// Follows the other servers through janus until `shutdown`, with a look at each `every`.
pub async fn follow(
    mirror: Arc<Mirror>,
    own: ServerId,
    mut urls: watch::Receiver<Vec<String>>,
    dialer: Dialer,
    every: Duration,
    shutdown: CancellationToken,
) {
    let loading = mirror.clone();
    let _ = blocking(move || loading.load()).await;
    let mut changes = mirror.runs.subscribe();
    let mut following = Following {
        mirror,
        own,
        dialer,
        stop: shutdown.clone(),
        peers: None,
        seen: BTreeMap::new(),
        later: BTreeMap::new(),
        said: BTreeMap::new(),
        all_at: Instant::now(),
    };
    while !shutdown.is_cancelled() {
        let wanted = urls.borrow_and_update().clone();
        shutdown.run_until_cancelled(following.round(&wanted)).await;
        following.look_over().await;
        let due = Instant::now() + every;
        loop {
            following.count().await;
            let changed = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = sleep_until(due) => break,
                changed = urls.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                changed = changes.recv() => changed,
            };
            match changed {
                // The first backup of a disk here makes the other servers' tables of it worth reading.
                Ok(Change::Committed(run)) => following.forget(Some(&run.machine)),
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => following.forget(None),
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}

struct Following {
    mirror: Arc<Mirror>,
    own: ServerId,
    dialer: Dialer,
    stop: CancellationToken,
    peers: Option<Peers>,
    /// How a machine stood on a server when all of it was read: newest backup, number of snapshots.
    seen: BTreeMap<Owner, (i64, u64)>,
    /// Tables that could not be read, and when they may be tried again.
    later: BTreeMap<SnapshotId, Instant>,
    /// Failures that were logged, by what they are about.
    said: BTreeMap<String, String>,
    /// When all servers are to be asked.
    all_at: Instant,
}

impl Following {
    /// Makes what is here equal to what the other servers have, as far as they answer.
    async fn round(&mut self, urls: &[String]) {
        if self.peers.as_ref().is_some_and(|peers| !urls.contains(&peers.url)) {
            self.peers = None;
        }
        if urls.is_empty() {
            return;
        }
        if self.peers.is_none() {
            match peer::connect(urls, Expect::Janus, &self.dialer).await {
                Ok(peers) => self.peers = Some(peers),
                // The reports say it.
                Err(reason) => return tracing::debug!(reason, "no janus to read tables through"),
            }
        }
        let Some(peers) = self.peers.clone() else { return };
        match peers.machines().await {
            Ok(machines) => {
                self.is_well("janus");
                self.sync(&peers, &machines).await;
            }
            Err(status) => {
                self.failed("janus", &status, "tables of other servers can't be mirrored");
                self.peers = None;
            }
        }
    }

    async fn sync(&mut self, peers: &Peers, machines: &[pb::MachineInfo]) {
        let is_all = Instant::now() >= self.all_at;
        if is_all {
            self.seen.clear();
            self.all_at = Instant::now() + AGAIN;
        }
        self.later.retain(|_, until| *until > Instant::now());
        let mut owners: BTreeMap<Owner, Option<(i64, u64)>> = BTreeMap::new();
        for info in machines {
            let Ok(machine) = info.machine.parse::<MachineKey>() else { continue };
            for at in &info.servers {
                let Ok(server) = at.server_id.parse::<ServerId>() else { continue };
                let state = (at.last_committed_ms, at.snapshot_count);
                owners.insert((server, machine.clone()), Some(state));
            }
        }
        // Those that nobody names any more may have nothing left, or be unknown to a janus that was started anew.
        for owner in self.mirror.shelf.owners() {
            owners.entry(owner).or_insert(None);
        }
        owners.retain(|(server, machine), state| {
            let is_new = state.is_none()
                || self.seen.get(&(server.clone(), machine.clone())) != state.as_ref();
            let is_of_use =
                self.mirror.has_own(machine) || !self.mirror.shelf.of_machine(machine).is_empty();
            *server != self.own && is_new && is_of_use
        });
        for (owner, state) in owners {
            let is_done = self.sync_owner(peers, &owner).await;
            match state.filter(|_| is_done) {
                Some(state) => drop(self.seen.insert(owner, state)),
                None => drop(self.seen.remove(&owner)),
            }
        }
    }

    /// Reads and drops tables of a machine on a server; false: it is to be asked again soon.
    async fn sync_owner(&mut self, peers: &Peers, owner: &Owner) -> bool {
        let (server, machine) = owner;
        let listed = match peers.snapshots(server, machine).await {
            Ok(listed) => listed,
            Err(status) => {
                self.failed(server.as_str(), &status, "a server's snapshots can't be listed");
                return false;
            }
        };
        let described = listed.into_iter().filter_map(|wire| Description::try_from(wire).ok());
        let described: Vec<_> =
            described.filter(|one| (&one.server, &one.machine) == (server, machine)).collect();
        let ids: BTreeSet<SnapshotId> = described.iter().map(|one| one.id).collect();
        let mut is_done = self.drop_others(owner, &ids).await;
        let missing = described.into_iter().filter(|one| {
            self.mirror.shelf.get(one.id).is_none() && !self.later.contains_key(&one.id)
        });
        for wanted in missing.collect::<Vec<_>>() {
            if !self.mirror.has_own_disk(&wanted) {
                continue;
            }
            match pull(&self.mirror, peers, &wanted).await {
                Ok((bytes, base)) => {
                    self.is_well(server.as_str());
                    self.is_well("space");
                    let base = base.map(|base| base.to_string());
                    tracing::info!(%server, %machine, disk = %wanted.disk, snapshot = %wanted.id, bytes, base, "table mirrored");
                    // The first mirroring of all may take days: what is here is of use at once.
                    self.count().await;
                }
                Err(error) if error.is_away() => {
                    tracing::debug!(%server, %error, "a table can't be mirrored now");
                    return false;
                }
                Err(error) if error.is_full() => {
                    self.say(
                        "space",
                        error.to_string(),
                        "tables of other servers are not mirrored",
                    );
                    return false;
                }
                Err(error) => {
                    self.later.insert(wanted.id, Instant::now() + LATER);
                    let about = format!("snapshot {}", wanted.id);
                    self.say(&about, error.to_string(), "a table can't be mirrored");
                    is_done = false;
                }
            }
        }
        is_done
    }

    /// Drops what a server has no more.
    async fn drop_others(
        &mut self,
        (server, machine): &Owner,
        listed: &BTreeSet<SnapshotId>,
    ) -> bool {
        let kept = self.mirror.shelf.of_machine(machine);
        let gone = kept.iter().map(|kept| &kept.description);
        let gone = gone.filter(|one| one.server == *server && !listed.contains(&one.id));
        let gone: Vec<SnapshotId> = gone.map(|one| one.id).collect();
        for id in gone {
            let mirror = self.mirror.clone();
            match blocking(move || mirror.drop_one(id)).await {
                Ok(Ok(())) => {
                    tracing::info!(%server, %machine, snapshot = %id, "mirrored table dropped: its server has no such snapshot any more");
                }
                Ok(Err(error)) => {
                    self.say("files", error.to_string(), "a mirrored table can't be dropped");
                    return false;
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Reads tables again of which it isn't known whether they are whole: all after a start, later those that could not be read.
    async fn look_over(&mut self) {
        while let Some(id) = self.mirror.shelf.take_doubtful() {
            let (mirror, stop) = (self.mirror.clone(), self.stop.clone());
            background(move || mirror.look_over(id, &stop)).await;
            if self.stop.is_cancelled() {
                return;
            }
            if self.mirror.shelf.get(id).is_none() {
                self.seen.clear();
            }
        }
    }

    /// Counts shares that aren't known, the newest first.
    async fn count(&self) {
        let mirror = self.mirror.clone();
        let uncounted = blocking(move || mirror.uncounted()).await;
        for kept in uncounted.unwrap_or_default() {
            if self.stop.is_cancelled() {
                return;
            }
            let (mirror, stop) = (self.mirror.clone(), self.stop.clone());
            background(move || {
                if let Err(error) = mirror.count(&kept, &|| stop.is_cancelled()) {
                    tracing::warn!(snapshot = %kept.description.id, %error, "a mirrored table can't be compared with the own snapshots");
                }
            })
            .await;
        }
    }

    /// A machine's tables are to be listed again, or all.
    fn forget(&mut self, machine: Option<&MachineKey>) {
        self.seen.retain(|(_, known), _| machine.is_some_and(|machine| machine != known));
    }

    /// Logs a failed call, unless it only says that somebody is away, which others tell.
    fn failed(&mut self, about: &str, status: &Status, what: &'static str) {
        match is_away(status) {
            true => tracing::debug!(about, reason = told(status), "{what}"),
            false => self.say(about, told(status), what),
        }
    }

    /// Logs a failure once, until it is another one or over.
    fn say(&mut self, about: &str, reason: String, what: &'static str) {
        if self.said.get(about) != Some(&reason) {
            tracing::warn!(about, reason, "{what}");
            self.said.insert(about.to_owned(), reason);
        }
    }

    fn is_well(&mut self, about: &str) {
        self.said.remove(about);
    }
}

impl Mirror {
    /// Whether this server has snapshots of a machine.
    fn has_own(&self, machine: &MachineKey) -> bool {
        self.runs.machine(machine).is_some_and(|machine| machine.has_chain())
    }

    /// Whether this server has snapshots of a disk.
    fn has_own_disk(&self, of: &Description) -> bool {
        self.own(&of.machine).iter().any(|held| held.snapshot().disk == of.disk)
    }

    /// Drops a table. Those that are built on it are written anew, which waits while the space is low. Blocks.
    fn drop_one(&self, id: SnapshotId) -> Result<(), MirrorError> {
        if self.shelf.is_built_on(id) {
            self.check_space()?;
        }
        self.shelf.remove(id)
    }

    /// Reads a table; one that isn't whole goes, with those that are built on it. Blocks.
    fn look_over(&self, id: SnapshotId, stop: &CancellationToken) {
        let Err(error) = self.shelf.check(id, &|| stop.is_cancelled()) else { return };
        if !error.is_damage() {
            tracing::warn!(snapshot = %id, %error, "a mirrored table can't be looked over now");
            return;
        }
        tracing::warn!(snapshot = %id, %error, "a mirrored table is damaged; it is read again");
        if let Err(error) = self.shelf.remove_all(id) {
            tracing::warn!(%error, "a damaged mirrored table can't be removed");
        }
    }
}
