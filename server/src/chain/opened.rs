//! A snapshot opened for reading: the images and tables of its whole chain.
//!
//! Two ways lead to a block. Through the images, as any reader of the format goes; and by the tables, which say which image
//! must hold it. The second needs no image but that one, so a chain with a lost image still gives what the others hold.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::{
    hash::hash_block,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, SnapshotId},
};

use super::{
    Held, Snapshot,
    ranges::BlockRanges,
    stub,
    table::{Table, TableError, TableStack},
};
use crate::{
    image::{Format, Image, ImageError, Layers, Parent, Places, Source},
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
    /// Damage was found earlier.
    #[error("nothing can be built on the chain of snapshot {snapshot}: {reason}")]
    Unusable {
        /// The snapshot.
        snapshot: SnapshotId,
        /// What was found.
        reason: String,
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

impl OpenError {
    /// True when the file itself is to blame, not the moment.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::BrokenChain { .. } | Self::Unusable { .. } | Self::Short { .. } => true,
            Self::Io { source, .. } => is_lost(source),
            Self::Image { source: ImageError::Io { source, .. }, .. }
            | Self::Table { source: TableError::Io { source, .. }, .. } => is_lost(source),
            Self::Table { source: TableError::NewerVersion { .. }, .. } => false,
            Self::Image { .. } | Self::Table { .. } => true,
        }
    }

    /// True when the disk failed: that may be over in a moment, and only a check of the whole image says whether it is.
    pub fn is_disk_failure(&self) -> bool {
        let (Self::Io { source, .. }
        | Self::Image { source: ImageError::Io { source, .. }, .. }
        | Self::Table { source: TableError::Io { source, .. }, .. }) = self
        else {
            return false;
        };
        source.kind() != io::ErrorKind::NotFound
    }

    /// True when this file was looked at.
    pub fn is_about(&self, file: &Path) -> bool {
        match self {
            Self::BrokenChain { .. } | Self::Unusable { .. } => false,
            Self::Io { path, .. }
            | Self::Short { path, .. }
            | Self::Image { path, .. }
            | Self::Table { path, .. } => path == file,
        }
    }
}

/// The file is gone, or its place on the disk can't be read any more.
pub fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// A snapshot's content: blocks from the images, hashes from the tables.
pub struct OpenedSnapshot {
    /// The snapshot.
    pub held: Held,
    /// It and what it is built on, newest first.
    pub chain: Vec<Held>,
    /// Tables, newest first.
    pub tables: TableStack,
    links: Arc<[SnapshotId]>,
    /// Blocks that were known to be damaged when it was opened.
    pub damaged: BlockRanges,
    /// Images that can't be opened, by their place in the chain.
    pub lost: Vec<(usize, OpenError)>,
    images: Vec<Option<Arc<Image>>>,
    /// All images together, when they are all there.
    layers: Option<Layers>,
}

impl OpenedSnapshot {
    /// Opens the files of a chain, newest first, that lie in a machine's folder.
    ///
    /// # Errors
    /// When a file is missing, damaged, or not the one that its child was made on.
    pub fn open(storage: &Disk, folder: &Path, chain: &[Held]) -> Result<Self, OpenError> {
        let mut opened = Self::open_rest(storage, folder, chain)?;
        let first = opened.lost.drain(..).next();
        match first {
            Some((_, error)) => Err(error),
            None => Ok(opened),
        }
    }

    /// Opens what is left of a chain: images may be missing or damaged.
    ///
    /// # Errors
    /// When a table is missing or damaged: then nobody knows what the blocks should be.
    pub fn open_rest(storage: &Disk, folder: &Path, chain: &[Held]) -> Result<Self, OpenError> {
        let (mut images, mut tables, mut lost) = (Vec::new(), Vec::new(), Vec::new());
        for (place, held) in chain.iter().enumerate() {
            match open_image(storage, folder, held.snapshot()) {
                Ok(image) => images.push(Some(Arc::new(image))),
                Err(error) => {
                    images.push(open_cut(storage, folder, held.snapshot(), &error));
                    lost.push((place, error));
                }
            }
            tables.push(Arc::new(open_table(storage, folder, held.snapshot())?));
        }
        let held = chain[0].clone();
        let path = folder.join(&held.snapshot().table);
        let tables = TableStack::new(tables, held.snapshot().size_bytes);
        let tables = tables.map_err(|source| OpenError::Table { path, source })?;
        let layers = match images.iter().cloned().collect::<Option<Vec<_>>>().map(Layers::new) {
            Some(Ok(layers)) => Some(layers),
            Some(Err(source)) => {
                let path = folder.join(&held.snapshot().image);
                lost.push((0, OpenError::Image { path, source }));
                None
            }
            None => None,
        };
        let links = chain.iter().map(|held| held.snapshot().id).collect();
        let (chain, damaged) = (chain.to_vec(), BlockRanges::default());
        Ok(Self { held, chain, tables, links, damaged, lost, images, layers })
    }

