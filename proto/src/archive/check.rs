//! Reads all of an archived image again: each part has its sum, each block its hash.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::{
    ArchiveError, DiskEntry, Link, PART_FRAMES, Store,
    content::{of_image, of_table},
    names::{FileName, Kind, MachinePlace},
    reader::{Frames, Packed, Reading, fetch_index},
};
use crate::{
    hash::hash_block,
    ids::{BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES, block_len},
    image::{Image, Source},
    table::{Page, Table},
};

/// Of an image its first part, the last, and what lies between, and its table.
const FRAMES: usize = 5 * PART_FRAMES as usize;
/// Wrong blocks of an image that are named.
const MOST_NAMED: usize = 8;

/// An image of a chain with its table, read whole. Blocks.
pub struct Check<'a> {
    /// The archive.
    pub store: &'a Store,
    /// Makes its calls.
    pub runtime: &'a Handle,
    /// Where the machine is.
    pub place: &'a MachinePlace,
    /// The disk.
    pub entry: &'a DiskEntry,
}

impl Check<'_> {
    /// Reads an image and its table; returns what is wrong with them.
    ///
    /// # Errors
    /// When the store can't be asked.
    pub fn link(&self, link: &Link) -> Result<Vec<ArchiveError>, ArchiveError> {
        let frames = Frames::new(FRAMES);
        let name = |kind| self.place.file(&self.entry.disk, link.edition(), kind);
        let (table_name, image_name) = (name(Kind::Table), name(Kind::Image(self.entry.format)));
        let mut wrong = Vec::new();
        let table = self.open(&table_name, &link.table, &frames, &mut wrong)?;
        let image = self.open(&image_name, &link.image, &frames, &mut wrong)?;
        if let (Some(table), Some(image)) = (&table, &image) {
            match self.blocks(link, (&table_name, table), (&image_name, image)) {
                Ok(blocks) => wrong.extend(blocks),
                Err(error) if error.is_damage() => wrong.push(error),
                Err(error) => return Err(error),
            }
        }
        for packed in [table, image].into_iter().flatten() {
            for error in packed.read_rest()? {
                // What is named already was not read to its end.
                if !wrong.iter().any(|known| known.to_string() == error.to_string()) {
                    wrong.push(error);
                }
            }
        }
        Ok(wrong)
    }

    fn open(
        &self,
        name: &FileName,
        entry: &super::FileEntry,
        frames: &Arc<Frames>,
        wrong: &mut Vec<ArchiveError>,
    ) -> Result<Option<Arc<Packed>>, ArchiveError> {
        match self.runtime.block_on(fetch_index(self.store, name, entry)) {
            Ok(index) => {
                let (name, index) = (name.clone(), Arc::new(index));
                let packed =
                    Packed::new(self.store, self.runtime, name, index, frames, Reading::Whole);
                Ok(Some(Arc::new(packed)))
            }
            Err(error) if error.is_damage() => {
                wrong.push(error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn blocks(
        &self,
        link: &Link,
        (table_name, table): (&FileName, &Arc<Packed>),
        (image_name, image): (&FileName, &Arc<Packed>),
    ) -> Result<Vec<ArchiveError>, ArchiveError> {
        let (told_table, told_image) = (table_name.as_str(), image_name.as_str());
        let table =
            Table::open(table.clone().into_file()).map_err(|error| of_table(told_table, error))?;
        let header = table.header();
        if header.snapshot != link.snapshot || header.disk_bytes != self.entry.size_bytes {
            return Err(ArchiveError::damaged(told_table, "it is of another snapshot"));
        }
        let image =
            Image::open(image.clone().into_file()).map_err(|error| of_image(told_image, error))?;
        let mut wrong = Vec::new();
        let segments: Vec<u64> = table.digests().map(|(segment, _)| segment).collect();
        for segment in segments {
            let page = table.page(segment).map_err(|error| of_table(told_table, error))?;
            let Some(page) = page else { continue };
            for block in
                self.segment(segment, &page, &image).map_err(|error| of_image(told_image, error))?
            {
                if wrong.len() < MOST_NAMED {
                    wrong.push(ArchiveError::damaged(
                        told_image,
                        format!("block {block} doesn't have its hash"),
                    ));
                }
            }
        }
        Ok(wrong)
    }

    /// Blocks of a segment that aren't what the table says.
    fn segment(
        &self,
        segment: u64,
        page: &Page,
        image: &Image,
    ) -> Result<Vec<u64>, crate::image::ImageError> {
        let (first, size) = (segment * SEGMENT_BLOCKS, self.entry.size_bytes);
        let bytes = segment * SEGMENT_BYTES..((segment + 1) * SEGMENT_BYTES).min(size);
        let extents = image.extents(bytes)?;
        let mut wrong = Vec::new();
        let mut data = [0; BLOCK_BYTES as usize];
        for (block, hash) in page.present.blocks().zip(&page.hashes) {
            let block = first + block as u64;
            let (at, len) = (block * BLOCK_BYTES, block_len(size, block));
            let place = extents.partition_point(|(range, _)| range.end <= at);
            let place = extents
                .get(place)
                .map(|(range, source)| (at.saturating_sub(range.start), range.end, source));
            let place = place.and_then(|(inside, end, source)| match source {
                Source::File(from) if at + len as u64 <= end => Some(from + inside),
                _ => None,
            });
            let Some(place) = place else {
                wrong.push(block);
                continue;
            };
            let data = data.get_mut(..len).unwrap_or_default();
            image.read_file_at(data, place)?;
            if hash_block(data) != *hash {
                wrong.push(block);
            }
        }
        Ok(wrong)
    }
}
