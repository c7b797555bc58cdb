//! The audit log: who did what to which run, in files that only grow, each record chained to the one before.
//!
//! A record is a line of JSON ([`record`]) with the hash of the record before and, last, its own. Files are named by the number of
//! their first record, and the chain goes on from one to the next; none is ever removed by us. A record is synced before
//! [`Audit::record`] says that it is there.
//!
//! A crash leaves the last record whole, absent, or torn. A torn one stays, and the next start closes it with a record that says so;
//! [`verify`] believes no other line that is none. When records can't be written (a full disk), work goes on: they
//! wait in memory, [`Audit::warning`] tells of it, and how many were lost in the end is a record too. Who must not act
//! unrecorded looks at the result.

pub mod record;
#[cfg(test)]
mod tests;
pub mod verify;

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use janus_proto::ids::BlockHash;

pub use self::record::{Action, Event, Record, Who};
use self::record::{Closed, Line, NOTHING_BEFORE};
use crate::{
    runs::now_ms,
    storage::{Access, Disk, File},
};

/// Its folder in the image path, where the settings name no other.
pub const FOLDER: &str = ".audit";
/// A file that has so many bytes is followed by the next one.
const ROTATE_BYTES: u64 = 16 << 20;
/// Most bytes of a file that are read: the last record may have begun just below the bound.
const MAX_FILE_BYTES: u64 = ROTATE_BYTES + (1 << 20);
/// Records that wait for room.
const MOST_WAITING: usize = 1000;
/// The same call of the same caller with the same end is one record for so long: readers come back again and again, and nobody shall fill
/// the disk by calls that cost him nothing.
const SAME: Duration = Duration::from_secs(600);
/// Calls that are remembered for that.
const MOST_REMEMBERED: usize = 256;

/// Why the log can't be used.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// Another process writes it.
    #[error("{} is written by another janus-server: each needs an audit_path of its own", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// Somebody has taken it away.
    #[error("the audit log can't be written: {} was removed, moved or replaced while the server ran; put it back, or restart the server, which begins a new one", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("the audit log can't be written: cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl AuditError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// The newest record: whoever notes it elsewhere can tell later whether the log still has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Head {
    /// Its number, from 1; 0: there is none.
    pub number: u64,
    /// Its hash.
    pub hash: BlockHash,
}

/// The audit log of a server.
pub struct Audit {
    disk: Disk,
    folder: PathBuf,
    rotate_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    log: Option<Log>,
    /// Not written yet.
    waiting: VecDeque<(i64, Event)>,
    lost: u64,
    /// Why nothing can be written.
    failure: Option<String>,
    recent: VecDeque<(Instant, Event)>,
}

/// The files as they are.
struct Log {
    _lock: File,
    head: Head,
    /// The newest file, and how much of it is whole records. None before the first record.
    file: Option<(File, u64)>,
    /// There may be something behind them.
    is_dirty: bool,
}

impl Audit {
    /// The log in this folder. Nothing is touched before the first use.
    pub fn new(disk: Disk, folder: &Path) -> Self {
        Self {
            disk,
            folder: folder.to_owned(),
            rotate_bytes: ROTATE_BYTES,
            state: Mutex::default(),
        }
    }

