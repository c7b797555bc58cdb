//! A disk of an archived run: its content, by the images of its chain and their tables.

use std::{io, sync::Arc, thread};

use futures::{StreamExt, TryStreamExt};
use tokio::runtime::Handle;

use super::{
    ArchiveError, DiskEntry, Link, Manifest, Store,
    index::Index,
    names::{FileName, Kind, MachinePlace},
    reader::{Frames, Packed, Reading, fetch_index},
};
use crate::{
    ids::{BlockHash, DiskId},
    image::{Image, ImageError, Kind as ImageKind, Layers},
    table::{Table, TableError, TableStack},
};

/// Memory for frames of a disk that is read: 96 MiB.
const FRAMES: usize = 96;
/// Indexes that are fetched, and files that are opened, side by side.
const AT_ONCE: usize = 8;

/// A disk of an archived run. Reads block, on threads that may.
#[derive(Debug)]
pub struct Archived {
    /// Hashes of its blocks.
    pub tables: TableStack,
    /// Its blocks.
    pub layers: Layers,
    /// The tables of its images, newest first.
    pub own_tables: Vec<Arc<Table>>,
    entry: DiskEntry,
}

impl Archived {
    /// Opens a disk of a run. Blocks.
    ///
    /// # Errors
    /// When something of it can't be read, is damaged, or isn't what the manifest says.
    pub fn open(
        store: &Store,
        runtime: &Handle,
        manifest: &Manifest,
        disk: &DiskId,
    ) -> Result<Self, ArchiveError> {
        let place = manifest.place(store.prefix());
        let unknown =
            || ArchiveError::Missing { object: format!("disk {disk} of run {}", manifest.run) };
        let entry = manifest.disk(disk).ok_or_else(unknown)?.clone();
        let opener = Opener::new(store, runtime, &place, &entry)?;
        let (tables, images) = (opener.tables()?, opener.images()?);
        let newest = opener.name(entry.links.first(), Kind::Table);
        let stack = stack(&entry, &tables, &newest)?;
        let layers = Layers::new(images).map_err(|error| {
            of_image(&opener.name(entry.links.first(), Kind::Image(entry.format)), error)
        })?;
        check_geometry(&entry, &layers, &newest)?;
        Ok(Self { tables: stack, layers, own_tables: tables, entry })
    }

    /// Only the hashes of a disk of a run.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_tables(
        store: &Store,
        runtime: &Handle,
        place: &MachinePlace,
        entry: &DiskEntry,
    ) -> Result<TableStack, ArchiveError> {
        let opener = Opener::new(store, runtime, place, entry)?;
        stack(entry, &opener.tables()?, &opener.name(entry.links.first(), Kind::Table))
    }

    /// What the manifest says of it.
    pub fn entry(&self) -> &DiskEntry {
        &self.entry
    }

    /// The hashes of a segment.
    ///
    /// # Errors
    /// When they can't be read, or are damaged.
    pub fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, ArchiveError> {
        self.tables
            .segment(segment)
            .map_err(|error| of_table(&format!("disk {}", self.entry.disk), error))
    }

    /// Fills `buffer` from byte `offset` of the disk on. What is read is not compared with anything.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ArchiveError> {
        let read = self.layers.read_at(offset, buffer);
        read.map_err(|error| of_image(&format!("disk {}", self.entry.disk), error))
    }
}

/// Opens the files of a chain.
struct Opener<'a> {
    store: &'a Store,
    runtime: &'a Handle,
    place: &'a MachinePlace,
    entry: &'a DiskEntry,
    frames: Arc<Frames>,
    /// Of each link its image's and its table's.
    indexes: Vec<(Arc<Index>, Arc<Index>)>,
}

