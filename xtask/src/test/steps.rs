//! Running cargo, test programs and checks, and counting what they say.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};

use super::programs::{self, Target, TestProgram};
use crate::site::{PROGRAMS_VARIABLE, cargo, target};

/// Tests, or checks, by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub passed: u64,
    pub failed: u64,
}

/// Runs steps and remembers what failed.
#[derive(Debug, Default)]
pub(super) struct Runner {
    pub quick: bool,
    pub failures: Vec<String>,
    /// With more rounds and larger disks.
    pub soak: bool,
    counts: Counts,
    /// Compiled at the first need.
    programs: Option<Vec<TestProgram>>,
}

impl Runner {
    pub fn new(quick: bool, soak: bool) -> Self {
        Self { quick, soak, ..Self::default() }
    }

    /// True for tests that print a seed or figures worth a log line.
    pub fn shows_figures(&self, name: &str) -> bool {
        self.soak || matches!(name, "kills" | "simulation" | "redteam" | "hardening")
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
        self.count(name, cargo);
    }

    /// Compiles all test programs at once, unless it was done.
    pub fn compile_tests(&mut self) {
        if self.programs.is_none() {
            println!("-- programs and tests: cargo test --workspace --no-run");
            let (found, compiled) = programs::compile();
            self.programs = Some(found);
            match compiled {
                Ok(()) => self.counts.passed += 1,
                Err(error) => self.fail(format!("programs and tests: {error:#}")),
            }
        }
    }

    /// Runs the tests of a package (its folder).
    pub fn tests(&mut self, package: &str, target: Target, arguments: &[&str]) {
        let name = match target {
            Target::Lib => format!("unit tests of {package}"),
            Target::Bins => format!("unit tests of the programs of {package}"),
            Target::Tests => format!("{package}/tests"),
            Target::Test(name) => format!("{package}/tests/{name}"),
        };
        println!("-- {name} {}", arguments.join(" "));
        self.compile_tests();
        let commands =
            programs::commands(self.programs.as_deref().unwrap_or_default(), package, target);
        if commands.is_empty() {
            self.fail(format!("{name}: there are none"));
        }
        for mut command in commands {
            command.args(arguments);
            self.count(&name, command);
        }
    }

    fn count(&mut self, name: &str, mut command: Command) {
        if self.soak {
            command.env("JANUS_SOAK", "1");
        }
        command.env(PROGRAMS_VARIABLE, target().join("debug"));
        match counted(&mut command) {
            Ok((true, counts)) if counts == Counts::default() => self.counts.passed += 1,
            Ok((true, counts)) => self.add(counts),
            Ok((false, counts)) => {
                self.add(counts);
                if counts.failed == 0 {
                    self.counts.failed += 1;
                }
                self.failures.push(format!("{name}: {command:?}"));
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
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("run {command:?}"))?;
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
