//! One disk of a carried run, opened to be read.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{CarriedError, DiskEntry};
use crate::{
    ids::{BLOCK_BYTES, BlockHash},
    image::{Image, Layers, Source},
    storage::{Disk, File},
    table::{Table, TableStack},
};

/// What a VHDX may add to a disk so that it has whole units.
const MOST_PADDING: u64 = 2 * BLOCK_BYTES;

/// The content of a carried disk: hashes that give the manifest's digest, and bytes that nobody has compared yet.
#[derive(Debug)]
pub struct CarriedDisk {
    entry: DiskEntry,
    image: Arc<Image>,
    layers: Layers,
    image_path: PathBuf,
    tables: TableStack,
    table_path: PathBuf,
}

impl CarriedDisk {
    /// Opens the files of a disk and checks all but the blocks.
    ///
    /// # Errors
    /// When a file is missing or damaged, or belongs to other content than the manifest names.
    pub fn open(storage: &Disk, folder: &Path, entry: &DiskEntry) -> Result<Self, CarriedError> {
        let (image_path, table_path) = (folder.join(&entry.image), folder.join(&entry.table));
        let table = open(storage, &table_path, entry.table_bytes)?;
        let table = Table::open(table).map_err(CarriedError::table(&table_path))?;
        let tables = TableStack::new(vec![Arc::new(table)], entry.size_bytes);
        let tables = tables.map_err(CarriedError::table(&table_path))?;
        let digest = tables.table_digest().map_err(CarriedError::table(&table_path))?;
        if digest != entry.table_digest {
            let reason = format!("its digest is {digest}, the manifest's {}", entry.table_digest);
            return Err(CarriedError::damaged(&table_path, reason));
        }
        let image = open(storage, &image_path, entry.image_bytes)?;
        let image = Arc::new(Image::open(image).map_err(CarriedError::image(&image_path))?);
        let layers = Layers::new(vec![image.clone()]);
        let layers = layers.map_err(CarriedError::image(&image_path))?;
        let geometry = layers.geometry();
        let size = entry.size_bytes..=entry.size_bytes + MOST_PADDING;
        if !size.contains(&geometry.disk_bytes)
            || geometry.logical_sector_bytes != entry.logical_sector_bytes
        {
            let reason = format!(
                "a disk of {} bytes in sectors of {}, the manifest says {} and {}",
                geometry.disk_bytes,
                geometry.logical_sector_bytes,
                entry.size_bytes,
                entry.logical_sector_bytes
            );
            return Err(CarriedError::damaged(&image_path, reason));
        }
        Ok(Self { entry: entry.clone(), image, layers, image_path, tables, table_path })
    }

    /// What the manifest says of it.
    pub fn entry(&self) -> &DiskEntry {
        &self.entry
    }

    /// Digest of a segment.
    pub fn digest(&self, segment: u64) -> BlockHash {
        self.tables.digest(segment)
    }

    /// Hashes of all blocks of a segment, which give its digest.
    ///
    /// # Errors
    /// When the table can't be read or is damaged.
    pub fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, CarriedError> {
        self.tables.segment(segment).map_err(CarriedError::table(&self.table_path))
    }

    /// Fills `buffer` from byte `offset` of the disk on. Whoever reads compares with the hashes.
    ///
    /// # Errors
    /// When the image can't be read or is damaged.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarriedError> {
        self.layers.read_at(offset, buffer).map_err(CarriedError::image(&self.image_path))
    }

    /// The error of a block that isn't what was backed up: where it is in the image.
    pub fn wrong(&self, block: u64) -> CarriedError {
        let start = block * BLOCK_BYTES;
        let places = self.image.extents(start..(start + BLOCK_BYTES).min(self.entry.size_bytes));
        let place = places.ok().and_then(|places| {
            places.into_iter().find_map(|(_, source)| match source {
                Source::File(at) => Some(at),
                _ => None,
            })
        });
        match place {
            Some(offset) => CarriedError::Block {
                path: self.image_path.clone(),
                offset,
                disk: self.entry.disk.clone(),
                block,
            },
            None => CarriedError::damaged(
                &self.image_path,
                format!("it doesn't hold block {block} of disk {}", self.entry.disk),
            ),
        }
    }
}

/// Opens a file that has this length.
fn open(storage: &Disk, path: &Path, expected: u64) -> Result<File, CarriedError> {
    let file = storage.open_regular(path).map_err(CarriedError::io("open", path))?;
    let length = file.metadata().map_err(CarriedError::io("read", path))?.length_bytes;
    match length == expected {
        true => Ok(file),
        false => Err(CarriedError::damaged(
            path,
            format!("it has {length} bytes, {expected} were written"),
        )),
    }
}
