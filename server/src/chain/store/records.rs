//! The store's small files: JSON, and a last line with the BLAKE3 sum of what stands before it. A crash leaves each old or new.

use std::{io, path::Path};

pub(crate) use janus_proto::summed::with_sum;
use janus_proto::summed::{self, Unfit};
use serde::{Serialize, de::DeserializeOwned};

use super::{FORMAT, StoreError};
use crate::storage::Disk;

/// Largest JSON file we read: a run of 64 disks is far below.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Replaces a file by a value.
pub(crate) fn write<T: Serialize>(
    storage: &Disk,
    path: &Path,
    value: &T,
) -> Result<(), StoreError> {
    write_large(storage, path, value, MAX_FILE_BYTES)
}

/// The same of a file that may have so many bytes: a larger one would not be read again.
pub(crate) fn write_large<T: Serialize>(
    storage: &Disk,
    path: &Path,
    value: &T,
    most: u64,
) -> Result<(), StoreError> {
    let text = text(path, value)?;
    if text.len() as u64 > most {
        return Err(StoreError::io("write", path)(io::ErrorKind::FileTooLarge.into()));
    }
    storage.replace(path, &text).map_err(StoreError::io("write", path))
}

/// All bytes of the file at `path` that holds this value.
pub(super) fn text<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, StoreError> {
    let damaged =
        |e: serde_json::Error| StoreError::Damaged { path: path.to_owned(), reason: e.to_string() };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(damaged)?;
    bytes.push(b'\n');
    Ok(with_sum(bytes))
}

/// Extension of files that could not be read. They are kept, and never written over.
pub(super) const DAMAGED: &str = "damaged";

/// A file that can be made again: a damaged one is kept beside and counts as missing.
pub(crate) fn read_or_put_aside<T: DeserializeOwned>(
    storage: &Disk,
    path: &Path,
) -> Result<Option<T>, StoreError> {
    read_large_or_put_aside(storage, path, MAX_FILE_BYTES)
}

/// The same of a file that may have so many bytes.
pub(crate) fn read_large_or_put_aside<T: DeserializeOwned>(
    storage: &Disk,
    path: &Path,
    most: u64,
) -> Result<Option<T>, StoreError> {
    match read_up_to(storage, path, most) {
        Err(error @ StoreError::Damaged { .. }) => {
            tracing::error!(%error, "a file is put aside");
            put_aside(storage, path)?;
            Ok(None)
        }
        other => other,
    }
}

/// Gives a damaged file a name that nothing else has.
pub(super) fn put_aside(storage: &Disk, path: &Path) -> Result<(), StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.{}.{DAMAGED}", uuid::Uuid::now_v7().simple()));
    storage.rename(path, &aside).map_err(StoreError::io("put aside", path))
}

/// A file's value; `None` when it is absent.
pub(in crate::chain) fn read<T: DeserializeOwned>(
    storage: &Disk,
    path: &Path,
) -> Result<Option<T>, StoreError> {
    read_up_to(storage, path, MAX_FILE_BYTES)
}

fn read_up_to<T: DeserializeOwned>(
    storage: &Disk,
    path: &Path,
    most: u64,
) -> Result<Option<T>, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: path.to_owned(), reason };
    let bytes = match storage.read(path, most) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            return Err(damaged("too long".into()));
        }
        Err(error) => return Err(StoreError::io("read", path)(error)),
    };
    parse(path, &bytes).map(Some)
}

/// The value in the bytes of the file at `path`, if they are what a writer left there.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, StoreError> {
    let path = path.to_owned();
    summed::parse(bytes, FORMAT).map_err(|unfit| match unfit {
        Unfit::Newer(format) => StoreError::Newer { path, format },
        Unfit::Damaged(reason) => StoreError::Damaged { path, reason },
    })
}
