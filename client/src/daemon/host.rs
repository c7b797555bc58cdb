//! This machine, as the daemon sees it: its clocks, its state file, and backups as processes.

use std::{ffi::OsString, io, path::PathBuf, process::Stdio, time::Duration};

use jiff::{Timestamp, tz::TimeZone};
use rustix::{
    process::{Pid, Signal, kill_process},
    time::{ClockId, clock_gettime},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Ended, Host, Moment, conditions};
use crate::{config::Settings, daemon::conditions::Hindrance, schedule::ScheduleSettings, state};

/// How long a backup that was asked to stop is waited for; killed then, it can be gone on with all the same.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// Longest line of output that is understood.
const LINE_BYTES: u64 = 4 << 20;

/// This machine.
#[derive(Debug)]
pub struct Machine {
    /// The program of this process, even when its file was replaced.
    program: PathBuf,
    /// What follows `janus-client backup --json`.
    arguments: Vec<OsString>,
    cache_path: PathBuf,
}

impl Machine {
    /// Backs up with these arguments, which name the settings.
    pub fn new(arguments: Vec<OsString>, cache_path: PathBuf) -> Self {
        Self { program: "/proc/self/exe".into(), arguments, cache_path }
    }

    async fn run(&self, stop: &CancellationToken) -> io::Result<Ended> {
        let mut child = Command::new(&self.program)
            .args(["backup", "--json"])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take();
        let answer = tokio::spawn(async move {
            match stdout {
                Some(stdout) => last_line(stdout).await,
                None => Vec::new(),
            }
        });
        let status = tokio::select! {
            status = child.wait() => status?,
            () = stop.cancelled() => {
                end(&mut child).await?;
                return Ok(Ended::Stopped);
            }
        };
        // What a hook left running may hold the pipe open.
        let answer = timeout(Duration::from_secs(5), answer).await;
        let answer = answer.ok().and_then(Result::ok).unwrap_or_default();
        if status.success() {
            return Ok(Ended::Made);
        }
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let said = answer["error"].as_str().map(str::to_owned);
        let message = said.unwrap_or_else(|| format!("janus-client backup ended with {status}"));
        let exit_code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        Ok(Ended::Failed { message, exit_code })
    }
}

impl Host for Machine {
    fn now(&self) -> Moment {
        let running = clock_gettime(ClockId::Boottime);
        let running = Duration::try_from(running).unwrap_or_default();
        Moment { wall: Timestamp::now(), zone: TimeZone::system(), running }
    }

    async fn last_success(&self) -> Option<Timestamp> {
        let folder = self.cache_path.clone();
        let read = tokio::task::spawn_blocking(move || state::look(&folder)).await;
        let read = read.map_err(io::Error::other).and_then(|read| read);
        let past = read.inspect_err(|error| {
            let path = self.cache_path.display();
            tracing::warn!(%path, %error, "can't read when the last backup was made");
        });
        Timestamp::from_millisecond(past.ok()?.last_success?.taken_ms).ok()
    }

    async fn hindrance(&self, settings: &ScheduleSettings) -> Option<Hindrance> {
        conditions::hindrance(settings).await
    }

    async fn back_up(&self, stop: &CancellationToken) -> Ended {
        self.run(stop).await.unwrap_or_else(|error| Ended::Failed {
            message: format!("janus-client backup cannot be started: {error}"),
            exit_code: 1,
        })
    }

    fn adopt(&mut self, settings: &Settings) {
        self.cache_path.clone_from(&settings.cache_path);
    }
}

/// Asks a backup to end, and waits for it.
async fn end(child: &mut Child) -> io::Result<()> {
    let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(pid) = pid {
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(STOP_PATIENCE, child.wait()).await.is_err() {
        tracing::warn!("the backup does not end; killing it");
        child.kill().await?;
    }
    Ok(())
}

/// The last line that isn't empty.
async fn last_line(output: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut output = BufReader::new(output);
    let mut last = Vec::new();
    loop {
        let mut line = Vec::new();
        let read = (&mut output).take(LINE_BYTES).read_until(b'\n', &mut line).await;
        if !read.is_ok_and(|count| count > 0) {
            return last;
        }
        if !line.trim_ascii().is_empty() {
            last = line;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(script: &str) -> (tempfile::TempDir, Machine) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let mut machine = Machine::new(vec!["--config".into(), "x".into()], folder.path().into());
        machine.program = program;
        (folder, machine)
    }

    #[tokio::test]
    async fn a_backup_tells_how_it_ended_by_its_last_line_and_code() {
        let go = CancellationToken::new();
        let (_kept, made) = machine("test \"$*\" = 'backup --json --config x'");
        assert_eq!(made.back_up(&go).await, Ended::Made);
        let (_kept, failed) = machine("echo '{\"event\":1}'; echo '{\"error\":\"full\"}'; exit 3");
        let expected = Ended::Failed { message: "full".into(), exit_code: 3 };
        assert_eq!(failed.back_up(&go).await, expected);
        let (_kept, killed) = machine("kill -9 $$");
        let Ended::Failed { message, exit_code: 1 } = killed.back_up(&go).await else { panic!() };
        assert!(message.contains("signal: 9"), "{message}");
    }

    #[tokio::test]
    async fn a_backup_that_is_stopped_is_asked_to_end() {
        let (folder, slow) = machine(
            "trap 'echo asked > $0.told; exit 130' TERM\necho > $0.up\nwhile :; do sleep 0.05; done",
        );
        let stop = CancellationToken::new();
        let asking = async {
            while !folder.path().join("program.up").exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            stop.cancel();
        };
        let (ended, ()) = tokio::join!(slow.back_up(&stop), asking);
        assert_eq!(ended, Ended::Stopped);
        assert!(folder.path().join("program.told").exists());
    }
}
