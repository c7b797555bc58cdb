//! The groups: what belongs to which, and how many minutes it may take.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};

use super::{
    matrix,
    programs::Target,
    steps::{Runner, When},
    tidy, tools,
};
use xtask::{bindings, packages};

/// A part of the test run.
pub(super) struct Group {
    pub name: &'static str,
    pub budget_minutes: u64,
    pub run: fn(&mut Runner),
}

pub(super) const GROUPS: &[Group] = &[
    Group { name: "build", budget_minutes: 10, run: build },
    Group { name: "main-job", budget_minutes: 5, run: main_job },
    Group { name: "janus", budget_minutes: 5, run: janus },
    Group { name: "store", budget_minutes: 5, run: store },
    Group { name: "sources", budget_minutes: 4, run: sources },
    Group { name: "client", budget_minutes: 4, run: client },
    Group { name: "restore", budget_minutes: 3, run: restore },
    Group { name: "seeding", budget_minutes: 2, run: seeding },
    Group { name: "security", budget_minutes: 4, run: security },
];

/// Modules of the client that belong to group `sources`.
const SOURCE_MODULES: &[&str] = &[
    "source::",
    "scan::",
    "delta::",
    "journal::",
    "reading::",
    "ranges::",
    "nbd::",
    "fs::",
    "frozen::",
    "volume::",
];
/// Those of group `restore`; the last stands there since minutes are left.
const RESTORE_MODULES: &[&str] =
    &["restore::", "export::", "snapshot::", "browse::", "cache::tests::size"];
/// Whole-system tests that belong to another group than `main-job`. Some stand where minutes are left, not where their subject is.
const QEMU: &str = "qemu-system-x86_64";

const PLACED: &[(&str, &str)] = &[
    ("admin", "store"),
    ("archive", "seeding"),
    ("caches", "restore"),
    ("carried", "seeding"),
    ("damage", "restore"),
    ("files", "restore"),
    ("frozen", "sources"),
    ("vhd", "restore"),
    ("guard", "security"),
    ("hardening", "security"),
    ("hostile", "sources"),
    ("links", "client"),
    ("nbd", "sources"),
    ("nbd_export", "restore"),
    ("networks", "security"),
    ("packages", "sources"),
    ("prove", "seeding"),
    ("reasons", "security"),
    ("redteam", "security"),
    ("ntfs", "sources"),
    ("reading", "sources"),
    ("resilience", "client"),
    ("restores", "restore"),
    ("schedule", "client"),
    ("seeding", "seeding"),
    ("tables", "seeding"),
    ("simulation", "janus"),
    ("thinning_kills", "restore"),
    ("spans", "client"),
    ("foreign_clients", "restore"),
    ("refusals", "security"),
    ("identity", "security"),
    ("sealed", "security"),
];
/// Whole-system tests that `--quick` leaves out.
const SLOW: &[&str] =
    &["kills", "links", "foreign_clients", "page", "simulation", "thinning_kills"];

