//! A chain of open images, read as one disk.

use std::{ops::Range, sync::Arc};

use super::{Geometry, Image, ImageError, Source};

/// Bytes looked up at once: bounds the memory that a hostile table can cost.
const PIECE_BYTES: u64 = 4 << 20;

/// Images that belong together, newest first. Threads may read at the same time.
#[derive(Clone, Debug)]
pub struct Layers {
    images: Vec<Arc<Image>>,
}

impl Layers {
    /// A chain of images, the newest first and the base last.
    ///
    /// # Errors
    /// When an image isn't the parent that the one before it names, or the last has a parent.
    pub fn new(images: Vec<Arc<Image>>) -> Result<Self, ImageError> {
        let Some(base) = images.last() else {
            return Err(ImageError::BrokenChain { reason: "it has no images" });
        };
        if base.parent().is_some() {
            return Err(ImageError::BrokenChain { reason: "its oldest image has a parent" });
        }
        for pair in images.windows(2) {
            check_link(&pair[0], &pair[1])?;
        }
        Ok(Self { images })
    }

    /// The newest image.
    pub fn newest(&self) -> &Image {
        &self.images[0]
    }

    /// Virtual size and sectors of the newest image. The disk's true size may be up to 8191 bytes less.
    pub fn geometry(&self) -> Geometry {
        self.images[0].geometry()
    }

    /// Fills `buffer` from byte `offset` of the disk on; zeros where no image has data.
    ///
    /// # Errors
    /// When it would read past the virtual size, or an image is damaged or can't be read. The buffer's content is then
    /// undefined.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let size = self.geometry().disk_bytes;
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > size) {
            return Err(ImageError::impossible(format!(
                "{} bytes at {offset} of a disk of {size}",
                buffer.len()
            )));
        }
        let mut start = offset;
        for piece in buffer.chunks_mut(PIECE_BYTES as usize) {
            self.read_piece(start, piece)?;
            start += piece.len() as u64;
        }
        Ok(())
    }

    /// Lets the disk begin with what says where a range is. What can't be read is left to its reader.
    pub fn will_need_structures(&self, range: &Range<u64>) {
        for image in &self.images {
            let _ = image.will_need_structures(range.clone());
        }
    }

    /// Lets the disk begin with a range that is read soon, where it lies in many places. What can't be looked up is left to
    /// its reader.
    pub fn will_need(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Ok(stretches) = self.stretches(range) {
            self.tell(&stretches);
        }
    }

    fn read_piece(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let stretches = self.stretches(offset..offset + buffer.len() as u64)?;
        self.tell(&stretches);
        for Stretch { range, from } in stretches {
            let part = &mut buffer[(range.start - offset) as usize..(range.end - offset) as usize];
            match from {
                Some((image, at)) => self.images[image].read_file_at(part, at)?,
                None => part.fill(0),
            }
        }
        Ok(())
    }

    /// Short stretches one after another cost the disk's latency each; told of all, it reads them side by side.
    fn tell(&self, stretches: &[Stretch]) {
        let stored = stretches.iter().filter_map(|stretch| Some((stretch, stretch.from?)));
        if stored.clone().nth(1).is_none() {
            return;
        }
        for (stretch, (image, at)) in stored {
            self.images[image].will_need(at, stretch.range.end - stretch.range.start);
        }
    }

    /// Where a range is: goes down layer by layer with the stretches that no layer above had.
    fn stretches(&self, range: Range<u64>) -> Result<Vec<Stretch>, ImageError> {
        let (mut found, mut open) = (Vec::new(), vec![range]);
        for (number, image) in self.images.iter().enumerate() {
            let mut below = Vec::new();
            for range in open {
                for (range, source) in image.extents(range)? {
                    match source {
                        Source::File(at) => {
                            found.push(Stretch { range, from: Some((number, at)) });
                        }
                        Source::Zero => found.push(Stretch { range, from: None }),
                        Source::Parent => below.push(range),
                    }
                }
            }
            if below.is_empty() {
                return Ok(found);
            }
            open = below;
        }
        // A base never answers `Parent`, and `new` saw to it that the last image is one.
        Err(ImageError::BrokenChain { reason: "its oldest image refers to a parent" })
    }
}

/// A piece of the disk, and where it is: in which image and where in its file, or nowhere, for zeros.
struct Stretch {
    range: Range<u64>,
    from: Option<(usize, u64)>,
}

pub(super) fn check_link(child: &Image, parent: &Image) -> Result<(), ImageError> {
    let link = child
        .parent()
        .ok_or(ImageError::BrokenChain { reason: "an image above the base has no parent" })?;
    if link.data_write != parent.data_write() {
        return Err(ImageError::WrongParent {
            expected: link.data_write,
            actual: parent.data_write(),
        });
    }
    if child.format() != parent.format() {
        return Err(ImageError::BrokenChain { reason: "it has images of two formats" });
    }
    if child.geometry().logical_sector_bytes != parent.geometry().logical_sector_bytes {
        return Err(ImageError::damaged("parent and child have different sector sizes"));
    }
    Ok(())
}
