//! Revocations that this server keeps, in `.revoked.json` below the image path.
//!
//! They count before they are written: what can't be kept is tried again. Those of other servers come through the report streams: see
//! [`report`](crate::report).

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use janus_proto::{
    pb,
    revoked::{Kept, Revocation, RevocationRefused, Revocations},
    tls::Identity,
};
use serde::{Deserialize, Serialize};

use crate::{
    chain::{
        FORMAT,
        store::{Store, StoreError, read_large_or_put_aside, write_large},
    },
    storage::Disk,
};

const REVOKED: &str = ".revoked.json";

/// Why nothing was revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// It counts, but isn't kept.
    #[error("{0}; until that is mended the revocation counts here only while this server runs")]
    Unkept(StoreError),
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
    #[serde(flatten)]
    kept: Kept,
}

/// Largest file that is read: all that are known at most.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// The revocations of a store, which are also those of an identity.
pub struct Revoked {
    storage: Disk,
    path: PathBuf,
    identity: Identity,
    /// Whether what counts is not all kept. One writer at a time.
    unkept: Mutex<bool>,
}

impl Revoked {
    /// Reads what a store keeps, and from now on the identity refuses it. Blocks.
    ///
    /// # Errors
    /// When it can't be read. A damaged file is put aside; the other servers tell what was in it.
    pub fn open(store: &Store, identity: Identity) -> Result<Self, StoreError> {
        let (storage, path) = (store.storage().clone(), store.root().join(REVOKED));
        let kept: Option<RevokedFile> = read_large_or_put_aside(&storage, &path, MAX_FILE_BYTES)?;
        let kept = kept.map(|file| file.kept.into_revocations()).unwrap_or_default();
        if let Err(error) = identity.revocations().insert(kept) {
            tracing::error!(%error, "not all revocations of this store count");
        }
        let revoked = Self { storage, path, identity, unkept: Mutex::new(false) };
        revoked.sign_anew();
        Ok(revoked)
    }

    /// All that are known.
    pub fn known(&self) -> &Revocations {
        self.identity.revocations()
    }

    /// Refuses what was issued for these principals (their URIs) until now. Blocks.
    ///
    /// # Errors
    /// When that can't be kept: it is refused all the same while this server runs, and kept when that can be.
    pub fn revoke(&self, principals: Vec<String>) -> Result<(), RevokeError> {
        let made = principals.into_iter().map(|principal| self.identity.revoke(principal));
        let made: Option<Vec<_>> = made.collect();
        self.take(made.ok_or(RevokeError::Unsigned)?)
    }

    /// Takes in what others have revoked, and says whom that is news of. One that isn't believed is logged, the others count. Blocks.
    ///
    /// # Errors
    /// As [`Revoked::revoke`].
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
            self.take(believed)?;
        }
        Ok(news)
    }

    /// Signs what was signed by servers that aren't believed any more: their certificates were revoked, or are of an authority that is
    /// gone. Others hear of it from us from now on. Blocks.
    pub fn sign_anew(&self) {
        let signed = self.identity.signed_anew();
        if !signed.is_empty()
            && let Err(error) = self.take(signed)
        {
            tracing::error!(%error, "revocations that were signed anew are not kept");
        }
    }

    /// Keeps what could not be kept when it came. Blocks.
    pub fn keep(&self) {
        let mut unkept = self.unkept.lock().unwrap_or_else(PoisonError::into_inner);
        if *unkept && self.write(&mut unkept).is_ok() {
            tracing::info!("all revocations are kept again");
        }
    }

    /// They count first: a full disk is no reason to let somebody in. What a server had signed that is among them is still meant.
    fn take(&self, more: Vec<Revocation>) -> Result<(), RevokeError> {
        let has_server = more.iter().any(Revocation::is_of_server);
        let mut taken = self.known().insert(more);
        if has_server {
            taken = taken.and(self.known().insert(self.identity.signed_anew()));
        }
        let mut unkept = self.unkept.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&mut unkept).map_err(RevokeError::Unkept)?;
        Ok(taken?)
    }

    fn write(&self, unkept: &mut bool) -> Result<(), StoreError> {
        *unkept = true;
        let kept = Kept::of(&self.known().all());
        let file = RevokedFile { format: FORMAT, kept };
        write_large(&self.storage, &self.path, &file, MAX_FILE_BYTES)?;
        *unkept = false;
        Ok(())
    }
}
