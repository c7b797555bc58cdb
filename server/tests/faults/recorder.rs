//! Sees every operation of the store: writes them down, and makes one of them fail.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use janus_server::storage::{Access, Op, Verdict, Watcher};

use crate::{promises::Promise, sparse::PAGE};

/// One operation that changes the disk or makes it durable, with all that is needed to do it again.
#[derive(Debug, Clone)]
pub enum Act {
    Open {
        handle: u64,
        path: PathBuf,
        access: Access,
    },
    Write {
        handle: u64,
        offset: u64,
        data: Arc<[u8]>,
    },
    SetLen {
        handle: u64,
        len: u64,
    },
    Punch {
        handle: u64,
        offset: u64,
        len: u64,
    },
    Clone {
        handle: u64,
        offset: u64,
        from: u64,
        from_offset: u64,
        len: u64,
    },
    CloneAll {
        handle: u64,
        from: u64,
    },
    /// A sync that failed leaves what it should have written unknown for good, as Linux does.
    Sync {
        handle: u64,
        failed: bool,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
    MakeFolder {
        path: PathBuf,
    },
    SyncFolder {
        path: PathBuf,
    },
}

/// What happened in a scenario.
pub enum Entry {
    Act(Act),
    Promise(Promise),
}

/// How an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk has an error, once.
    Error,
    /// The disk fails until it is said that somebody has repaired it.
    Down,
    /// The disk is full until it is said that somebody made room.
    Full,
    /// A write ends in the middle, once.
    Short,
    /// A sync fails, once; what it should have made durable is not, and stays so.
    Sync,
}

/// The recorder: a watcher for a scenario in `base`.
pub struct Recorder {
    base: PathBuf,
    state: Mutex<State>,
}

struct State {
    log: Vec<Entry>,
    /// Operations that the fault could have hit.
    calls: usize,
    fault: Option<(Fault, usize)>,
    hit: Option<String>,
    healed: bool,
    records: bool,
    shares: bool,
}

impl Recorder {
    /// Writes all down.
    pub fn recording(base: &Path) -> Arc<Self> {
        Self::new(base, None, true)
    }

    /// Only lets files share blocks.
    pub fn sharing(base: &Path) -> Arc<Self> {
        let recorder = Self::new(base, None, false);
        recorder.share_blocks();
        recorder
    }

    /// Makes call number `at` (from 0) of those that `fault` can hit fail.
    pub fn failing(base: &Path, fault: Fault, at: usize) -> Arc<Self> {
        Self::new(base, Some((fault, at)), fault.is_followed_by_a_power_cut())
    }

    fn new(base: &Path, fault: Option<(Fault, usize)>, records: bool) -> Arc<Self> {
        let (log, calls, hit, healed, shares) = (Vec::new(), 0, None, false, false);
        let state = State { log, calls, fault, hit, healed, records, shares };
        Arc::new(Self { base: base.to_owned(), state: Mutex::new(state) })
    }

    pub fn promise(&self, promise: Promise) {
        self.lock().log.push(Entry::Promise(promise));
    }

    /// Somebody made room on the disk, or repaired it.
    pub fn heal(&self) {
        self.lock().healed = true;
    }

    /// From now on files can share blocks, as on XFS and btrfs.
    pub fn share_blocks(&self) {
        self.lock().shares = true;
    }

    /// The operation that failed, if it came to that.
    pub fn hit(&self) -> Option<String> {
        self.lock().hit.clone()
    }

    pub fn take_log(&self) -> Vec<Entry> {
        std::mem::take(&mut self.lock().log)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn below(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.base).unwrap_or_else(|_| panic!("{}", path.display())).to_owned()
    }

    fn act(&self, op: &Op<'_>, failed: bool) -> Option<Act> {
        Some(match *op {
            Op::Open { file, access } => {
                Act::Open { handle: file.number, path: self.below(&file.path), access }
            }
            Op::Write { file, offset, data } => {
                Act::Write { handle: file.number, offset, data: data.into() }
            }
            Op::SetLen { file, len } => Act::SetLen { handle: file.number, len },
            Op::Punch { file, offset, len } => Act::Punch { handle: file.number, offset, len },
            Op::CloneRange { file, offset, from, from_offset, len } => {
                Act::Clone { handle: file.number, offset, from: from.number, from_offset, len }
            }
            Op::CloneAll { file, from } => Act::CloneAll { handle: file.number, from: from.number },
            Op::SyncData { file } | Op::SyncAll { file } => {
                Act::Sync { handle: file.number, failed }
            }
            Op::Rename { from, to } => Act::Rename { from: self.below(from), to: self.below(to) },
            Op::Remove { path } | Op::RemoveFolder { path } => {
                Act::Remove { path: self.below(path) }
            }
            Op::MakeFolder { path } => Act::MakeFolder { path: self.below(path) },
            Op::SyncFolder { path } => Act::SyncFolder { path: self.below(path) },
            Op::Read { .. } | Op::Measure { .. } | Op::List { .. } | Op::Look { .. } => {
                return None;
            }
        })
    }
}