fn build(runner: &mut Runner) {
    runner.cargo(When::Now, "format", &["fmt", "--all", "--check"], &[]);
    let clippy = "clippy --workspace --all-targets --features xtask/load -- -D warnings";
    runner.cargo(When::Now, "clippy", &clippy.split(' ').collect::<Vec<_>>(), &[]);
    runner.cargo(
        When::Now,
        "docs",
        &["doc", "--workspace", "--no-deps"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    );
    runner.check("committed bindings", bindings::check);
    runner.check("buf lint", tools::buf_lint);
    runner.check("tidy", tidy::check);
    let advisories = runner.soak;
    runner.check("crates (cargo-deny)", || tools::deny(advisories));
    runner.check("failure matrix", matrix::check);
    runner.compile_tests();
    runner.cargo(When::Now, "examples in docs", &["test", "--workspace", "--doc"], &[]);
}

fn main_job(runner: &mut Runner) {
    for target in [Target::Lib, Target::Bins] {
        runner.tests(When::Now, "xtask", target, &without_root(&[]));
    }
    for name in whole_system_tests(runner) {
        if PLACED.iter().all(|(placed, _)| *placed != name) {
            whole_system(runner, &name);
        }
    }
    if !runner.quick {
        runner.check("demo", demo);
    }
}

fn janus(runner: &mut Runner) {
    package(runner, "janus");
    placed(runner, "janus");
}

fn store(runner: &mut Runner) {
    package(runner, "server");
    placed(runner, "store");
}

fn sources(runner: &mut Runner) {
    runner.tests(When::Now, "client", Target::Lib, SOURCE_MODULES);
    placed(runner, "sources");
}

fn client(runner: &mut Runner) {
    let others = SOURCE_MODULES.iter().chain(RESTORE_MODULES);
    let arguments: Vec<_> = others.flat_map(|module| ["--skip", module]).collect();
    runner.tests(When::Now, "client", Target::Lib, &arguments);
    runner.tests(When::Now, "client", Target::Bins, &[]);
    placed(runner, "client");
}

fn restore(runner: &mut Runner) {
    runner.tests(When::Now, "client", Target::Lib, RESTORE_MODULES);
    placed(runner, "restore");
}

fn seeding(runner: &mut Runner) {
    placed(runner, "seeding");
}

fn security(runner: &mut Runner) {
    for target in [Target::Lib, Target::Tests] {
        runner.tests(When::Now, "proto", target, &[]);
    }
    placed(runner, "security");
}

fn placed(runner: &mut Runner, group: &str) {
    let here = whole_system_tests(runner);
    for (name, _) in PLACED
        .iter()
        .filter(|(name, place)| *place == group && here.iter().any(|test| test == name))
    {
        whole_system(runner, name);
    }
}

/// All tests of a package.
fn package(runner: &mut Runner, name: &str) {
    for target in [Target::Lib, Target::Bins, Target::Tests] {
        runner.tests(When::Now, name, target, &without_root(&[]));
    }
}

/// Arguments of tests, and without root those that leave out what needs it.
fn without_root<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = arguments.to_vec();
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN, they need root for loop devices or networks: tests called as_root_*");
        arguments.extend(["--skip", "as_root_"]);
    }
    arguments
}

fn whole_system(runner: &mut Runner, name: &str) {
    // One at a time: each test runs several programs, and memory and times are looked at. Those with networks of their
    // own mostly wait for silence to be long enough.
    let threads = if name == "links" { "16" } else { "1" };
    let mut arguments = without_root(&["--test-threads", threads]);
    // Its package brings other versions of QEMU's tools along, which the other tests then use.
    if name == "prove" && !runner.soak && !packages::is_here(QEMU) {
        println!(
            "NOT RUN, {QEMU} isn't installed (the soak installs it): tests of {name} called boot::*"
        );
        arguments.extend(["--skip", "boot::"]);
    }
    arguments.extend(if runner.shows_figures(name) { &["--nocapture"][..] } else { &[] });
    if runner.soak && name == "simulation" {
        let cargo = "test -p janus-client --profile soak --test simulation --";
        let arguments = [&cargo.split(' ').collect::<Vec<_>>(), &arguments[..]].concat();
        runner.cargo(When::Now, name, &arguments, &[]);
    } else {
        runner.tests(When::Now, "client", Target::Test(name), &arguments);
    }
}

/// Files of `client/tests`, and folders with a `main.rs`: read from the folder, so that a new one can't be forgotten.
fn whole_system_tests(runner: &mut Runner) -> Vec<String> {
    let names = || -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir("client/tests")? {
            let path = entry?.path();
            let is_file = path.extension().is_some_and(|extension| extension == "rs");
            if is_file || path.join("main.rs").is_file() {
                names.push(
                    path.file_stem().context("file without a name")?.to_string_lossy().into_owned(),
                );
            }
        }
        names.sort();
        Ok(names)
    };
    let mut found = Vec::new();
    match names() {
        Ok(names) => found = names,
        Err(error) => runner.check("find whole-system tests", || Err(error)),
    }
    found.retain(|name| !runner.quick || !SLOW.contains(&name.as_str()));
    found
}

/// The demo in a process of its own, as a user runs it; its JSON answer is checked.
fn demo() -> Result<()> {
    let program = std::env::current_exe()?;
    let text =
        packages::output(Command::new(program).args(["demo", "--json", "--size-mib", "128"]))?;
    let answer: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
    let steps = answer["steps"].as_array().context("no steps")?;
    ensure!(answer["ok"] == true && steps.len() >= 10, "{answer}");
    ensure!(steps.iter().all(|step| step["ok"] == true), "{answer}");
    Ok(())
}
