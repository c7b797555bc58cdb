//! Writes one disk of a carried run: image and table grow side by side, segment by segment.

use std::{convert::Infallible, path::PathBuf};

use uuid::Uuid;

use super::{CarriedError, Claim, DiskEntry, names};
use crate::{
    hash::{TableDigester, segment_digest, zero_hash},
    ids::{
        BLOCK_BYTES, BlockHash, DiskId, SEGMENT_BLOCKS, SnapshotId, block_count, block_len,
        segment_count,
    },
    image::{Format, Geometry, Identity, Kind, Layout, PAYLOAD_BYTES, Payload},
    storage::{Access, File},
    table::{SegmentBitmap, TableHeader, TableWriter},
};

/// Bytes after which an image is synced, so that the end has little left to sync and a disk that is full or pulled out shows.
const SYNC_BYTES: u64 = 256 << 20;
const PAYLOAD_BLOCKS: usize = (PAYLOAD_BYTES / BLOCK_BYTES) as usize;

/// A disk that is being written.
#[derive(Debug)]
pub struct DiskWriter {
    disk: DiskId,
    geometry: Geometry,
    layout: Layout,
    image: File,
    image_path: PathBuf,
    table: TableWriter,
    table_path: PathBuf,
    /// Payload blocks, in the order of their slots.
    slots: Vec<u32>,
    digester: TableDigester,
    data_bytes: u64,
    unsynced: u64,
}

impl DiskWriter {
    /// Begins the files of a disk.
    ///
    /// # Errors
    /// As the file system says, or when no VHDX holds such a disk.
    pub fn create(claim: &Claim, disk: &DiskId, geometry: Geometry) -> Result<Self, CarriedError> {
        let (image, table) = names(disk);
        let (image_path, table_path) = (claim.folder().join(image), claim.folder().join(table));
        let layout = Format::Vhdx.layout(geometry, Kind::Dynamic);
        let layout = layout.map_err(CarriedError::image(&image_path))?;
        let open = |path: &PathBuf| {
            // What an earlier attempt has left, links too, is not written into.
            claim.storage().remove(path).map_err(CarriedError::io("remove", path))?;
            let file = claim.storage().open_data(path, Access::CreateNew);
            file.map_err(CarriedError::io("create", path))
        };
        let image = open(&image_path)?;
        let header = TableHeader { snapshot: SnapshotId::new(), disk_bytes: geometry.disk_bytes };
        let table = TableWriter::create(open(&table_path)?, header);
        Ok(Self {
            disk: disk.clone(),
            geometry,
            layout,
            image,
            table: table.map_err(CarriedError::table(&table_path))?,
            image_path,
            table_path,
            slots: Vec::new(),
            digester: TableDigester::new(geometry.disk_bytes),
            data_bytes: 0,
            unsynced: 0,
        })
    }

    /// Writes a segment: the hashes of all its blocks, and its bytes. Segments ascend; those left out are zeros.
    ///
    /// # Errors
    /// As the file system says.
    pub fn segment(
        &mut self,
        segment: u64,
        hashes: &[BlockHash],
        data: &[u8],
    ) -> Result<(), CarriedError> {
        self.digester.push_zeros(segment);
        let digest = segment_digest(hashes);
        self.digester.push(&digest);
        let mut present = SegmentBitmap::default();
        let mut kept = Vec::with_capacity(hashes.len());
        for (index, hash) in hashes.iter().enumerate() {
            let block = segment * SEGMENT_BLOCKS + index as u64;
            if *hash != zero_hash(block_len(self.geometry.disk_bytes, block)) {
                present.insert(index);
                kept.push(*hash);
            }
        }
        self.data_bytes += kept.len() as u64 * BLOCK_BYTES;
        for (half, bytes) in data.chunks(PAYLOAD_BYTES as usize).enumerate() {
            self.payload(segment * 2 + half as u64, &present, half * PAYLOAD_BLOCKS, bytes)?;
        }
        self.table
            .push(segment, &present, &kept, digest)
            .map_err(CarriedError::table(&self.table_path))?;
        if self.unsynced >= SYNC_BYTES {
            self.unsynced = 0;
            self.image.sync_data().map_err(CarriedError::io("sync", &self.image_path))?;
        }
        Ok(())
    }

    /// Writes what isn't zero of a payload block, whose first block has number `first` in its segment.
    fn payload(
        &mut self,
        index: u64,
        present: &SegmentBitmap,
        first: usize,
        bytes: &[u8],
    ) -> Result<(), CarriedError> {
        let blocks = bytes.len().div_ceil(BLOCK_BYTES as usize);
        let mut next = 0;
        let mut place = None;
        while let Some(start) = (next..blocks).find(|at| present.contains(first + at)) {
            let end = (start..blocks).find(|at| !present.contains(first + at)).unwrap_or(blocks);
            next = end;
            let place = *place.get_or_insert_with(|| {
                self.slots.push(index as u32);
                self.layout.slot_offset(self.slots.len() as u32 - 1)
            });
            let (from, to) = (start * BLOCK_BYTES as usize, end * BLOCK_BYTES as usize);
            let piece = &bytes[from..to.min(bytes.len())];
            self.image
                .write_all_at(piece, place + from as u64)
                .map_err(CarriedError::io("write", &self.image_path))?;
            self.unsynced += piece.len() as u64;
        }
        Ok(())
    }

    /// Bytes of data so far, in whole blocks.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Writes the structures of both files, syncs them, and says what the manifest will.
    ///
    /// # Errors
    /// As the file system says.
    pub fn finish(
        mut self,
        consistency: i32,
        skipped_bytes: u64,
    ) -> Result<DiskEntry, CarriedError> {
        let size_bytes = self.geometry.disk_bytes;
        self.digester.push_zeros(segment_count(size_bytes));
        let slots = self.slots.len() as u32;
        self.layout.cut(&self.image, slots).map_err(CarriedError::image(&self.image_path))?;
        let identity = Identity { data_write: Uuid::now_v7(), virtual_disk: Uuid::new_v4() };
        // Segments ascend, so payload blocks do.
        let payloads = (0u32..).zip(&self.slots).map(|(slot, index)| {
            Ok::<_, Infallible>(Payload { index: u64::from(*index), slot, present: [u64::MAX; 8] })
        });
        let image_bytes = self
            .layout
            .write_structures(&self.image, &identity, None, slots, payloads)
            .map_err(CarriedError::image(&self.image_path))?;
        self.image.sync_all().map_err(CarriedError::io("write", &self.image_path))?;
        let table = self.table.finish().map_err(CarriedError::table(&self.table_path))?;
        table.sync_all().map_err(CarriedError::io("write", &self.table_path))?;
        let table_bytes =
            table.metadata().map_err(CarriedError::io("write", &self.table_path))?.length_bytes;
        let (image, table) = names(&self.disk);
        debug_assert!(self.data_bytes <= block_count(size_bytes) * BLOCK_BYTES);
        Ok(DiskEntry {
            disk: self.disk,
            size_bytes,
            logical_sector_bytes: self.geometry.logical_sector_bytes,
            table_digest: self.digester.finish(),
            consistency,
            skipped_bytes,
            data_bytes: self.data_bytes,
            image,
            image_bytes,
            table,
            table_bytes,
        })
    }
}
