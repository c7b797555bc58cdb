//! Holding file systems frozen for a moment, by a watchdog process.
//!
//! Frozen is what the watchdog ([`super::watchdog`]) froze; it thaws after its limit whatever happens. When the watchdog dies
//! before it thaws, or is silent for too long, a thread here thaws. As long as a [`Freeze`] lives nothing may be logged and no
//! file be written: it may be on a frozen file system.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{AtFlags, OFlags, StatxFlags, statx},
    io::Errno,
};

use super::{fsfreeze::thaw, watchdog::COMMAND};
use crate::source::mounts::Writable;

/// How long after its limit the watchdog is still believed to be about to thaw.
const SPARE: Duration = Duration::from_secs(1);

/// A file system to freeze: a folder of it that is open.
#[derive(Debug)]
pub struct Target {
    folder: File,
    /// Where it is mounted.
    pub mount: String,
}

impl Target {
    /// Opens a mounted file system, and nothing that hides it.
    ///
    /// # Errors
    /// When none of its mounts can be reached.
    pub fn open(mounted: &Writable) -> io::Result<Self> {
        let mut error = io::Error::other("it has no mount");
        for (id, mount) in &mounted.mounts {
            match open(mount, *id) {
                Ok(folder) => return Ok(Self { folder, mount: mount.clone() }),
                Err(why) => error = why,
            }
        }
        Err(error)
    }

    /// Writes out what is in memory, so that freezing takes no longer than it must. Blocks.
    pub fn sync(&self) {
        // Freezing writes it out again, and fails if that fails.
        let _ = rustix::fs::syncfs(&self.folder);
    }
}

fn open(mount: &str, id: u64) -> io::Result<File> {
    let flags = (OFlags::DIRECTORY | OFlags::NONBLOCK).bits().cast_signed();
    let folder = File::options().read(true).custom_flags(flags).open(mount)?;
    let told = statx(&folder, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    let is_it = told.stx_mask & StatxFlags::MNT_ID.bits() != 0 && told.stx_mnt_id == id;
    if is_it { Ok(folder) } else { Err(io::Error::other("another mount hides it")) }
}

/// What became of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is frozen.
    Frozen,
    /// Somebody else has frozen it already, and may thaw it at any time.
    Busy,
    /// It can't be frozen: it has no such thing.
    Unsupported,
    /// It could not be frozen.
    Failed(Errno),
    /// The watchdog did not come to it.
    Untold,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Frozen => f.write_str("frozen"),
            Self::Busy => f.write_str("somebody else has frozen it"),
            Self::Unsupported => f.write_str("it can't be frozen"),
            Self::Failed(errno) => write!(f, "freezing it failed: {errno}"),
            Self::Untold => f.write_str("freezing it took too long, or the watchdog died"),
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All that was frozen was so until we asked.
    Told,
    /// The watchdog thawed after its limit.
    Expired,
    /// The watchdog died or was silent, and we thawed.
    Lost,
}

/// File systems that are frozen until this is dropped, or the limit is over.
#[derive(Debug)]
pub struct Freeze {
    input: Option<ChildStdin>,
    guard: Option<JoinHandle<End>>,
    outcomes: Vec<Outcome>,
}

impl Freeze {
    /// Freezes these file systems, in this order. `client` is this program. Blocks for a little more than `limit` at most.
    ///
    /// # Errors
    /// When the watchdog can't be started; nothing is frozen then.
    pub fn begin(client: &OsStr, targets: Vec<Target>, limit: Duration) -> io::Result<Self> {
        let ours = std::process::id();
        // By their numbers here: what is at a path can change.
        let paths = targets.iter().map(|t| format!("/proc/{ours}/fd/{}", t.folder.as_raw_fd()));
        let mut command = Command::new(client);
        command.arg(COMMAND).arg("--limit-ms").arg(limit.as_millis().to_string()).args(paths);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        // The log may be there.
        command.stderr(Stdio::null());
        let until = Instant::now() + limit + SPARE;
        let mut child = command.spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (tell, told) = mpsc::sync_channel(1);
        let (count, guard) = (targets.len(), Guard::new(child, output, targets, until));
        let guard = thread::spawn(move || guard.run(&tell));
        let outcomes = told.recv().unwrap_or_else(|_| vec![Outcome::Untold; count]);
        Ok(Self { input, guard: Some(guard), outcomes })
    }

