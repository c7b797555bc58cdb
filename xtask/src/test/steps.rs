//! Steps of a test run: cargo, test programs and checks; what they came to and what they took.

use std::{
    collections::BTreeMap,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    programs::{self, Target, TestProgram},
    run::{self, Counts, Ended, Job, Lane, Took},
};
use xtask::{
    measure,
    site::{PROGRAMS_VARIABLE, cargo, target},
};

/// How many steps the table of the longest has.
const LONGEST: usize = 15;

/// Packages and test programs whose lines are shown at their end: so many faults were tried, so fast was it.
const SAYING: &[(&str, &str)] = &[
    ("server", "/faults"),
    ("server", "/merge_faults"),
    ("server", "/vhd_merge_faults"),
    ("server", "/relocation"),
    ("server", "/histories"),
    ("client", "/caches"),
    ("client", "/links"),
    ("client", "/networks"),
];

/// When a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Now; the next step waits for it.
    Now,
    /// Beside the steps that follow, at usual priority. For what hardly needs a processor and isn't about speed.
    Beside,
    /// Beside them, in time that they leave. For what needs processors and doesn't look at times.
    Idle,
}

/// Runs steps and remembers what failed.
#[derive(Debug)]
pub(super) struct Runner {
    pub quick: bool,
    pub failures: Vec<String>,
    /// With more rounds and larger disks.
    pub soak: bool,
    /// The group to which steps belong.
    pub group: &'static str,
    counts: BTreeMap<&'static str, Counts>,
    /// Compiled at the first need.
    programs: Option<Vec<TestProgram>>,
    beside: Lane,
    idle: Lane,
    times: Vec<Took>,
}

impl Runner {
    pub fn new(quick: bool, soak: bool) -> Self {
        Self {
            quick,
            soak,
            failures: Vec::new(),
            group: "",
            counts: BTreeMap::new(),
            programs: None,
            beside: Lane::new(false),
            idle: Lane::new(true),
            times: Vec::new(),
        }
    }

    /// True for tests whose lines are shown while they come: they print a seed or figures worth a log line.
    pub fn shows_figures(&self, name: &str) -> bool {
        self.soak || matches!(name, "kills" | "simulation" | "redteam" | "hardening")
    }

    pub fn counts(&self, group: &str) -> Counts {
        self.counts.get(group).copied().unwrap_or_default()
    }

