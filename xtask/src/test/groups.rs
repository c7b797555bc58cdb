//! The groups: what belongs to which, and how many minutes it may take.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};

use super::{
    matrix,
    programs::Target,
    steps::{Runner, When},
    tidy, tools,
};
use xtask::{
    bindings, packages,
    site::{PROGRAMS_VARIABLE, target},
};

/// A part of the test run.
pub(super) struct Group {
    pub name: &'static str,
    pub budget_minutes: u64,
    pub run: fn(&mut Runner),
}

pub(super) const GROUPS: &[Group] = &[
    Group { name: "build", budget_minutes: 10, run: build },
    // Early, as much of them runs beside the other groups.
    Group { name: "store", budget_minutes: 5, run: store },
    Group { name: "security", budget_minutes: 4, run: security },
    Group { name: "janus", budget_minutes: 5, run: janus },
    Group { name: "main-job", budget_minutes: 5, run: main_job },
    Group { name: "sources", budget_minutes: 4, run: sources },
    Group { name: "client", budget_minutes: 4, run: client },
    Group { name: "restore", budget_minutes: 3, run: restore },
    Group { name: "seeding", budget_minutes: 2, run: seeding },
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
const QEMU: &str = "qemu-system-x86_64";
/// Whole-system tests that belong to another group than `main-job`. Some stand where minutes are left, not where their subject is.
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
/// Whole-system tests that run beside the others, several at once: they wait for most of their time, and need a fifth of a
/// processor or less. None of them looks at the memory of a program.
const WAITING: &[Waiting] = &[
    // What a line does and a URL that leads nowhere costs is told by seconds.
    Waiting {
        program: "networks",
        threads: "4",
        about_speed: &["packing::", "urls::as_root_a_home_url_that_leads_nowhere"],
    },
    Waiting { program: "identity", threads: "2", about_speed: &[] },
];

struct Waiting {
    program: &'static str,
    threads: &'static str,
    /// Beginnings of the names of tests that run before, alone.
    about_speed: &'static [&'static str],
}

/// Whole-system tests that `--quick` leaves out.
const SLOW: &[&str] =
    &["kills", "links", "foreign_clients", "page", "simulation", "thinning_kills"];

fn build(runner: &mut Runner) {
    let cargo = |runner: &mut Runner, when, name, arguments: &str| {
        runner.cargo(when, name, &arguments.split(' ').collect::<Vec<_>>(), &[]);
    };
    cargo(runner, When::Now, "format", "fmt --all --check");
    runner.check("committed bindings", bindings::check);
    runner.check("buf lint", tools::buf_lint);
    runner.check("tidy", tidy::check);
    let advisories = runner.soak;
    runner.check("crates (cargo-deny)", || tools::deny(advisories));
    runner.check("failure matrix", matrix::check);
    // Cargo has one lock of the folder it builds into: whatever compiles beside the tests comes after what they need.
    runner.compile_tests();
    let clippy = "clippy --workspace --all-targets --features xtask/load -- -D warnings";
    cargo(runner, When::Idle, "clippy", clippy);
    let docs = ["doc", "--workspace", "--no-deps"];
    runner.cargo(When::Idle, "docs", &docs, &[("RUSTDOCFLAGS", "-D warnings")]);
    // Tests are compiled with features of libraries that users' builds don't have.
    let alone = "check -p janus-server -p janus -p janus-client --bins";
    cargo(runner, When::Idle, "programs without what tests add", alone);
    cargo(runner, When::Idle, "examples in docs", "test --workspace --doc");
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
    // They wait for silences, in memory or on loopback: all of them together need 5 seconds of a processor.
    package(runner, "janus", When::Now, &["--test-threads", "6"]);
    placed(runner, "janus");
}

fn store(runner: &mut Runner) {
    // They read and write images on virtual or simulated disks, without deadlines.
    package(runner, "server", When::Idle, &[]);
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
    let arguments = [RESTORE_MODULES, &["--show-output"]].concat();
    runner.tests(When::Now, "client", Target::Lib, &arguments);
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

/// All tests of a package; those in its `tests` when and as it is said.
fn package(runner: &mut Runner, name: &str, when: When, arguments: &[&str]) {
    for target in [Target::Lib, Target::Bins] {
        runner.tests(When::Now, name, target, &without_root(&[]));
    }
    runner.tests(when, name, Target::Tests, &without_root(arguments));
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
    let target = Target::Test(name);
    // One at a time: each test runs several programs, and memory and times are looked at.
    let mut arguments = without_root(&["--test-threads", "1"]);
    if let Some(waiting) = WAITING.iter().find(|waiting| waiting.program == name) {
        if !waiting.about_speed.is_empty() {
            let alone = [&arguments[..], waiting.about_speed].concat();
            runner.tests(When::Now, "client", target, &alone);
        }
        let others = waiting.about_speed.iter().flat_map(|begins| ["--skip", *begins]);
        let mut arguments = without_root(&["--test-threads", waiting.threads]);
        arguments.extend(others);
        runner.tests(When::Beside, "client", target, &arguments);
        return;
    }
    if name == "links" {
        // Each has networks of its own and mostly waits for a silence to be long enough.
        arguments = without_root(&["--test-threads", "16"]);
    }
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
        runner.tests(When::Now, "client", target, &arguments);
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
    // Its programs are here: another choice of features would compile them anew, with all that is below them.
    let text = packages::output(
        Command::new(program)
            .args(["demo", "--json", "--size-mib", "128"])
            .env(PROGRAMS_VARIABLE, target().join("debug")),
    )?;
    let answer: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
    let steps = answer["steps"].as_array().context("no steps")?;
    ensure!(answer["ok"] == true && steps.len() >= 10, "{answer}");
    ensure!(steps.iter().all(|step| step["ok"] == true), "{answer}");
    Ok(())
}
