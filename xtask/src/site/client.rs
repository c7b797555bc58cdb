//! A machine with `janus-client`: its settings, and running it.

use std::{
    fs::{self, File},
    io::{IsTerminal, Seek, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde::de::DeserializeOwned;

use super::{Programs, Settings, answers, process};
use crate::{
    disk,
    measure::{self, Used},
};

/// Nothing takes a client this long but in the soak.
const LONGEST: Duration = Duration::from_secs(600);

/// One machine.
#[derive(Debug, Clone)]
pub struct Client {
    /// Its settings, written to its file before each run.
    pub settings: Settings,
    /// A folder of programs that it finds before those of the system.
    pub path: Option<PathBuf>,
    programs: Programs,
    folder: PathBuf,
    show_progress: bool,
}

/// A backup and what its disk was then.
#[derive(Debug, Clone)]
pub struct Taken {
    /// Id of the snapshot.
    pub snapshot: String,
    /// Its server.
    pub server: String,
    /// A copy of the disk.
    pub copy: PathBuf,
}

/// A client that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
    output: PathBuf,
}

/// A client that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// What it printed on stdout.
    pub stdout: String,
    /// What it printed on stderr; empty when that went to the terminal.
    pub stderr: String,
    /// CPU time and peak memory.
    pub used: Used,
    /// Wall time.
    pub seconds: f64,
}

impl Client {
    pub(super) fn new(programs: Programs, folder: PathBuf, settings: Settings) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { settings, path: None, programs, folder, show_progress: false })
    }

    /// Lets the program draw its progress when we are on a terminal.
    pub fn show_progress(&mut self) {
        self.show_progress = std::io::stderr().is_terminal();
    }

    /// Its settings file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("client.toml")
    }

    /// Its cache folder.
    pub fn cache(&self) -> PathBuf {
        self.folder.join("cache")
    }

    /// A second client of the same machine: own settings file, cache and certificate paths as in `self`.
    ///
    /// # Errors
    /// When its folder can't be made.
    pub fn twin(&self, name: &str) -> Result<Self> {
        let folder = self.folder.with_file_name(name);
        let mut twin = Self::new(self.programs.clone(), folder, self.settings.clone())?;
        twin.settings.set("cache_path", twin.cache().to_string_lossy());
        Ok(twin)
    }

    /// Starts `janus-client ARGUMENTS --config FILE`.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(&self, arguments: &[&str]) -> Result<Running> {
        self.start_with(arguments, Stdio::null())
    }

    fn start_with(&self, arguments: &[&str], input: Stdio) -> Result<Running> {
        self.settings.write(&self.config())?;
        let output = tempfile::Builder::new().prefix("run-").tempdir_in(&self.folder)?.keep();
        let mut command: Command = self.programs.client();
        command.args(arguments).arg("--config").arg(self.config()).stdin(input);
        if let Some(path) = &self.path {
            let system = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{system}", path.display()));
        }
        command.stdout(File::create(output.join("stdout"))?);
        let on_terminal = self.show_progress && std::io::stderr().is_terminal();
        command.stderr(if on_terminal {
            Stdio::inherit()
        } else {
            File::create(output.join("stderr"))?.into()
        });
        let started = Instant::now();
        let child = command.spawn().context("start janus-client")?;
        process::started(&child);
        Ok(Running { child, started, output })
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it can't be started or waited for; a failed run is no error here.
    pub fn run(&self, arguments: &[&str]) -> Result<Finished> {
        self.start(arguments)?.wait()
    }

    /// Runs it to its end with this on its standard input.
    ///
    /// # Errors
    /// As [`Client::run`].
    pub fn run_with_input(&self, arguments: &[&str], input: &str) -> Result<Finished> {
        let mut file = tempfile::tempfile_in(&self.folder)?;
        file.write_all(input.as_bytes())?;
        file.rewind()?;
        self.start_with(arguments, file.into())?.wait()
    }

    /// Runs it with `--json`; it must succeed.
    ///
    /// # Errors
    /// When it fails or prints something else than expected.
    pub fn answer<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--json"]).collect();
        self.run(&arguments)?.answer()
    }

    /// Backs up all disks of the settings.
    ///
    /// # Errors
    /// When the backup fails.
    pub fn backup(&self) -> Result<answers::Backup> {
        self.answer(&["backup"])
    }

    /// Backs up the one disk of the settings, and copies it into `folder` as it is now.
    ///
    /// # Errors
    /// When the backup fails, or the copy.
    pub fn backup_and_copy(&self, disk: &Path, folder: &Path) -> Result<Taken> {
        let answers::Backup { server, disks, .. } = self.backup()?;
        let snapshot = disks.into_iter().next().context("no disk")?.snapshot_id;
        let copy = folder.join(format!("copy-{snapshot}"));
        disk::copy(disk, &copy)?;
        Ok(Taken { snapshot, server, copy })
    }

    /// Lists this machine's snapshots.
    ///
    /// # Errors
    /// When that fails.
    pub fn list(&self) -> Result<answers::List> {
        self.answer(&["list"])
    }

    /// Restores a disk's newest snapshot, or the snapshot with this id, into a new file.
    ///
    /// # Errors
    /// When the restore fails.
    pub fn restore(&self, what: &str, to: &Path) -> Result<answers::Restore> {
        self.answer(&["restore", what, "--to", &to.to_string_lossy()])
    }

    /// How the servers stand.
    ///
    /// # Errors
    /// When that fails.
    pub fn status(&self) -> Result<answers::Status> {
        self.answer(&["status"])
    }

    /// Runs it with `--json`; it must fail with one clear line.
    ///
    /// # Errors
    /// When it succeeds, or its answer isn't one object with one line that equals its exit code.
    pub fn failure(&self, arguments: &[&str]) -> Result<answers::Failure> {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--json"]).collect();
        let finished = self.run(&arguments)?;
        ensure!(finished.code.is_some_and(|code| code != 0), "succeeded: {}", finished.stdout);
        let failure: answers::Failure = serde_json::from_str(finished.answer_line())
            .with_context(|| format!("not an answer: {finished:?}"))?;
        ensure!(
            Some(failure.exit_code) == finished.code,
            "exit code {:?}: {failure:?}",
            finished.code
        );
        ensure!(!failure.error.contains('\n'), "more than one line: {failure:?}");
        Ok(failure)
    }
}

