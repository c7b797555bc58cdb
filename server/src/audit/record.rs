//! One record of the audit log, as a value and as a line.
//!
//! A line is JSON with the fields of [`Record`], and last `hash`: BLAKE3 of all bytes of the line before `,"hash"`. As `before`, the hash
//! of the record before, is among these, each hash stands for the whole log up to it.

use janus_proto::{
    error::shorten,
    ids::{BackupId, BlockHash, DiskId, MachineKey, SnapshotId},
};
use serde::{Deserialize, Serialize};

/// Version of the records; an older program doesn't take newer ones for damaged.
pub const VERSION: u32 = 1;
/// What the first record has before it.
pub const NOTHING_BEFORE: BlockHash = BlockHash([0; 32]);
/// Most characters of a note or a result.
const LONGEST: usize = 400;
const HASH: &[u8] = b",\"hash\":\"";
/// From `,"hash"` to the end of the line.
const TAIL: usize = HASH.len() + 64 + 3;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The server began.
    ServerStart,
    /// The server ended in good order.
    ServerStop,
    /// A run was opened or taken over.
    Start,
    /// A run was committed.
    Commit,
    /// A run was given up.
    Abort,
    /// A snapshot was opened for reading.
    Open,
    /// A run went to the trash.
    Drop,
    /// A run is gone for good.
    Purge,
    /// A run came back from the trash.
    Restore,
    /// A run can't be dropped until a date.
    Lock,
    /// A backup looks as if somebody had encrypted or overwritten a disk.
    Alarm,
    /// Such an alarm was ended by an operator.
    AlarmClear,
    /// A machine got its certificate for a token.
    Enroll,
    /// A machine renewed its certificate.
    Renew,
    /// Certificates are refused that another server has revoked.
    Revoke,
    /// An operator asked for a command; its result is in a later record.
    Command,
    /// Records found no room.
    Lost,
    /// What stands before this record in its file is part of one that was being written in a crash.
    Torn,
    /// What stands before this record in its file is no record.
    Broken,
    /// Of a newer program.
    #[serde(other)]
    Other,
}

/// Who did it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Role and name, as `client alice/web1` or `operator alice (uid 0)`.
    pub name: String,
    /// The janus that spoke for him; empty: he called himself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub through: String,
}

impl Who {
    /// Whoever has this name.
    pub fn named(name: impl ToString) -> Self {
        Self { name: shorten(&name.to_string()), through: String::new() }
    }

    /// This server by itself.
    pub fn server() -> Self {
        Self::named("this server")
    }
}

/// Bytes that are no record, as the record after them has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// How many.
    pub bytes: u64,
    /// Their BLAKE3.
    pub hash: BlockHash,
}

impl Closed {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, hash: BlockHash(blake3::hash(bytes).into()) }
    }

    /// True for what a crash leaves: nothing that looks like a whole record, or bytes that never got to the disk.
    pub(super) fn is_torn(&self, bytes: &[u8]) -> bool {
        let is_whole = |line: &[u8]| {
            let tail = line.len().checked_sub(TAIL).and_then(|start| line.get(start..));
            tail.is_some_and(|tail| tail.starts_with(HASH)) && line.ends_with(b"\n")
        };
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        bytes.contains(&0) || (!bytes.ends_with(b"\n") && !lines.any(is_whole))
    }
}

/// Something to be recorded. Fields that don't apply are empty.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Event {
    pub who: Who,
    pub what: Action,
    pub machine: Option<MachineKey>,
    pub run: Option<BackupId>,
    pub disk: Option<DiskId>,
    pub snapshot: Option<SnapshotId>,
    pub note: String,
    pub result: String,
    pub closed: Option<Closed>,
}

impl Event {
    /// Something that was done, and went well.
    pub fn new(what: Action) -> Self {
        Self {
            who: Who::default(),
            what,
            machine: None,
            run: None,
            disk: None,
            snapshot: None,
            note: String::new(),
            result: "ok".into(),
            closed: None,
        }
    }

