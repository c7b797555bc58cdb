//! The process that freezes file systems, and thaws them whatever becomes of the client.
//!
//! It thaws when its input says or ends (a client that is killed closes it), and when its time is over. Signals but SIGKILL don't
//! end it; when that one does, the client thaws ([`super::freeze`]). While anything is frozen it reads and writes
//! nothing but its two pipes: it is one program with the client, has its memory locked, and logs nothing.
//!
//! On its output it says, for the file system with number N: `begin N` before it freezes it, then `frozen N` or `failed N
//! ERRNO`; `done` after the last one; and `thawed` or `expired` at the end.

use std::{
    fs::File,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mm::{MlockAllFlags, mlockall},
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::fsfreeze::{freeze, thaw};

/// Its name among the commands of the client.
pub const COMMAND: &str = "freeze-watchdog";
/// How long file systems stay frozen at most.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Freezes the file systems of these folders until it is told, or `limit` is over. Meant for a process of its own.
pub fn run(folders: &[&PathBuf], limit: Duration) -> ExitCode {
    match prepare(folders) {
        Ok((folders, _deaf)) => {
            let held = Held { folders: &folders, state: Mutex::default() };
            let until = Instant::now() + limit;
            thread::scope(|scope| {
                scope.spawn(|| held.wait(until));
                held.freeze_all();
            });
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("janus-client: {COMMAND}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that may need a file system. What is returned beside the folders keeps signals from ending us.
fn prepare(folders: &[&PathBuf]) -> io::Result<(Vec<File>, Deaf)> {
    let deaf = Deaf::new()?;
    let folders = folders.iter().map(File::open).collect::<io::Result<_>>()?;
    // Both only for when memory is short.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    Ok((folders, deaf))
}

/// Takes signals and forgets them.
struct Deaf {
    _signals: Vec<Signal>,
    _runtime: tokio::runtime::Runtime,
}

impl Deaf {
    fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        let signals = kinds.into_iter().map(signal).collect::<io::Result<_>>()?;
        drop(entered);
        Ok(Self { _signals: signals, _runtime: runtime })
    }
}

struct Held<'a> {
    folders: &'a [File],
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    frozen: Vec<usize>,
    is_over: bool,
}

impl Held<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn freeze_all(&self) {
        for (number, folder) in self.folders.iter().enumerate() {
            if self.state().is_over {
                return;
            }
            say(&format!("begin {number}"));
            let result = freeze(folder);
            let mut state = self.state();
            match result {
                // It took until now, and nobody waits any more.
                Ok(()) if state.is_over => {
                    let _ = thaw(folder);
                    return;
                }
                Ok(()) => {
                    state.frozen.push(number);
                    say(&format!("frozen {number}"));
                }
                Err(errno) => say(&format!("failed {number} {}", errno.raw_os_error())),
            }
        }
        say("done");
    }

    /// Thaws when the input says or ends, or at `until`.
    fn wait(&self, until: Instant) {
        let is_told = is_told(until);
        let mut state = self.state();
        state.is_over = true;
        while let Some(number) = state.frozen.pop() {
            let _ = thaw(&self.folders[number]);
        }
        say(if is_told { "thawed" } else { "expired" });
    }
}

fn is_told(until: Instant) -> bool {
    let input = io::stdin();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        let mut inputs = [PollFd::new(&input, PollFlags::IN)];
        match poll(&mut inputs, Some(&timeout)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            // Its end counts, too.
            Ok(_) | Err(_) => return true,
        }
    }
}

fn say(word: &str) {
    // Nobody listens when the client is gone; its end is seen on the input.
    let _ = io::stdout().write_all(format!("{word}\n").as_bytes());
}
