//! Reads an audit log from its first record to its newest: each must follow the one before.

use std::path::{Path, PathBuf};

use janus_proto::ids::BlockHash;

use super::{
    AuditError, Head, files, first_number, read,
    record::{self, Action, Closed, Line, NOTHING_BEFORE, Record},
};
use crate::storage::Disk;

/// A log that isn't what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// The file.
    pub file: PathBuf,
    /// The line in it, from 1.
    pub line: u64,
    /// What is wrong.
    pub what: String,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Files that were read.
    pub files: u64,
    /// The last record that follows from the first one.
    pub head: Head,
    /// Records that a crash has torn.
    pub torn: u64,
    /// Records that found no room.
    pub lost: Vec<String>,
    /// The first thing that is wrong.
    pub bad: Option<Bad>,
}

/// Reads all records up to `head`, the newest one that its writer knows. `seen` is shown each record, with its hash. `noted` is the hash of a
/// record that must be among them.
///
/// # Errors
/// When files can't be read; what is wrong with their content is no error.
pub fn verify(
    disk: &Disk,
    folder: &Path,
    head: Head,
    noted: Option<BlockHash>,
    seen: &mut dyn FnMut(&Record, &[u8]),
) -> Result<Found, AuditError> {
    let nothing = Head { number: 0, hash: NOTHING_BEFORE };
    let found = Found { files: 0, head: nothing, torn: 0, lost: Vec::new(), bad: None };
    let mut reader = Reader { found, newest: head, noted, seen, at: (folder.to_owned(), 0) };
    for path in files(disk, folder)? {
        let bytes = read(disk, &path)?;
        reader.file(&path, &bytes);
        if reader.found.bad.is_some() || reader.found.head.number >= head.number {
            break;
        }
    }
    Ok(reader.end())
}

struct Reader<'a> {
    found: Found,
    newest: Head,
    noted: Option<BlockHash>,
    seen: &'a mut dyn FnMut(&Record, &[u8]),
    /// File and line that are read.
    at: (PathBuf, u64),
}

impl Reader<'_> {
    fn bad(&mut self, what: impl Into<String>) {
        let (file, line) = self.at.clone();
        self.found.bad.get_or_insert(Bad { file, line, what: what.into() });
    }

    fn file(&mut self, path: &Path, bytes: &[u8]) {
        self.found.files += 1;
        self.at = (path.to_owned(), 1);
        // One that never got a record, and was passed over.
        if bytes.is_empty() {
            return;
        }
        let (named, next) = (first_number(path).unwrap_or_default(), self.found.head.number + 1);
        if named != next {
            return self.bad(format!(
                "the file begins with record {named} by its name, the next one is {next}: a file is missing or was renamed"
            ));
        }
        let mut rest = bytes;
        while !rest.is_empty() && self.found.bad.is_none() {
            if self.found.head.number >= self.newest.number {
                return;
            }
            let line = first_line(rest);
            match record::parse(line) {
                Line::Record(record, hash) => {
                    self.record(&record, hash, line, false);
                    rest = rest.get(line.len()..).unwrap_or_default();
                    self.at.1 += 1;
                }
                Line::Other(what) => rest = self.torn(rest, &what),
            }
        }
    }

    /// Something that is no record: only what a record behind it closes as torn is let pass.
    fn torn<'b>(&mut self, rest: &'b [u8], what: &str) -> &'b [u8] {
        let (mut start, mut lines) = (0, 0);
        while let Some(after) = rest.get(start..).filter(|after| !after.is_empty()) {
            let line = first_line(after);
            if let Line::Record(record, hash) = record::parse(line) {
                let torn = rest.get(..start).unwrap_or_default();
                let whole = torn.strip_suffix(b"\n").unwrap_or_default();
                let is_closed = record.what == Action::Torn
                    && record.closed.is_some_and(|closed| {
                        [torn, whole].map(Closed::of).contains(&closed)
                            && closed.is_torn(if closed.bytes == torn.len() as u64 {
                                torn
                            } else {
                                whole
                            })
                    });
                if is_closed {
                    self.at.1 += lines;
                    self.found.torn += 1;
                    self.record(&record, hash, line, true);
                    self.at.1 += 1;
                    return after.get(line.len()..).unwrap_or_default();
                }
                break;
            }
            (start, lines) = (start + line.len(), lines + 1);
        }
        self.bad(what);
        &[]
    }

    fn record(&mut self, record: &Record, hash: BlockHash, line: &[u8], closes: bool) {
        let expected = self.found.head.number + 1;
        if record.n != expected {
            return self.bad(format!("record {} stands where {expected} should", record.n));
        }
        if record.before != self.found.head.hash {
            return self.bad("it doesn't follow the record before it".to_owned());
        }
        if record.closed.is_some() != closes {
            return self.bad("it speaks of torn bytes that aren't before it".to_owned());
        }
        self.found.head = Head { number: record.n, hash };
        if record.what == Action::Lost {
            self.found.lost.push(record.note.clone());
        }
        self.noted.take_if(|noted| *noted == hash);
        (self.seen)(record, line);
    }

    fn end(mut self) -> Found {
        let (last, newest) = (self.found.head, self.newest);
        if self.found.bad.is_none() && last.number < newest.number {
            self.bad(format!(
                "the log ends with record {}, its writer has written {}: the end was cut off",
                last.number, newest.number
            ));
        }
        if self.found.bad.is_none() && last.number == newest.number && last.hash != newest.hash {
            self.bad("the newest record is not the one that was written".to_owned());
        }
        if self.found.bad.is_none()
            && let Some(noted) = self.noted
        {
            self.bad(format!(
                "no record up to number {} has the noted hash {noted}: what came up to it was cut off, or this is another log",
                last.number
            ));
        }
        self.found
    }
}

/// Bytes up to the first end of a line.
fn first_line(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
    bytes.get(..end).unwrap_or_default()
}
