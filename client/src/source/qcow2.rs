//! A qcow2 image that no virtual machine uses: read through a `qemu-nbd` of our own, which tells what changed since.
//!
//! A dirty bitmap begins before anything is read; the ones before it go when the backup is committed and remembered. A
//! backup that fails takes its bitmap back. Killed, it leaves one bitmap more, which the next backup removes; a watchdog
//! ends `qemu-nbd` then. While that runs, QEMU's own locks keep writers away.

use std::{
    fs::{DirBuilder, File},
    io::{self, PipeWriter, Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::fs::MemfdFlags;
use serde::Deserialize;

use crate::{
    frozen::program::{MAX_SHOWN, words},
    journal::Distrust,
    nbd::{Limits, NbdError, NbdMedium, bitmap},
};

/// What `disks` calls such an image.
pub const SCHEME: &str = "qcow2:";

const QEMU_IMG: &str = "qemu-img";
const QEMU_NBD: &str = "qemu-nbd";
/// `qemu-nbd`, and beside it a watchdog that kills it when our end of the pipe closes without a word before: we were killed.
/// Its standard input is the socket to serve, which systemd's protocol wants as number 3; the pipe is its standard output.
const WATCHED: &str = "exec 3<&0 4<&1 </dev/null >/dev/null
{ exec 3<&-; read -r _ <&4 || kill -9 $$; } &
exec 4<&-
LISTEN_FDS=1 LISTEN_PID=$$
export LISTEN_FDS LISTEN_PID
exec \"$0\" \"$@\"";
/// How long `qemu-nbd` may be silent, also until it serves.
const START: Duration = Duration::from_secs(60);
/// How long it may take to end, once it has left the connection.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes of one bit of our bitmaps.
const GRANULARITY: u64 = 64 << 10;
/// Older bitmaps that are kept and looked at; the last committed run's is the oldest of them.
const MAX_OLD: usize = 4;

/// Why such an image can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// Missing, or not permitted.
    #[error("cannot be opened: {0}")]
    Open(io::Error),
    /// A program is missing or can't be run.
    #[error("{program} cannot be run: {source}; install it (Debian: qemu-utils)")]
    Run {
        /// Which.
        program: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program}: {words}; a disk of a running machine is backed up through its NBD export")]
    Failed {
        /// Which.
        program: &'static str,
        /// What it said.
        words: String,
    },
    /// It is another kind of image.
    #[error("it is a {0} image; only qcow2 has dirty bitmaps")]
    Format(String),
    /// `qemu-nbd` serves nothing.
    #[error("qemu-nbd: {0}")]
    Nbd(#[from] NbdError),
    /// There can't be a socket.
    #[error("a socket for qemu-nbd cannot be made: {0}")]
    Socket(io::Error),
}

/// The image, held still by a `qemu-nbd` until it is dropped.
#[derive(Debug)]
pub struct Qcow2 {
    path: PathBuf,
    /// The bitmap that began for this run; `None` when the image can't be written.
    begun: Option<String>,
    /// Bitmaps to remove when the run is committed.
    old: Vec<String>,
    bad: Vec<(String, Distrust)>,
    serving: Mutex<Option<Serving>>,
    is_committed: AtomicBool,
}

impl Qcow2 {
    /// Begins a bitmap and serves the image.
    ///
    /// # Errors
    /// When a virtual machine uses it, it is no qcow2 image, or QEMU's programs are missing.
    pub fn open(path: &Path) -> Result<(Self, NbdMedium), Qcow2Error> {
        // Absolute: QEMU takes what stands before a colon for a protocol.
        let path = &std::fs::canonicalize(path).map_err(Qcow2Error::Open)?;
        let info = Info::of(path)?;
        let mut ours: Vec<Bitmap> =
            info.bitmaps.into_iter().filter(|b| bitmap::is_ours(&b.name)).collect();
        ours.sort_by(|a, b| a.name.cmp(&b.name));
        let begun = begin(path)?;
        // What failed runs have left; the oldest is the one that may be asked for.
        if begun.is_some() {
            for extra in ours.drain(MAX_OLD.min(ours.len())..) {
                remove(path, &extra.name);
            }
        }
        let (good, bad): (Vec<_>, Vec<_>) = ours
            .iter()
            .map(|b| (b.name.clone(), b.doubt(&info.untracked)))
            .partition(|(_, doubt)| doubt.is_none());
        let old = ours.iter().map(|bitmap| bitmap.name.clone()).collect();
        let bad = bad.into_iter().filter_map(|(name, doubt)| Some((name, doubt?))).collect();
        let image = Self {
            path: path.clone(),
            begun,
            old,
            bad,
            serving: Mutex::default(),
            is_committed: AtomicBool::new(false),
        };
        let good: Vec<String> = good.into_iter().map(|(name, _)| name).collect();
        let (serving, medium) = Serving::start(path, &good)?;
        *image.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(serving);
        Ok((image, medium))
    }

    /// Serves the image as it is, and begins nothing: only to look into it. The last answer is whether a backup would begin a bitmap that
    /// tells all changes.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn look(path: &Path) -> Result<(Self, NbdMedium, bool), Qcow2Error> {
        let path = &std::fs::canonicalize(path).map_err(Qcow2Error::Open)?;
        let is_tracked = Info::of(path)?.untracked.is_none();
        let is_writable = rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
        let (serving, medium) = Serving::start(path, &[])?;
        let image = Self {
            path: path.clone(),
            begun: None,
            old: Vec::new(),
            bad: Vec::new(),
            serving: Mutex::new(Some(serving)),
            is_committed: AtomicBool::new(false),
        };
        Ok((image, medium, is_tracked && is_writable))
    }

    /// The bitmap that began for this run.
    pub fn begun(&self) -> Option<&str> {
        self.begun.as_deref()
    }

    /// Bitmaps that are there and not to be believed.
    pub fn bad(&self) -> &[(String, Distrust)] {
        &self.bad
    }

    /// The run is committed and remembered: only its bitmap stays. The image is served no more.
    pub fn committed(&self) {
        self.release();
        self.is_committed.store(true, Ordering::Relaxed);
        if self.begun.is_some() {
            self.old.iter().for_each(|name| remove(&self.path, name));
        }
    }

    /// Ends `qemu-nbd`: nobody can write to the image as long as it runs.
    fn release(&self) {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        self.release();
        if !self.is_committed.load(Ordering::Relaxed)
            && let Some(begun) = &self.begun
        {
            remove(&self.path, begun);
        }
    }
}

/// Begins a bitmap; `None` where the image may only be read.
fn begin(path: &Path) -> Result<Option<String>, Qcow2Error> {
    if rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_err() {
        tracing::warn!(path = %path.display(), "the image is read-only: no dirty bitmap can begin, the next backup compares all");
        return Ok(None);
    }
    let name = bitmap::new_name();
    let granularity = GRANULARITY.to_string();
    let add = ["bitmap", "-f", "qcow2", "--add", "-g", granularity.as_str()];
    run(Command::new(QEMU_IMG).args(add).arg(path).arg(&name))?;
    Ok(Some(name))
}

/// Removes a bitmap. One that stays costs a little time at each write to the image, and is removed by a later backup.
fn remove(path: &Path, name: &str) {
    let remove = ["bitmap", "-f", "qcow2", "--remove"];
    if let Err(error) = run(Command::new(QEMU_IMG).args(remove).arg(path).arg(name)) {
        tracing::warn!(path = %path.display(), name, %error, "a dirty bitmap can't be removed");
    }
}

fn run(command: &mut Command) -> Result<Output, Qcow2Error> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Qcow2Error::Run { program: QEMU_IMG, source })?;
    if output.status.success() {
        return Ok(output);
    }
    Err(Qcow2Error::Failed { program: QEMU_IMG, words: words(&output.stderr) })
}

