//! Sizes of source files: past 500 lines look for the second story in a file, past 700 it must be found.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};

const SUSPECT_LINES: usize = 500;
const MOST_LINES: usize = 700;

/// Looks at all Rust files but the generated ones.
pub(super) fn check() -> Result<()> {
    let mut files = Vec::new();
    for part in ["proto", "server", "janus", "client", "xtask"] {
        collect(Path::new(part), &mut files)?;
    }
    let mut too_long = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path)?;
        let lines = text.lines().count();
        if lines > MOST_LINES {
            too_long.push(format!("{} ({lines} lines)", path.display()));
        } else if lines > SUSPECT_LINES {
            println!("   {} has {lines} lines: is there a second story in it?", path.display());
        }
    }
    ensure!(too_long.is_empty(), "over {MOST_LINES} lines: {}", too_long.join(", "));
    Ok(())
}

/// All Rust files below a folder but the generated ones.
pub(super) fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("gen") && !path.ends_with("target") {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