    /// The same with another bound for its files.
    #[cfg(test)]
    fn rotating(self, rotate_bytes: u64) -> Self {
        Self { rotate_bytes, ..self }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Takes a record in and makes it durable, after those that wait. Blocks.
    ///
    /// # Errors
    /// When it can't be written now: it waits in memory then.
    pub fn record(&self, who: &Who, event: Event) -> Result<(), AuditError> {
        let mut state = self.lock();
        let event = event.by(who);
        let is_cheap = matches!(event.what, Action::Open | Action::Commit | Action::Abort);
        if is_cheap && state.was_just_now(&event) {
            return Ok(());
        }
        match state.waiting.len() < MOST_WAITING {
            true => state.waiting.push_back((now_ms(), event)),
            false => state.lost += 1,
        }
        self.write(&mut state)
    }

    /// The same for who goes on whatever comes of it: the failure is in the log of the server.
    pub fn note(&self, who: &Who, event: Event) {
        // `write` has told it, once.
        let _ = self.record(who, event);
    }

    /// Writes what waits. Blocks.
    ///
    /// # Errors
    /// As [`Self::record`].
    pub fn flush(&self) -> Result<(), AuditError> {
        self.write(&mut self.lock())
    }

    /// The newest record. Blocks.
    ///
    /// # Errors
    /// When the log can't be opened.
    pub fn head(&self) -> Result<Head, AuditError> {
        let mut state = self.lock();
        Ok(self.opened(&mut state)?.head)
    }

    /// What an administrator should know of it.
    pub fn warning(&self) -> Option<String> {
        let state = self.lock();
        let failure = state.failure.as_ref()?;
        let (waiting, lost) = (state.waiting.len(), state.lost);
        Some(format!(
            "{failure}; {waiting} records wait in memory, {lost} are lost: make room, or set audit_path"
        ))
    }

    fn write(&self, state: &mut State) -> Result<(), AuditError> {
        let written = self.write_waiting(state);
        match &written {
            Ok(()) => {
                if state.failure.take().is_some() {
                    tracing::info!("the audit log is written again");
                }
            }
            Err(error) => {
                let text = error.to_string();
                if state.failure.as_ref() != Some(&text) {
                    tracing::error!(%error, "work goes on, its audit records wait in memory");
                }
                state.failure = Some(text);
            }
        }
        written
    }

    fn write_waiting(&self, state: &mut State) -> Result<(), AuditError> {
        while let Some((ms, event)) = state.waiting.front().cloned() {
            self.append(self.opened(state)?, ms, &event)?;
            state.waiting.pop_front();
        }
        if state.lost > 0 {
            let text = format!("{} records found no room before this one", state.lost);
            let event = Event::new(Action::Lost).by(&Who::server()).noting(text);
            self.append(self.opened(state)?, now_ms(), &event)?;
            state.lost = 0;
        }
        Ok(())
    }

    fn append(&self, log: &mut Log, ms: i64, event: &Event) -> Result<(), AuditError> {
        let record = Record::of(log.head.number + 1, ms, log.head.hash, event);
        let (line, hash) = record::line(&record);
        self.append_line(log, record.n, &line)?;
        log.head = Head { number: record.n, hash };
        Ok(())
    }

    fn append_line(&self, log: &mut Log, number: u64, line: &[u8]) -> Result<(), AuditError> {
        let fits = |length: u64| length == 0 || length + line.len() as u64 <= self.rotate_bytes;
        if !log.file.as_ref().is_some_and(|(_, length)| fits(*length)) {
            let path = self.folder.join(format!("audit-{number:012}.jsonl"));
            let file = self.disk.open(&path, Access::Create);
            let file = file.map_err(AuditError::io("make", &path))?;
            // What a failed attempt has left of this very record.
            file.set_len(0).map_err(AuditError::io("cut", &path))?;
            self.disk.sync_folder(&self.folder).map_err(AuditError::io("sync", &self.folder))?;
            log.file = Some((file, 0));
            log.is_dirty = false;
        }
        let Some((file, length)) = &mut log.file else { return Ok(()) };
        let path = file.path().to_owned();
        if !file.is_at_its_path().map_err(AuditError::io("look for", &path))? {
            return Err(AuditError::Gone { path });
        }
        if log.is_dirty {
            file.set_len(*length).map_err(AuditError::io("cut", &path))?;
        }
        log.is_dirty = true;
        file.write_all_at(line, *length).map_err(AuditError::io("write", &path))?;
        file.sync_all().map_err(AuditError::io("sync", &path))?;
        log.is_dirty = false;
        *length += line.len() as u64;
        Ok(())
    }

    fn opened<'s>(&self, state: &'s mut State) -> Result<&'s mut Log, AuditError> {
        match &mut state.log {
            Some(log) => Ok(log),
            closed => Ok(closed.insert(self.open()?)),
        }
    }

    fn open(&self) -> Result<Log, AuditError> {
        self.disk.make_folder(&self.folder).map_err(AuditError::io("make", &self.folder))?;
        let path = self.folder.join(".lock");
        let lock = self.disk.open(&path, Access::Create);
        let lock = lock.map_err(AuditError::io("open", &path))?;
        if !lock.try_lock().map_err(AuditError::io("lock", &path))? {
            return Err(AuditError::Locked { path: self.folder.clone() });
        }
        let mut log = Log {
            _lock: lock,
            head: Head { number: 0, hash: NOTHING_BEFORE },
            file: None,
            is_dirty: false,
        };
        let mut files = files(&self.disk, &self.folder)?;
        let mut newest = None;
        while let Some(path) = files.pop() {
            let bytes = read(&self.disk, &path)?;
            // One that never got a record is made again under the same name.
            if newest.is_none() && bytes.is_empty() {
                continue;
            }
            let last = last_record(&bytes);
            newest.get_or_insert((path, bytes, last.map_or(0, |(_, end)| end)));
            if let Some((head, _)) = last {
                log.head = head;
                break;
            }
        }
        if let Some((path, bytes, whole)) = newest {
            self.go_on_after(&mut log, &path, &bytes, whole)?;
        }
        Ok(log)
    }

    /// Goes on in a file of which so many bytes are whole records: closes what else is in it.
    fn go_on_after(
        &self,
        log: &mut Log,
        path: &Path,
        bytes: &[u8],
        whole: usize,
    ) -> Result<(), AuditError> {
        let file = self.disk.open(path, Access::Write).map_err(AuditError::io("open", path))?;
        let rest = bytes.get(whole..).unwrap_or_default();
        log.file = Some((file, bytes.len() as u64));
        if rest.is_empty() {
            return Ok(());
        }
        // All of a record but its end of line: its hash says that it is whole.
        if let Line::Record(record, hash) = record::parse(&[rest, b"\n"].concat())
            && (record.n, record.before) == (log.head.number + 1, log.head.hash)
        {
            let Some((file, length)) = &mut log.file else { return Ok(()) };
            file.write_all_at(b"\n", *length).map_err(AuditError::io("write", path))?;
            file.sync_all().map_err(AuditError::io("sync", path))?;
            *length += 1;
            log.head = Head { number: record.n, hash };
            return Ok(());
        }
        let closed = Closed::of(rest);
        let what = if closed.is_torn(rest) { Action::Torn } else { Action::Broken };
        tracing::error!(path = %path.display(), bytes = rest.len(), ?what, "the audit log ends in what is no record: it stays, and the next record says so");
        let event = Event::new(what).by(&Who::server()).closing(closed);
        let event = event.noting(format!("{} bytes before this record are none", rest.len()));
        let record = Record::of(log.head.number + 1, now_ms(), log.head.hash, &event);
        let (mut line, hash) = record::line(&record);
        if rest.last() != Some(&b'\n') {
            line.insert(0, b'\n');
        }
        // In this file, however long it is: it speaks of what stands before it.
        let Some((file, length)) = &mut log.file else { return Ok(()) };
        file.write_all_at(&line, *length).map_err(AuditError::io("write", path))?;
        file.sync_all().map_err(AuditError::io("sync", path))?;
        *length += line.len() as u64;
        log.head = Head { number: record.n, hash };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn was_just_now(&mut self, event: &Event) -> bool {
        self.recent.retain(|(at, _)| at.elapsed() < SAME);
        if self.recent.iter().any(|(_, known)| known == event) {
            return true;
        }
        if self.recent.len() == MOST_REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((Instant::now(), event.clone()));
        false
    }
}

/// The files of a log, oldest first.
fn files(disk: &Disk, folder: &Path) -> Result<Vec<PathBuf>, AuditError> {
    let mut files = disk.list(folder).map_err(AuditError::io("list", folder))?;
    files.retain(|path| first_number(path).is_some());
    Ok(files)
}

/// Number of the first record of a file, as its name has it.
fn first_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let digits = name.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
    (digits.len() == 12).then(|| digits.parse().ok())?
}

fn read(disk: &Disk, path: &Path) -> Result<Vec<u8>, AuditError> {
    let bytes = disk.read(path, MAX_FILE_BYTES).map_err(AuditError::io("read", path))?;
    Ok(bytes.unwrap_or_default())
}

/// The last record of a file, and where it ends.
fn last_record(bytes: &[u8]) -> Option<(Head, usize)> {
    let (mut at, mut last) = (0, None);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        at += line.len();
        if let Line::Record(record, hash) = record::parse(line) {
            last = Some((Head { number: record.n, hash }, at));
        }
    }
    last
}
