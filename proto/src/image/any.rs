//! The two formats as one: which one an image has is decided when a chain begins, and nobody else needs to know.

use std::{error::Error, ops::Range};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Geometry, Identity, ImageError, Kind, Parent, Payload, Source,
    vhd::{self, VhdImage},
    vhdx::{self, VhdxImage},
};
use crate::storage::File;

/// Format of an image, the same over a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Up to 64 TiB, sectors of 512 and 4096 bytes.
    #[default]
    Vhdx,
    /// Up to 2040 GiB, sectors of 512 bytes.
    Vhd,
}

impl Format {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Vhdx, Self::Vhd];

    /// What file names end in.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
        }
    }

    /// The format of a file by its name.
    pub fn of_name(name: &str) -> Option<Self> {
        let (_, extension) = name.rsplit_once('.')?;
        Self::ALL.into_iter().find(|format| extension.eq_ignore_ascii_case(format.extension()))
    }

    /// Places in an image of this format.
    ///
    /// # Errors
    /// When the format can't hold such a disk.
    pub fn layout(self, geometry: Geometry, kind: Kind) -> Result<Layout, ImageError> {
        Ok(match self {
            Self::Vhdx => Layout::Vhdx(vhdx::Layout::new(geometry, kind)?),
            Self::Vhd => Layout::Vhd(vhd::Layout::new(geometry, kind)?),
        })
    }
}

/// The places in a file that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A VHDX.
    Vhdx(vhdx::Layout),
    /// A VHD.
    Vhd(vhd::Layout),
}

/// Calls the same method of whichever it is.
macro_rules! either {
    ($enum:ident, $self:expr, $it:ident => $call:expr) => {
        match $self {
            $enum::Vhdx($it) => $call,
            $enum::Vhd($it) => $call,
        }
    };
}

impl Layout {
    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Vhdx(_) => Format::Vhdx,
            Self::Vhd(_) => Format::Vhd,
        }
    }

    /// The disk's geometry, with its true size.
    pub fn geometry(&self) -> Geometry {
        either!(Self, self, layout => layout.geometry())
    }

    /// Base or child.
    pub fn kind(&self) -> Kind {
        either!(Self, self, layout => layout.kind())
    }

    /// Size of the virtual disk: the true size, padded.
    pub fn virtual_bytes(&self) -> u64 {
        either!(Self, self, layout => layout.virtual_bytes())
    }

    /// Payload blocks of the disk.
    pub fn payload_count(&self) -> u64 {
        either!(Self, self, layout => layout.payload_count())
    }

    /// Offset of the data of a slot in the file: a multiple of 4096.
    pub fn slot_offset(&self, slot: u32) -> u64 {
        either!(Self, self, layout => layout.slot_offset(slot))
    }

    /// Cuts a partial file behind its slots, or extends it to there.
    ///
    /// # Errors
    /// When the length can't be set.
    pub fn cut(&self, file: &File, slots: u32) -> Result<(), ImageError> {
        either!(Self, self, layout => layout.cut(file, slots))
    }

    /// Writes all structures around the data that is already in the slots, and returns the file's length: see
    /// [`vhdx::write_structures`].
    ///
    /// # Errors
    /// When the file can't be written, the list fails or is out of order, or base and parent contradict each other.
    pub fn write_structures<E>(
        &self,
        file: &File,
        identity: &Identity,
        parent: Option<&Parent>,
        slots: u32,
        blocks: impl IntoIterator<Item = Result<Payload, E>>,
    ) -> Result<u64, ImageError>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        match self {
            Self::Vhdx(layout) => {
                vhdx::write_structures(file, layout, identity, parent, slots, blocks)
            }
            Self::Vhd(layout) => {
                vhd::write_structures(file, layout, identity, parent, slots, blocks)
            }
        }
    }
}

/// An open image of either format.
#[derive(Debug)]
pub enum Image {
    /// A VHDX.
    Vhdx(VhdxImage),
    /// A VHD.
    Vhd(VhdImage),
}

impl Image {
    /// Opens an image of whichever format the file has, and checks all its structures but the blocks.
    ///
    /// # Errors
    /// When it is neither a VHDX nor a VHD, needs what we don't know, or breaks the format's rules.
    pub fn open(file: File) -> Result<Self, ImageError> {
        match format_of(&file)? {
            Format::Vhdx => VhdxImage::open(file).map(Self::Vhdx),
            Format::Vhd => VhdImage::open(file).map(Self::Vhd),
        }
    }

