//! One stub at work.

use std::{collections::BTreeMap, sync::Arc};

use janus_proto::{
    hash::{hash_blocks, zero_hash},
    ids::{
        BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, SnapshotId, block_count, block_len,
    },
    model::Extent,
};

use super::{
    FillError,
    sources::{Source, segments_of},
};
use crate::{
    chain::{
        Held,
        opened::{OpenError, open_table},
        ranges::{BlockRanges, segment_blocks},
        stub,
        table::TableStack,
    },
    image,
    image::Image,
    runs::{Machine, Runs},
    storage::Access,
};

/// A stub that is being filled.
pub(super) struct Stub<'a> {
    runs: &'a Runs,
    machine: Arc<Machine>,
    held: &'a Held,
    image: Image,
    tables: TableStack,
    /// What wasn't here when it was last asked.
    pub(super) missing: BlockRanges,
    /// Segments that were looked at since the image was synced last, with what they lack.
    looked: BTreeMap<u64, BlockRanges>,
    buffer: Vec<u8>,
}

impl<'a> Stub<'a> {
    pub(super) fn open(runs: &'a Runs, held: &'a Held) -> Result<Self, FillError> {
        let machine = runs.machine(&held.run.machine).ok_or(FillError::Gone)?;
        let missing = machine.missing(held.snapshot()).ok_or(FillError::Gone)?;
        let (storage, snapshot) = (runs.store().storage(), held.snapshot());
        let folder = runs.store().machine_folder(&machine.key);
        let path = folder.join(&snapshot.image);
        let image = stub::open(storage, &path, Access::Write)
            .map_err(|source| OpenError::Io { path: path.clone(), source });
        let opened = image.and_then(|file| {
            let (expected, actual) = (snapshot.image_length_bytes, file.metadata());
            let failed = |source| OpenError::Io { path: path.clone(), source };
            let actual = actual.map_err(failed)?.length_bytes;
            if actual < expected {
                return Err(OpenError::Short { path, expected, actual });
            }
            let image = Image::open(file).map_err(|source| OpenError::Image { path, source })?;
            Ok((image, open_table(storage, &folder, snapshot)?))
        });
        let (image, table) =
            opened.map_err(|error| match error.is_damage() && !error.is_disk_failure() {
                true => FillError::Lost(error.to_string()),
                false => own(error),
            })?;
        let tables = TableStack::new(vec![Arc::new(table)], snapshot.size_bytes).map_err(own)?;
        let buffer = vec![0; SEGMENT_BYTES.min(snapshot.size_bytes) as usize];
        let looked = BTreeMap::new();
        Ok(Self { runs, machine, held, image, tables, missing, looked, buffer })
    }

    pub(super) fn id(&self) -> SnapshotId {
        self.held.snapshot().id
    }

    /// True when blocks of a segment are missing.
    pub(super) fn lacks(&self, segment: u64) -> bool {
        match self.looked.get(&segment) {
            Some(lacking) => !lacking.is_empty(),
            None => self.missing.intersects(&segment_blocks(segment)),
        }
    }

    /// Writes what a source has of a segment.
    pub(super) fn fill_segment(
        &mut self,
        segment: u64,
        source: &mut Source,
    ) -> Result<(), FillError> {
        let size = self.held.snapshot().size_bytes;
        let hashes = self.tables.segment(segment).map_err(own)?;
        let lacking = self.look(segment, &hashes)?;
        self.write_again(segment, &hashes, &lacking)?;
        let mut still = lacking.clone();
        if !lacking.is_empty() {
            self.runs.check_room_for(SEGMENT_BYTES).map_err(own)?;
            let digest = self.tables.digest(segment);
            let extents: Vec<Extent> = lacking.iter().map(Extent::of_data).collect();
            let mut buffer = std::mem::take(&mut self.buffer);
            let start = segment * SEGMENT_BLOCKS;
            let place = |block: u64| {
                let from = ((block - start) * BLOCK_BYTES) as usize;
                from..from + block_len(size, block)
            };
            let read = source.read(segment, digest, &hashes, &extents, &mut buffer);
            let written = read.map_err(FillError::from).and_then(|came| {
                // One after another: what was read may still not be what it should be.
                for range in came.iter() {
                    let bytes = &buffer[place(range.start).start..place(range.end - 1).end];
                    let mut found = Vec::with_capacity((range.end - range.start) as usize);
                    hash_blocks(bytes, &mut found);
                    let good = (range.clone()).zip(&found).filter(|(block, hash)| {
                        hashes.get((block - start) as usize) == Some(*hash)
                    });
                    let mut runs = BlockRanges::default();
                    good.for_each(|(block, _)| runs.insert(block..block + 1));
                    for run in runs.iter() {
                        let bytes = &buffer[place(run.start).start..place(run.end - 1).end];
                        self.write(run.start * BLOCK_BYTES, bytes)?;
                        still.remove(run);
                    }
                }
                Ok(())
            });
            self.buffer = buffer;
            written?;
        }
        self.looked.insert(segment, still);
        Ok(())
    }

    /// True when the machine's next backup is asked for blocks of it.
    pub(super) fn is_asked_for(&self) -> bool {
        let health = self.machine.health();
        health.damage(self.held.snapshot()).is_some_and(|damage| !damage.blocks.is_empty())
    }

