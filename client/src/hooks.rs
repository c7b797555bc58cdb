//! Programs of the administrator that run before and after a backup, such as a database's own freeze and thaw.
//!
//! They are started directly, without a shell, in a process group of their own, which is killed as a whole when its time is over
//! or the backup is stopped. What they print goes into the log. The one after the backup runs whenever the one before it was started, also
//! when that failed: it may have done half of its work. A client that is killed runs none.

use std::{io, process::Stdio, time::Duration};

use janus_proto::child::Group;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::Command,
};

/// Bytes of a line of output that are logged at once.
const LINE_BYTES: u64 = 4096;
/// How long the output of a hook that has ended is waited for: what it left running may hold it open.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("{setting}: {program} cannot be started: {source}")]
    Start {
        /// `pre_backup` or `post_backup`.
        setting: &'static str,
        /// Its first word.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// It said that it failed.
    #[error("{setting}: {program} ended with {status}")]
    Failed {
        /// `pre_backup` or `post_backup`.
        setting: &'static str,
        /// Its first word.
        program: String,
        /// Its exit code or signal.
        status: std::process::ExitStatus,
    },
    /// It took too long and was killed.
    #[error("{setting}: {program} was killed after {seconds} s (hook_seconds)")]
    TooLong {
        /// `pre_backup` or `post_backup`.
        setting: &'static str,
        /// Its first word.
        program: String,
        /// The limit.
        seconds: u64,
    },
}

/// A program with its arguments; none where the list is empty.
#[derive(Debug, Clone)]
pub struct Hook<'a> {
    /// `pre_backup` or `post_backup`.
    pub setting: &'static str,
    /// Program and arguments.
    pub words: &'a [String],
    /// Longest time it may take.
    pub limit: Duration,
}

impl Hook<'_> {
    /// Runs it with `variables` added to its environment.
    ///
    /// # Errors
    /// When it can't be started, fails, or takes too long. Nothing of its process group is left then.
    pub async fn run(&self, variables: &[(&str, &str)]) -> Result<(), HookError> {
        let Some((program, arguments)) = self.words.split_first() else { return Ok(()) };
        let (setting, name) = (self.setting, program.clone());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let child = command.spawn();
        let child =
            child.map_err(|source| HookError::Start { setting, program: name.clone(), source })?;
        let mut group = Group::of(child);
        let (out, err) = (group.child.stdout.take(), group.child.stderr.take());
        let output = async { tokio::join!(log(setting, out), log(setting, err)) };
        tokio::pin!(output);
        let ended = async {
            tokio::select! {
                biased;
                status = group.child.wait() => {
                    let _ = tokio::time::timeout(OUTPUT_PATIENCE, output).await;
                    status
                }
                _ = &mut output => group.child.wait().await,
            }
        };
        let status = tokio::time::timeout(self.limit, ended).await;
        match status {
            Err(_) => {
                let seconds = self.limit.as_secs();
                Err(HookError::TooLong { setting, program: name, seconds })
            }
            Ok(Err(source)) => Err(HookError::Start { setting, program: name, source }),
            Ok(Ok(status)) if status.success() => {
                group.release();
                Ok(())
            }
            Ok(Ok(status)) => Err(HookError::Failed { setting, program: name, status }),
        }
    }
}

async fn log(setting: &'static str, output: Option<impl AsyncRead + Unpin>) {
    let Some(output) = output else { return };
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut output).take(LINE_BYTES).read_until(b'\n', &mut line).await;
        if !read.is_ok_and(|count| count > 0) {
            return;
        }
        tracing::info!(hook = setting, "{}", String::from_utf8_lossy(&line).trim_end());
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;

    async fn run(script: &str, limit_ms: u64) -> Result<(), HookError> {
        let words = ["/bin/sh", "-c", script].map(str::to_owned);
        let limit = Duration::from_millis(limit_ms);
        Hook { setting: "pre_backup", words: &words, limit }.run(&[("JANUS_RESULT", "ok")]).await
    }

    #[tokio::test]
    async fn a_hook_succeeds_fails_or_is_missing() {
        let nothing = Hook { setting: "pre_backup", words: &[], limit: Duration::ZERO };
        nothing.run(&[]).await.unwrap();
        run("test \"$JANUS_RESULT\" = ok", 5000).await.unwrap();
        assert!(matches!(run("exit 3", 5000).await, Err(HookError::Failed { .. })));
        let words = ["/nonexistent/hook".to_owned()];
        let missing = Hook { setting: "pre_backup", words: &words, limit: Duration::from_secs(1) };
        assert!(matches!(missing.run(&[]).await, Err(HookError::Start { .. })));
    }

    #[tokio::test]
    async fn much_output_does_not_hold_a_hook_up_and_open_pipes_hold_nobody() {
        run("head -c 3000000 /dev/zero; head -c 300000 /dev/zero >&2", 20_000).await.unwrap();
        let began = Instant::now();
        run("sleep 4 & exit 0", 20_000).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_dies_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let pids = folder.path().join("pids");
        let script = format!("sleep 60 & echo $! > {0}; wait", pids.display());
        let began = Instant::now();
        let error = run(&script, 700).await.unwrap_err();
        assert!(matches!(error, HookError::TooLong { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(10));
        let child = fs::read_to_string(pids).unwrap();
        let state = || fs::read_to_string(format!("/proc/{}/stat", child.trim()));
        for _ in 0..50 {
            // Gone, or dead and not yet buried by whoever inherited it.
            if state().map_or(true, |state| state.contains(") Z ")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the hook's child lives: {:?}", state());
    }
}
