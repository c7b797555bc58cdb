//! `cargo xtask test`: everything that CI runs, in groups with a time budget each.
//!
//! CI runs exactly this. A group that fails doesn't stop the others: the table at the end says all that is wrong.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use xtask::packages;

mod groups;
mod matrix;
mod programs;
mod run;
mod steps;
mod tidy;
mod tools;

use groups::GROUPS;
use run::Counts;
use steps::Runner;

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave out what takes longest: kill rounds, the simulation, the demo, foreign clients
    #[arg(long, conflicts_with = "soak")]
    quick: bool,
    /// More rounds and larger disks
    #[arg(long)]
    soak: bool,
    /// Only these groups (may be repeated): build, store, security, janus, main-job, sources, client, restore, seeding
    #[arg(long)]
    group: Vec<String>,
}

/// The row of the time in which nothing was left but what runs beside other steps.
const BESIDE: &str = "beside";
const BESIDE_MINUTES: u64 = 2;

struct Row {
    name: &'static str,
    counts: Counts,
    took: Duration,
    budget: Duration,
}

/// Runs the groups and prints their table; the last line is `N passed, N failed`.
///
/// # Errors
/// When something failed, or with `CI` set in the environment when all groups together took longer than their budgets. A group
/// that alone did is named: another one's minutes served it.
pub fn run(args: &Args) -> Result<()> {
    if let Some(unknown) =
        args.group.iter().find(|name| !GROUPS.iter().any(|group| group.name == **name))
    {
        let known: Vec<_> = GROUPS.iter().map(|group| group.name).collect();
        bail!("no group {unknown}; there are {}", known.join(", "));
    }
    std::env::set_current_dir(xtask::site::workspace())?;
    packages::require(packages::TEST_TOOLS)?;
    let mut runner = Runner::new(args.quick, args.soak);
    let factor = if args.soak { 600 } else { 60 };
    let mut rows = Vec::new();
    for group in GROUPS
        .iter()
        .filter(|group| args.group.is_empty() || args.group.iter().any(|name| name == group.name))
    {
        println!("\n== {}", group.name);
        let started = Instant::now();
        runner.group = group.name;
        (group.run)(&mut runner);
        let (took, budget) =
            (started.elapsed(), Duration::from_secs(group.budget_minutes * factor));
        rows.push(Row { name: group.name, counts: Counts::default(), took, budget });
    }
    println!("\n== {BESIDE}");
    let took = runner.wait();
    // What ran beside others counts in its group.
    for row in &mut rows {
        row.counts = runner.counts(row.name);
    }
    let budget = Duration::from_secs(BESIDE_MINUTES * factor);
    rows.push(Row { name: BESIDE, counts: Counts::default(), took, budget });
    runner.show_longest();
    report(&rows, &runner.failures)
}

fn report(rows: &[Row], failures: &[String]) -> Result<()> {
    println!("\n{:<10} {:>7} {:>7} {:>9} {:>9}", "group", "passed", "failed", "minutes", "budget");
    let minutes = |time: Duration| time.as_secs_f64() / 60.0;
    let mut late = Vec::new();
    let mut total = Counts::default();
    for row in rows {
        let (took, budget) = (minutes(row.took), minutes(row.budget));
        println!(
            "{:<10} {:>7} {:>7} {took:>9.1} {budget:>9.0}",
            row.name, row.counts.passed, row.counts.failed
        );
        total.add(row.counts);
        if row.took > row.budget {
            late.push(row.name);
        }
    }
    let (took, budget): (Duration, Duration) =
        (rows.iter().map(|row| row.took).sum(), rows.iter().map(|row| row.budget).sum());
    println!("{:>36.1} {:>9.0}", minutes(took), minutes(budget));
    for failure in failures {
        println!("FAILED: {failure}");
    }
    if !late.is_empty() {
        println!("over budget: {}", late.join(", "));
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    ensure!(total.failed == 0 && failures.is_empty(), "tests failed");
    // Other machines are slower than the one that the budgets are for: twice as much is too much anywhere.
    ensure!(
        took <= budget * 2 || std::env::var_os("CI").is_none(),
        "the tests took {} minutes, more than the {} of their budgets",
        took.as_secs() / 60,
        budget.as_secs() / 60
    );
    Ok(())
}
