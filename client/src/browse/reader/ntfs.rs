//! NTFS, on the records, runs and fix-ups of [`crate::fs::ntfs`], which backups read anyway: folders, streams, compression,
//! links. Refused: encrypted files, and those whose content a driver of Windows keeps elsewhere.
//!
//! The two libraries there are don't do: by their sources `ntfs` 0.4 knows no compression, and `ntfs-core` 0.9 reads streams as
//! a whole, into memory.

use std::rc::Rc;

use self::{links::Meaning, streams::Content};
use super::{
    super::{BrowseError, Entry, Kind, Stream},
    blocks::Blocks,
    tree::{Each, FileSystem, Handle, Node, Place, Result},
};
use crate::{
    fs::{
        FsError,
        ntfs::{Bytes, Ntfs, Record, numbers, types},
    },
    source::view::ReadAt,
};

mod folder;
mod links;
mod lznt1;
mod streams;

/// Between the years that the two count from, in seconds.
const FROM_1601_TO_1970: i64 = 11_644_473_600;
const TICKS: u64 = 10_000_000;
/// Names of a file in the namespace of DOS only: the same file has a longer one.
const DOS_ONLY: u8 = 2;

/// A volume, and the stream that was read last.
pub(super) struct NtfsFiles {
    ntfs: Ntfs<'static>,
    last: Option<(u64, String, Rc<Content>)>,
}

fn error(error: FsError) -> BrowseError {
    match error {
        FsError::Io(error) => BrowseError::Read { what: error.to_string() },
        FsError::Damaged { what } => BrowseError::Damaged { what },
        error => BrowseError::unsupported(error.to_string()),
    }
}

fn damaged(number: u64) -> BrowseError {
    BrowseError::damaged(format!("MFT record {number} is not that of a file"))
}

impl NtfsFiles {
    pub(super) fn open(blocks: Rc<Blocks>) -> Result<Self> {
        // The process serves one volume, as long as it lives.
        let volume: &'static dyn ReadAt = Box::leak(Box::new(blocks));
        Ok(Self { ntfs: Ntfs::open(volume).map_err(error)?, last: None })
    }

    /// All records of a file, the base first.
    fn records(&self, number: u64) -> Result<Vec<Record>> {
        let base = self.ntfs.record(number).map_err(error)?;
        let base = base.filter(|record| record.base == number).ok_or_else(|| damaged(number))?;
        let others = streams::extensions(&self.ntfs, &base)?;
        let mut records = vec![base];
        for other in others {
            let record = self.ntfs.record(other).map_err(error)?;
            records.push(record.filter(|one| one.base == number).ok_or_else(|| damaged(other))?);
        }
        Ok(records)
    }

    fn entry(&self, name: &[u8], number: u64) -> Result<Entry> {
        let records = self.records(number)?;
        let all = || records.iter().flat_map(|record| &record.attributes);
        let resident = |kind| all().find(|one| one.kind == kind).and_then(streams::resident);
        let mut entry = Entry { name: name.to_vec(), number, ..Entry::default() };
        entry.set_kind(if records[0].is_folder { Kind::Folder } else { Kind::File });
        let names = all().filter(|one| one.kind == types::FILE_NAME);
        let is_long = |name: &&[u8]| name.get(65).is_some_and(|namespace| *namespace != DOS_ONLY);
        entry.names = names.filter_map(streams::resident).filter(is_long).count() as u32;
        let flags = match resident(types::STANDARD_INFORMATION) {
            Some(bytes) => {
                let ticks = Bytes(bytes).u64(8).map_err(error)?;
                entry.modified_seconds = Some((ticks / TICKS).cast_signed() - FROM_1601_TO_1970);
                entry.modified_nanos = (ticks % TICKS) as u32 * 100;
                Bytes(bytes).u32(32).map_err(error)?
            }
            None => 0,
        };
        let mut is_encrypted = flags & 0x4000 != 0;
        let contents = streams::contents(&self.ntfs, &records)?;
        for (name, content) in &contents {
            is_encrypted |= content.is_encrypted;
            if name.is_empty() {
                entry.size_bytes = content.size_bytes;
                entry.allocated_bytes = Some(content.allocated_bytes(&self.ntfs));
            } else {
                entry.streams.push(Stream { name: name.clone(), size_bytes: content.size_bytes });
            }
        }
        entry.attributes = letters(flags, is_encrypted);
        let own = contents.iter().find(|(name, _)| name.is_empty()).map(|(_, content)| content);
        if let Meaning::Link(target) = self.meaning(&records, flags, own)? {
            entry.set_kind(Kind::Link);
            entry.target = target;
        }
        Ok(entry)
    }

