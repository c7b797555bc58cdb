//! One disk on its way into an archive: which blocks differ, where they lie in the image that is to be, and that image piece by piece.
//!
//! Structures and table are written to files below the image path first ([`SPOOL`]); they take a part of what the data do, since the
//! structures' file is sparse. The data are read from the store's own images when their part of the new one is made.

use std::{
    convert::Infallible,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use janus_proto::{
    archive::{
        DiskEntry, Link,
        names::{Kind as FileKind, MachinePlace},
    },
    ids::{BLOCK_BYTES, SEGMENT_BLOCKS, block_count},
    image::{Format, Geometry, Identity, Kind, Layout, PAYLOAD_BYTES, Parent, Payload, vhd},
    table::{Difference, Page, Table, TableHeader, TableStack, TableWriter},
};

use super::{
    Archive, Sent,
    there::{self, Objects, There},
    upload::Upload,
};
use crate::{
    carry::{CarryError, Meter, whole},
    chain::{
        Held,
        opened::{Ahead, OpenedSnapshot},
    },
    runs::Runs,
    storage::{Access, Disk, File},
};

/// What the name of the folder of what is on its way begins with, below the image path. Emptied at the beginning and the end.
const SPOOL: &str = ".archive";

impl Archive {
    /// Archives a disk, over what is there of it before.
    pub(super) fn write_disk(
        &self,
        runs: &Arc<Runs>,
        held: &Held,
        place: &MachinePlace,
        before: Option<(DiskEntry, TableStack)>,
        (known, objects, anew): (&[There], &Objects, bool),
        hear: &dyn Fn(u64, u64) -> bool,
    ) -> Result<(DiskEntry, Sent), CarryError> {
        let snapshot = held.snapshot();
        let opened = whole::open(runs, snapshot.id)?;
        let format = opened.newest_format().unwrap_or_default();
        let before = before.filter(|(entry, _)| entry.format == format);
        let spool = Spool::make(runs.store().storage(), runs.store().root(), &self.name)?;
        let mut image = NewImage::plan(&opened, &spool, format, before.as_ref(), hear)?;
        let total = image.length_bytes + image.table_bytes;
        let mut meter = Meter::new(total, hear);
        let below = before.as_ref().and_then(|(entry, _)| entry.links.first()).map(Link::edition);
        let edition = there::edition(known, &snapshot.disk, snapshot.id, below, anew);
        let name = |kind| place.file(&snapshot.disk, edition, kind);
        let mut upload = Upload::new(self, objects, &mut meter);
        let table_file = spool.open(TABLE)?;
        let mut read_table = |offset: u64, buffer: &mut [u8]| {
            let read = table_file.read_exact_at(buffer, offset);
            read.map_err(spool.failed(TABLE))
        };
        let table = upload.file(&name(FileKind::Table), image.table_bytes, &mut read_table)?;
        let length = image.length_bytes;
        let mut read_image = |offset: u64, buffer: &mut [u8]| image.read(offset, buffer);
        let file = upload.file(&name(FileKind::Image(format)), length, &mut read_image)?;
        let kept_bytes = upload.kept_bytes;
        let sent = Sent {
            disk: snapshot.disk.clone(),
            is_base: before.is_none(),
            differing_bytes: image.differing_blocks * BLOCK_BYTES,
            kept_bytes,
        };
        let Identity { data_write, virtual_disk } = image.identity;
        let mut links = vec![Link {
            snapshot: snapshot.id,
            edition: edition.number,
            data_write,
            virtual_disk,
            image: file,
            table,
        }];
        links.extend(before.into_iter().flat_map(|(entry, _)| entry.links));
        let entry = DiskEntry {
            disk: snapshot.disk.clone(),
            size_bytes: snapshot.size_bytes,
            logical_sector_bytes: snapshot.logical_sector_bytes,
            table_digest: snapshot.table_digest,
            consistency: snapshot.consistency,
            skipped_bytes: snapshot.skipped_bytes,
            format,
            links,
        };
        Ok((entry, sent))
    }
}

const TABLE: &str = "table";
const IMAGE: &str = "image";

/// Files on their way.
struct Spool {
    storage: Disk,
    folder: PathBuf,
}

impl Spool {
    /// Archives of other names have their own.
    fn make(storage: &Disk, root: &FilePath, archive: &str) -> Result<Self, CarryError> {
        let folder = root.join(format!("{SPOOL}-{archive}"));
        let spool = Self { storage: storage.clone(), folder };
        let made = storage.make_folder(&spool.folder);
        made.map_err(spool.failed(""))?;
        spool.empty();
        Ok(spool)
    }

    fn failed<E: std::error::Error + Send + Sync + 'static>(
        &self,
        name: &str,
    ) -> impl Fn(E) -> CarryError {
        let path = self.folder.join(name);
        move |error| CarryError::Spool { path: path.clone(), source: Box::new(error) }
    }

    fn create(&self, name: &str) -> Result<File, CarryError> {
        let file = self.storage.open(&self.folder.join(name), Access::CreateNew);
        file.map_err(self.failed(name))
    }

    fn open(&self, name: &str) -> Result<File, CarryError> {
        self.storage.open(&self.folder.join(name), Access::Read).map_err(self.failed(name))
    }

    fn empty(&self) {
        for name in [TABLE, IMAGE] {
            let path = self.folder.join(name);
            if self.storage.exists(&path).unwrap_or(false) {
                let _ = self.storage.remove(&path);
            }
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.empty();
        let _ = self.storage.remove_folder(&self.folder);
    }
}

/// The image that is to be.
struct NewImage<'a> {
    opened: &'a OpenedSnapshot,
    ahead: Ahead<'a>,
    layout: Layout,
    identity: Identity,
    /// Which payload block each slot holds.
    payloads: Vec<u32>,
    /// Which blocks each segment has in it, and their hashes.
    table: Table,
    /// The page that was looked at last.
    page: Option<(u64, Page)>,
    structures: File,
    length_bytes: u64,
    table_bytes: u64,
    differing_blocks: u64,
}

