//! Stubs: bases whose hashes are here and whose blocks are still elsewhere.
//!
//! Manifests and the images above name a stub's image as if it were full. Until it is, its file has another name, so that other
//! readers of the chain fail instead of taking what is not here yet for zeros, and it is hidden ([`crate::image::set_hidden`]), so
//! that they don't open it by that name either. The renaming of the full, synced file ends the
//! stub. Its structures are whole from the beginning: a block that is here lies at its place, and has its hash.

use std::{
    io,
    path::{Path, PathBuf},
};

use janus_proto::{hash::zero_segment_of, ids::block_count};

use super::{
    Snapshot,
    opened::open_table,
    ranges::{BlockRanges, segment_blocks},
};
use crate::storage::{Access, Disk, File};

/// What the name of a stub's image ends in.
const ENDING: &str = ".stub";

/// All files that a snapshot has in a machine's folder: its image, be it a stub's, and its table.
pub fn files(folder: &Path, snapshot: &Snapshot) -> [PathBuf; 3] {
    let image = folder.join(&snapshot.image);
    [path(&image), image, folder.join(&snapshot.table)]
}

/// Where an image lies now, if it is there.
///
/// # Errors
/// As the file system says.
pub fn place(storage: &Disk, image: PathBuf) -> io::Result<PathBuf> {
    let stub = path(&image);
    Ok(if storage.exists(&stub)? { stub } else { image })
}

/// The name that an image has while it is a stub.
pub fn name(image: &str) -> String {
    format!("{image}{ENDING}")
}

/// The path that an image has while it is a stub.
pub fn path(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(ENDING);
    path.into()
}

/// True when an image in a machine's folder lies there as a stub.
///
/// # Errors
/// As the file system says.
pub fn is_here(storage: &Disk, folder: &Path, snapshot: &Snapshot) -> io::Result<bool> {
    storage.exists(&path(&folder.join(&snapshot.image)))
}

/// All that a stub may lack: segments that aren't zeros, or everything when its table can't be read.
pub fn all_blocks(storage: &Disk, folder: &Path, snapshot: &Snapshot) -> BlockRanges {
    let end = block_count(snapshot.size_bytes);
    let Ok(table) = open_table(storage, folder, snapshot) else { return BlockRanges::all(end) };
    let mut missing = BlockRanges::default();
    for (segment, digest) in table.digests() {
        if digest != zero_segment_of(snapshot.size_bytes, segment) {
            missing.insert(segment_blocks(segment));
        }
    }
    missing.remove(end..u64::MAX);
    missing
}

/// True when the file was opened as that of a stub.
pub fn is_of(file: &File) -> bool {
    file.path().as_os_str().as_encoded_bytes().ends_with(ENDING.as_bytes())
}

/// Opens the file of an image, be it a stub's.
///
/// # Errors
/// As the file system says.
pub fn open(storage: &Disk, image: &Path, access: Access) -> io::Result<File> {
    let is_missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    match storage.open_data(image, access) {
        Err(error) if is_missing(&error) => match storage.open_data(&path(image), access) {
            // It may have become full in between.
            Err(error) if is_missing(&error) => storage.open_data(image, access),
            opened => opened,
        },
        opened => opened,
    }
}
