//! Who delivers: the snapshot on its server, or another snapshot of the same disk on another one.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::{ids::BlockHash, pb::ErrorReason};

use super::packing::Packing;
use crate::{
    link::{LinkError, PATIENCE, Remedy},
    packing::Wish,
    snapshot::Opened,
};

const PAUSE: Duration = Duration::from_millis(500);

pub(super) struct Source {
    /// Its number in the queue; 0 has all that is wanted.
    pub(super) number: usize,
    pub(super) opened: Opened,
    pub(super) packing: Packing,
    digests: OnceLock<Vec<BlockHash>>,
    /// Since when nothing came of it.
    lost_since: Mutex<Option<Instant>>,
    /// Why it delivers nothing any more.
    failure: Mutex<Option<Failure>>,
}

/// Why a source was given up.
#[derive(Debug)]
pub(super) enum Failure {
    Link(LinkError),
    Damage(super::DamageError),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Link(error) => error.fmt(f),
            Self::Damage(error) => error.fmt(f),
        }
    }
}

/// What is to be done about a failed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Again(Duration),
    GivenUp,
}

impl Source {
    pub(super) fn new(number: usize, opened: Opened, wish: Wish) -> Self {
        Self {
            number,
            opened,
            packing: Packing::new(wish),
            digests: OnceLock::new(),
            lost_since: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    pub(super) fn server(&self) -> &str {
        &self.opened.snapshot().server_id
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.opened.snapshot().size_bytes
    }

    /// What its segments are.
    pub(super) fn set_digests(&self, digests: Vec<BlockHash>) {
        let _ = self.digests.set(digests);
    }

    /// What one of its segments is, where it has it and that is known.
    pub(super) fn digest(&self, segment: u64) -> Option<&BlockHash> {
        self.digests.get()?.get(segment as usize)
    }

    /// Something came.
    pub(super) fn is_there(&self) {
        *self.lost_since.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How long to wait after a failure, and whether at all.
    pub(super) fn verdict(&self, error: &LinkError, failover_after: Duration) -> Verdict {
        let mut lost_since = self.lost_since.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = lost_since.is_none();
        let since = lost_since.get_or_insert_with(Instant::now).elapsed();
        let server = self.server();
        if let Some(pause) = error.busy().filter(|_| since < PATIENCE) {
            tracing::warn!(server, %error, ?pause, "waiting for a place");
            return Verdict::Again(pause);
        }
        let expired = error.reason() == Some(ErrorReason::HandleExpired);
        if (error.remedy() != Remedy::Reconnect && !expired) || since > failover_after {
            return Verdict::GivenUp;
        }
        if is_first {
            tracing::warn!(server, %error, "connection lost; going on as soon as the server answers");
        }
        Verdict::Again(PAUSE)
    }

    pub(super) fn fail(&self, failure: Failure) {
        let mut known = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            tracing::warn!(server = self.server(), snapshot = %self.opened.snapshot().snapshot_id, %failure, "nothing more is fetched from it");
            *known = Some(failure);
        }
    }

    pub(super) fn take_failure(&self) -> Option<Failure> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