impl<'a> NewImage<'a> {
    /// Finds what differs, and writes table and structures.
    fn plan(
        opened: &'a OpenedSnapshot,
        spool: &Spool,
        format: Format,
        before: Option<&(DiskEntry, TableStack)>,
        hear: &dyn Fn(u64, u64) -> bool,
    ) -> Result<Self, CarryError> {
        let snapshot = opened.held.snapshot();
        let disk_bytes = snapshot.size_bytes;
        let of_table = |source| CarryError::Table { disk: snapshot.disk.clone(), source };
        let zeros = TableStack::new(Vec::new(), disk_bytes).map_err(of_table)?;
        let since = before.map_or(&zeros, |(_, tables)| tables);
        let header = TableHeader { snapshot: snapshot.id, disk_bytes };
        let mut writer =
            TableWriter::create(spool.create(TABLE)?, header).map_err(spool.failed(TABLE))?;
        let (mut payloads, mut differing_blocks) = (Vec::new(), 0);
        for differing in Difference::new(&opened.tables, since, 0).map_err(of_table)? {
            let differing = differing.map_err(of_table)?;
            let pushed = writer.push(
                differing.segment,
                &differing.present,
                &differing.hashes,
                differing.digest,
            );
            pushed.map_err(spool.failed(TABLE))?;
            differing_blocks += differing.hashes.len() as u64;
            let halves = [0, 1].map(|half| differing.segment * 2 + half);
            let halves =
                halves.into_iter().filter(|index| differing.present.half(*index) != [0; 8]);
            // The largest disk has 2^25 payload blocks.
            payloads.extend(halves.map(|index| index as u32));
            if !hear(0, 0) {
                return Err(CarryError::Stopped);
            }
        }
        let table = Table::open(writer.finish().map_err(spool.failed(TABLE))?)
            .map_err(spool.failed(TABLE))?;
        let table_bytes = spool.open(TABLE)?.metadata().map_err(spool.failed(TABLE))?.length_bytes;
        let geometry = Geometry { disk_bytes, logical_sector_bytes: snapshot.logical_sector_bytes };
        let parent = before.and_then(|(entry, _)| parent(entry));
        let kind = if parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let layout = format.layout(geometry, kind).map_err(spool.failed(IMAGE))?;
        let first = before.and_then(|(entry, _)| entry.links.first());
        let identity = Identity {
            data_write: snapshot.data_write,
            virtual_disk: first.map_or(snapshot.virtual_disk, |link| link.virtual_disk),
        };
        let structures = spool.create(IMAGE)?;
        let mut new = Self {
            opened,
            ahead: opened.ahead(),
            layout,
            identity,
            payloads,
            table,
            page: None,
            structures,
            length_bytes: 0,
            table_bytes,
            differing_blocks,
        };
        new.length_bytes = new.write_structures(parent.as_ref()).map_err(spool.failed(IMAGE))?;
        Ok(new)
    }

