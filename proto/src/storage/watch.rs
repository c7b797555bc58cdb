//! The seam that tests look through: every operation is shown to a watcher before it is done.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For reading. It must be there.
    Read,
    /// For reading and writing. It must be there.
    Write,
    /// For reading and writing; made when it is not there. What is in it stays.
    Create,
    /// For reading and writing; it must not be there.
    CreateNew,
}

/// An open file, as operations name it.
#[derive(Debug)]
pub struct Handle {
    /// Counts opened files of this process while somebody watches, from 1; 0 without a watcher.
    pub number: u64,
    /// Where it was opened. It may have another name by now.
    pub path: PathBuf,
}

/// An operation that is about to be done.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// A file is opened or made. The path is the handle's.
    Open {
        /// The file to be.
        file: &'a Handle,
        /// How.
        access: Access,
    },
    /// Bytes are read.
    Read {
        /// The file.
        file: &'a Handle,
        /// From where.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Bytes are written.
    Write {
        /// The file.
        file: &'a Handle,
        /// Where.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// A file is cut, or extended by a hole.
    SetLen {
        /// The file.
        file: &'a Handle,
        /// Its new length.
        len: u64,
    },
    /// A range becomes zeros. The file's length stays.
    Punch {
        /// The file.
        file: &'a Handle,
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// A range of another file is shared.
    CloneRange {
        /// The file that changes.
        file: &'a Handle,
        /// Where in it.
        offset: u64,
        /// The other file.
        from: &'a Handle,
        /// Start of the range there.
        from_offset: u64,
        /// Its length; 0: to the end of the other file.
        len: u64,
    },
    /// All of another file is shared: content and length become its.
    CloneAll {
        /// The file that changes.
        file: &'a Handle,
        /// The other file.
        from: &'a Handle,
    },
    /// Content and length become durable.
    SyncData {
        /// The file.
        file: &'a Handle,
    },
    /// Content and all metadata become durable.
    SyncAll {
        /// The file.
        file: &'a Handle,
    },
    /// Length and space of an open file are asked for.
    Measure {
        /// The file.
        file: &'a Handle,
    },
    /// A name is given to a file or folder; a file that had it is gone.
    Rename {
        /// The old name.
        from: &'a Path,
        /// The new one.
        to: &'a Path,
    },
    /// A file is removed.
    Remove {
        /// The file.
        path: &'a Path,
    },
    /// An empty folder is removed.
    RemoveFolder {
        /// The folder.
        path: &'a Path,
    },
    /// One folder is made; the one above it is there.
    MakeFolder {
        /// The folder.
        path: &'a Path,
    },
    /// The names in a folder become durable.
    SyncFolder {
        /// The folder.
        path: &'a Path,
    },
    /// The names in a folder are read.
    List {
        /// The folder.
        path: &'a Path,
    },
    /// It is asked whether something is there, and what.
    Look {
        /// The path.
        path: &'a Path,
    },
}

impl Op<'_> {
    /// True when it changes what is on the disk, or makes it durable.
    pub fn is_change(&self) -> bool {
        let only_looks = matches!(
            self,
            Op::Open { access: Access::Read | Access::Write, .. }
                | Op::Read { .. }
                | Op::Measure { .. }
                | Op::List { .. }
                | Op::Look { .. }
        );
        !only_looks
    }
}

/// What becomes of an operation.
#[derive(Debug)]
pub enum Verdict {
    /// It is done.
    Go,
    /// Of a write only the first bytes are written, then it fails. Any other operation just fails.
    Short {
        /// How many bytes.
        written: usize,
        /// Why it fails.
        error: io::Error,
    },
    /// Of a clone: the watcher has given the file the other's bytes, on a file system that shares none. Any other operation is done.
    Shared,
}

/// Sees every operation of a [`super::Disk`] before it is done. Called from any thread.
pub trait Watcher: Send + Sync {
    /// Lets the operation happen, or not: an error is what its caller gets.
    ///
    /// # Errors
    /// Those that the caller shall see.
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict>;
}

impl fmt::Debug for dyn Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}
