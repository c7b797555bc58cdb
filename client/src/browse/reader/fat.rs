//! FAT12, FAT16 and FAT32 by `fatfs`. Its times have no zone and are taken as UTC; names of 8 and 3 letters beyond ASCII can't be told.

use std::{
    collections::HashMap,
    io::{Read, Seek, SeekFrom},
    rc::Rc,
};

use fatfs::{DateTime, DirEntry, File, FileAttributes, FileSystem as Fat, FsOptions};
use jiff::{civil, tz::TimeZone};

use super::{
    super::{BrowseError, Entry, Kind},
    blocks::{Blocks, Positioned},
    tree::{Each, FileSystem, Handle, Node, Place, Result, fill},
};
use crate::source::view::ReadAt;

/// A volume, and the file that was read last.
pub(super) struct FatFiles {
    fs: &'static Fat<Positioned>,
    volume_bytes: u64,
    open: Option<Open>,
    /// Files of the folder that was listed last, by their paths: to find one again, its folder would be read from its start.
    listed: HashMap<Vec<u8>, DirEntry<'static, Positioned>>,
}

struct Open {
    path: Vec<u8>,
    file: File<'static, Positioned>,
    position: u64,
}

/// Short names in code page 850, which DOS and Windows use in western Europe and `mtools` everywhere.
#[derive(Debug)]
struct Western;

const CODE_PAGE_850: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜø£Ø×ƒáíóúñÑªº¿®¬½¼¡«»░▒▓│┤ÁÂÀ©╣║╗╝¢¥┐└┴┬├─┼ãÃ╚╔╩╦╠═╬¤ðÐÊËÈıÍÎÏ┘┌█▄¦Ì▀ÓßÔÒõÕµþÞÚÛÙýÝ¯´\u{ad}±‗¾¶§÷¸°¨·¹³²■\u{a0}";

impl fatfs::OemCpConverter for Western {
    fn decode(&self, oem_char: u8) -> char {
        match oem_char.checked_sub(0x80) {
            None => char::from(oem_char),
            Some(place) => {
                CODE_PAGE_850.chars().nth(place.into()).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
        }
    }

    fn encode(&self, uni_char: char) -> Option<u8> {
        if uni_char.is_ascii() {
            return u8::try_from(uni_char).ok();
        }
        let place = CODE_PAGE_850.chars().position(|other| other == uni_char)?;
        u8::try_from(place + 0x80).ok()
    }
}

fn error(error: std::io::Error) -> BrowseError {
    match error.kind() {
        std::io::ErrorKind::NotFound => BrowseError::Unknown { path: "such file".into() },
        std::io::ErrorKind::Other if error.get_ref().is_some() => BrowseError::damaged(error),
        _ => BrowseError::Read { what: error.to_string() },
    }
}

impl FatFiles {
    pub(super) fn open(blocks: Rc<Blocks>) -> Result<Self> {
        let volume_bytes = blocks.len();
        let disk = Positioned::new(blocks);
        let options = FsOptions::new().update_accessed_date(false).oem_cp_converter(&Western);
        let fs = Fat::new(disk, options).map_err(error)?;
        // The process serves one volume, as long as it lives.
        let fs = Box::leak(Box::new(fs));
        Ok(Self { fs, volume_bytes, open: None, listed: HashMap::new() })
    }

    /// The file at `path`, ready to be read from `offset` on: from its start each cluster is to be looked up.
    fn opened(&mut self, path: &[u8], offset: u64) -> Result<&mut Open> {
        let is_it = |open: &Open| open.path == path && open.position == offset;
        if !self.open.as_ref().is_some_and(is_it) {
            let mut file = match self.listed.get(path) {
                Some(known) => known.to_file(),
                None => self.fs.root_dir().open_file(relative(path)?).map_err(error)?,
            };
            let position = file.seek(SeekFrom::Start(offset)).map_err(error)?;
            self.open = Some(Open { path: path.to_vec(), file, position });
        }
        self.open.as_mut().ok_or_else(|| BrowseError::unknown(path))
    }
}

/// A path without its first slash, as text.
fn relative(path: &[u8]) -> Result<&str> {
    let path = path.strip_prefix(b"/").unwrap_or(path);
    std::str::from_utf8(path).map_err(|_| BrowseError::unknown(path))
}

fn seconds(time: DateTime) -> Option<i64> {
    let number = |value: u16| i8::try_from(value).ok();
    let (date, time) = (time.date, time.time);
    let date =
        civil::Date::new(i16::try_from(date.year).ok()?, number(date.month)?, number(date.day)?);
    let nanos = i32::from(time.millis) * 1_000_000;
    let time = civil::Time::new(number(time.hour)?, number(time.min)?, number(time.sec)?, nanos);
    let time = TimeZone::UTC.to_timestamp(date.ok()?.to_datetime(time.ok()?)).ok()?;
    Some(time.as_second())
}

fn letters(attributes: FileAttributes) -> String {
    [
        (FileAttributes::READ_ONLY, 'R'),
        (FileAttributes::HIDDEN, 'H'),
        (FileAttributes::SYSTEM, 'S'),
        (FileAttributes::ARCHIVE, 'A'),
    ]
    .into_iter()
    .filter(|(one, _)| attributes.contains(*one))
    .map(|(_, letter)| letter)
    .collect()
}

impl FileSystem for FatFiles {
    fn root(&mut self) -> Result<Node> {
        let mut entry = Entry::default();
        entry.set_kind(Kind::Folder);
        Ok(Node { entry, handle: Handle::Path })
    }

    fn list(&mut self, folder: Place<'_>, each: Each<'_>) -> Result<()> {
        let (root, place) = (self.fs.root_dir(), folder);
        self.listed.clear();
        let folder = match relative(folder.path)? {
            "" => root,
            path => root.open_dir(path).map_err(error)?,
        };
        for found in folder.iter() {
            let found = found.map_err(error)?;
            let name = found.file_name();
            if name == "." || name == ".." {
                continue;
            }
            let mut entry = Entry {
                name: name.into_bytes(),
                size_bytes: found.len(),
                modified_seconds: seconds(found.modified()),
                attributes: letters(found.attributes()),
                ..Entry::default()
            };
            entry.set_kind(if found.is_dir() { Kind::Folder } else { Kind::File });
            if found.is_file() {
                // The first of two files of one name, as for everybody else.
                self.listed.entry(place.join(&entry.name)).or_insert(found);
            }
            each(Node { entry, handle: Handle::Path })?;
        }
        Ok(())
    }

    fn read(&mut self, file: Place<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let open = self.opened(file.path, offset)?;
        if open.position < offset {
            return Ok(0);
        }
        let done = fill(buffer, |rest| open.file.read(rest).map_err(error))?;
        open.position += done as u64;
        Ok(done)
    }

    /// Each folder has a cluster of its own.
    fn most_folders(&self) -> u64 {
        self.volume_bytes / u64::from(self.fs.cluster_size().max(512))
    }
}

#[cfg(test)]
mod tests {
    use fatfs::OemCpConverter;

    use super::*;

    #[test]
    fn each_byte_of_a_short_name_is_a_character_of_its_own() {
        assert_eq!(CODE_PAGE_850.chars().count(), 128);
        assert_eq!(
            (Western.decode(0x9A), Western.decode(0x99), Western.decode(b'A')),
            ('Ü', 'Ö', 'A')
        );
        for byte in 0..=255 {
            assert_eq!(Western.encode(Western.decode(byte)), Some(byte));
        }
        assert_eq!(Western.encode('€'), None);
    }
}
