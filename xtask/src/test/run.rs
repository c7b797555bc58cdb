//! Running one command of a test run: what it says, what its tests came to, and what it took.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use xtask::measure;

/// So much of how a failed test ended is told again at the end.
const MESSAGE_LINES: usize = 5;
const MESSAGE_BYTES: usize = 300;

/// Tests, or checks, by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub passed: u64,
    pub failed: u64,
}

impl Counts {
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// A command to run.
#[derive(Debug)]
pub(super) struct Job {
    pub name: String,
    /// The group in whose row its tests are counted.
    pub group: &'static str,
    pub command: Command,
}

/// What came of a job.
#[derive(Debug)]
pub(super) struct Ended {
    pub job: Job,
    /// Whether it succeeded, and the sum of its `test result:` lines.
    pub outcome: Result<(bool, Counts)>,
    pub took: Took,
    /// What it said.
    pub output: String,
}

/// What a step took.
#[derive(Debug, Clone)]
pub(super) struct Took {
    pub name: String,
    pub wall: Duration,
    /// Of all its processes.
    pub cpu_seconds: f64,
    /// It ran beside other steps.
    pub is_beside: bool,
}

impl Job {
    /// Runs it and shows what it says.
    pub fn run(self) -> Ended {
        self.end(false, |command, counts| {
            let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
            let stdout = child.stdout.take().context("stdout is piped")?;
            let output = read(stdout, counts, |line| println!("{line}"));
            Ok((measure::wait_for_all(&mut child)?, output))
        })
    }

    /// Runs it, if wished at the lowest priority, and keeps what it says.
    fn run_beside(self, is_idle: bool) -> Ended {
        self.end(true, |command, counts| {
            let (mut said, output) = std::io::pipe()?;
            let mut beside = again(command, if is_idle { &["chrt", "--idle", "0"] } else { &[] });
            beside.stdout(output.try_clone()?).stderr(output);
            let mut child = beside.spawn()?;
            // It holds ends of the pipe, which would never end.
            drop(beside);
            let output = read(&mut said, counts, |_| ());
            Ok((measure::wait_for_all(&mut child)?, output))
        })
    }

    fn end(
        mut self,
        is_beside: bool,
        run: impl FnOnce(&mut Command, &mut Counts) -> Result<((std::process::ExitStatus, f64), String)>,
    ) -> Ended {
        let started = Instant::now();
        let mut counts = Counts::default();
        let ran =
            run(&mut self.command, &mut counts).with_context(|| format!("run {:?}", self.command));
        let mut took =
            Took { name: self.name.clone(), wall: started.elapsed(), cpu_seconds: 0.0, is_beside };
        let mut output = String::new();
        let outcome = ran.map(|((status, cpu_seconds), said)| {
            took.cpu_seconds = cpu_seconds;
            output = said;
            (status.success(), counts)
        });
        Ended { job: self, outcome, took, output }
    }
}

fn read(said: impl Read, counts: &mut Counts, show: impl Fn(&str)) -> String {
    let mut output = String::new();
    for line in BufReader::new(said).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        counts.add(parse(&line).unwrap_or_default());
        show(&line);
        output.push_str(&line);
        output.push('\n');
    }
    output
}

/// The same command, with others before it.
fn again(command: &Command, before: &[&str]) -> Command {
    let mut words = before.iter().map(OsStr::new).chain([command.get_program()]);
    let mut again = Command::new(words.next().unwrap_or_default());
    again.args(words).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => again.env(name, value),
            None => again.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        again.current_dir(folder);
    }
    again
}

/// Jobs that run beside the steps, one after the other.
///
/// The tests of whole systems mostly wait: for deadlines, for a silence to be long enough. A lane of others that wait, and
/// one of work for idle processors, fill that time.
#[derive(Debug)]
pub(super) struct Lane {
    jobs: mpsc::Sender<Job>,
    ended: mpsc::Receiver<Ended>,
    /// Jobs that haven't been taken from `ended`.
    open: usize,
}

impl Lane {
    /// With `is_idle` its jobs get processors that nobody else wants, so that whoever looks at times isn't disturbed.
    pub fn new(is_idle: bool) -> Self {
        let (jobs, to_do) = mpsc::channel::<Job>();
        let (done, ended) = mpsc::channel();
        thread::spawn(move || {
            for job in to_do {
                if done.send(job.run_beside(is_idle)).is_err() {
                    return;
                }
            }
        });
        Self { jobs, ended, open: 0 }
    }

    pub fn add(&mut self, job: Job) {
        // The thread lives as long as we do.
        self.open += usize::from(self.jobs.send(job).is_ok());
    }

    /// The next one that has ended, in the order in which they were added.
    pub fn ended(&mut self) -> Option<Ended> {
        let ended = self.ended.try_recv().ok()?;
        self.open -= 1;
        Some(ended)
    }

