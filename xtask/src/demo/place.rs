//! The folder of a demo, which one demo has at a time: two would kill each other's servers and mix their images.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// Folder of demos without `--dir`.
const USUAL: &str = "target/demo";

/// Keeps other demos out until it is dropped, or its process ends in whatever way.
#[derive(Debug)]
pub(super) struct Place {
    pub folder: PathBuf,
    _lock: File,
}

impl Place {
    /// `chosen` as it is, or else the usual folder, emptied.
    ///
    /// # Errors
    /// When another demo has it, or it can't be made or emptied.
    pub fn take(chosen: Option<&Path>) -> Result<Self> {
        let folder = chosen.unwrap_or(Path::new(USUAL)).to_owned();
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        // The folder itself is locked, so no file has to be left in it or beside it.
        let lock = File::open(&folder).with_context(|| format!("open {}", folder.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another demo runs in {}: wait for its end, or choose another folder with --dir FOLDER",
                folder.display()
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", folder.display()));
            }
        }
        if chosen.is_none() {
            empty(&folder).with_context(|| format!("empty {}", folder.display()))?;
        }
        Ok(Self { folder, _lock: lock })
    }
}

fn empty(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_demos_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let chosen = folder.path().join("demo");
        let first = Place::take(Some(&chosen)).unwrap();
        fs::write(first.folder.join("kept"), "").unwrap();
        let refused = Place::take(Some(&chosen)).unwrap_err().to_string();
        assert!(refused.starts_with("another demo runs in "), "{refused}");
        drop(first);
        let second = Place::take(Some(&chosen)).unwrap();
        assert!(second.folder.join("kept").exists(), "a chosen folder is not emptied");
        empty(&second.folder).unwrap();
        assert_eq!(fs::read_dir(&second.folder).unwrap().count(), 0);
    }
}
