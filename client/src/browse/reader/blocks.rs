//! The volume, as the reader sees it: bytes that it asks its client for. Small reads come from pages that are kept.

use std::{
    cell::RefCell,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Stdin, Stdout, Write},
    rc::Rc,
};

use super::super::wire::{self, Tag};
use crate::source::view::{Paged, ReadAt, Reader};

/// Pages that are kept: 64 MiB.
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
pub(super) type Blocks = Paged<Asked>;

/// The volume of so many bytes at the other end of the pipes.
pub(super) fn blocks(pipes: Rc<RefCell<Pipes>>, len: u64) -> Blocks {
    Paged::new(Asked { pipes, len, answer: RefCell::default() }, PAGES)
}

/// Bytes that the client is asked for.
pub(super) struct Asked {
    pipes: Rc<RefCell<Pipes>>,
    len: u64,
    answer: RefCell<Vec<u8>>,
}

impl ReadAt for Asked {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
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
}

/// The volume with a position, for a library that wants to write, too: it can't.
pub(super) struct Positioned(Reader<Rc<Blocks>>);

impl Positioned {
    pub(super) fn new(blocks: Rc<Blocks>) -> Self {
        Self(Reader::new(blocks))
    }
}

impl Read for Positioned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Seek for Positioned {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
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
