//! A disk restored as a VHDX or VHD: its blocks go straight to their places in a new file, and what makes it an image is
//! written at the end.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Mutex, PoisonError},
};

use janus_proto::{
    image::{Geometry, Identity, ImageError, Kind, Layout, PAYLOAD_BYTES, Payload},
    storage::{Access, Disk, File},
};
use uuid::Uuid;

use super::{format::TargetFormat, place::Place};

/// An image that is being written. Several threads may write at once.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    layout: Layout,
    /// The slot of each payload block that has one.
    slots: Mutex<HashMap<u64, u32>>,
}

impl ImageFile {
    /// Begins an image in an empty file.
    ///
    /// # Errors
    /// When the format can't hold such a disk, or the file can't be opened.
    pub(super) fn on(path: &Path, place: &Place) -> Result<Self, ImageError> {
        let TargetFormat::Image(format) = place.format else {
            return Err(ImageError::Unsupported { reason: "neither VHDX nor VHD".into() });
        };
        let geometry = Geometry {
            disk_bytes: place.bytes(),
            logical_sector_bytes: place.logical_sector_bytes,
        };
        let layout = format.layout(geometry, Kind::Dynamic)?;
        let file = Disk::default().open_data(path, Access::Write);
        let file = file.map_err(|source| ImageError::Io { action: "opening", source })?;
        Ok(Self { file, layout, slots: Mutex::default() })
    }

    /// Writes from byte `at` of the disk on. What is never written is zeros.
    ///
    /// # Errors
    /// As the file system says.
    pub(super) fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let (mut at, mut rest) = (at, data);
        while !rest.is_empty() {
            let within = at % PAYLOAD_BYTES;
            let fits = rest.len().min((PAYLOAD_BYTES - within) as usize);
            let (now, later) = rest.split_at(fits);
            let place = self.layout.slot_offset(self.slot(at / PAYLOAD_BYTES)) + within;
            self.file.write_all_at(now, place)?;
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }

    /// Makes zeros of what was written.
    ///
    /// # Errors
    /// As the file system says.
    pub(super) fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at + len;
        let mut at = at;
        while at < end {
            let to = end.min((at / PAYLOAD_BYTES + 1) * PAYLOAD_BYTES);
            let has_slot = {
                let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
                slots.contains_key(&(at / PAYLOAD_BYTES))
            };
            if has_slot {
                self.write(at, &vec![0; (to - at) as usize])?;
            }
            at = to;
        }
        Ok(())
    }

    fn slot(&self, payload: u64) -> u32 {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let next = slots.len() as u32;
        *slots.entry(payload).or_insert(next)
    }

    /// Makes it an image, and syncs it.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn finish(&self) -> Result<(), ImageError> {
        let mut payloads: Vec<_> = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.iter().map(|(index, slot)| (*index, *slot)).collect()
        };
        payloads.sort_unstable();
        let slots = payloads.len() as u32;
        let all = payloads.into_iter().map(|(index, slot)| {
            Ok::<_, io::Error>(Payload { index, slot, present: [u64::MAX; 8] })
        });
        let identity = Identity { data_write: Uuid::new_v4(), virtual_disk: Uuid::new_v4() };
        self.layout.write_structures(&self.file, &identity, None, slots, all)?;
        self.file.sync_all().map_err(|source| ImageError::Io { action: "syncing", source })
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::image::{Format, Image, Source};

    use super::*;

    #[test]
    fn what_was_written_is_read_back_and_the_rest_is_zeros() {
        const SIZE: u64 = 9 << 20;
        let dir = tempfile::tempdir().unwrap();
        for format in [Format::Vhdx, Format::Vhd] {
            let path = dir.path().join(format.extension());
            std::fs::File::create(&path).unwrap();
            let place = Place::whole(SIZE, 512, TargetFormat::Image(format));
            let file = ImageFile::on(&path, &place).unwrap();
            let mut expected = vec![0; SIZE as usize];
            std::thread::scope(|scope| {
                for (first, part) in [500usize, 2000, 0].into_iter().enumerate() {
                    let (file, byte) = (&file, first as u8 + 1);
                    expected[part * 4096..(part + 20) * 4096].fill(byte);
                    let at = part as u64 * 4096;
                    scope.spawn(move || file.write(at, &[byte; 20 * 4096]).unwrap());
                }
            });
            file.zero(4096, 3 << 20).unwrap();
            expected[4096..4096 + (3 << 20)].fill(0);
            file.finish().unwrap();
            let image = Image::open(Disk::default().open(&path, Access::Read).unwrap()).unwrap();
            let mut content = vec![0; SIZE as usize];
            for (range, source) in image.extents(0..SIZE).unwrap() {
                let now = &mut content[range.start as usize..range.end as usize];
                match source {
                    Source::File(at) => image.read_file_at(now, at).unwrap(),
                    Source::Zero => {}
                    Source::Parent => panic!("a base has no parent"),
                }
            }
            assert!(content == expected, "{format:?}");
        }
    }
}