    /// Blocks among these that a source has, as far as hashes tell. Zeros need none.
    pub(super) fn had_by(
        &mut self,
        source: &mut Source,
        among: &BlockRanges,
    ) -> Result<BlockRanges, FillError> {
        let size = self.held.snapshot().size_bytes;
        let mut had = BlockRanges::default();
        for segment in segments_of(among) {
            let (hashes, digest) =
                (self.tables.segment(segment).map_err(own)?, self.tables.digest(segment));
            let mut wanted = BlockRanges::default();
            for (block, hash) in (segment * SEGMENT_BLOCKS..block_count(size)).zip(&hashes) {
                match among.contains(block) {
                    true if *hash == zero_hash(block_len(size, block)) => {
                        had.insert(block..block + 1)
                    }
                    true => wanted.insert(block..block + 1),
                    false => {}
                }
            }
            let extents: Vec<Extent> = wanted.iter().map(Extent::of_data).collect();
            if !extents.is_empty() {
                had.extend(&source.had(segment, digest, &hashes, &extents)?);
            }
        }
        Ok(had)
    }

    /// Blocks of a segment that aren't here.
    fn look(&mut self, segment: u64, hashes: &[BlockHash]) -> Result<BlockRanges, FillError> {
        let size = self.held.snapshot().size_bytes;
        let start = segment * SEGMENT_BLOCKS;
        let begin = segment * SEGMENT_BYTES;
        let end = (begin + SEGMENT_BYTES).min(size);
        let bytes = &mut self.buffer[..(end - begin) as usize];
        for (range, from) in self.image.extents(begin..end).map_err(own)? {
            let part = &mut bytes[(range.start - begin) as usize..(range.end - begin) as usize];
            match from {
                image::Source::File(at) => self.image.read_file_at(part, at).map_err(own)?,
                _ => part.fill(0),
            }
        }
        let mut found = Vec::with_capacity(hashes.len());
        hash_blocks(bytes, &mut found);
        let mut lacking = BlockRanges::default();
        for ((block, hash), found) in (start..block_count(size)).zip(hashes).zip(&found) {
            if hash != found && *hash != zero_hash(block_len(size, block)) {
                lacking.insert(block..block + 1);
            }
        }
        Ok(lacking)
    }

    /// Writes blocks of a segment that was just looked at and that look right, but aren't known to be durable: the system may have failed
    /// to write them, and tells that once.
    fn write_again(
        &self,
        segment: u64,
        hashes: &[BlockHash],
        lacking: &BlockRanges,
    ) -> Result<(), FillError> {
        let size = self.held.snapshot().size_bytes;
        let start = segment * SEGMENT_BLOCKS;
        let mut right = BlockRanges::default();
        for (block, hash) in (start..block_count(size)).zip(hashes) {
            let has_data = *hash != zero_hash(block_len(size, block));
            if has_data && self.missing.contains(block) && !lacking.contains(block) {
                right.insert(block..block + 1);
            }
        }
        for run in right.iter() {
            let from = ((run.start - start) * BLOCK_BYTES) as usize;
            let length: usize = run.clone().map(|block| block_len(size, block)).sum();
            self.write(run.start * BLOCK_BYTES, &self.buffer[from..from + length])?;
        }
        Ok(())
    }

    /// Writes blocks to their place in the image, unless a merge has it.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), FillError> {
        let _merging = self.machine.take_merging();
        if !self.machine.still_has(self.held) {
            return Err(FillError::Gone);
        }
        for (range, from) in self.image.extents(offset..offset + bytes.len() as u64).map_err(own)? {
            // All that isn't zeros has a place.
            let image::Source::File(at) = from else { continue };
            let part = &bytes[(range.start - offset) as usize..(range.end - offset) as usize];
            self.image.file().write_all_at(part, at).map_err(own)?;
        }
        Ok(())
    }

    /// Makes what came durable, and tells it.
    pub(super) fn keep(&mut self) -> Result<(), FillError> {
        if self.looked.is_empty() {
            return Ok(());
        }
        self.image.file().sync_data().map_err(own)?;
        let end = block_count(self.held.snapshot().size_bytes);
        let (mut looked, mut all_lacking) = (BlockRanges::default(), BlockRanges::default());
        for (segment, lacking) in std::mem::take(&mut self.looked) {
            let blocks = segment_blocks(segment);
            looked.insert(blocks.start..blocks.end.min(end));
            all_lacking.extend(&lacking);
        }
        self.runs.note_filled(self.held, &looked, &all_lacking);
        // Readers may have found more.
        self.missing = self.machine.missing(self.held.snapshot()).ok_or(FillError::Gone)?;
        Ok(())
    }

    /// All is here: the image gets its name.
    pub(super) fn finish(self) -> Result<(), FillError> {
        // All of it is durable before others may take it for what it will be.
        self.image.file().sync_all().map_err(own)?;
        image::set_hidden(self.image.file(), false).map_err(own)?;
        self.image.file().sync_all().map_err(own)?;
        let storage = self.runs.store().storage();
        let path =
            self.runs.store().machine_folder(&self.machine.key).join(&self.held.snapshot().image);
        let _merging = self.machine.take_merging();
        if !self.machine.still_has(self.held) {
            return Err(FillError::Gone);
        }
        {
            let _files = self.machine.change_files();
            let stub = stub::path(&path);
            // A crash may have come right after the renaming.
            if storage.exists(&stub).map_err(own)? {
                storage.rename(&stub, &path).map_err(own)?;
            }
            if let Some(folder) = path.parent() {
                storage.sync_folder(folder).map_err(own)?;
            }
        }
        self.runs.note_full(self.held);
        Ok(())
    }
}

fn own(error: impl std::fmt::Display) -> FillError {
    FillError::Own(error.to_string())
}