    /// The chain, newest first. While this lives, its images change only where nobody sees it who reads them this way.
    pub fn links(&self) -> &Arc<[SnapshotId]> {
        &self.links
    }

    /// Format of its own image, when that can be opened.
    pub fn newest_format(&self) -> Option<Format> {
        self.images.first()?.as_ref().map(|image| image.format())
    }

    /// True when the image at this place of the chain was a stub's when it was opened.
    pub fn is_stub(&self, place: usize) -> bool {
        self.images
            .get(place)
            .and_then(Option::as_ref)
            .is_some_and(|image| stub::is_of(image.file()))
    }

    /// What a child of its own image is to say about it, when that can be opened.
    pub fn as_parent(&self) -> Option<Parent> {
        let name = &self.held.snapshot().image;
        let image = self.images.first()?.as_ref()?;
        Some(image.as_parent(name.rsplit('/').next().unwrap_or(name)))
    }

    /// A reader that looks ahead.
    pub fn ahead(&self) -> Ahead<'_> {
        Ahead { opened: self, structures: 0..0, segments: VecDeque::new() }
    }

    /// Fills `buffer` from byte `offset` of the disk on, through the images.
    ///
    /// # Errors
    /// When an image is damaged or can't be read. The buffer's content is then undefined.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let lost = ImageError::BrokenChain { reason: "an image is missing" };
        self.layers.as_ref().ok_or(lost)?.read_at(offset, buffer)
    }
}

/// Reads in order, looks up where each segment is just once, and lets the disk begin with what is read next: a chain lies in
/// many places, and one after another each costs the disk's latency.
pub struct Ahead<'a> {
    opened: &'a OpenedSnapshot,
    /// Bytes of the disk whose structures are being read.
    structures: Range<u64>,
    /// Segments that were looked up last, some at once.
    segments: VecDeque<Places>,
}

impl Ahead<'_> {
    /// Bytes of the disk whose structures are asked for at once: 32 KiB of each image.
    const STRUCTURES: u64 = 128 << 20;
    /// Segments that are looked up at once: what says where they are lies together in each image, and a long chain has many.
    pub const AT_ONCE: usize = 8;
    /// Of one segment the last message is in the making while the next ones are looked up.
    const SEGMENTS: usize = 3;

    /// A segment is read soon. What can't be looked up is left to its reader.
    pub fn segment(&mut self, segment: u64) {
        self.look_up(segment..segment + 1);
    }

    /// A segment is read now, and those of `next` after it. What can't be looked up is left to its reader.
    pub fn segments(&mut self, segment: u64, next: &[u64]) {
        let run = |from: u64, next: &[u64]| {
            let follows = (from + 1..).zip(next).take_while(|(number, next)| number == *next);
            from..from + 1 + follows.count().min(Self::AT_ONCE - 1) as u64
        };
        self.look_up(run(segment, next));
        // While the last one that is known is sent the disk begins with the others.
        if let [first, rest @ ..] = next {
            self.look_up(run(*first, rest));
        }
    }

    /// Looks segments that follow each other up, unless the first of them is known.
    fn look_up(&mut self, segments: Range<u64>) {
        let Some(layers) = &self.opened.layers else { return };
        let disk_bytes = self.opened.tables.disk_bytes();
        let bytes = segments.start * SEGMENT_BYTES..(segments.end * SEGMENT_BYTES).min(disk_bytes);
        let is_known = |places: &Places| places.range().contains(&bytes.start);
        if bytes.is_empty() || self.segments.iter().any(is_known) {
            return;
        }
        if !self.structures.contains(&bytes.start) {
            let end = (bytes.start / Self::STRUCTURES + 1) * Self::STRUCTURES;
            self.structures = bytes.start..end.min(disk_bytes);
            layers.will_need_structures(&self.structures);
        }
        let Ok(places) = layers.look_up(bytes) else { return };
        if self.segments.len() == Self::SEGMENTS {
            self.segments.pop_front();
        }
        self.segments.push_back(places);
    }

    /// Fills `buffer` from byte `offset` of the disk on.
    ///
    /// # Errors
    /// As [`OpenedSnapshot::read_at`].
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let until_end = SEGMENT_BYTES - at % SEGMENT_BYTES;
            let (piece, after) = rest.split_at_mut(rest.len().min(until_end as usize));
            let places = self.segments.iter().find(|places| places.range().contains(&at));
            match (places, &self.opened.layers) {
                (Some(places), Some(layers)) => layers.read_places(places, at, piece)?,
                _ => self.opened.read_at(at, piece)?,
            }
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }
}

