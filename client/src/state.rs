//! What this machine must remember between backups: the open run, runs it began, the highest use counter. One small
//! file beside the hash cache, and the lock that keeps a second backup of this machine away.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use janus_proto::{
    ids::{BackupId, DiskId, ServerId},
    metadata::MAX_USE_JUMP,
};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::files::{lock_file, private_folder, replace, takes_nothing};

/// Runs that are remembered as ours, whatever came of them: a lost one keeps others away for a lease, a minute or so.
const OURS_KEPT: usize = 64;

/// Why the state can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process backs this machine up.
    #[error("another backup of this machine is running (it holds {}); wait for it", path.display())]
    Busy {
        /// The lock file.
        path: PathBuf,
    },
    /// The folder or file can't be used.
    #[error("{}: {source}; set cache_path to a folder this user can write to", path.display())]
    Io {
        /// Folder or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A run on a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run.
    pub backup_id: BackupId,
    /// Where it is; unknown until StartBackup was answered.
    pub server: Option<ServerId>,
    /// Its disks with their sizes: only the same ones can go on with it.
    pub disks: Vec<(DiskId, u64)>,
}

/// The last backup of this machine that was made, on whatever server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Success {
    /// Unix milliseconds by this machine's clock: its content is not older than that.
    pub taken_ms: i64,
    /// The run.
    pub backup_id: BackupId,
    /// Who has it.
    pub server: ServerId,
}

/// Backups that failed since the last success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// Unix milliseconds of the first one's end.
    pub since_ms: i64,
    /// How many.
    pub count: u64,
    /// What the last one said.
    pub error: String,
    /// Unix milliseconds when somebody was told of it last; none: nobody was yet.
    #[serde(default)]
    pub told_ms: Option<i64>,
}

/// What is kept.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Stored {
    use_counter: u64,
    /// The run to go on with.
    pub open: Option<RunRecord>,
    /// The newest last.
    ours: Vec<BackupId>,
    /// The last backup that was made.
    pub last_success: Option<Success>,
    /// What came after it.
    pub failing: Option<Failing>,
    /// Failures before the last success of whose end nobody has taken notice yet.
    recovered: Option<Failing>,
}

/// Reads the state in `folder` without taking the lock: for those who only want to know.
///
/// # Errors
/// When there is a state that can't be read.
pub fn look(folder: &Path) -> io::Result<Stored> {
    read(&folder.join("state.json"))
}

/// The state of this machine; holding it holds the lock.
#[derive(Debug)]
pub struct MachineState {
    path: PathBuf,
    stored: Stored,
    /// Nothing can be stored, and it was said.
    is_forgetful: bool,
    _lock: File,
}

