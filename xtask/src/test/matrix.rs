//! The tables of `docs/resilience.md` that say what happens when something fails: every cell names the tests that prove
//! it, and every test named is in the tree.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Result, ensure};

use xtask::site::workspace;

const PAGE: &str = "docs/resilience.md";
const SECTION: &str = "## What happens when";
/// A cell of something that can't happen.
const NOTHING: &str = "—";

/// Checks the page against the tree.
pub(super) fn check() -> Result<()> {
    let mut files = Vec::new();
    for part in ["proto", "server", "janus", "client", "xtask"] {
        super::tidy::collect(&workspace().join(part), &mut files)?;
    }
    let mut tests = BTreeSet::new();
    for file in files {
        tests.extend(tests_in(&fs::read_to_string(file)?));
    }
    let wrong = faults(&fs::read_to_string(workspace().join(PAGE))?, &tests);
    ensure!(wrong.is_empty(), "{PAGE}: {}", wrong.join("; "));
    Ok(())
}

/// Names of the functions under an attribute with `test` in it.
fn tests_in(source: &str) -> Vec<String> {
    let mut tests = Vec::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        let name = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        match name {
            Some(rest) => {
                let name = rest.split(['(', '<']).next().unwrap_or_default();
                tests.extend(is_test.then(|| name.to_owned()));
                is_test = false;
            }
            None if line.starts_with("#[") => {
                is_test |= line.contains("test]") || line.contains("test(")
            }
            None => {}
        }
    }
    tests
}

/// What is wrong with the tables of the page.
fn faults(page: &str, tests: &BTreeSet<String>) -> Vec<String> {
    let section = page.split(SECTION).nth(1).unwrap_or_default();
    let mut wrong = Vec::new();
    let mut used = BTreeSet::new();
    let mut cells = 0;
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with('|')).collect();
    for (at, row) in rows.iter().enumerate() {
        let is_rule = |row: &str| row.starts_with("| ---");
        if is_rule(row) || rows.get(at + 1).is_some_and(|next| is_rule(next)) {
            continue;
        }
        let columns: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        if columns.len() != 6 {
            wrong.push(format!("a row without five phases: {row}"));
        }
        for cell in columns.iter().skip(1) {
            cells += 1;
            let proofs = numbers(cell);
            if proofs.is_empty() && *cell != NOTHING {
                wrong.push(format!("{}: no test proves {cell:?}", columns[0]));
            }
            used.extend(proofs);
        }
    }
    let named = named(section);
    for number in used.difference(&named.keys().copied().collect()) {
        wrong.push(format!("there is no test [{number}]"));
    }
    for (number, names) in &named {
        if !used.contains(number) {
            wrong.push(format!("no cell names test [{number}]"));
        }
        for name in names.iter().filter(|name| !tests.contains(*name)) {
            wrong.push(format!("there is no test {name}"));
        }
    }
    if cells == 0 {
        wrong.push(format!("no table after {SECTION}"));
    }
    wrong
}

/// Numbers in brackets.
fn numbers(cell: &str) -> Vec<u32> {
    let ends = cell.split('[').skip(1).filter_map(|part| part.split_once(']'));
    ends.flat_map(|(inside, _)| inside.split(", ").filter_map(|number| number.parse().ok()))
        .collect()
}

/// The numbered list below the tables: names in backticks.
fn named(section: &str) -> BTreeMap<u32, Vec<String>> {
    let item = |line: &str| {
        let (number, rest) = line.split_once(". ")?;
        let names = rest.split('`').skip(1).step_by(2).map(str::to_owned);
        Some((number.parse().ok()?, names.collect()))
    };
    section.lines().filter_map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "## What happens when\n\n| | start | upload | commit | list | restore |\n\
        | --- | --- | --- | --- | --- | --- |\n| dead | goes on [1] | so [1, 2] | so [2] | — | so [1] |\n\n\
        1. `one_goes_on`\n2. `two_goes_on`\n";

    fn tree(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn every_cell_of_the_page_names_tests_that_are_there() {
        check().unwrap();
    }

    #[test]
    fn a_page_whose_tests_are_there_is_right() {
        assert_eq!(faults(TABLE, &tree(&["one_goes_on", "two_goes_on"])), [""; 0]);
    }

    #[test]
    fn tests_that_are_gone_and_cells_without_tests_are_found() {
        let both = tree(&["one_goes_on", "two_goes_on"]);
        let wrong = |page: &str, says: &str| {
            let wrong = faults(page, &both).join("; ");
            assert!(wrong.contains(says), "{wrong}");
        };
        assert_eq!(faults(TABLE, &tree(&["one_goes_on"])), ["there is no test two_goes_on"]);
        wrong(&TABLE.replace("so [2]", "so"), "no test proves \"so\"");
        wrong(&TABLE.replace("so [2]", "so [3]"), "there is no test [3]");
        wrong(&TABLE.replace("| so [1] |", "|"), "a row without five phases");
        wrong(
            &TABLE.replace("[1, 2]", "[1]").replace("so [2]", "so [1]"),
            "no cell names test [2]",
        );
        wrong("## What happens when\n", "no table");
    }

    #[test]
    fn only_functions_under_a_test_attribute_are_tests() {
        let source = "#[tokio::test]\nasync fn one() {\n    fn inner() {}\n}\n/// A fact.\n#[test]\nfn two() {}\n\
            fn three() {}\n#[cfg(test)]\nmod tests {}\n#[derive(Debug)]\nfn four() {}\n";
        assert_eq!(tests_in(source), ["one", "two"]);
    }
}