/// Finds what can be found of single blocks of a damaged snapshot. Remembers the segment it looked at last.
pub struct Salvage<'a> {
    opened: &'a OpenedSnapshot,
    segment: Option<u64>,
    /// Which image must hold each block of it.
    holders: Vec<Option<usize>>,
}

impl<'a> Salvage<'a> {
    /// Of this snapshot.
    pub fn new(opened: &'a OpenedSnapshot) -> Self {
        Self { opened, segment: None, holders: Vec::new() }
    }

    /// Reads one block that should have this hash by any way there is; false when it is lost.
    pub fn read(&mut self, block: u64, hash: BlockHash, buffer: &mut [u8]) -> bool {
        let through_images = self.opened.read_at(block * BLOCK_BYTES, buffer).is_ok();
        (through_images && hash_block(buffer) == hash)
            || (self.read_by_table(block, buffer) && hash_block(buffer) == hash)
    }

    /// Place in the chain of the image that answers wrongly for a block which is lost; `None` when that image can't even be
    /// opened.
    pub fn to_blame(&mut self, block: u64) -> Option<usize> {
        let images = &self.opened.images;
        let last = images.len().saturating_sub(1);
        let by_table = self.holder(block).unwrap_or(last);
        let start = block * BLOCK_BYTES;
        let end = (start + BLOCK_BYTES).min(self.opened.tables.disk_bytes());
        let asks_further = |image: &Option<Arc<Image>>| {
            let extents = image.as_ref().and_then(|image| image.extents(start..end).ok());
            extents.is_some_and(|all| all.iter().all(|(_, source)| *source == Source::Parent))
        };
        let by_image =
            images[..by_table].iter().position(|image| image.is_some() && !asks_further(image));
        let place = by_image.unwrap_or(by_table);
        images.get(place)?.is_some().then_some(place)
    }

    fn holder(&mut self, block: u64) -> Option<usize> {
        let segment = block / SEGMENT_BLOCKS;
        if self.segment != Some(segment) {
            self.holders = self.opened.tables.holders(segment).unwrap_or_default();
            self.segment = Some(segment);
        }
        self.holders.get((block % SEGMENT_BLOCKS) as usize).copied().flatten()
    }

    fn read_by_table(&mut self, block: u64, buffer: &mut [u8]) -> bool {
        let Some(place) = self.holder(block) else { return false };
        let Some(Some(image)) = self.opened.images.get(place) else { return false };
        let start = block * BLOCK_BYTES;
        let Ok(extents) = image.extents(start..start + buffer.len() as u64) else { return false };
        extents.into_iter().all(|(stretch, source)| {
            let part = (stretch.start - start) as usize..(stretch.end - start) as usize;
            match source {
                Source::File(at) => image.read_file_at(&mut buffer[part], at).is_ok(),
                Source::Zero => {
                    buffer[part].fill(0);
                    true
                }
                Source::Parent => false,
            }
        })
    }
}

/// Opens a snapshot's own image and compares it with what was committed.
///
/// # Errors
/// When it is missing, cut or damaged.
pub fn open_image(storage: &Disk, folder: &Path, snapshot: &Snapshot) -> Result<Image, OpenError> {
    let path = folder.join(&snapshot.image);
    let file = stub::open(storage, &path, Access::Read).map_err(failed(&path))?;
    let (expected, actual) = (snapshot.image_length_bytes, length(&file)?);
    if actual < expected {
        return Err(OpenError::Short { path, expected, actual });
    }
    let image =
        Image::open(file).map_err(|source| OpenError::Image { path: path.clone(), source })?;
    if image.is_hidden() && !stub::is_of(image.file()) {
        let reason = "it is a stub, but doesn't have the name of one".to_owned();
        let source = ImageError::Damaged { reason };
        return Err(OpenError::Image { path, source });
    }
    Ok(image)
}

/// What is there of a cut image may still be read.
fn open_cut(
    storage: &Disk,
    folder: &Path,
    snapshot: &Snapshot,
    error: &OpenError,
) -> Option<Arc<Image>> {
    let OpenError::Short { .. } = error else { return None };
    let file = stub::open(storage, &folder.join(&snapshot.image), Access::Read).ok()?;
    Image::open(file).ok().map(Arc::new)
}

/// Opens a snapshot's own table.
///
/// # Errors
/// When it is missing or damaged.
pub fn open_table(storage: &Disk, folder: &Path, snapshot: &Snapshot) -> Result<Table, OpenError> {
    let path = folder.join(&snapshot.table);
    let file = storage.open(&path, Access::Read).map_err(failed(&path))?;
    Table::open(file).map_err(|source| OpenError::Table { path, source })
}

fn length(file: &File) -> Result<u64, OpenError> {
    Ok(file.metadata().map_err(failed(file.path()))?.length_bytes)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { path: path.to_owned(), source }
}