impl MachineState {
    /// Takes the lock in `folder`, which is made when it is missing, and reads the state. Where nothing can be written, the
    /// folder that is there is locked, and nothing is remembered; nor is what the disk can't read any more.
    ///
    /// # Errors
    /// `Busy` when another process holds it, `Io` when the folder can't be used.
    pub fn lock(folder: &Path) -> Result<Self, StateError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| StateError::Io { path, source }
        };
        let lock_path = folder.join("machine.lock");
        let opened = private_folder(folder).and_then(|()| lock_file(&lock_path));
        let mut is_forgetful = false;
        let lock = match opened {
            Err(error) if takes_nothing(&error) => {
                warn_forgetful(&lock_path, &error);
                is_forgetful = true;
                nearest(folder).ok_or(error)
            }
            opened => opened,
        };
        let lock = lock.map_err(failed(&lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StateError::Busy { path: lock_path }),
            Err(error) => return Err(failed(&lock_path)(error.into())),
        }
        let path = folder.join("state.json");
        let stored = match read(&path) {
            Err(error) if takes_nothing(&error) => {
                warn_forgetful(&path, &error);
                is_forgetful = true;
                Stored::default()
            }
            read => read.map_err(failed(&path))?,
        };
        Ok(Self { path, stored, is_forgetful, _lock: lock })
    }

    /// Highest use counter that a server has told this machine.
    pub fn use_counter(&self) -> u64 {
        self.stored.use_counter
    }

    /// The run to go on with.
    pub fn open_run(&self) -> Option<&RunRecord> {
        self.stored.open.as_ref()
    }

    /// Whether this machine has begun the run, as far as it remembers. As we hold the lock, it is not under way.
    pub fn is_ours(&self, backup_id: BackupId) -> bool {
        self.stored.ours.contains(&backup_id)
    }

    /// Remembers a run before its first message, again when its server is known.
    ///
    /// # Errors
    /// When it can't be stored durably.
    pub fn set_open(&mut self, run: RunRecord) -> Result<(), StateError> {
        if !self.is_ours(run.backup_id) {
            self.stored.ours.push(run.backup_id);
            let surplus = self.stored.ours.len().saturating_sub(OURS_KEPT);
            self.stored.ours.drain(..surplus);
        }
        self.stored.open = Some(run);
        self.store()
    }

    /// Takes in the counter of a start. What is further above the one that was asked for than any server takes is no count of
    /// starts: servers would refuse all that follow.
    ///
    /// # Errors
    /// When it can't be stored durably.
    pub fn raise_use_counter(&mut self, counter: u64) -> Result<(), StateError> {
        let known = self.stored.use_counter;
        if counter > known.saturating_add(1).saturating_add(MAX_USE_JUMP) {
            tracing::warn!(
                counter,
                known,
                "the use counter of the answer is ignored: it is too far above the known one"
            );
            return Ok(());
        }
        self.stored.use_counter = self.stored.use_counter.max(counter);
        self.store()
    }

    /// A backup was made: there is no run to go on with any more.
    ///
    /// # Errors
    /// When it can't be stored durably.
    pub fn succeeded(&mut self, success: Success) -> Result<(), StateError> {
        self.stored.open = None;
        self.stored.last_success = Some(success);
        let failing = self.stored.failing.take();
        self.stored.recovered = failing.or(self.stored.recovered.take());
        self.store()
    }

    /// The failures that have ended, until somebody has taken notice of that.
    pub fn recovered(&self) -> Option<&Failing> {
        self.stored.recovered.as_ref()
    }

    /// Somebody has taken notice that these have ended, or nobody wants to.
    ///
    /// # Errors
    /// When it can't be stored durably.
    pub fn forget_recovered(&mut self, told: &Failing) -> Result<(), StateError> {
        if self.stored.recovered.as_ref() != Some(told) {
            return Ok(());
        }
        self.stored.recovered = None;
        self.store()
    }

    /// What failed since the last success.
    pub fn failing(&self) -> Option<&Failing> {
        self.stored.failing.as_ref()
    }

    /// Notes that a backup failed.
    ///
    /// # Errors
    /// When it can't be stored durably.
    pub fn set_failing(&mut self, failing: Failing) -> Result<(), StateError> {
        self.stored.failing = Some(failing);
        self.store()
    }

    /// There is no run to go on with any more: it is committed, or given up.
    ///
    /// # Errors
    /// When it can't be stored durably.
    pub fn close_run(&mut self) -> Result<(), StateError> {
        self.stored.open = None;
        self.store()
    }

    /// What can't be stored for want of room costs a resume, so a backup is not given up for it.
    fn store(&mut self) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(&self.stored).map_err(io::Error::from);
        match text.and_then(|text| replace(&self.path, &text)) {
            // A folder that could not be made isn't there.
            Err(_) if self.is_forgetful => Ok(()),
            Err(error) if takes_nothing(&error) => {
                warn_forgetful(&self.path, &error);
                self.is_forgetful = true;
                Ok(())
            }
            stored => stored.map_err(|source| StateError::Io { path: self.path.clone(), source }),
        }
    }
}

fn warn_forgetful(path: &Path, error: &io::Error) {
    tracing::warn!(path = %path.display(), %error, "going on without remembering: a backup that is interrupted begins anew; make room there, or set cache_path to another disk");
}

