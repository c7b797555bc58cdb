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

    /// Where a range is that is read soon, and lets the disk begin with it where it lies in many places. Ask for large ranges
    /// in pieces.
    ///
    /// # Errors
    /// When an image is damaged or can't be read.
    pub fn look_up(&self, range: Range<u64>) -> Result<Places, ImageError> {
        let places = Places(self.stretches(range)?);
        self.tell(&places.0);
        Ok(places)
    }

    /// Fills `buffer` from byte `offset` of the disk on, all of which `places` know.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn read_places(
        &self,
        places: &Places,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ImageError> {
        let end = offset + buffer.len() as u64;
        let first = places.0.partition_point(|stretch| stretch.range.end <= offset);
        let mut at = offset;
        for stretch in places.0[first..].iter().take_while(|stretch| stretch.range.start < end) {
            let range = at..stretch.range.end.min(end);
            let part = &mut buffer[(range.start - offset) as usize..(range.end - offset) as usize];
            match stretch.from {
                Some((image, start)) => self.images[image]
                    .read_file_at(part, start + (range.start - stretch.range.start))?,
                None => part.fill(0),
            }
            at = range.end;
        }
        if at == end {
            return Ok(());
        }
        Err(ImageError::impossible(format!("byte {at} of the disk was not looked up")))
    }

    fn read_piece(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let places = self.look_up(offset..offset + buffer.len() as u64)?;
        self.read_places(&places, offset, buffer)
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

    /// Where a range is, in order: goes down layer by layer with the stretches that no layer above had. Each image is asked
    /// once, for all of them together.
    fn stretches(&self, range: Range<u64>) -> Result<Vec<Stretch>, ImageError> {
        let (mut found, mut open) = (Vec::new(), vec![range]);
        for (number, image) in self.images.iter().enumerate() {
            let (Some(first), Some(last)) = (open.first(), open.last()) else { break };
            let extents = image.extents(first.start..last.end)?;
            let mut below = Vec::new();
            for (range, source) in common(&open, &extents) {
                let from = match source {
                    Source::Parent => {
                        below.push(range);
                        continue;
                    }
                    Source::File(at) => Some((number, at)),
                    Source::Zero => None,
                };
                found.push(Stretch { range, from });
            }
            open = below;
        }
        if !open.is_empty() {
            // A base never answers `Parent`, and `new` saw to it that the last image is one.
            return Err(ImageError::BrokenChain { reason: "its oldest image refers to a parent" });
        }
        found.sort_unstable_by_key(|stretch| stretch.range.start);
        Ok(found)
    }
}

/// The parts of `extents` that lie in the ranges of `open`; both ascend.
fn common<'a>(
    open: &'a [Range<u64>],
    extents: &'a [(Range<u64>, Source)],
) -> impl Iterator<Item = (Range<u64>, Source)> + 'a {
    let (mut wanted, mut known) = (0, 0);
    std::iter::from_fn(move || {
        loop {
            let (open, (extent, source)) = (open.get(wanted)?, extents.get(known)?);
            let range = open.start.max(extent.start)..open.end.min(extent.end);
            if open.end <= extent.end {
                wanted += 1;
            } else {
                known += 1;
            }
            if range.is_empty() {
                continue;
            }
            let source = match *source {
                Source::File(at) => Source::File(at + (range.start - extent.start)),
                other => other,
            };
            return Some((range, source));
        }
    })
}

/// Where the stretches of a range of the disk are, in order and without gaps.
#[derive(Debug)]
pub struct Places(Vec<Stretch>);

impl Places {
    /// True when no image holds anything of the range.
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|stretch| stretch.from.is_none())
    }

    /// The range, in bytes of the disk.
    pub fn range(&self) -> Range<u64> {
        match (self.0.first(), self.0.last()) {
            (Some(first), Some(last)) => first.range.start..last.range.end,
            _ => 0..0,
        }
    }
}

/// A piece of the disk, and where it is: in which image and where in its file, or nowhere, for zeros.
#[derive(Debug)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_cut_to_what_no_layer_above_had() {
        let open = [2..4, 6..9, 20..30];
        let extents = [(0..3, Source::File(100)), (3..8, Source::Parent), (8..25, Source::Zero)];
        let found: Vec<_> = common(&open, &extents).collect();
        let expected = [
            (2..3, Source::File(102)),
            (3..4, Source::Parent),
            (6..8, Source::Parent),
            (8..9, Source::Zero),
            (20..25, Source::Zero),
        ];
        assert_eq!(found, expected);
    }
}
