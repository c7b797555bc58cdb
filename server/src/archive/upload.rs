//! Files into parts, and those that aren't there into the store: some on their way while the next is made.

use bytes::Bytes;
use janus_proto::{
    archive::{
        ArchiveError, FRAME_BYTES, FileEntry, PART_FRAMES, Path,
        index::{Index, Packer},
        names::FileName,
    },
    ids::BlockHash,
};
use tokio::task::JoinSet;

use super::{Archive, there::Objects};
use crate::carry::{CarryError, Meter};

/// Parts on their way: with the one in the making this bounds memory to 96 MiB.
const FLIGHT: usize = 2;

/// Fills a buffer from a byte of a file on.
type Read<'r> = dyn FnMut(u64, &mut [u8]) -> Result<(), CarryError> + 'r;

/// Files of one snapshot on their way.
pub(super) struct Upload<'a, 'm> {
    archive: &'a Archive,
    objects: &'a Objects,
    meter: &'a mut Meter<'m>,
    flight: JoinSet<Result<(), ArchiveError>>,
    /// Bytes of parts that were there already.
    pub(super) kept_bytes: u64,
}

impl<'a, 'm> Upload<'a, 'm> {
    pub(super) fn new(
        archive: &'a Archive,
        objects: &'a Objects,
        meter: &'a mut Meter<'m>,
    ) -> Self {
        Self { archive, objects, meter, flight: JoinSet::new(), kept_bytes: 0 }
    }

    /// Sends what isn't there of a file that `read` reads.
    pub(super) fn file(
        &mut self,
        name: &FileName,
        length_bytes: u64,
        read: &mut Read<'_>,
    ) -> Result<FileEntry, CarryError> {
        let mut index = Index::new(length_bytes);
        let mut packer = Packer::default();
        let mut frame = vec![0; FRAME_BYTES as usize];
        let frames = length_bytes.div_ceil(FRAME_BYTES);
        for number in 0..frames {
            let offset = number * FRAME_BYTES;
            let count = (length_bytes - offset).min(FRAME_BYTES) as usize;
            let piece = frame.get_mut(..count).unwrap_or_default();
            read(offset, piece)?;
            let packed = packer.push(piece);
            packed.map_err(|error| ArchiveError::Damaged {
                object: name.as_str().to_owned(),
                reason: error.to_string(),
            })?;
            self.meter.add(count as u64)?;
            if packer.frame_count() == PART_FRAMES || number + 1 == frames {
                let (part, lengths) = packer.take();
                let sum = BlockHash(*blake3::hash(&part).as_bytes());
                let object = name.part(index.part_count(), &sum);
                index.push(sum, &lengths);
                self.part(object, part)?;
            }
        }
        self.land(0)?;
        let bytes = Bytes::from(index.encode());
        let index_sum = BlockHash(*blake3::hash(&bytes).as_bytes());
        let object = name.index(&index_sum);
        self.archive.runtime.block_on(self.archive.store.put(&object, &bytes))?;
        Ok(FileEntry { length_bytes, stored_bytes: index.stored_bytes(), index_sum })
    }

    fn part(&mut self, object: Path, part: Vec<u8>) -> Result<(), CarryError> {
        if self.objects.get(&object) == Some(&(part.len() as u64)) {
            self.kept_bytes += part.len() as u64;
            return Ok(());
        }
        self.land(FLIGHT - 1)?;
        let store = self.archive.store.clone();
        let send = async move { store.put(&object, &Bytes::from(part)).await };
        self.flight.spawn_on(send, self.archive.runtime.handle());
        Ok(())
    }

    /// Waits until no more than so many parts are on their way.
    fn land(&mut self, most: usize) -> Result<(), CarryError> {
        while self.flight.len() > most {
            let landed = self.archive.runtime.block_on(self.flight.join_next());
            match landed {
                Some(Ok(sent)) => sent?,
                Some(Err(_)) | None => return Err(ArchiveError::Stopped.into()),
            }
        }
        Ok(())
    }
}
