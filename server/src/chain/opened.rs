//! A snapshot opened for reading: the images and tables of its whole chain.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::ids::SnapshotId;

use super::{
    Held,
    table::{Table, TableError, TableStack},
};
use crate::{
    image::{Image, ImageError, Layers},
    storage::{Access, Disk, File},
};

/// Why a snapshot can't be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A manifest of the chain is missing.
    #[error("the chain of snapshot {snapshot} has a missing link")]
    BrokenChain {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// A file of the chain can't be opened.
    #[error("cannot open {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An image was cut.
    #[error("image {} has {actual} bytes, {expected} were committed", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Length at its commit.
        expected: u64,
        /// Length now.
        actual: u64,
    },
    /// An image of the chain.
    #[error("image {}: {source}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// A table of the chain.
    #[error("table {}: {source}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: TableError,
    },
}

/// A snapshot's content: blocks from the images, hashes from the tables.
pub struct OpenedSnapshot {
    /// The snapshot.
    pub held: Held,
    /// Images, newest first.
    pub layers: Layers,
    /// Tables, newest first.
    pub tables: TableStack,
    links: Arc<[SnapshotId]>,
}

impl OpenedSnapshot {
    /// Opens the files of a chain, newest first, that lie in a machine's folder.
    ///
    /// # Errors
    /// When a file is missing, damaged, or not the one that its child was made on.
    pub fn open(storage: &Disk, folder: &Path, chain: &[Held]) -> Result<Self, OpenError> {
        let mut images = Vec::with_capacity(chain.len());
        let mut tables = Vec::with_capacity(chain.len());
        for held in chain {
            let path = folder.join(&held.snapshot().image);
            let file = storage.open_data(&path, Access::Read).map_err(failed(&path))?;
            let (expected, actual) = (held.snapshot().image_length_bytes, length(&file)?);
            if actual < expected {
                return Err(OpenError::Short { path, expected, actual });
            }
            let image = Image::open(file).map_err(|source| OpenError::Image { path, source })?;
            images.push(Arc::new(image));
            let path = folder.join(&held.snapshot().table);
            let file = storage.open(&path, Access::Read).map_err(failed(&path))?;
            let table = Table::open(file).map_err(|source| OpenError::Table { path, source })?;
            tables.push(Arc::new(table));
        }
        let held = chain[0].clone();
        let path = folder.join(&held.snapshot().image);
        let layers = Layers::new(images).map_err(|source| OpenError::Image { path, source })?;
        let path = folder.join(&held.snapshot().table);
        let tables = TableStack::new(tables, held.snapshot().size_bytes);
        let tables = tables.map_err(|source| OpenError::Table { path, source })?;
        let links = chain.iter().map(|held| held.snapshot().id).collect();
        Ok(Self { held, layers, tables, links })
    }

    /// The chain, newest first. While this lives, its images change only where nobody sees it who reads them this way.
    pub fn links(&self) -> &Arc<[SnapshotId]> {
        &self.links
    }
}

fn length(file: &File) -> Result<u64, OpenError> {
    Ok(file.metadata().map_err(failed(file.path()))?.length_bytes)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { path: path.to_owned(), source }
}