impl<'a> Opener<'a> {
    fn new(
        store: &'a Store,
        runtime: &'a Handle,
        place: &'a MachinePlace,
        entry: &'a DiskEntry,
    ) -> Result<Self, ArchiveError> {
        let fetch = |link: &'a Link| async move {
            let name = |kind| place.file(&entry.disk, link.edition(), kind);
            let (image, table) = (name(Kind::Image(entry.format)), name(Kind::Table));
            let image = fetch_index(store, &image, &link.image).await?;
            let table = fetch_index(store, &table, &link.table).await?;
            Ok::<_, ArchiveError>((Arc::new(image), Arc::new(table)))
        };
        let fetching = futures::stream::iter(entry.links.iter().map(fetch)).buffered(AT_ONCE);
        let indexes = runtime.block_on(fetching.try_collect::<Vec<_>>())?;
        let frames = Frames::new(FRAMES);
        Ok(Self { store, runtime, place, entry, frames, indexes })
    }

    fn name(&self, link: Option<&Link>, kind: Kind) -> String {
        let name = link.map(|link| self.place.file(&self.entry.disk, link.edition(), kind));
        name.map(|name| name.as_str().to_owned()).unwrap_or_default()
    }

    fn packed(&self, name: FileName, index: &Arc<Index>) -> Arc<Packed> {
        let index = index.clone();
        Arc::new(Packed::new(self.store, self.runtime, name, index, &self.frames, Reading::Frames))
    }

    fn tables(&self) -> Result<Vec<Arc<Table>>, ArchiveError> {
        self.each(|link, (_, index)| {
            let name = self.place.file(&self.entry.disk, link.edition(), Kind::Table);
            let told = name.as_str().to_owned();
            let table = Table::open(self.packed(name, index).into_file());
            let table = table.map_err(|error| of_table(&told, error))?;
            match table.header().snapshot == link.snapshot {
                true => Ok(Arc::new(table)),
                false => Err(ArchiveError::damaged(told, "it is of another snapshot")),
            }
        })
    }

    fn images(&self) -> Result<Vec<Arc<Image>>, ArchiveError> {
        self.each(|link, (index, _)| {
            let name =
                self.place.file(&self.entry.disk, link.edition(), Kind::Image(self.entry.format));
            let told = name.as_str().to_owned();
            let image = Image::open(self.packed(name, index).into_file());
            Ok(Arc::new(image.map_err(|error| of_image(&told, error))?))
        })
    }

    /// Does the same with each link, some side by side: each costs the store's latency a few times.
    fn each<T: Send>(
        &self,
        open: impl Fn(&Link, &(Arc<Index>, Arc<Index>)) -> Result<T, ArchiveError> + Sync,
    ) -> Result<Vec<T>, ArchiveError> {
        let links: Vec<_> = self.entry.links.iter().zip(&self.indexes).collect();
        let share = links.len().div_ceil(AT_ONCE).max(1);
        thread::scope(|scope| {
            let open = &open;
            let threads: Vec<_> = links
                .chunks(share)
                .map(|links| {
                    scope.spawn(move || {
                        links
                            .iter()
                            .map(|(link, index)| open(link, index))
                            .collect::<Result<Vec<T>, _>>()
                    })
                })
                .collect();
            let mut all = Vec::with_capacity(links.len());
            for thread in threads {
                let opened = thread
                    .join()
                    .map_err(|_| ArchiveError::damaged("a chain", "its reader failed"))?;
                all.extend(opened?);
            }
            Ok(all)
        })
    }
}

fn stack(
    entry: &DiskEntry,
    tables: &[Arc<Table>],
    newest: &str,
) -> Result<TableStack, ArchiveError> {
    let stack = TableStack::new(tables.to_vec(), entry.size_bytes)
        .map_err(|error| of_table(newest, error))?;
    let digest = stack.table_digest().map_err(|error| of_table(newest, error))?;
    match digest == entry.table_digest {
        true => Ok(stack),
        false => Err(ArchiveError::damaged(newest, "its hashes are not those of the run")),
    }
}

fn check_geometry(entry: &DiskEntry, layers: &Layers, newest: &str) -> Result<(), ArchiveError> {
    let geometry = layers.geometry();
    let layout = entry.format.layout(
        crate::image::Geometry {
            disk_bytes: entry.size_bytes,
            logical_sector_bytes: entry.logical_sector_bytes,
        },
        ImageKind::Dynamic,
    );
    let expected = layout.map(|layout| layout.virtual_bytes()).unwrap_or_default();
    match geometry.disk_bytes == expected
        && geometry.logical_sector_bytes == entry.logical_sector_bytes
    {
        true => Ok(()),
        false => Err(ArchiveError::damaged(newest, "its image is of another disk")),
    }
}

/// An error of a table, or what is behind it.
pub fn of_table(object: &str, error: TableError) -> ArchiveError {
    match error {
        TableError::Io { source, .. } => of_io(object, source),
        error => ArchiveError::damaged(object, error.to_string()),
    }
}

/// An error of an image, or what is behind it.
pub fn of_image(object: &str, error: ImageError) -> ArchiveError {
    match error {
        ImageError::Io { source, .. } => of_io(object, source),
        error => ArchiveError::damaged(object, error.to_string()),
    }
}

fn of_io(object: &str, error: io::Error) -> ArchiveError {
    match error.downcast::<ArchiveError>() {
        Ok(error) => error,
        Err(error) => ArchiveError::damaged(object, error.to_string()),
    }
}