impl Running {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it at once.
    pub fn kill(&self) {
        process::signal(self.pid(), Signal::KILL);
    }

    /// Asks it to end, as Ctrl-C does.
    pub fn interrupt(&self) {
        process::signal(self.pid(), Signal::INT);
    }

    /// True when it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.output.join("stderr")).unwrap_or_default()
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.output.join("stdout")).unwrap_or_default()
    }

    /// Suspends it.
    pub fn freeze(&self) {
        process::signal(self.pid(), Signal::STOP);
    }

    /// Goes on after `freeze`.
    pub fn thaw(&self) {
        process::signal(self.pid(), Signal::CONT);
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When waiting fails, or it hangs: after ten minutes, if `JANUS_SOAK` isn't set.
    pub fn wait(mut self) -> Result<Finished> {
        let longest = std::env::var_os("JANUS_SOAK").map_or(LONGEST, |_| Duration::MAX);
        let waited = measure::wait(&mut self.child, self.started, longest);
        let (status, used, took) = waited.with_context(|| self.log())?;
        process::ended(&self.child);
        let read = |name: &str| fs::read_to_string(self.output.join(name)).unwrap_or_default();
        let (stdout, stderr) = (read("stdout"), read("stderr"));
        let _ = fs::remove_dir_all(&self.output);
        Ok(Finished { code: status.code(), stdout, stderr, used, seconds: took.as_secs_f64() })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.kill();
            let _ = self.child.wait();
        }
        process::ended(&self.child);
    }
}

impl Finished {
    /// The last line that it printed: with `--json`, events may come before it.
    pub fn answer_line(&self) -> &str {
        self.stdout.lines().last().unwrap_or_default()
    }

    /// The answer of a run that succeeded.
    ///
    /// # Errors
    /// When it did not, or printed something else.
    pub fn answer<T: DeserializeOwned>(&self) -> Result<T> {
        if self.code != Some(0) {
            let said = if self.stderr.is_empty() { &self.stdout } else { &self.stderr };
            let failure: Option<answers::Failure> = serde_json::from_str(self.answer_line()).ok();
            let why = failure.map_or_else(|| said.trim().to_owned(), |failure| failure.error);
            bail!("janus-client ended with code {:?}: {why}", self.code);
        }
        serde_json::from_str(self.answer_line())
            .with_context(|| format!("not the expected answer: {}", self.stdout.trim()))
    }
}