    fn write_structures(
        &self,
        parent: Option<&Parent>,
    ) -> Result<u64, janus_proto::image::ImageError> {
        let slots = self.payloads.len() as u32;
        let payloads = (0..slots).zip(&self.payloads).map(|(slot, index)| {
            let index = u64::from(*index);
            // All of a base's slots count.
            let present = match parent {
                None => Ok(None),
                Some(_) => self.table.page(index / 2),
            };
            present.map(|page| {
                let present = page.map_or([0; 8], |page| page.present.half(index));
                Payload { index, slot, present }
            })
        });
        let (file, identity) = (&self.structures, &self.identity);
        if slots == 0 {
            let none = std::iter::empty::<Result<Payload, Infallible>>();
            return self.layout.write_structures(file, identity, parent, 0, none);
        }
        self.layout.write_structures(file, identity, parent, slots, payloads)
    }

    /// Fills `buffer` from byte `offset` of the image on.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        let path = || self.structures.path().to_owned();
        let read = self.structures.read_exact_at(buffer, offset);
        read.map_err(|source| CarryError::Spool { path: path(), source: Box::new(source) })?;
        let first = self.layout.slot_offset(0);
        let stride = self.layout.slot_offset(1) - first;
        let end = offset + buffer.len() as u64;
        for slot in offset.saturating_sub(first) / stride.. {
            let Some(payload) = self.payloads.get(slot as usize).copied() else { return Ok(()) };
            let data = self.layout.slot_offset(slot as u32);
            if data >= end {
                return Ok(());
            }
            let here = data.max(offset)..(data + PAYLOAD_BYTES).min(end);
            if here.is_empty() {
                continue;
            }
            let on_disk = u64::from(payload) * PAYLOAD_BYTES + (here.start - data);
            let piece = (here.start - offset) as usize..(here.end - offset) as usize;
            if let Some(piece) = buffer.get_mut(piece) {
                self.fill(on_disk, piece)?;
            }
        }
        Ok(())
    }

    /// Puts the blocks that are in the image into `buffer`, which is the disk from byte `start` on, within a segment.
    fn fill(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        let size = self.opened.held.snapshot().size_bytes;
        let segment = start / BLOCK_BYTES / SEGMENT_BLOCKS;
        if self.page.as_ref().is_none_or(|(known, _)| *known != segment) {
            let of_table = |source| CarryError::Table {
                disk: self.opened.held.snapshot().disk.clone(),
                source,
            };
            let Some(page) = self.table.page(segment).map_err(of_table)? else { return Ok(()) };
            self.page = Some((segment, page));
            self.ahead.segment(segment);
        }
        let Some((_, page)) = &self.page else { return Ok(()) };
        let first = start / BLOCK_BYTES;
        let end = (first + buffer.len() as u64 / BLOCK_BYTES).min(block_count(size));
        let mut at = first;
        while at < end {
            let is_in = |block: u64| page.present.contains((block % SEGMENT_BLOCKS) as usize);
            if !is_in(at) {
                at += 1;
                continue;
            }
            let run = at..(at..end).find(|block| !is_in(*block)).unwrap_or(end);
            at = run.end;
            let bytes = (run.start - first) * BLOCK_BYTES
                ..((run.end - first) * BLOCK_BYTES).min(size - first * BLOCK_BYTES);
            let Some(piece) = buffer.get_mut(bytes.start as usize..bytes.end as usize) else {
                continue;
            };
            let skipped =
                (segment * SEGMENT_BLOCKS..run.start).filter(|block| is_in(*block)).count();
            let hashes = page.hashes.get(skipped..).unwrap_or_default();
            whole::read(self.opened, &self.ahead, run.start, hashes, piece)?;
        }
        Ok(())
    }
}

/// What the new image says about the one that it differs from.
fn parent(entry: &DiskEntry) -> Option<Parent> {
    let link = entry.links.first()?;
    Some(Parent {
        data_write: link.data_write,
        file_name: format!("{}.{}", link.edition(), entry.format.extension()),
        time_stamp: match entry.format {
            Format::Vhd => vhd::time_stamp_of(link.data_write),
            Format::Vhdx => 0,
        },
    })
}