    pub(super) fn by(mut self, who: &Who) -> Self {
        self.who = who.clone();
        self
    }

    pub(super) fn closing(mut self, closed: Closed) -> Self {
        self.closed = Some(closed);
        self
    }

    /// About a run of a machine.
    #[must_use]
    pub fn of_run(mut self, machine: &MachineKey, run: BackupId) -> Self {
        (self.machine, self.run) = (Some(machine.clone()), Some(run));
        self
    }

    /// About a machine.
    #[must_use]
    pub fn of_machine(mut self, machine: &MachineKey) -> Self {
        self.machine = Some(machine.clone());
        self
    }

    /// About a snapshot of a disk.
    #[must_use]
    pub fn of_snapshot(mut self, disk: &DiskId, snapshot: SnapshotId) -> Self {
        (self.disk, self.snapshot) = (Some(disk.clone()), Some(snapshot));
        self
    }

    /// With more words.
    #[must_use]
    pub fn noting(mut self, note: impl AsRef<str>) -> Self {
        self.note = note.as_ref().chars().take(LONGEST).collect();
        self
    }

    /// With what came of it.
    #[must_use]
    pub fn with_result<T>(mut self, result: &Result<T, impl std::fmt::Display>) -> Self {
        self.result = match result {
            Ok(_) => "ok".into(),
            Err(error) => error.to_string().chars().take(LONGEST).collect(),
        };
        self
    }

    /// That is about to be done.
    #[must_use]
    pub fn asked(mut self) -> Self {
        self.result = "asked".into();
        self
    }
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the records.
    pub v: u32,
    /// Its number, from 1.
    pub n: u64,
    /// Unix milliseconds, by the server's clock.
    pub ms: i64,
    /// Hash of the record before.
    pub before: BlockHash,
    /// Who did it.
    pub who: Who,
    /// What was done.
    pub what: Action,
    /// To a run, or to other things, of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineKey>,
    /// The run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<BackupId>,
    /// The disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskId>,
    /// The snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
    /// More words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// `ok`, `asked`, or why not.
    pub result: String,
    /// The bytes before this record that are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Closed>,
}

impl Record {
    /// The record of an event.
    pub(super) fn of(n: u64, ms: i64, before: BlockHash, event: &Event) -> Self {
        let Event { who, what, machine, run, disk, snapshot, note, result, closed } = event.clone();
        Self {
            v: VERSION,
            n,
            ms,
            before,
            who,
            what,
            machine,
            run,
            disk,
            snapshot,
            note,
            result,
            closed,
        }
    }
}

/// A record as a line with its end, and its hash.
pub(super) fn line(record: &Record) -> (Vec<u8>, BlockHash) {
    // A record is plain data: it can always be written as JSON.
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.pop();
    let hash = BlockHash(blake3::hash(&line).into());
    line.extend_from_slice(HASH);
    line.extend_from_slice(format!("{hash}\"}}\n").as_bytes());
    (line, hash)
}

/// What a line is.
#[derive(Debug)]
pub enum Line {
    /// A record, and its hash.
    Record(Box<Record>, BlockHash),
    /// None; what is wrong with it.
    Other(String),
}

/// Reads a line, its end included.
pub fn parse(line: &[u8]) -> Line {
    let other = |what: &str| Line::Other(what.to_owned());
    let Some(start) = line.len().checked_sub(TAIL) else { return other("too short for a record") };
    let (body, tail) = line.split_at(start);
    let digits = tail.strip_prefix(HASH).and_then(|rest| rest.strip_suffix(b"\"}\n"));
    let Some(digits) = digits else { return other("it doesn't end as a record does") };
    let hash = BlockHash(blake3::hash(body).into());
    if digits != hash.to_string().as_bytes() {
        return other("its hash is not that of its content");
    }
    match serde_json::from_slice::<Record>(&[body, b"}"].concat()) {
        Ok(record) => Line::Record(Box::new(record), hash),
        Err(error) => Line::Other(format!("not the JSON of a record: {error}")),
    }
}
