//! Child processes that don't outlive this program: stopped when dropped, and on Ctrl-C.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::measure::{self, Used};

/// A program that doesn't say that it listens within this time has failed.
const START_TIME: Duration = Duration::from_secs(30);
/// A program that doesn't end after SIGTERM within this time is killed; drains take at most 10 s.
const STOP_TIME: Duration = Duration::from_secs(20);

static LIVE: Mutex<Live> = Mutex::new(Live { pids: BTreeSet::new(), folders: BTreeSet::new() });

struct Live {
    pids: BTreeSet<u32>,
    folders: BTreeSet<PathBuf>,
}

fn live() -> MutexGuard<'static, Live> {
    // A panic elsewhere leaves the sets as they are, and stopping children matters most after a panic.
    LIVE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// On Ctrl-C or SIGTERM kills all children, removes temporary folders and ends this program with code 130.
///
/// # Errors
/// When a handler is already set.
pub fn stop_children_on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        let live = live();
        for pid in &live.pids {
            signal(*pid, Signal::KILL);
        }
        for folder in &live.folders {
            let _ = fs::remove_dir_all(folder);
        }
        eprintln!("interrupted; processes are stopped");
        std::process::exit(130);
    })
    .context("handle Ctrl-C")
}

pub(super) fn remove_on_interrupt(folder: &Path) {
    live().folders.insert(folder.to_owned());
}

pub(super) fn keep_on_interrupt(folder: &Path) {
    live().folders.remove(folder);
}

/// Remembers a child for Ctrl-C; `ended` forgets it again.
pub(super) fn started(child: &Child) {
    live().pids.insert(child.id());
}

pub(super) fn ended(child: &Child) {
    live().pids.remove(&child.id());
}

/// Sends a signal; a process that has gone is no error.
pub(super) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// A running server or janus.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    url: String,
    log: PathBuf,
}

impl Process {
    /// Starts a program and waits until it prints `listening on URL`. What it logs is appended to `log`.
    ///
    /// # Errors
    /// When it doesn't start, ends, or says nothing in 30 s; with the end of its log.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file.try_clone()?);
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        started(&child);
        let stdout = child.stdout.take().context("stdout is piped")?;
        let heard = listen(stdout, file);
        let mut process =
            Self { name: name.to_owned(), child, url: String::new(), log: log.to_owned() };
        process.url = process.await_url(&heard)?;
        Ok(process)
    }

    /// Starts a program that says nothing of where it listens: at `url`, as its settings have it. What it logs is appended to
    /// `log`.
    ///
    /// # Errors
    /// When it doesn't start.
    pub fn spawn(name: &str, mut command: Command, log: &Path, url: &str) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        started(&child);
        Ok(Self { name: name.to_owned(), child, url: url.to_owned(), log: log.to_owned() })
    }

    fn await_url(&mut self, heard: &mpsc::Receiver<String>) -> Result<String> {
        match heard.recv_timeout(START_TIME) {
            Ok(url) => Ok(url),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("{} does not listen after {START_TIME:?}: {}", self.name, self.log_end())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = self.child.wait()?;
                bail!("{} ended at its start ({status}): {}", self.name, self.log_end())
            }
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The URL it printed.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// CPU time and peak memory so far.
    pub fn used(&self) -> Used {
        measure::used(self.pid())
    }

    /// Kills it at once, as a power cut would.
    pub fn kill(mut self) {
        self.end(Signal::KILL);
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it doesn't end within 20 s; it is killed then.
    pub fn stop(mut self) -> Result<ExitStatus> {
        signal(self.pid(), Signal::TERM);
        let until = Instant::now() + STOP_TIME;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("{} did not end {STOP_TIME:?} after SIGTERM: {}", self.name, self.log_end())
    }

    /// Suspends it: it holds its connections and answers nothing.
    pub fn freeze(&self) {
        signal(self.pid(), Signal::STOP);
    }

    /// Goes on after `freeze`.
    pub fn thaw(&self) {
        signal(self.pid(), Signal::CONT);
    }

    /// Asks it to read its settings again (SIGHUP).
    pub fn hang_up(&self) {
        signal(self.pid(), Signal::HUP);
    }

    /// False when it has ended by itself.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn end(&mut self, how: Signal) {
        if self.is_running() {
            signal(self.child.id(), how);
            let _ = self.child.wait();
        }
        ended(&self.child);
    }

    fn log_end(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let end: Vec<_> = text.lines().rev().take(5).collect();
        format!(
            "{} says: {}",
            self.log.display(),
            end.into_iter().rev().collect::<Vec<_>>().join(" / ")
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Signal::KILL);
    }
}

/// Copies what a program prints into its log and hands out the URL of its `listening on` line.
fn listen(stdout: ChildStdout, mut log: File) -> mpsc::Receiver<String> {
    let (tell, heard) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some(url) = line.strip_prefix("listening on ") {
                let _ = tell.send(url.trim().to_owned());
            }
            let _ = writeln!(log, "{line}");
        }
    });
    heard
}
