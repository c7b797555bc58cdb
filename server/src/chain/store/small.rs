//! A small file of the store that is read at its first use, kept in memory, and replaced as a whole.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{FORMAT, Store, StoreError, read_or_put_aside, write};
use crate::storage::Disk;

/// The file, with what stands in it beside its `format`.
pub(crate) struct SmallFile<T> {
    storage: Disk,
    path: PathBuf,
    value: Mutex<Option<T>>,
}

#[derive(Serialize, Deserialize)]
struct Formatted<T> {
    format: u32,
    #[serde(flatten)]
    value: T,
}

impl<T> SmallFile<T> {
    /// The file of this name at the root of a store. Nothing is read yet.
    pub fn new(store: &Store, name: &str) -> Self {
        Self::at(store.storage().clone(), store.root().join(name))
    }

    pub(crate) fn at(storage: Disk, path: PathBuf) -> Self {
        Self { storage, path, value: Mutex::default() }
    }

    /// Keeps all others from it. Blocks.
    pub fn lock(&self) -> Locked<'_, T> {
        // A panic elsewhere leaves a value that was written.
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { file: self, value }
    }
}

/// The file, for one alone.
pub(crate) struct Locked<'f, T> {
    file: &'f SmallFile<T>,
    value: MutexGuard<'f, Option<T>>,
}

impl<T: Clone + Default + Serialize + DeserializeOwned> Locked<'_, T> {
    /// What stands there. A missing file counts as an empty one; a damaged one is put aside, and counts as missing.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn value(&mut self) -> Result<&T, StoreError> {
        match &mut *self.value {
            Some(value) => Ok(value),
            unread => {
                let known = read_or_put_aside(&self.file.storage, &self.file.path)?;
                let known = known.map(|Formatted { value, .. }| value);
                Ok(unread.insert(known.unwrap_or_default()))
            }
        }
    }

    /// Replaces it: what stood there stays when that can't be written.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn replace(&mut self, value: T) -> Result<(), StoreError> {
        let new = Formatted { format: FORMAT, value };
        write(&self.file.storage, &self.file.path, &new)?;
        *self.value = Some(new.value);
        Ok(())
    }

    /// Replaces it by what `change` makes of it.
    ///
    /// # Errors
    /// When it can't be read or written.
    pub fn change<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> Result<R, StoreError> {
        let mut new = self.value()?.clone();
        let done = change(&mut new);
        self.replace(new)?;
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::summed::with_sum;

    use super::*;

    #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
    struct Listed {
        last: u32,
        names: Vec<String>,
    }

    #[test]
    fn it_is_kept_with_its_format_and_what_is_not_written_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("store");
        std::fs::create_dir(&place).unwrap();
        let path = place.join(".list.json");
        let file = || SmallFile::<Listed>::at(Disk::default(), path.clone());
        let first = file();
        assert_eq!(*first.lock().value().unwrap(), Listed::default());
        let added = first.lock().change(|list| {
            list.names.push("a".into());
            list.last += 1;
            list.last
        });
        assert_eq!(added.unwrap(), 1);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with(&format!("{{\n  \"format\": {FORMAT},\n  \"last\": 1,")),
            "{text}"
        );
        let known = Listed { last: 1, names: vec!["a".into()] };
        assert_eq!(*file().lock().value().unwrap(), known);
        std::fs::remove_dir_all(&place).unwrap();
        first.lock().change(|list| list.last = 7).unwrap_err();
        assert_eq!(*first.lock().value().unwrap(), known);
    }

    #[test]
    fn a_damaged_one_is_put_aside_and_a_newer_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".list.json");
        std::fs::write(&path, "nonsense").unwrap();
        let file = || SmallFile::<Listed>::at(Disk::default(), path.clone());
        assert_eq!(*file().lock().value().unwrap(), Listed::default());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "it is kept beside");
        let newer = format!("{{\"format\":{},\"last\":1,\"names\":[]}}\n", FORMAT + 1);
        std::fs::write(&path, with_sum(newer.into_bytes())).unwrap();
        let refused = file().lock().change(|list| list.last = 2).unwrap_err();
        assert!(matches!(refused, StoreError::Newer { .. }), "{refused}");
    }
}
