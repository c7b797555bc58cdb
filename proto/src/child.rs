//! Programs that settings name, run without a shell. Each has a process group of its own, so that nothing of it is left when it
//! takes too long or fails.

use std::{
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

/// What a failed program said, at most.
const MOST_SAID_BYTES: u64 = 1000;
/// How long the output of a program that has ended is waited for.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

/// A child and its process group, which is killed unless it is released.
pub struct Group {
    /// The child, begun with `process_group(0)`.
    pub child: Child,
    leader: Option<Pid>,
}

impl Group {
    /// The group that this child leads.
    pub fn of(child: Child) -> Self {
        let leader = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Self { child, leader }
    }

    /// What a program that succeeded has left running may stay: it may be a service.
    pub fn release(&mut self) {
        self.leader = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.leader {
            // Gone already: nothing to do.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Why a program wasn't told.
#[derive(Debug, thiserror::Error)]
pub enum TellError {
    /// It can't be started, or waited for.
    #[error(transparent)]
    Start(#[from] io::Error),
    /// It was killed.
    #[error("no end after {} s", .0.as_secs())]
    TooLong(Duration),
    /// It says that it failed.
    #[error("{status}: {said}")]
    Failed {
        /// How it ended.
        status: ExitStatus,
        /// The beginning of its error output.
        said: String,
    },
}

/// Gives a program a message on its standard input, and waits for its end.
///
/// # Errors
/// When it hasn't taken it for certain.
pub async fn tell(
    program: &str,
    arguments: &[String],
    message: &str,
    limit: Duration,
) -> Result<(), TellError> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut group = Group::of(command.process_group(0).spawn()?);
    let (stdin, stderr) = (group.child.stdin.take(), group.child.stderr.take());
    let reading = async {
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = (&mut stderr).take(MOST_SAID_BYTES).read_to_end(&mut said).await;
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
        }
        String::from_utf8_lossy(&said).trim().to_owned()
    };
    tokio::pin!(reading);
    let writing = async {
        if let Some(mut stdin) = stdin {
            // A program that doesn't read its stdin says by its exit code whether that was meant.
            let _ = stdin.write_all(message.as_bytes()).await;
        }
    };
    let mut said = None;
    let ended = async {
        let both = async { tokio::join!(writing, group.child.wait()).1 };
        tokio::pin!(both);
        tokio::select! {
            biased;
            status = &mut both => status,
            text = &mut reading => {
                said = Some(text);
                both.await
            }
        }
    };
    let status = timeout(limit, ended).await.map_err(|_| TellError::TooLong(limit))??;
    if status.success() {
        group.release();
        return Ok(());
    }
    let said = match said {
        Some(said) => said,
        // What it left running may hold its output open.
        None => timeout(OUTPUT_PATIENCE, reading).await.unwrap_or_default(),
    };
    Err(TellError::Failed { status, said })
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;

    async fn shell(script: &str, message: &str, limit_ms: u64) -> Result<(), TellError> {
        let arguments = ["-c", script].map(str::to_owned);
        tell("/bin/sh", &arguments, message, Duration::from_millis(limit_ms)).await
    }

    #[tokio::test]
    async fn a_program_says_why_it_failed() {
        shell("exit 0", &"x".repeat(1 << 20), 20_000).await.unwrap();
        shell("test \"$(cat)\" = hello", "hello", 20_000).await.unwrap();
        let failed = shell("echo no such mailbox >&2; exit 3", "", 20_000).await.unwrap_err();
        assert_eq!(failed.to_string(), "exit status: 3: no such mailbox");
        let failed = shell("yes | head -c 3000000 >&2; exit 3", "", 20_000).await.unwrap_err();
        assert!(failed.to_string().len() < 1100);
        assert!(tell("/nonexistent", &[], "", Duration::from_secs(1)).await.is_err());
    }

    #[tokio::test]
    async fn one_that_takes_too_long_dies_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script = format!("sleep 60 & echo $! > {}; wait", pid.display());
        let began = Instant::now();
        let error = shell(&script, "", 700).await.unwrap_err();
        assert!(matches!(error, TellError::TooLong(_)), "{error}");
        assert!(began.elapsed() < Duration::from_secs(10));
        let child = fs::read_to_string(pid).unwrap();
        let state = || fs::read_to_string(format!("/proc/{}/stat", child.trim()));
        for _ in 0..50 {
            // Gone, or dead and not yet buried by whoever inherited it.
            if state().map_or(true, |state| state.contains(") Z ")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the program's child lives: {:?}", state());
    }
}
