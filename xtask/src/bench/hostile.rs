//! A good machine's backup beside floods of a bad one: `client/tests/redteam`, optimised, and what it prints of it.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::site::{PROGRAMS_VARIABLE, Profile, Programs, cargo};

const TEST: &str = "a_good_backup_beside_all_floods_ends";

/// Measures, prints a row for server and janus each, and writes them.
pub(super) fn run(json: &Path) -> Result<()> {
    let programs = Programs::built_or(Profile::Release)?;
    let mut test = cargo();
    test.args(["test", "--workspace", "--release", "--test", "redteam"]);
    test.args(["--", TEST, "--nocapture", "--test-threads", "1"]);
    test.env(PROGRAMS_VARIABLE, programs.folder());
    let output = test.output().context("run cargo")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<&str> = said.lines().filter(|line| line.contains("of its speed")).collect();
    ensure!(rows.len() == 2, "no figures in: {said}");
    rows.iter().for_each(|row| println!("{row}"));
    std::fs::write(json, serde_json::to_vec_pretty(&serde_json::json!({ "rows": rows }))?)?;
    println!("\nfigures: {}", json.display());
    Ok(())
}
