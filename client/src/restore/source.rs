//! Who delivers: the snapshot on its server, or another snapshot of the same disk on another one.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use janus_proto::ids::BlockHash;

use super::packing::Packing;
use crate::{
    link::{LinkError, Waiting},
    packing::Wish,
    snapshot::Opened,
};

pub(super) struct Source {
    /// Its number in the queue; 0 has all that is wanted.
    pub(super) number: usize,
    pub(super) opened: Opened,
    pub(super) packing: Packing,
    digests: OnceLock<Vec<BlockHash>>,
    waiting: Mutex<Waiting>,
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

impl Source {
    pub(super) fn new(number: usize, opened: Opened, wish: Wish) -> Self {
        Self {
            number,
            opened,
            packing: Packing::new(wish),
            digests: OnceLock::new(),
            waiting: Mutex::default(),
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
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_over();
    }

    /// How long to wait after a failure; `None`: it is given up.
    pub(super) fn pause(&self, error: &LinkError, failover_after: Duration) -> Option<Duration> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pause(error, self.server(), failover_after)
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
