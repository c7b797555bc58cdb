//! Backups that are carried by hand: runs out of the store into a folder, and into the store out of one, or out of images that
//! other programs made.
//!
//! An import is a run as a client's: its blocks go through sessions, compared with what the disk's head holds, and a commit
//! publishes it. So a chain that is here is continued, an import that is killed leaves what a killed backup leaves, and one
//! that is begun again reads only what is missing. Everything here blocks.

mod content;
mod export;
mod import;
pub(crate) mod whole;

use janus_proto::{
    carried::CarriedError,
    ids::{DiskId, MachineKey, ServerId},
    image::foreign::ForeignError,
    table::TableError,
};

pub use self::{
    content::{Content, foreign, raw},
    export::export,
    import::{Imported, NewDisk, NewRun, import},
};
use crate::{chain::opened::OpenError, runs::RunError};

/// Why nothing was carried.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The carried folder.
    #[error(transparent)]
    Carried(#[from] CarriedError),
    /// An image of another program.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// A file that can't be taken in.
    #[error("{}: {reason}", path.display())]
    Unfit {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
    /// A file can't be read now.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A snapshot can't be opened.
    #[error("disk {disk}: {source}")]
    Open {
        /// The disk.
        disk: DiskId,
        /// Why not.
        source: OpenError,
    },
    /// The hashes of a snapshot can't be read.
    #[error("disk {disk}: {source}")]
    Table {
        /// The disk.
        disk: DiskId,
        /// Why not.
        source: TableError,
    },
    /// A snapshot has lost a block.
    #[error(
        "block {block} of disk {disk} is lost: `janus-server verify {machine}` tells what else is; a newer snapshot may be whole"
    )]
    Lost {
        /// The machine.
        machine: MachineKey,
        /// The disk.
        disk: DiskId,
        /// The block.
        block: u64,
    },
    /// A snapshot builds on a stub.
    #[error(
        "disk {disk} of {machine} isn't complete here: `janus-server seed status` tells what still comes from other servers"
    )]
    Incomplete {
        /// The machine.
        machine: MachineKey,
        /// The disk.
        disk: DiskId,
    },
    /// Another server, or the way to it.
    #[error("server {server}: {reason}")]
    Source {
        /// Its name.
        server: ServerId,
        /// What is wrong there.
        reason: String,
        /// It may be well again later.
        passes: bool,
    },
    /// An archive.
    #[error(transparent)]
    Archive(#[from] janus_proto::archive::ArchiveError),
    /// What is written for an archive on its way.
    #[error("cannot write {}: {source}", path.display())]
    Spool {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is nothing to be seeded.
    #[error(transparent)]
    Seed(Box<crate::seed::SeedError>),
    /// The run was not opened, written or committed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Asked to stop.
    #[error("stopped")]
    Stopped,
}

impl CarryError {
    /// True when the same command, given again, may go on where this one ended: nothing is wrong with what is carried.
    pub fn may_go_on(&self) -> bool {
        match self {
            Self::Stopped | Self::Io { .. } => true,
            Self::Source { passes, .. } => *passes,
            Self::Carried(error) => !error.is_damage(),
            Self::Archive(error) => error.passes(),
            Self::Foreign(ForeignError::Io { .. }) => true,
            _ => false,
        }
    }
}

/// Counts bytes of disks, tells how far it is, and hears whether to go on.
pub struct Meter<'a> {
    done: u64,
    total: u64,
    hear: &'a dyn Fn(u64, u64) -> bool,
}

impl<'a> Meter<'a> {
    /// Of so many bytes in all. `hear` gets those that are done and all, often, and answers whether to go on.
    pub fn new(total: u64, hear: &'a dyn Fn(u64, u64) -> bool) -> Self {
        Self { done: 0, total, hear }
    }

    pub(crate) fn add(&mut self, bytes: u64) -> Result<(), CarryError> {
        self.done += bytes;
        match (self.hear)(self.done, self.total) {
            true => Ok(()),
            false => Err(CarryError::Stopped),
        }
    }
}
