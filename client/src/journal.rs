//! Change journals: hints which parts of a volume need not be read.
//!
//! A hint is believed only where everything that could make it wrong was looked at; else it says why not ([`Distrust`]),
//! and the volume is read as a whole. What was believed is audited: see [`crate::reading`].

use std::fmt;

use janus_proto::ranges::Ranges;

pub mod memory;
pub mod ntfs_usn;
mod packed;

/// Where hints come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JournalKind {
    /// `$UsnJrnl` of an NTFS volume, with a comparison of its MFT.
    NtfsUsn,
    /// A dirty bitmap that QEMU keeps.
    QemuBitmap,
}

impl JournalKind {
    /// As JSON has it.
    pub fn id(self) -> &'static str {
        match self {
            Self::NtfsUsn => "ntfs-usn",
            Self::QemuBitmap => "qemu-bitmap",
        }
    }
}

impl fmt::Display for JournalKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NtfsUsn => "NTFS USN journal",
            Self::QemuBitmap => "QEMU dirty bitmap",
        })
    }
}

/// The change journal of one volume, or of a whole disk. Its calls block.
pub trait Journal {
    /// What it is.
    fn kind(&self) -> JournalKind;

    /// What may have changed since `cursor` (`None`: nothing is remembered), and the cursor for the next run.
    fn changes(&self, cursor: Option<&[u8]>) -> Answer;
}

impl<J: Journal> Journal for &J {
    fn kind(&self) -> JournalKind {
        (*self).kind()
    }

    fn changes(&self, cursor: Option<&[u8]>) -> Answer {
        (*self).changes(cursor)
    }
}

/// What a journal says.
#[derive(Debug)]
pub struct Answer {
    /// What changed, or why that can't be told.
    pub changes: Result<Changes, Distrust>,
    /// To be remembered when this run is committed; `None`: the next run can't use the journal either.
    pub next: Option<Vec<u8>>,
}

/// A volume since the cursor, in bytes from its start. What is in neither set is promised to be unchanged.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Changes {
    /// May have changed.
    pub changed: Ranges,
    /// Nothing uses it now: whatever it holds may stay what it was.
    pub free: Ranges,
}

/// Why a journal isn't believed; each text goes on from "full compare: ".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// There is none.
    #[error("there is no change journal")]
    NoJournal,
    /// The first run, or what an earlier one left can't be used.
    #[error("nothing is remembered of an earlier backup")]
    NoCursor,
    /// Hashes are of other bytes than those of the last backup.
    #[error("the last backup wasn't sealed as this one is")]
    OtherKind,
    /// The regular comparison of everything.
    #[error("it is due: everything is compared every {runs} backups and every {days} days")]
    Due {
        /// Setting `full_compare_runs`.
        runs: u32,
        /// Setting `full_compare_days`.
        days: u32,
    },
    /// Turned off by an audit.
    #[error(
        "the journal missed a change at byte {offset} on {date} and is off since; to use it again: janus-client trust-journal {disk}"
    )]
    Off {
        /// What had changed.
        offset: u64,
        /// The day.
        date: String,
        /// The disk's id.
        disk: String,
    },
    /// An audit of this run found it wrong.
    #[error("the journal missed a change at byte {offset}; it stays off from now on")]
    Missed {
        /// What had changed.
        offset: u64,
    },
    /// The hashes are those of a server, not of the time the cursor speaks of.
    #[error("the hashes were read from the server")]
    Reconciled,
    /// The bitmap that began at the last backup isn't there.
    #[error("the dirty bitmap {name} of the last backup is gone")]
    BitmapGone {
        /// Its name.
        name: String,
    },
    /// QEMU itself doesn't trust it.
    #[error(
        "the dirty bitmap {name} is inconsistent: the program that wrote to the disk did not end properly"
    )]
    Inconsistent {
        /// Its name.
        name: String,
    },
    /// It was made by somebody else.
    #[error("the dirty bitmap {name} has a granularity of {bytes} bytes, which ours have not")]
    Granularity {
        /// Its name.
        name: String,
        /// Bytes of one bit.
        bytes: u64,
    },
    /// The disk or volume isn't as large as it was.
    #[error("it had {old} bytes and has {new}")]
    Resized {
        /// Bytes at the last backup.
        old: u64,
        /// Bytes now.
        new: u64,
    },
    /// It can't be had.
    #[error("the journal can't be read: {what}")]
    Unreadable {
        /// What is wrong.
        what: String,
    },
    /// A part of the disk that is kept elsewhere may change without a trace.
    #[error("{what}")]
    Untracked {
        /// What nobody tracks.
        what: String,
    },
    /// The journal has another id.
    #[error("the change journal was made anew")]
    Recreated,
    /// The journal is gone, or going.
    #[error("the change journal was deleted")]
    Deleted,
    /// The journal goes on under another stamp.
    #[error("the change journal was stopped meanwhile")]
    Restamped,
    /// Its oldest record is younger than the last backup.
    #[error("the change journal no longer reaches back to the last backup")]
    Wrapped,
    /// What stood before the cursor stands there no more.
    #[error("the volume was rolled back")]
    RolledBack,
    /// It has other sizes or another serial number.
    #[error("it is another volume than at the last backup, or has another size")]
    OtherVolume,
    /// What is on the disk is not the last word.
    #[error("the volume is not at rest: {what}")]
    NotAtRest {
        /// How that is known.
        what: String,
    },
    /// Its log was emptied, as ntfs-3g does.
    #[error("a driver that keeps no change journal has used the volume")]
    ForeignDriver,
    /// Of a version that is not known here, or not as it should be.
    #[error("the change journal can't be understood: {what}")]
    NotUnderstood {
        /// What.
        what: String,
    },
    /// The volume's structures can't be used.
    #[error("the volume can't be understood: {what}")]
    Damaged {
        /// What.
        what: String,
    },
}