    /// Opens an image of another program, which may have left it open: what the log of a VHDX holds counts as done, without
    /// changing the file.
    ///
    /// # Errors
    /// As [`Self::open`], and when the log is damaged.
    pub fn open_foreign(file: File) -> Result<Self, ImageError> {
        let image = match format_of(&file)? {
            Format::Vhdx => VhdxImage::open_foreign(file).map(Self::Vhdx),
            Format::Vhd => VhdImage::open(file).map(Self::Vhd),
        }?;
        match image.is_hidden() {
            true => Err(ImageError::unsupported("a stub: its blocks are still on another server")),
            false => Ok(image),
        }
    }

    /// True when other programs don't take it for what it is.
    pub fn is_hidden(&self) -> bool {
        either!(Self, self, image => image.is_hidden())
    }

    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Vhdx(_) => Format::Vhdx,
            Self::Vhd(_) => Format::Vhd,
        }
    }

    /// Virtual size and sectors.
    pub fn geometry(&self) -> Geometry {
        either!(Self, self, image => image.geometry())
    }

    /// Base or child.
    pub fn kind(&self) -> Kind {
        either!(Self, self, image => image.kind())
    }

    /// The file.
    pub fn file(&self) -> &File {
        either!(Self, self, image => image.file())
    }

    /// The id that a child of this image names.
    pub fn data_write(&self) -> Uuid {
        either!(Self, self, image => image.data_write())
    }

    /// The disk's id; a VHD has none.
    pub fn virtual_disk(&self) -> Option<Uuid> {
        match self {
            Self::Vhdx(image) => Some(image.virtual_disk()),
            Self::Vhd(_) => None,
        }
    }

    /// What a child says about its parent. The name comes from the file: compare it before using it as a path.
    pub fn parent(&self) -> Option<&Parent> {
        either!(Self, self, image => image.parent())
    }

    /// All file names that a child gives its parent, the most trusted first.
    pub fn parent_names(&self) -> &[String] {
        either!(Self, self, image => image.parent_names())
    }

    /// What a child of this image is to say about it, when it has this file name.
    pub fn as_parent(&self, file_name: &str) -> Parent {
        let time_stamp = match self {
            Self::Vhdx(_) => 0,
            Self::Vhd(image) => image.time_stamp(),
        };
        Parent { data_write: self.data_write(), file_name: file_name.to_owned(), time_stamp }
    }

    /// Says where each stretch of `range` (bytes of the disk) is, in order and without gaps. Past the disk's end it is zero.
    ///
    /// The answer can have an entry for each sector: ask for large disks in pieces.
    ///
    /// # Errors
    /// When the table can't be read, or names blocks outside the file or on top of its structures.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Source)>, ImageError> {
        either!(Self, self, image => image.extents(range))
    }

    /// Reads all of `buffer` from `offset` of the file, a place that [`Self::extents`] named.
    ///
    /// # Errors
    /// When the file can't be read or has become shorter.
    pub fn read_file_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        either!(Self, self, image => image.read_file_at(buffer, offset))
    }

    /// What [`Self::extents`] reads of the file for `range` is read soon.
    ///
    /// # Errors
    /// As there.
    pub fn will_need_structures(&self, range: Range<u64>) -> Result<(), ImageError> {
        either!(Self, self, image => image.will_need_structures(range))
    }

    /// The place that [`Self::extents`] named is read soon.
    pub fn will_need(&self, offset: u64, len: u64) {
        self.file().will_need(offset, len);
    }

    /// Checks every entry of the allocation table: all blocks inside the file, none on top of another.
    ///
    /// # Errors
    /// As [`Self::extents`], and when blocks overlap.
    pub fn check_blocks(&self) -> Result<(), ImageError> {
        either!(Self, self, image => image.check_blocks())
    }
}

/// An image that takes blocks of its child in: see [`vhdx::Absorber`].
#[derive(Debug)]
pub enum Absorber {
    /// A VHDX.
    Vhdx(vhdx::Absorber),
    /// A VHD.
    Vhd(vhd::Absorber),
}

