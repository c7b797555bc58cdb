//! Revocations that this server keeps, in `.revoked.json` below the image path.
//!
//! They are written before they count, and before they are told to anybody. Those of other servers come through the report
//! streams: see [`report`](crate::report).

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use janus_proto::{
    pb,
    revoked::{Revocation, RevocationRefused, Revocations},
    tls::Identity,
};
use serde::{Deserialize, Serialize};

use crate::{
    chain::{
        FORMAT,
        store::{Store, StoreError, read_or_put_aside, write},
    },
    storage::Disk,
};

const REVOKED: &str = ".revoked.json";

/// Why nothing was revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// It can't be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are too many.
    #[error(transparent)]
    Refused(#[from] RevocationRefused),
    /// Our key can't sign.
    #[error(
        "the key of this server can't sign a revocation: use a key that `janus-server pki issue` made"
    )]
    Unsigned,
}

#[derive(Debug, Serialize, Deserialize)]
struct RevokedFile {
    format: u32,
    revocations: Vec<Revocation>,
}

/// The revocations of a store, which are also those of an identity.
pub struct Revoked {
    storage: Disk,
    path: PathBuf,
    identity: Identity,
    /// One writer at a time.
    writing: Mutex<()>,
}

impl Revoked {
    /// Reads what a store keeps, and from now on the identity refuses it. Blocks.
    ///
    /// # Errors
    /// When it can't be read. A damaged file is put aside; the other servers tell what was in it.
    pub fn open(store: &Store, identity: Identity) -> Result<Self, StoreError> {
        let (storage, path) = (store.storage().clone(), store.root().join(REVOKED));
        let kept: Option<RevokedFile> = read_or_put_aside(&storage, &path)?;
        let kept = kept.map(|file| file.revocations).unwrap_or_default();
        if let Err(error) = identity.revocations().insert(kept) {
            tracing::error!(%error, "not all revocations of this store count");
        }
        Ok(Self { storage, path, identity, writing: Mutex::default() })
    }

    /// All that are known.
    pub fn known(&self) -> &Revocations {
        self.identity.revocations()
    }

    /// Refuses what was issued for these principals (their URIs) until now. Blocks.
    ///
    /// # Errors
    /// When that can't be kept: nothing is refused then.
    pub fn revoke(&self, principals: Vec<String>) -> Result<(), RevokeError> {
        let made = principals.into_iter().map(|principal| self.identity.revoke(principal));
        let made: Option<Vec<_>> = made.collect();
        self.keep(made.ok_or(RevokeError::Unsigned)?)
    }

    /// Takes in what others have revoked, and says whom that is news of. One that isn't believed is logged, the others count. Blocks.
    ///
    /// # Errors
    /// When they can't be kept.
    pub fn merge(
        &self,
        from: &str,
        revocations: &[pb::Revocation],
    ) -> Result<Vec<String>, RevokeError> {
        let believed = self.identity.news(revocations, |error| {
            tracing::warn!(janus = from, %error, "revocation ignored");
        });
        let news = believed.iter().map(|one| one.principal.clone()).collect();
        if !believed.is_empty() {
            self.keep(believed)?;
        }
        Ok(news)
    }

    fn keep(&self, more: Vec<Revocation>) -> Result<(), RevokeError> {
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known();
        let mut revocations = known.all();
        // Where a principal stands twice the later one counts, when it is read too.
        revocations.retain(|old| {
            more.iter().all(|new| new.principal != old.principal || new.until < old.until)
        });
        revocations.extend(more.iter().cloned());
        write(&self.storage, &self.path, &RevokedFile { format: FORMAT, revocations })?;
        Ok(known.insert(more)?)
    }
}
