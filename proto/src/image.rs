//! Images: single VHDX and VHD files as they lie on disk. Knows nothing of chains on a server, runs or manifests.
//!
//! An image is written once. Blocks that arrive are written straight to their place in a partial file
//! ([`Layout::slot_offset`]); [`Layout::write_structures`] turns that file into an image at commit. Nothing here syncs or
//! renames: until the caller has published the file, a crash leaves something nobody reads. Once it has a child, an image
//! never changes again, because the child names its parent's data write id.
//!
//! What isn't to be read by other programs yet can be hidden from them ([`set_hidden`]): it is opened by [`Image::open`] alone.
//!
//! Reading accepts files of other programs too ([`Image`]), so every byte is checked before it is used. No bytes of a
//! file make this module panic or allocate by a length that was not checked.

use std::io;

use uuid::Uuid;

#[cfg(test)]
use crate::storage;

mod any;
pub mod foreign;
pub mod layers;
mod names;
mod payload;
#[cfg(test)]
mod sample;
mod stretches;
pub mod vhd;
pub mod vhdx;

pub use any::{Absorber, Format, Image, Layout, set_hidden, set_identity};
pub use layers::{Layers, Places};
pub use payload::{PAYLOAD_BYTES, Payload, UNIT_BYTES};

/// Logical sectors of a disk as somebody told them: what isn't known counts as 512.
pub fn sector_bytes(told: u32) -> u32 {
    if told == 4096 { 4096 } else { 512 }
}

/// Size and sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512. For an image that was opened: the virtual size, which [`Layout`] pads.
    pub disk_bytes: u64,
    /// Logical sector size in bytes: 512 or 4096, as the source has it, because partition tables count in it.
    pub logical_sector_bytes: u32,
}

/// Whether an image stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A base: what it doesn't hold is zero.
    Dynamic,
    /// A child: what it doesn't hold is in its parent.
    Differencing,
}

/// The ids an image carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Names this content; children link to it. In a VHD its unique id.
    pub data_write: Uuid,
    /// Names the disk; the same in all images of a chain. A VHD has no place for it.
    pub virtual_disk: Uuid,
}

/// What a child says about its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The parent's [`Identity::data_write`].
    pub data_write: Uuid,
    /// The parent's file name without a folder: a chain lives in one folder.
    pub file_name: String,
    /// VHD: the parent's time stamp, seconds since 2000. Nothing in VHDX.
    pub time_stamp: u32,
}

/// A parent, and all file names that its child gives it, the most trusted first.
type NamedParent = (Parent, Vec<String>);

/// Where a stretch of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the parent image.
    Parent,
    /// Nowhere: it is zero.
    Zero,
    /// In this file, from this byte offset on.
    File(u64),
}

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file itself failed.
    #[error("{action} of an image")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file breaks the rules of its format.
    #[error("damaged image: {reason}")]
    Damaged {
        /// Which rule, and where.
        reason: String,
    },
    /// A valid file that needs something this reader doesn't have.
    #[error("unsupported image: {reason}")]
    Unsupported {
        /// What it needs.
        reason: String,
    },
    /// The writer stopped in the middle; data would be missing without its log.
    #[error(
        "image was not closed properly: its log holds changes that must be replayed by the program that wrote it"
    )]
    DirtyLog,
    /// The images are no chain.
    #[error("image expects a parent with data write id {expected}, the next image has {actual}")]
    WrongParent {
        /// What the child names.
        expected: Uuid,
        /// What is there.
        actual: Uuid,
    },
    /// The oldest image of a chain has a parent, or one in between has none.
    #[error("broken chain of images: {reason}")]
    BrokenChain {
        /// Which end is wrong.
        reason: &'static str,
    },
    /// The caller asked for something that can't be.
    #[error("impossible image: {reason}")]
    Impossible {
        /// What can't be.
        reason: String,
    },
    /// The caller's list of payload blocks failed.
    #[error("list of payload blocks")]
    Blocks(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl ImageError {
    fn damaged(reason: impl Into<String>) -> Self {
        Self::Damaged { reason: reason.into() }
    }

    fn unsupported(reason: impl Into<String>) -> Self {
        Self::Unsupported { reason: reason.into() }
    }

    fn impossible(reason: impl Into<String>) -> Self {
        Self::Impossible { reason: reason.into() }
    }

    fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::damaged(format!("file ends within the {action}")),
            _ => Self::Io { action, source },
        }
    }
}

/// Refuses ranges that share a byte.
fn check_disjoint(ranges: &mut [std::ops::Range<u64>], what: &str) -> Result<(), ImageError> {
    ranges.sort_unstable_by_key(|range| range.start);
    match ranges.windows(2).find(|pair| pair[0].end > pair[1].start) {
        Some(pair) => {
            Err(ImageError::damaged(format!("{what} {:?} and {:?} overlap", pair[0], pair[1])))
        }
        None => Ok(()),
    }
}
