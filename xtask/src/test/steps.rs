//! Running cargo and checks, and counting what they say.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};

use crate::site::{PROGRAMS_VARIABLE, cargo, target};

/// Tests, or checks, by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub passed: u64,
    pub failed: u64,
}

/// Runs steps and remembers what failed.
pub(super) struct Runner {
    pub quick: bool,
    pub failures: Vec<String>,
    /// With more rounds and larger disks.
    pub soak: bool,
    counts: Counts,
}

impl Runner {
    pub fn new(quick: bool, soak: bool) -> Result<Self> {
        Ok(Self { quick, soak, failures: Vec::new(), counts: Counts::default() })
    }

    /// True for tests that print a seed or figures worth a log line.
    pub fn shows_figures(&self, name: &str) -> bool {
        self.soak || matches!(name, "kills" | "simulation")
    }

    pub fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    /// A check counts as one test.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        println!("-- {name}");
        match check() {
            Ok(()) => self.counts.passed += 1,
            Err(error) => self.fail(format!("{name}: {error:#}")),
        }
    }

    pub fn cargo(&mut self, name: &str, arguments: &[&str]) {
        self.cargo_with(name, arguments, &[]);
    }

    /// Runs cargo. The tests it ran are counted; a run without tests counts as one.
    pub fn cargo_with(&mut self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) {
        println!("-- {name}: cargo {}", arguments.join(" "));
        let mut cargo = cargo();
        cargo.args(arguments).envs(environment.iter().copied());
        if self.soak {
            cargo.env("JANUS_SOAK", "1");
        }
        let programs = target().join("debug");
        if programs.join("janus-client").is_file() {
            cargo.env(PROGRAMS_VARIABLE, programs);
        }
        match counted(&mut cargo) {
            Ok((true, counts)) if counts == Counts::default() => self.counts.passed += 1,
            Ok((true, counts)) => self.add(counts),
            Ok((false, counts)) => {
                self.add(counts);
                if counts.failed == 0 {
                    self.counts.failed += 1;
                }
                self.failures.push(format!("{name}: cargo {}", arguments.join(" ")));
            }
            Err(error) => self.fail(format!("{name}: {error:#}")),
        }
    }

    fn add(&mut self, counts: Counts) {
        self.counts.passed += counts.passed;
        self.counts.failed += counts.failed;
    }

    fn fail(&mut self, why: String) {
        println!("FAILED: {why}");
        self.counts.failed += 1;
        self.failures.push(why);
    }
}

/// Runs a command, shows its output and sums up its `test result:` lines.
fn counted(command: &mut Command) -> Result<(bool, Counts)> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("run cargo")?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        if let Some(result) = parse(&line) {
            counts.passed += result.passed;
            counts.failed += result.failed;
        }
        println!("{line}");
    }
    Ok((child.wait()?.success(), counts))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_cargo_test_are_summed() {
        let line = "test result: FAILED. 31 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(parse(line), Some(Counts { passed: 31, failed: 2 }));
        assert_eq!(parse("test names ... ok"), None);
    }
}
