//! Test programs: compiled all at once, then run one by one.
//!
//! `cargo test -p NAME` chooses the features of shared libraries for that package alone and compiles tokio, tonic and all above
//! them anew for each choice. Here the whole workspace is chosen each time, so that everything is compiled once.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use xtask::site::{cargo, workspace};

/// What of a package holds tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target<'a> {
    /// Unit tests of the library.
    Lib,
    /// Unit tests of the programs.
    Bins,
    /// All of `tests`.
    Tests,
    /// The file or folder of this name in `tests`.
    Test(&'a str),
}

/// A compiled test program.
#[derive(Debug)]
pub(super) struct TestProgram {
    /// The package's folder.
    folder: PathBuf,
    kind: String,
    name: String,
    path: PathBuf,
}

/// Compiles all test programs, and the programs that they run: those that compile, and what went wrong.
pub(super) fn compile() -> (Vec<TestProgram>, Result<()>) {
    let mut found = Vec::new();
    let compiled = compile_into(&mut found);
    (found, compiled)
}

fn compile_into(found: &mut Vec<TestProgram>) -> Result<()> {
    let mut cargo = cargo();
    cargo.args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("run cargo")?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let lines = BufReader::new(stdout).lines().map_while(Result::ok);
    found.extend(lines.filter_map(|line| read(&serde_json::from_str(&line).ok()?)));
    ensure!(child.wait()?.success(), "not all of it compiles");
    Ok(())
}

/// Commands that run the tests of a package's target, from its folder as cargo does, with their names.
pub(super) fn commands(
    all: &[TestProgram],
    package: &str,
    target: Target,
) -> Vec<(String, Command)> {
    let folder = workspace().join(package);
    let here = all.iter().filter(|test| test.folder == folder && test.holds(target));
    here.map(|test| (test.title(package), test.command())).collect()
}

impl TestProgram {
    fn holds(&self, target: Target) -> bool {
        match target {
            Target::Lib => self.kind == "lib",
            Target::Bins => self.kind == "bin",
            Target::Tests => self.kind == "test",
            Target::Test(name) => self.kind == "test" && self.name == name,
        }
    }

    fn title(&self, package: &str) -> String {
        match self.kind.as_str() {
            "lib" => format!("unit tests of {package}"),
            "bin" => format!("unit tests of the program {}", self.name),
            _ => format!("{package}/tests/{}", self.name),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.current_dir(&self.folder).env("CARGO_MANIFEST_DIR", &self.folder);
        command
    }
}

/// A test program of cargo's message, <https://doc.rust-lang.org/cargo/reference/external-tools.html#artifact-messages>.
fn read(message: &Value) -> Option<TestProgram> {
    let path = message["executable"].as_str()?;
    let target = &message["target"];
    (message["reason"] == "compiler-artifact" && message["profile"]["test"] == true)
        .then_some(())?;
    Some(TestProgram {
        folder: Path::new(message["manifest_path"].as_str()?).parent()?.to_owned(),
        kind: target["kind"][0].as_str()?.to_owned(),
        name: target["name"].as_str()?.to_owned(),
        path: path.into(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_program_is_found_by_its_package_and_target() {
        let message = json!({
            "reason": "compiler-artifact",
            "manifest_path": workspace().join("client/Cargo.toml"),
            "target": {"kind": ["test"], "name": "hostile"},
            "profile": {"test": true},
            "executable": "/target/debug/deps/hostile-0a1b",
        });
        let all = [read(&message).unwrap()];
        let found = |package, target| commands(&all, package, target);
        let (name, command) = &found("client", Target::Test("hostile"))[0];
        assert_eq!(name, "client/tests/hostile");
        assert_eq!(command.get_program(), "/target/debug/deps/hostile-0a1b");
        assert_eq!(command.get_current_dir(), Some(&*workspace().join("client")));
        assert_eq!(found("client", Target::Tests).len(), 1);
        assert_eq!(found("server", Target::Test("hostile")).len(), 0);
        assert_eq!(found("client", Target::Test("other")).len(), 0);
        assert_eq!(found("client", Target::Lib).len(), 0);

        let mut library = message.clone();
        library["profile"]["test"] = false.into();
        assert!(read(&library).is_none());
    }
}
