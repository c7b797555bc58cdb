//! The volume, as the reader sees it: bytes that it asks its client for. Small reads come from pages that are kept.

use std::{
    cell::RefCell,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Stdin, Stdout, Write},
    rc::Rc,
};

use super::super::wire::{self, Tag};
use crate::source::view::ReadAt;

/// Bytes that are asked for at once where less is needed.
const PAGE_BYTES: u64 = 64 << 10;
/// Pages that are kept, by their number modulo this: 64 MiB.
const PAGES: usize = 1024;

/// The two pipes to the client.
pub(super) struct Pipes {
    input: BufReader<Stdin>,
    pub(super) output: BufWriter<Stdout>,
}

impl Pipes {
    pub(super) fn new() -> Self {
        let output = BufWriter::with_capacity(64 << 10, io::stdout());
        Self { input: BufReader::with_capacity(128 << 10, io::stdin()), output }
    }

    /// The next frame of the client.
    pub(super) fn next(&mut self, content: &mut Vec<u8>) -> io::Result<Tag> {
        self.output.flush()?;
        wire::read(&mut self.input, content)
    }
}

/// The volume.
pub(super) struct Blocks {
    pipes: Rc<RefCell<Pipes>>,
    len: u64,
    pages: RefCell<Vec<Option<Page>>>,
    answer: RefCell<Vec<u8>>,
}

/// Its number and its bytes.
type Page = (u64, Vec<u8>);

impl Blocks {
    pub(super) fn new(pipes: Rc<RefCell<Pipes>>, len: u64) -> Self {
        let pages = RefCell::new(vec![None; PAGES]);
        Self { pipes, len, pages, answer: RefCell::default() }
    }

    fn ask(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for part in buffer.chunks_mut(wire::MAX_BYTES as usize) {
            let mut pipes = self.pipes.borrow_mut();
            let mut answer = self.answer.borrow_mut();
            let len = (part.len() as u32).to_le_bytes();
            wire::write(&mut pipes.output, Tag::Want, &[&at.to_le_bytes(), &len])?;
            match pipes.next(&mut answer)? {
                Tag::Bytes if answer.len() == part.len() => part.copy_from_slice(&answer),
                Tag::Refused => {
                    return Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()));
                }
                _ => return Err(wire::wrong("no answer to what was asked")),
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn read_page(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let number = offset / PAGE_BYTES;
        let within = (offset % PAGE_BYTES) as usize;
        let mut pages = self.pages.borrow_mut();
        let place = &mut pages[(number % PAGES as u64) as usize];
        let page = match place {
            Some((known, page)) if *known == number => page,
            _ => {
                let first = number * PAGE_BYTES;
                let mut page = vec![0; PAGE_BYTES.min(self.len - first) as usize];
                self.ask(&mut page, first)?;
                &mut place.insert((number, page)).1
            }
        };
        let count = buffer.len().min(page.len() - within);
        buffer[..count].copy_from_slice(&page[within..within + count]);
        Ok(count)
    }
}

impl ReadAt for Blocks {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buffer.len() as u64 >= PAGE_BYTES {
            return self.ask(buffer, offset);
        }
        let mut done = 0;
        while done < buffer.len() {
            done += self.read_page(&mut buffer[done..], offset + done as u64)?;
        }
        Ok(())
    }
}

/// The volume with a position, for libraries that want one. Nothing can be written.
pub(super) struct Positioned {
    pub(super) blocks: Rc<Blocks>,
    pub(super) position: u64,
}

impl Read for Positioned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.blocks.len.saturating_sub(self.position);
        let count = (buffer.len() as u64).min(left) as usize;
        self.blocks.read_exact_at(&mut buffer[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Positioned {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.blocks.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl Write for Positioned {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
