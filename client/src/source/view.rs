//! A volume as bytes at any offset, for those who read its structures.

use std::{
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileTypeExt,
    sync::{Mutex, PoisonError},
};

use super::Source;

/// Bytes at any offset.
pub trait ReadAt {
    /// How many there are.
    fn len(&self) -> u64;

    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When any byte of it can't be read; [`io::ErrorKind::UnexpectedEof`] past the end.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn len(&self) -> u64 {
        let is_device = |meta: &std::fs::Metadata| meta.file_type().is_block_device();
        let size = self.metadata().and_then(|meta| super::size_of(self, is_device(&meta)));
        size.unwrap_or(0)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for std::rc::Rc<T> {
    fn len(&self) -> u64 {
        T::len(self)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        T::read_exact_at(self, buffer, offset)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn len(&self) -> u64 {
        T::len(self)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        T::read_exact_at(self, buffer, offset)
    }
}

/// Bytes that are read at once where less is asked for.
const PAGE_BYTES: u64 = 64 << 10;

/// Small reads of another come from pages of 64 KiB that are kept, each in the place of its number modulo theirs.
#[derive(Debug)]
pub struct Paged<T> {
    inner: T,
    pages: Mutex<Vec<Option<Page>>>,
}

/// Its number and its bytes.
type Page = (u64, Vec<u8>);

impl<T: ReadAt> Paged<T> {
    /// Keeps so many pages of `inner`.
    pub fn new(inner: T, pages: usize) -> Self {
        Self { inner, pages: Mutex::new(vec![None; pages.max(1)]) }
    }

    /// Copies from one page what `buffer` has room for, from `offset` on; returns how much.
    fn read_page(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let number = offset / PAGE_BYTES;
        let within = (offset % PAGE_BYTES) as usize;
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (number % pages.len() as u64) as usize;
        let place = &mut pages[at];
        let page = match place {
            Some((known, page)) if *known == number => page,
            _ => {
                let first = number * PAGE_BYTES;
                let mut page = vec![0; PAGE_BYTES.min(self.inner.len() - first) as usize];
                self.inner.read_exact_at(&mut page, first)?;
                &mut place.insert((number, page)).1
            }
        };
        let count = buffer.len().min(page.len() - within);
        buffer[..count].copy_from_slice(&page[within..within + count]);
        Ok(count)
    }
}

impl<T: ReadAt> ReadAt for Paged<T> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buffer.len() as u64 >= PAGE_BYTES {
            return self.inner.read_exact_at(buffer, offset);
        }
        let mut done = 0;
        while done < buffer.len() {
            done += self.read_page(&mut buffer[done..], offset + done as u64)?;
        }
        Ok(())
    }
}

/// Pages that a view keeps: 16 MiB.
const PAGES: usize = 256;

/// A part of a source, paged.
#[derive(Debug)]
pub struct View<'a>(Paged<Part<'a>>);

#[derive(Debug)]
struct Part<'a> {
    source: &'a Source,
    start: u64,
    len: u64,
}

impl ReadAt for Part<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.source.read_at(self.start + offset, buffer).map_err(io::Error::other)
    }
}

impl<'a> View<'a> {
    /// `len` bytes of `source` from `start` on, or fewer where it ends earlier.
    pub fn new(source: &'a Source, start: u64, len: u64) -> Self {
        let start = start.min(source.size_bytes());
        let len = len.min(source.size_bytes() - start);
        Self(Paged::new(Part { source, start, len }, PAGES))
    }

    /// A reader with a position, for libraries that want one.
    pub fn reader(&self) -> Reader<&Self> {
        Reader::new(self)
    }
}

impl ReadAt for View<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

/// Reads from a position on.
#[derive(Debug)]
pub struct Reader<T> {
    of: T,
    position: u64,
}

impl<T: ReadAt> Reader<T> {
    /// From the start.
    pub fn new(of: T) -> Self {
        Self { of, position: 0 }
    }
}

impl<T: ReadAt> Read for Reader<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.of.len().saturating_sub(self.position);
        let count = (buffer.len() as u64).min(left) as usize;
        self.of.read_exact_at(&mut buffer[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl<T: ReadAt> Seek for Reader<T> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.of.len().checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::DiskSpec;

    #[test]
    fn a_view_is_a_window_and_ends_where_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let content: Vec<u8> = (0..200 * 1024u32).map(|at| (at / 7) as u8).collect();
        fs::write(&path, &content).unwrap();
        let spec = DiskSpec { name: Some("d".parse().unwrap()), path };
        let source = Source::open(&spec, None, false).unwrap();
        let view = View::new(&source, 1000, 150 * 1024);
        let window = &content[1000..1000 + 150 * 1024];
        for (offset, len) in [(0, 1), (65_530, 20), (3, 100_000), (150 * 1024 - 5, 5)] {
            let mut buffer = vec![0; len];
            view.read_exact_at(&mut buffer, offset as u64).unwrap();
            assert_eq!(buffer, window[offset..offset + len], "{offset} {len}");
        }
        assert!(view.read_exact_at(&mut [0; 6], 150 * 1024 - 5).is_err());
        assert!(view.read_exact_at(&mut [0; 6], u64::MAX).is_err());
        let mut all = Vec::new();
        let mut reader = view.reader();
        reader.seek(SeekFrom::End(-10)).unwrap();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, window[150 * 1024 - 10..]);
        assert!(reader.seek(SeekFrom::Current(i64::MIN)).is_err());
        assert_eq!(View::new(&source, 190 * 1024, u64::MAX).len(), 10 * 1024);
    }
}