/// The nearest folder on the way to `folder` that is there.
fn nearest(folder: &Path) -> Option<File> {
    folder.ancestors().find_map(|folder| File::open(folder).ok())
}

/// A state that can't be understood is as good as none: it costs a resume, never data.
fn read(path: &Path) -> io::Result<Stored> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "the state file is damaged; going on without it");
            Stored::default()
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Stored::default()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> RunRecord {
        RunRecord {
            backup_id: BackupId::new(),
            server: Some("a".parse().unwrap()),
            disks: vec![("d".parse().unwrap(), 4096)],
        }
    }

    #[test]
    fn a_second_backup_is_kept_away_and_the_open_run_survives() {
        let dir = tempfile::tempdir().unwrap();
        let run = record();
        let mut state = MachineState::lock(dir.path()).unwrap();
        state.set_open(run.clone()).unwrap();
        state.raise_use_counter(7).unwrap();
        state.raise_use_counter(3).unwrap();
        assert!(matches!(MachineState::lock(dir.path()), Err(StateError::Busy { .. })));
        drop(state);
        let mut state = MachineState::lock(dir.path()).unwrap();
        assert_eq!((state.open_run(), state.use_counter()), (Some(&run), 7));
        state.raise_use_counter(u64::MAX).unwrap();
        assert_eq!(state.use_counter(), 7, "no count of starts");
        state.raise_use_counter(8 + MAX_USE_JUMP).unwrap();
        assert_eq!(state.use_counter(), 8 + MAX_USE_JUMP);
        state.close_run().unwrap();
        assert_eq!(state.open_run(), None);
        assert!(state.is_ours(run.backup_id) && !state.is_ours(BackupId::new()));
        for _ in 0..OURS_KEPT {
            state.set_open(record()).unwrap();
        }
        assert!(!state.is_ours(run.backup_id), "the oldest is forgotten");
    }

    #[test]
    fn the_last_success_can_be_read_while_a_backup_runs_and_in_a_file_of_before() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path()).unwrap().last_success, None);
        fs::write(dir.path().join("state.json"), "{\"use_counter\":3}").unwrap();
        let mut state = MachineState::lock(dir.path()).unwrap();
        state.set_open(record()).unwrap();
        let (taken_ms, backup_id) = (1_767_225_600_000, BackupId::new());
        let success = Success { taken_ms, backup_id, server: "a".parse().unwrap() };
        let failing = Failing { since_ms: 1, count: 2, error: "full".into(), told_ms: None };
        state.set_failing(failing.clone()).unwrap();
        state.succeeded(success.clone()).unwrap();
        assert_eq!(state.failing(), None);
        assert_eq!(state.recovered(), Some(&failing));
        state.forget_recovered(&Failing { count: 3, ..failing.clone() }).unwrap();
        assert_eq!(state.recovered(), Some(&failing), "others");
        state.forget_recovered(&failing).unwrap();
        assert_eq!(state.recovered(), None);
        state.set_failing(failing.clone()).unwrap();
        let seen = look(dir.path()).unwrap();
        assert_eq!((seen.last_success, seen.failing), (Some(success), Some(failing)));
        assert_eq!((seen.open, state.use_counter()), (None, 3));
    }

    #[test]
    fn a_damaged_state_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("state.json"), "{\"use_coun").unwrap();
        assert_eq!(MachineState::lock(dir.path()).unwrap().use_counter(), 0);
    }

    #[test]
    fn a_state_that_the_disk_cannot_read_any_more_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        // Reading the first page of our own memory is an error like one of a disk.
        std::os::unix::fs::symlink("/proc/self/mem", dir.path().join("state.json")).unwrap();
        assert_eq!(look(dir.path()).unwrap_err().raw_os_error(), Some(5));
        let mut state = MachineState::lock(dir.path()).unwrap();
        assert_eq!(state.use_counter(), 0);
        // What can be written is remembered again.
        state.raise_use_counter(3).unwrap();
        drop(state);
        assert_eq!(MachineState::lock(dir.path()).unwrap().use_counter(), 3);
    }
}
