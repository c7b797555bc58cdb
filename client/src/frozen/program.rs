//! The programs of LVM and ZFS, run for their answer.
//!
//! A program that takes too long is asked to end and then left alone, never killed: an `lvcreate` killed at the wrong moment
//! leaves its volume suspended, and everybody who writes to it waits for ever. Nothing is logged here: a file system may be
//! frozen, and the log may be on it.

use std::{
    ffi::OsString,
    io::{self, Read},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};

/// Longest time a program may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to end when it was asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How long the output of a program that has ended is waited for: what it left running may hold it open.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes of output that are taken; a listing of 10,000 volumes has about 2 MiB.
const MAX_OUTPUT: u64 = 16 << 20;
/// Bytes of an error that are shown.
pub(crate) const MAX_SHOWN: usize = 400;

/// Why a program has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It isn't installed, or can't be run.
    #[error("{program} cannot be run: {source}")]
    Run {
        /// Its name.
        program: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It failed.
    #[error("{command}: {words}")]
    Failed {
        /// As typed.
        command: String,
        /// What it said, in one line.
        words: String,
    },
    /// It was asked to end.
    #[error("{command}: it took longer than {} s", LIMIT.as_secs())]
    TooLong {
        /// As typed.
        command: String,
    },
    /// Its answer can't be understood.
    #[error("{command}: its answer can't be understood: {reason}")]
    Answer {
        /// As typed.
        command: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ProgramError {
    /// The program isn't there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Run { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    program: &'static str,
    arguments: Vec<String>,
}

impl Line {
    /// A program with its arguments, written with blanks between them; `more` are arguments that may hold blanks.
    pub(super) fn new(program: &'static str, arguments: &str, more: &[&str]) -> Self {
        let words = arguments.split_ascii_whitespace().chain(more.iter().copied());
        Self { program, arguments: words.map(str::to_owned).collect() }
    }

    /// Runs it; what it prints.
    ///
    /// # Errors
    /// When it is missing, fails, or takes too long.
    pub fn run(&self) -> Result<String, ProgramError> {
        let run = |source| ProgramError::Run { program: self.program, source };
        let mut child = self.command().spawn().map_err(run)?;
        let (out, err) = (gather(child.stdout.take()), gather(child.stderr.take()));
        let status = wait(&mut child, LIMIT).map_err(run)?;
        let status = status.ok_or_else(|| ProgramError::TooLong { command: self.to_string() })?;
        let said = |from: mpsc::Receiver<Vec<u8>>| from.recv_timeout(OUTPUT_PATIENCE);
        if status.success() {
            let out = said(out).unwrap_or_default();
            return Ok(String::from_utf8_lossy(&out).into_owned());
        }
        let words = words(&said(err).unwrap_or_default());
        let words = if words.is_empty() { status.to_string() } else { words };
        Err(ProgramError::Failed { command: self.to_string(), words })
    }

    fn command(&self) -> Command {
        // Where administrators' programs are, also for whoever calls us with the path of a user.
        let path: OsString = std::env::var_os("PATH")
            .map(|mut path| {
                path.push(":/usr/sbin:/sbin");
                path
            })
            .unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        let mut command = Command::new(self.program);
        command.args(&self.arguments).env("PATH", path).env("LC_ALL", "C");
        // Ctrl-C is for us: a program of a group of its own goes on to its end.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.program)?;
        self.arguments.iter().try_for_each(|word| write!(f, " {word}"))
    }
}

fn gather(output: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (tell, told) = mpsc::sync_channel(1);
    // It ends with the last holder of the program's output.
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut output) = output {
            let _ = output.by_ref().take(MAX_OUTPUT).read_to_end(&mut bytes);
            let _ = io::copy(&mut output, &mut io::sink());
        }
        let _ = tell.send(bytes);
    });
    told
}

/// `None` when it doesn't end.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    if let Some(status) = wait_until(child, Instant::now() + limit)? {
        return Ok(Some(status));
    }
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::TERM);
    }
    wait_until(child, Instant::now() + GRACE)?;
    Ok(None)
}

fn wait_until(child: &mut Child, until: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            None if Instant::now() < until => thread::sleep(PAUSE),
            ended => return Ok(ended),
        }
    }
}

/// What a program said, in one line.
pub(crate) fn words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(&stderr[..stderr.len().min(MAX_SHOWN)]);
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<String, ProgramError> {
        Line::new("sh", "-c", &[script]).run()
    }

    #[test]
    fn a_program_answers_fails_with_its_own_words_or_is_missing() {
        assert_eq!(shell("echo $LC_ALL").unwrap(), "C\n");
        let failed = shell("echo ' no room ' >&2; echo 'in vg0' >&2; exit 5").unwrap_err();
        assert!(failed.to_string().ends_with(": no room; in vg0"), "{failed}");
        assert!(shell("exit 5").unwrap_err().to_string().ends_with("exit status: 5"));
        assert!(Line::new("nosuchprogram", "", &[]).run().unwrap_err().is_missing());
        assert_eq!(shell("head -c 20000000 /dev/zero").unwrap().len() as u64, MAX_OUTPUT);
    }

    #[test]
    fn a_program_that_takes_too_long_is_asked_to_end() {
        let mut child = Line::new("sleep", "60", &[]).command().spawn().unwrap();
        let began = Instant::now();
        assert_eq!(wait(&mut child, Duration::from_millis(50)).unwrap(), None);
        assert!(began.elapsed() < GRACE && child.try_wait().unwrap().is_some());
    }
}
