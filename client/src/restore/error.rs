//! What ends a restore early.

use std::{io::ErrorKind, path::PathBuf};

use janus_proto::{error::WireError, ids::BlockHash, show::amount};

use super::{Lost, TargetError, place::PlaceError};
use crate::{
    link::LinkError,
    seal::SealError,
    snapshot::{BadData, ReadError, SelectError},
    tables::percent,
};

/// Why a disk was not restored. A file that was to be replaced is as it was, unless `--in-place` was given.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is no such snapshot, or it can't be had.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// A call failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It can't be opened here, or must not be.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The target can't be used or written.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The part that was asked for isn't there, or doesn't fit.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A block is not what was backed up.
    #[error(
        "server {server} sent wrong data: {source}; restore another snapshot, or the same from another server"
    )]
    Damaged {
        /// The server.
        server: String,
        /// What is wrong.
        source: DamageError,
    },
    /// Blocks are lost.
    #[error(
        "{} of this snapshot are lost on server {server}, bytes {}; restore another snapshot, the same disk from another server, or what is left: --partial MAP",
        amount(lost.bytes()),
        lost.said()
    )]
    Lost {
        /// The server.
        server: String,
        /// Which.
        lost: Lost,
    },
    /// Its server doesn't have all of it yet.
    #[error(
        "{} of this snapshot aren't on server {server} yet (it was seeded by hashes), and the servers that have them can't be reached, bytes {}; restore again when they can, or take what is there: --partial MAP",
        amount(missing.bytes()),
        missing.said()
    )]
    Incomplete {
        /// The server.
        server: String,
        /// Which.
        missing: Lost,
    },
    /// Its server was lost, and others don't have all of it.
    #[error(
        "server {server} can't be reached any more, and {} of {} ({percent:.1} %) are nowhere else; go on with the same command when it is back, or take the rest: --partial MAP: {source}",
        amount(missing.bytes()),
        amount(*size_bytes)
    )]
    Missing {
        /// The server.
        server: String,
        /// What only it has.
        missing: Lost,
        /// Size of the disk.
        size_bytes: u64,
        /// Share of the disk.
        percent: f64,
        /// Why it is lost.
        source: LinkError,
    },
    /// Its server is away from the start, and others don't have all of it.
    #[error(
        "snapshot {snapshot} is on server {server}, which can't be reached now; others have {:.1} % of it, {} of {}; take that, with zeros for the rest: --partial MAP; or wait for {server}",
        percent(*held_bytes, *content_bytes),
        amount(*held_bytes),
        amount(*content_bytes)
    )]
    Elsewhere {
        /// Its id.
        snapshot: String,
        /// Its server.
        server: String,
        /// What others have.
        held_bytes: u64,
        /// All of it that isn't zeros.
        content_bytes: u64,
        /// What they don't have, where that was tried.
        missing: Lost,
    },
    /// The map of lost blocks.
    #[error("{}: the map of what is lost can't be written: {source}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// What was written is not what is read.
    #[error(
        "{}: what was written there is not what is read back, first in the 4 MiB at byte {offset}; the device or its memory is broken",
        path.display()
    )]
    ReadBack {
        /// The target.
        path: PathBuf,
        /// Of the first segment that differs.
        offset: u64,
    },
    /// Asked to stop.
    #[error("interrupted; the same command goes on from here")]
    Interrupted,
}

/// What is wrong with received data.
#[derive(Debug, thiserror::Error)]
pub enum DamageError {
    /// A message that makes no sense.
    #[error(transparent)]
    Message(#[from] WireError),
    /// A block doesn't have its hash.
    #[error(transparent)]
    Block(#[from] janus_proto::model::HashMismatch),
    /// A block isn't the snapshot's.
    #[error("block {block} is not the snapshot's")]
    Foreign {
        /// Its number.
        block: u64,
    },
    /// A part isn't the snapshot's.
    #[error("segment {segment} is not the snapshot's")]
    Segment {
        /// Its number.
        segment: u64,
    },
    /// The whole isn't the snapshot.
    #[error("all segments together have digest {actual}, the snapshot has {expected}")]
    Whole {
        /// Of what was received.
        actual: BlockHash,
        /// Of the snapshot.
        expected: BlockHash,
    },
}

impl RestoreError {
    /// There is no space left where it was to be written.
    pub(super) fn is_full(&self) -> bool {
        let Self::Target(TargetError::Io { source, .. }) = self else { return false };
        matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    }
}

impl From<ReadError> for RestoreError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Link(error) => Self::Link(error),
            ReadError::Damaged { server, source } => {
                let source = match source {
                    BadData::Message(source) => source.into(),
                    BadData::Block(source) => source.into(),
                };
                Self::Damaged { server, source }
            }
        }
    }
}
