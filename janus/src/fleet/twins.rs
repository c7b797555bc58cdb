//! Servers that report one store: somebody has copied a store with its id.
//!
//! What clients and janus remember goes by that id, and one server's chain would be taken for the other's. So neither gets
//! starts, whatever else is ready; restores and open runs go on. That ends when one of them reports another store, or is
//! gone: it doesn't report and no URL of `server_urls` leads to it.

use std::collections::BTreeSet;

use janus_proto::ids::ServerId;

use super::Fleet;
use crate::upstream::{Down, Link, Need, Upstream};

impl Fleet {
    /// Another server with the same store.
    pub fn twin_of(&self, server: &ServerId) -> Option<ServerId> {
        let same = self.registry.same_store(server);
        // A server that was given another name leaves its old one behind.
        let is_here = |other: &ServerId| {
            self.registry.report_age(other).is_some() || self.named(other).is_some()
        };
        same.into_iter().find(is_here)
    }

    /// Why a server that is ready gets no starts.
    pub(crate) fn barred(&self, server: &ServerId) -> Option<String> {
        let twin = self.twin_of(server)?;
        Some(format!(
            "it reports the same store as server {twin}: stop the one that is the copy, run `janus-server adopt --new-id` \
             there and start it again"
        ))
    }

    /// Whether a server can be used for `need`, as far as is known now.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn stand(&self, upstream: &Upstream, need: Need) -> Result<Link, Down> {
        let link = upstream.stand(need)?;
        self.admit(upstream, need).map(|()| link)
    }

    /// Whether a server that is ready may be used for `need`.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn admit(&self, upstream: &Upstream, need: Need) -> Result<(), Down> {
        match upstream.server().filter(|_| need == Need::Starts).and_then(|id| self.barred(&id)) {
            Some(reason) => Err(Down { reason, since_ms: 0 }),
            None => Ok(()),
        }
    }

    /// Pairs of servers with one store, each once.
    pub fn twins(&self) -> BTreeSet<(ServerId, ServerId)> {
        let pair = |server: ServerId| {
            let twin = self.twin_of(&server)?;
            Some(if server < twin { (server, twin) } else { (twin, server) })
        };
        self.registry.servers().into_iter().filter_map(pair).collect()
    }

    /// What an administrator should look at: all that [`crate::registry::Registry::warnings`] says, and servers with one store.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.registry.warnings();
        warnings.extend(self.twins().into_iter().map(|(one, other)| {
            format!(
                "servers {one} and {other} report the same store, so neither gets backups: run \
                 `janus-server adopt --new-id` on the one that is the copy"
            )
        }));
        warnings
    }
}