    /// What else than its content a file may stand for.
    fn meaning(&self, records: &[Record], flags: u32, own: Option<&Content>) -> Result<Meaning> {
        if let Some(point) = streams::content(&self.ntfs, records, types::REPARSE_POINT, "")? {
            return links::of_reparse_point(&point.small(&self.ntfs, links::MOST_BYTES)?);
        }
        // As Interix and older ones of ntfs-3g keep links: system files with a magic word.
        let is_system = flags & 0x4 != 0 && !records[0].is_folder;
        match own.filter(|own| is_system && own.size_bytes <= links::MOST_BYTES) {
            Some(own) if !own.is_encrypted => {
                Ok(links::of_interix(&own.small(&self.ntfs, links::MOST_BYTES)?))
            }
            _ => Ok(Meaning::Content),
        }
    }

    fn content(&mut self, file: Place<'_>, stream: &str) -> Result<Rc<Content>> {
        let Handle::Number(number) = file.node.handle else {
            return Err(BrowseError::unknown(file.path));
        };
        if let Some((known, name, content)) = &self.last
            && (*known, name.as_str()) == (number, stream)
        {
            return Ok(content.clone());
        }
        let records = self.records(number)?;
        let content = streams::content(&self.ntfs, &records, types::DATA, stream)?;
        let content = content.ok_or_else(|| match records[0].is_folder && stream.is_empty() {
            true => BrowseError::Kind { what: "this is a folder".into() },
            false => BrowseError::Unknown { path: format!("stream {stream}") },
        })?;
        if content.is_encrypted {
            return Err(BrowseError::unsupported(
                "it is encrypted by Windows (EFS): restore the disk and read it there",
            ));
        }
        if stream.is_empty()
            && let Meaning::Elsewhere(what) = self.meaning(&records, 0, None)?
        {
            return Err(BrowseError::Unsupported { what });
        }
        let content = Rc::new(content);
        self.last = Some((number, stream.to_owned(), content.clone()));
        Ok(content)
    }
}

fn letters(flags: u32, is_encrypted: bool) -> String {
    let known = [(0x1, 'R'), (0x2, 'H'), (0x4, 'S'), (0x20, 'A'), (0x800, 'C'), (0x200, 'P')];
    let set = known.into_iter().filter(|(bit, _)| flags & bit != 0).map(|(_, letter)| letter);
    set.chain(is_encrypted.then_some('E')).collect()
}

impl FileSystem for NtfsFiles {
    fn root(&mut self) -> Result<Node> {
        let number = numbers::ROOT;
        Ok(Node { entry: self.entry(b"", number)?, handle: Handle::Number(number) })
    }

    fn list(&mut self, folder: Place<'_>, each: Each<'_>) -> Result<()> {
        let Handle::Number(number) = folder.node.handle else {
            return Err(BrowseError::unknown(folder.path));
        };
        let records = self.records(number)?;
        folder::each_name(&self.ntfs, &records, &mut |name, number| {
            // The root folder lists itself and the file system's own files.
            if number < numbers::FIRST_USER {
                return Ok(());
            }
            let entry = self.entry(name, number);
            let entry = entry.unwrap_or_else(|problem| Entry::unreadable(name, problem));
            each(Node { entry, handle: Handle::Number(number) })
        })
    }

    fn read(&mut self, file: Place<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.read_stream(file, "", offset, buffer)
    }

    fn read_stream(
        &mut self,
        file: Place<'_>,
        stream: &str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let content = self.content(file, stream)?;
        content.read(&self.ntfs, offset, buffer)
    }

    fn next_data(&mut self, file: Place<'_>, stream: &str, offset: u64) -> Result<u64> {
        let content = self.content(file, stream)?;
        Ok(content.next_data(&self.ntfs, offset))
    }

    fn most_folders(&self) -> u64 {
        self.ntfs.records()
    }
}