/// Reads what `qemu-img info` says: for fuzzers.
pub(crate) fn read_info(bytes: &[u8]) {
    if let Ok(info) = Info::parse(bytes) {
        info.bitmaps.iter().for_each(|bitmap| drop(bitmap.doubt(&info.untracked)));
    }
}

struct Info {
    bitmaps: Vec<Bitmap>,
    /// Why no bitmap tells all changes.
    untracked: Option<String>,
}

#[derive(Deserialize)]
struct Bitmap {
    name: String,
    granularity: u64,
    #[serde(default)]
    flags: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    format: String,
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: FormatSpecific,
}

#[derive(Default, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: Specific,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Specific {
    #[serde(default)]
    bitmaps: Vec<Bitmap>,
    data_file: Option<String>,
}

impl Info {
    fn of(path: &Path) -> Result<Self, Qcow2Error> {
        let output = run(Command::new(QEMU_IMG).args(["info", "--output=json"]).arg(path))?;
        Self::parse(&output.stdout)
    }

    fn parse(bytes: &[u8]) -> Result<Self, Qcow2Error> {
        let info: ImageInfo = serde_json::from_slice(bytes).map_err(|error| {
            Qcow2Error::Failed { program: QEMU_IMG, words: format!("info says: {error}") }
        })?;
        if info.format != "qcow2" {
            return Err(Qcow2Error::Format(info.format));
        }
        let Specific { bitmaps, data_file } = info.format_specific.data;
        let untracked = match (info.backing_filename, data_file) {
            (Some(file), _) => Some(format!("no bitmap tracks the image's backing file {file}")),
            (_, Some(file)) => Some(format!("others can write to the image's data file {file}")),
            _ => None,
        };
        Ok(Self { bitmaps, untracked })
    }
}

