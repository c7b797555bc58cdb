//! Archives: runs of machines in an object store (S3, Azure, GCS) or a folder, in a form that needs none of our programs.
//!
//! ```text
//! PREFIX/<server>/<user>/<machine>/runs/<time>-<run>.json                        a run: what is in it, written last
//! PREFIX/<server>/<user>/<machine>/disks/<disk>/<snapshot>.vhdx.0000000.<sum>.zst  a part of an image, 32 MiB of it
//! PREFIX/<server>/<user>/<machine>/disks/<disk>/<snapshot>.vhdx.index.<sum>        sums of all its parts
//! PREFIX/<server>/<user>/<machine>/disks/<disk>/<snapshot>.table.…                 the same of the hashes of its blocks
//! ```
//!
//! A part is a row of zstd frames, so all parts one after another are one zstd stream: `cat <snapshot>.vhdx.*.zst | zstd -d`
//! gives a standard image, a base or one that names the image it differs from, which lies beside it. Zeros, which a slot of an
//! image with few changes mostly is, take nothing; each frame can be read alone.
//!
//! The manifest of a run ([`manifest`]) is its commit point. It names, for each disk, all images of its chain with the sums of
//! their indexes: a run needs no other manifest. It is changed only when its run is sent again. Names of objects are made, never read. What an archive
//! says is foreign: sizes are bounded before memory is taken, parts have sums, and blocks are compared with their hashes.

use std::{io, time::Duration};

pub use object_store::path::Path;

pub mod check;
pub mod content;
pub mod http;
pub mod index;
pub mod manifest;
pub mod names;
pub mod place;
pub mod reader;
pub mod runs;
#[cfg(test)]
mod tests;

pub use self::{
    content::Archived,
    manifest::{DiskEntry, FileEntry, Link, Manifest},
    place::{Place, Store},
};

/// Bytes of a file in a frame.
pub const FRAME_BYTES: u64 = 1 << 20;
/// Frames in a part.
pub const PART_FRAMES: u64 = 32;
/// Bytes of a file in a part.
pub const PART_BYTES: u64 = FRAME_BYTES * PART_FRAMES;

/// What can go wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It can't be set up as it is described.
    #[error("archive {url}: {reason}")]
    Setup {
        /// Where it would be.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The store could not be asked, for as long as it was waited for.
    #[error("object {object}: {reason}")]
    Store {
        /// Which object, or which of them.
        object: String,
        /// What the store or the way to it said.
        reason: String,
        /// It may be well again later.
        passes: bool,
    },
    /// There is no such object.
    #[error("object {object} is missing")]
    Missing {
        /// Its name.
        object: String,
    },
    /// An object is not what was written there.
    #[error("object {object} is damaged: {reason}")]
    Damaged {
        /// Its name.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Written by a newer version.
    #[error(
        "object {object} has format {format}, this program knows {}: use a newer one",
        manifest::FORMAT
    )]
    Newer {
        /// Its name.
        object: String,
        /// Its format.
        format: u64,
    },
    /// An object of that name is there, with another content.
    #[error(
        "object {object} is there already, with another content: does another server of this name archive into it?"
    )]
    Occupied {
        /// Its name.
        object: String,
    },
    /// Asked to stop.
    #[error("stopped")]
    Stopped,
}

impl ArchiveError {
    fn damaged(object: impl ToString, reason: impl Into<String>) -> Self {
        Self::Damaged { object: object.to_string(), reason: reason.into() }
    }

    /// True when the same may go well later: nothing is wrong with what is there.
    pub fn passes(&self) -> bool {
        match self {
            Self::Store { passes, .. } => *passes,
            Self::Stopped => true,
            _ => false,
        }
    }

    /// True when an object is missing or not what it was.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Missing { .. })
    }
}

/// As readers of files see it.
impl From<ArchiveError> for io::Error {
    fn from(error: ArchiveError) -> Self {
        let kind = match error {
            ArchiveError::Damaged { .. } | ArchiveError::Missing { .. } => {
                io::ErrorKind::InvalidData
            }
            ArchiveError::Stopped => io::ErrorKind::Interrupted,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// How long a store that can't be asked is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

fn told(path: &Path) -> String {
    path.to_string()
}