    /// A check counts as one test.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        self.begin(name, "");
        match self.timed(name, check) {
            Ok(()) => self.add(self.group, Counts { passed: 1, failed: 0 }),
            Err(error) => self.fail(self.group, format!("{name}: {error:#}")),
        }
    }

    /// Runs cargo. The tests it ran are counted; a run without tests counts as one.
    pub fn cargo(
        &mut self,
        when: When,
        name: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) {
        let mut cargo = cargo();
        cargo.args(arguments).envs(environment.iter().copied());
        self.run(when, name.to_owned(), &format!("cargo {}", arguments.join(" ")), cargo);
    }

    /// Compiles all test programs at once, unless it was done.
    pub fn compile_tests(&mut self) {
        if self.programs.is_none() {
            let name = "programs and tests";
            self.begin(name, "cargo test --workspace --no-run");
            let (found, compiled) = self.timed(name, programs::compile);
            self.programs = Some(found);
            match compiled {
                Ok(()) => self.add(self.group, Counts { passed: 1, failed: 0 }),
                Err(error) => self.fail(self.group, format!("{name}: {error:#}")),
            }
        }
    }

    /// Runs the tests of a package (its folder).
    pub fn tests(&mut self, when: When, package: &str, target: Target, arguments: &[&str]) {
        self.compile_tests();
        let commands =
            programs::commands(self.programs.as_deref().unwrap_or_default(), package, target);
        if commands.is_empty() {
            self.fail(self.group, format!("{target:?} of {package}: there are no tests"));
        }
        for (name, mut command) in commands {
            command.args(arguments);
            // Libtest keeps what tests say that pass.
            if SAYING.iter().any(|(of, test)| *of == package && name.ends_with(test)) {
                command.arg("--show-output");
            }
            self.run(when, name, &arguments.join(" "), command);
        }
    }

    fn run(&mut self, when: When, name: String, what: &str, mut command: Command) {
        if self.soak {
            command.env("JANUS_SOAK", "1");
        }
        command.env(PROGRAMS_VARIABLE, target().join("debug"));
        let job = Job { name, group: self.group, command };
        match when {
            When::Now => {
                self.begin(&job.name, what);
                self.ended(job.run());
            }
            When::Beside => self.beside.add(job),
            When::Idle => self.idle.add(job),
        }
    }

    /// Shows what has ended beside us, then the name of the step that begins.
    fn begin(&mut self, name: &str, what: &str) {
        while let Some(ended) = self.beside.ended().or_else(|| self.idle.ended()) {
            self.ended(ended);
        }
        println!("-- {}", format!("{name} {what}").trim_end());
    }

    fn timed<T>(&mut self, name: &str, step: impl FnOnce() -> T) -> T {
        let (started, before) = (Instant::now(), measure::our_cpu_seconds());
        let came_of_it = step();
        self.took(Took {
            name: name.to_owned(),
            wall: started.elapsed(),
            cpu_seconds: measure::our_cpu_seconds() - before,
            is_beside: false,
        });
        came_of_it
    }

    fn ended(&mut self, ended: Ended) {
        let Ended { job: Job { name, group, command }, outcome, took, output } = ended;
        if took.is_beside {
            println!("-- {name} (ran beside others)\n{}", output.trim_end());
        }
        match outcome {
            Ok((true, counts)) if counts == Counts::default() => {
                self.add(group, Counts { passed: 1, failed: 0 });
            }
            Ok((true, counts)) => self.add(group, counts),
            Ok((false, counts)) => {
                let failed = counts.failed.max(1);
                self.add(group, Counts { failed, ..counts });
                self.failures.push(format!("{name}: {command:?}"));
                self.failures.extend(run::failed_tests(&output));
            }
            Err(error) => self.fail(group, format!("{name}: {error:#}")),
        }
        self.took(took);
    }

    fn took(&mut self, took: Took) {
        println!("   {} took {}", took.name, took.figures());
        self.times.push(took);
    }

    /// Waits for all that runs beside us; returns how long that took.
    pub fn wait(&mut self) -> Duration {
        let started = Instant::now();
        while let Some(ended) = self.beside.wait().or_else(|| self.idle.wait()) {
            self.ended(ended);
        }
        started.elapsed()
    }

    /// The steps that took longest.
    pub fn show_longest(&mut self) {
        self.times.sort_by_key(|took| std::cmp::Reverse(took.wall));
        println!("\n{:>8} {:>8}  the longest steps", "seconds", "of CPU");
        for took in self.times.iter().take(LONGEST) {
            let beside = if took.is_beside { " (beside others)" } else { "" };
            println!(
                "{:>8.1} {:>8.1}  {}{beside}",
                took.wall.as_secs_f64(),
                took.cpu_seconds,
                took.name
            );
        }
        let total: f64 = self.times.iter().map(|took| took.cpu_seconds).sum();
        println!("{total:>17.1}  all steps");
    }

    fn add(&mut self, group: &'static str, counts: Counts) {
        self.counts.entry(group).or_default().add(counts);
    }

    fn fail(&mut self, group: &'static str, why: String) {
        println!("FAILED: {why}");
        self.add(group, Counts { passed: 0, failed: 1 });
        self.failures.push(why);
    }
}

impl Took {
    fn figures(&self) -> String {
        format!("{:.1} s, {:.1} s of CPU", self.wall.as_secs_f64(), self.cpu_seconds)
    }
}