impl Bitmap {
    fn doubt(&self, untracked: &Option<String>) -> Option<Distrust> {
        let has = |flag: &str| self.flags.iter().any(|known| known == flag);
        let (name, bytes) = (self.name.clone(), self.granularity);
        if has("in-use") {
            return Some(Distrust::Inconsistent { name });
        }
        if !has("auto") {
            let what = format!("the dirty bitmap {name} was turned off");
            return Some(Distrust::Untracked { what });
        }
        if bytes != GRANULARITY {
            return Some(Distrust::Granularity { name, bytes });
        }
        untracked.clone().map(|what| Distrust::Untracked { what })
    }
}

/// A `qemu-nbd` of ours. It gets a socket that listens already and that we are connected to, so nothing of it stays on disk.
#[derive(Debug)]
struct Serving {
    child: Child,
    /// Ends the watchdog; dropped without a word, it kills `qemu-nbd`.
    watchdog: Option<PipeWriter>,
}

impl Serving {
    fn start(path: &Path, bitmaps: &[String]) -> Result<(Self, NbdMedium), Qcow2Error> {
        let (listener, socket) = connected().map_err(Qcow2Error::Socket)?;
        let memory = rustix::fs::memfd_create("qemu-nbd", MemfdFlags::CLOEXEC);
        let mut log = File::from(memory.map_err(|error| Qcow2Error::Socket(error.into()))?);
        let pipes = || io::Result::Ok((io::pipe()?, log.try_clone()?));
        let ((watched, watchdog), stderr) = pipes().map_err(Qcow2Error::Socket)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", WATCHED, QEMU_NBD, "--read-only", "--format=qcow2", "--shared=1"]);
        command.args(bitmaps.iter().map(|name| format!("--bitmap={name}"))).arg("--").arg(path);
        command.stdin(OwnedFd::from(listener)).stdout(watched).stderr(stderr);
        let child = command.spawn();
        // The socket must close when qemu-nbd ends: the command holds it, too.
        drop(command);
        let child = child.map_err(|source| Qcow2Error::Run { program: QEMU_NBD, source })?;
        let mut serving = Self { child, watchdog: Some(watchdog) };
        // It serves one connection and ends.
        let limits = Limits { patience: START, reconnect: Duration::ZERO };
        match NbdMedium::of_socket(socket, limits) {
            Ok(medium) => Ok((serving, medium)),
            Err(error) => Err(serving.why(&mut log).unwrap_or(Qcow2Error::Nbd(error))),
        }
    }

    /// What `qemu-nbd` said, if it has ended.
    fn why(&mut self, log: &mut File) -> Option<Qcow2Error> {
        let until = Instant::now() + PATIENCE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(PAUSE);
        }
        let mut said = Vec::new();
        let read = log.rewind().and_then(|()| log.take(MAX_SHOWN as u64).read_to_end(&mut said));
        let words = if read.is_ok() { words(&said) } else { String::new() };
        Some(Qcow2Error::Failed { program: QEMU_NBD, words })
    }
}

/// A listening socket with our connection waiting in it. Its name is gone again: nobody else can connect, and a kill leaves
/// nothing but in the moment between.
fn connected() -> io::Result<(UnixListener, UnixStream)> {
    let folder = std::env::temp_dir().join(format!("janus-nbd-{}", uuid::Uuid::new_v4().simple()));
    DirBuilder::new().mode(0o700).create(&folder)?;
    let name = folder.join("socket");
    let made = UnixListener::bind(&name).and_then(|it| Ok((it, UnixStream::connect(&name)?)));
    // Nothing else is in it.
    std::fs::remove_dir_all(&folder).and(made)
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The watchdog goes first: it must not kill a process that has the same number later.
        if let Some(mut watchdog) = self.watchdog.take() {
            let _ = watchdog.write_all(b"end\n");
        }
        // It only reads: nothing is lost. It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