impl Absorber {
    /// Opens the file of the parent, or a copy of it, for reading and writing. It is never made shorter than `least_bytes`, its
    /// length at its commit.
    ///
    /// # Errors
    /// When it is no valid image or can't be read or cut.
    pub fn open(file: File, least_bytes: u64) -> Result<Self, ImageError> {
        match format_of(&file)? {
            Format::Vhdx => vhdx::Absorber::open(file, least_bytes).map(Self::Vhdx),
            Format::Vhd => vhd::Absorber::open(file, least_bytes).map(Self::Vhd),
        }
    }

    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Vhdx(_) => Format::Vhdx,
            Self::Vhd(_) => Format::Vhd,
        }
    }

    /// Virtual size and sectors.
    pub fn geometry(&self) -> Geometry {
        either!(Self, self, absorber => absorber.image().geometry())
    }

    /// What the image says about its own parent.
    pub fn parent(&self) -> Option<&Parent> {
        either!(Self, self, absorber => absorber.image().parent())
    }

    /// The file, to put data into.
    pub fn file(&self) -> &File {
        either!(Self, self, absorber => absorber.image().file())
    }

    /// Payload blocks touched since the last flush; each needs some memory.
    pub fn touched(&self) -> usize {
        either!(Self, self, absorber => absorber.touched())
    }

    /// Bytes of the disk up to the end of the payload block that holds byte `at`.
    pub fn until_block_end(&self, at: u64) -> u64 {
        either!(Self, self, absorber => absorber.until_block_end(at))
    }

    /// Where in the file the bytes `range` of the disk belong: whole units, in one payload block, behind those asked for before.
    ///
    /// # Errors
    /// When the table is damaged, or the range is none of the disk.
    pub fn place(&mut self, range: Range<u64>) -> Result<u64, ImageError> {
        either!(Self, self, absorber => absorber.place(range))
    }

    /// As [`Self::place`] for zeros; `None` when they are there already, since nothing is.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn place_zeros(&mut self, range: Range<u64>) -> Result<Option<u64>, ImageError> {
        either!(Self, self, absorber => absorber.place_zeros(range))
    }

    /// Makes the structures name what was put in. With `sync` the data are durable before a structure names them.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn flush(&mut self, sync: bool) -> Result<(), ImageError> {
        either!(Self, self, absorber => absorber.flush(sync))
    }
}

/// Hides an image from other programs, which find no signature of its format then, or shows it again. The caller syncs.
///
/// # Errors
/// When the file is no valid image or can't be written.
pub fn set_hidden(file: &File, is_hidden: bool) -> Result<(), ImageError> {
    match format_of(file)? {
        Format::Vhdx => vhdx::set_hidden(file, is_hidden),
        Format::Vhd => vhd::set_hidden(file, is_hidden),
    }
}

/// Gives a file the id that the child's own children name, and shows it. Durable when it returns; a crash leaves the old or the new
/// one.
///
/// # Errors
/// When the file is no valid image or can't be written.
pub fn set_identity(file: &File, data_write: Uuid) -> Result<(), ImageError> {
    match format_of(file)? {
        Format::Vhdx => vhdx::set_identity(file, data_write),
        Format::Vhd => vhd::set_identity(file, data_write),
    }
}

impl From<VhdxImage> for Image {
    fn from(image: VhdxImage) -> Self {
        Self::Vhdx(image)
    }
}

impl From<VhdImage> for Image {
    fn from(image: VhdImage) -> Self {
        Self::Vhd(image)
    }
}

/// Only a VHDX says at its start what it is; everything else is for the reader of VHDs to refuse.
fn format_of(file: &File) -> Result<Format, ImageError> {
    let mut start = [0; 8];
    file.read_exact_at(&mut start, 0).map_err(ImageError::io("start"))?;
    let is_vhdx = &start == b"vhdxfile" || &start == vhdx::HIDDEN;
    Ok(if is_vhdx { Format::Vhdx } else { Format::Vhd })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_formats_apart() {
        for format in Format::ALL {
            assert_eq!(Format::of_name(&format!("disk/1.{}", format.extension())), Some(format));
        }
        assert_eq!(Format::of_name("A.VHD"), Some(Format::Vhd));
        assert_eq!(Format::of_name("a.raw"), None);
        assert_eq!(Format::of_name("vhd"), None);
    }
}