    /// Waits for the next one; `None` when there is none left.
    pub fn wait(&mut self) -> Option<Ended> {
        self.open = self.open.checked_sub(1)?;
        self.ended.recv().ok()
    }
}

/// Reads a line such as `test result: ok. 4 passed; 0 failed; 0 ignored; ...`.
fn parse(line: &str) -> Option<Counts> {
    let words: Vec<_> = line.strip_prefix("test result: ")?.split([' ', ';']).collect();
    let before = |word: &str| {
        let at = words.iter().position(|other| *other == word)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    Some(Counts { passed: before("passed")?, failed: before("failed")? })
}

/// The tests that failed by libtest's `output`, with how each ended if that was kept, without the frames of backtraces.
pub(super) fn failed_tests(output: &str) -> Vec<String> {
    let Some((_, names)) = output.rsplit_once("\nfailures:\n") else { return Vec::new() };
    let names = names.lines().map_while(|line| line.strip_prefix("    "));
    names
        .map(|name| {
            let said = output.split_once(&format!("---- {name} stdout ----\n"));
            let mut lines = vec![name];
            lines.extend(said.into_iter().flat_map(|(_, said)| how_it_ended(said)));
            lines.join("\n    ")
        })
        .collect()
}

/// The lines of the first panic or error in what a test said.
fn how_it_ended(said: &str) -> impl Iterator<Item = &str> {
    said.lines()
        .take_while(|line| !line.starts_with("---- "))
        .skip_while(|line| !line.contains(" panicked at ") && !line.starts_with("Error: "))
        .take_while(|line| *line != "stack backtrace:" && !line.starts_with("note: "))
        .take_while(|line| !line.is_empty())
        .take(MESSAGE_LINES)
        .map(|line| line.get(..MESSAGE_BYTES).unwrap_or(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_cargo_test_are_summed() {
        let line = "test result: FAILED. 31 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(parse(line), Some(Counts { passed: 31, failed: 2 }));
        assert_eq!(parse("test names ... ok"), None);
    }

    #[test]
    fn failed_tests_say_how_they_ended() {
        let output = "\
test a::works ... ok
test a::panics ... FAILED
test a::ends ... FAILED
test a::shown ... FAILED

failures:

---- a::panics stdout ----
a figure

thread 'a::panics' (7) panicked at src/a.rs:3:5:
assertion failed: 1 == 2
stack backtrace:
   0: main
             at ./src/a.rs:3:5

---- a::ends stdout ----
Error: \"no disk\"


failures:
    a::panics
    a::ends
    a::shown

test result: FAILED. 1 passed; 3 failed; 0 ignored
";
        let panics = "a::panics\n    thread 'a::panics' (7) panicked at src/a.rs:3:5:\n    assertion failed: 1 == 2";
        assert_eq!(failed_tests(output), [panics, "a::ends\n    Error: \"no disk\"", "a::shown"]);
        assert!(failed_tests("error: could not compile").is_empty());
    }

    fn job(name: &str, script: &str) -> Job {
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("GIVEN", "7").current_dir("/");
        Job { name: name.to_owned(), group: "store", command }
    }

    #[test]
    fn jobs_beside_end_in_their_order_with_all_they_said() {
        let mut beside = Lane::new(true);
        let result = "echo test result: FAILED. 3 passed\\; 1 failed\\; 0 ignored";
        beside.add(job("slow", &format!("sleep 0.3; {result}; chrt -p $$ >&2; exit 1")));
        beside.add(job("fast", "echo $GIVEN in $PWD"));
        assert!(beside.ended().is_none());

        let slow = beside.wait().unwrap();
        assert_eq!((slow.job.name.as_str(), slow.job.group), ("slow", "store"));
        assert_eq!(slow.outcome.unwrap(), (false, Counts { passed: 3, failed: 1 }));
        assert!(slow.output.contains("SCHED_IDLE"), "{}", slow.output);
        assert!(slow.took.is_beside && slow.took.wall >= Duration::from_millis(300));

        let fast = beside.wait().unwrap();
        assert_eq!(fast.output, "7 in /\n");
        assert_eq!(fast.outcome.unwrap(), (true, Counts::default()));
        assert!(beside.wait().is_none());
    }

    #[test]
    fn only_an_idle_lane_is_idle() {
        let mut beside = Lane::new(false);
        beside.add(job("usual", "chrt -p $$"));
        let output = beside.wait().unwrap().output;
        assert!(output.contains("SCHED_OTHER"), "{output}");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let command = Command::new("/no/such/program");
        let job = Job { name: "none".to_owned(), group: "store", command };
        assert!(job.run().outcome.is_err());
    }
}