impl Watcher for Recorder {
    fn before(&self, op: &Op<'_>) -> io::Result<Verdict> {
        let is_clone = matches!(op, Op::CloneRange { .. } | Op::CloneAll { .. });
        if is_clone && !self.lock().shares {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let mut verdict = self.lock().verdict(op);
        // Folders in memory share no blocks: what reads as if they did is a copy.
        if is_clone && verdict.is_ok() {
            share(op)?;
            verdict = Ok(Verdict::Shared);
        }
        if !self.lock().records {
            return verdict;
        }
        let act = match &verdict {
            Ok(Verdict::Go | Verdict::Shared) => self.act(op, false),
            Ok(Verdict::Short { written, .. }) => match self.act(op, false) {
                Some(Act::Write { handle, offset, data }) => {
                    Some(Act::Write { handle, offset, data: data[..*written].into() })
                }
                _ => None,
            },
            Err(_) if matches!(op, Op::SyncData { .. } | Op::SyncAll { .. }) => self.act(op, true),
            Err(_) => None,
        };
        self.lock().log.extend(act.map(Entry::Act));
        verdict
    }
}

impl State {
    fn verdict(&mut self, op: &Op<'_>) -> io::Result<Verdict> {
        let Some((fault, at)) = self.fault else { return Ok(Verdict::Go) };
        if !fault.can_hit(op) {
            return Ok(Verdict::Go);
        }
        let call = self.calls;
        self.calls += 1;
        if call == at {
            self.hit = Some(name(op));
        }
        let lasts = matches!(fault, Fault::Full | Fault::Down) && call >= at && !self.healed;
        if call != at && !lasts {
            return Ok(Verdict::Go);
        }
        match (fault, op) {
            (Fault::Short, Op::Write { data, .. }) => {
                let error = io::ErrorKind::WriteZero.into();
                Ok(Verdict::Short { written: data.len() / 3, error })
            }
            // A disk that gets full takes the beginning of a write.
            (Fault::Full, Op::Write { data, .. }) if call == at => {
                let error = io::ErrorKind::StorageFull.into();
                Ok(Verdict::Short { written: data.len() / 2 / 4096 * 4096, error })
            }
            (Fault::Full, _) => Err(io::ErrorKind::StorageFull.into()),
            _ => Err(io::Error::from_raw_os_error(libc::EIO)),
        }
    }
}

impl Fault {
    /// A power cut at the end of the scenario shows what such a fault has really left.
    pub fn is_followed_by_a_power_cut(self) -> bool {
        matches!(self, Self::Sync | Self::Down)
    }

    fn can_hit(self, op: &Op<'_>) -> bool {
        match self {
            Self::Error | Self::Down => true,
            Self::Full => matches!(
                op,
                Op::Open { access: Access::Create | Access::CreateNew, .. }
                    | Op::Write { .. }
                    | Op::CloneRange { .. }
                    | Op::CloneAll { .. }
                    | Op::SetLen { .. }
                    | Op::Rename { .. }
                    | Op::MakeFolder { .. }
            ),
            Self::Short => matches!(op, Op::Write { .. }),
            Self::Sync => {
                matches!(op, Op::SyncData { .. } | Op::SyncAll { .. } | Op::SyncFolder { .. })
            }
        }
    }
}

/// Gives a file another's bytes, refusing what a file system would.
fn share(op: &Op<'_>) -> io::Result<()> {
    let whole = |bytes: u64| bytes.is_multiple_of(PAGE);
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let (to, offset, from, from_offset, len) = match *op {
        Op::CloneRange { file, offset, from, from_offset, len } => {
            (open(&file.path)?, offset, File::open(&from.path)?, from_offset, len)
        }
        Op::CloneAll { file, from } => {
            let to = open(&file.path)?;
            to.set_len(0)?;
            (to, 0, File::open(&from.path)?, 0, 0)
        }
        _ => return Ok(()),
    };
    let end = from.metadata()?.len();
    let len = if len == 0 { end - from_offset } else { len };
    let is_whole = whole(len) || from_offset + len == end;
    if !is_whole || !whole(offset) || !whole(from_offset) || from_offset + len > end {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut bytes = vec![0; len as usize];
    from.read_exact_at(&mut bytes, from_offset)?;
    to.set_len(to.metadata()?.len().max(offset + len))?;
    for (at, piece) in (offset..).step_by(PAGE as usize).zip(bytes.chunks(PAGE as usize)) {
        // Holes stay holes.
        let mut old = vec![0; piece.len()];
        to.read_exact_at(&mut old, at)?;
        if old != piece {
            to.write_all_at(piece, at)?;
        }
    }
    Ok(())
}

/// An operation in a few words.
fn name(op: &Op<'_>) -> String {
    match op {
        Op::Write { file, offset, data } => {
            format!("write {} bytes at {offset} of {}", data.len(), file.path.display())
        }
        other => format!("{other:?}"),
    }
}
