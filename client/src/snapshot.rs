//! Snapshots as something that can be read here: which one is meant, a handle on its server that outlives links, and its
//! bytes at any offset.

use janus_proto::{error::WireError, model::HashMismatch};

use crate::link::LinkError;

pub mod medium;
pub mod opened;
pub mod order;
pub mod select;

pub use self::{
    medium::SnapshotMedium,
    opened::{Opened, Part},
    select::{SelectError, Selection, Which},
};

/// Why a snapshot can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A call failed, and went on failing as long as one waits for a server.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// What came is not what was backed up.
    #[error("server {server} sent wrong data: {source}")]
    Damaged {
        /// The server.
        server: String,
        /// What is wrong.
        source: BadData,
    },
}

/// What is wrong with received data.
#[derive(Debug, thiserror::Error)]
pub enum BadData {
    /// A message that makes no sense.
    #[error(transparent)]
    Message(#[from] WireError),
    /// A block doesn't have its hash.
    #[error(transparent)]
    Block(#[from] HashMismatch),
}
