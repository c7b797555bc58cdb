//! File systems: which of a volume's bytes nothing uses.
//!
//! The answers of `free` are promises: what they name may be backed up as zeros. So every doubt is an error, and an error
//! means that all of the volume is used. All here reads bytes of others: sizes are bounded before anything is allocated.

use std::io;

pub mod ntfs;

/// Why nothing is said about a volume's free space: all of it counts as used.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// It could not be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Its structures contradict each other.
    #[error("damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// It is in use, or was not unmounted: what is on the disk is not the last word.
    #[error("not clean: {what}")]
    NotClean {
        /// How that is known.
        what: String,
    },
    /// It has a feature that is not understood here.
    #[error("not supported: {what}")]
    Unsupported {
        /// The feature.
        what: String,
    },
}

impl FsError {
    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }

    pub(crate) fn not_clean(what: impl Into<String>) -> Self {
        Self::NotClean { what: what.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }
}