    /// What became of each file system.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// Thaws, and tells whether that happened before.
    pub fn thaw(mut self) -> End {
        self.end()
    }

    fn end(&mut self) -> End {
        self.input.take();
        self.guard.take().map_or(End::Lost, |guard| guard.join().unwrap_or(End::Lost))
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        self.end();
    }
}

/// Listens to the watchdog, and thaws in its place when it doesn't.
struct Guard {
    child: Child,
    output: Option<ChildStdout>,
    heard: Vec<u8>,
    targets: Vec<Target>,
    until: Instant,
    outcomes: Vec<Outcome>,
    /// What the watchdog was about to freeze.
    begun: Option<usize>,
    frozen: Vec<usize>,
}

impl Guard {
    fn new(
        child: Child,
        output: Option<ChildStdout>,
        targets: Vec<Target>,
        until: Instant,
    ) -> Self {
        let outcomes = vec![Outcome::Untold; targets.len()];
        let (begun, frozen, heard) = (None, Vec::new(), Vec::new());
        Self { child, output, heard, targets, until, outcomes, begun, frozen }
    }

    fn run(mut self, tell: &mpsc::SyncSender<Vec<Outcome>>) -> End {
        let mut end = None;
        while let Some(line) = self.line() {
            match line.as_str() {
                "done" => drop(tell.try_send(self.outcomes.clone())),
                "thawed" => end = Some(End::Told),
                "expired" => end = Some(End::Expired),
                other => self.note(other),
            }
        }
        if end.is_some() && matches!(self.child.wait(), Ok(status) if status.success()) {
            return end.unwrap_or(End::Lost);
        }
        self.thaw();
        // Who waits for outcomes gets none, and nothing is frozen.
        End::Lost
    }

    fn note(&mut self, line: &str) {
        let mut words = line.split(' ');
        let (Some(what), Some(number)) = (words.next(), words.next()) else { return };
        let Some(number) = number.parse().ok().filter(|number| *number < self.outcomes.len())
        else {
            return;
        };
        if what == "begin" {
            self.begun = Some(number);
            return;
        }
        self.begun = None;
        if what == "frozen" {
            self.frozen.push(number);
            self.outcomes[number] = Outcome::Frozen;
            return;
        }
        let errno = words.next().and_then(|errno| errno.parse().ok()).unwrap_or_default();
        self.outcomes[number] = match Errno::from_raw_os_error(errno) {
            Errno::BUSY => Outcome::Busy,
            Errno::OPNOTSUPP | Errno::NOTTY => Outcome::Unsupported,
            errno => Outcome::Failed(errno),
        };
    }

    /// `None` at the end of the output, and when time is over.
    fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
                let line = self.heard.drain(..=end).collect::<Vec<_>>();
                return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let output = self.output.as_mut()?;
            let left = self.until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok()?;
            match poll(&mut [PollFd::new(output, PollFlags::IN)], Some(&timeout)) {
                Ok(0) if left.is_zero() => return None,
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(_) => return None,
            }
            let mut bytes = [0; 256];
            match output.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.heard.extend_from_slice(&bytes[..count]),
            }
        }
    }

    /// The watchdog is dead, or must be: it would freeze more once it goes on.
    fn thaw(&mut self) {
        let _ = self.child.kill();
        while let Some(number) = self.frozen.pop() {
            let _ = thaw(&self.targets[number].folder);
        }
        // Killed within a freeze, it ends when that is done.
        let _ = self.child.wait();
        if let Some(number) = self.begun.take() {
            let _ = thaw(&self.targets[number].folder);
        }
    }
}

/// This program, also after its file was replaced.
pub fn own_program() -> &'static OsStr {
    Path::new("/proc/self/exe").as_os_str()
}
