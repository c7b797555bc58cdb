//! What a library read last of the volume. Two of them read times of files, but don't tell them.

use std::{cell::RefCell, io, rc::Rc};

use super::blocks::Blocks;
use crate::source::view::ReadAt;

/// Reads that are longer hold no single structure.
const MOST_BYTES: usize = 64 << 10;

/// Reads the volume for a library, and remembers the last bytes.
#[derive(Clone)]
pub(super) struct Watched {
    blocks: Rc<Blocks>,
    last: Rc<RefCell<Vec<u8>>>,
}

impl Watched {
    pub(super) fn new(blocks: Rc<Blocks>) -> Self {
        Self { blocks, last: Rc::default() }
    }

    pub(super) fn len(&self) -> u64 {
        self.blocks.len()
    }

    /// Forgets what was read until now.
    pub(super) fn forget(&self) {
        self.last.borrow_mut().clear();
    }

    /// What was read last since then.
    pub(super) fn last(&self) -> std::cell::Ref<'_, [u8]> {
        std::cell::Ref::map(self.last.borrow(), Vec::as_slice)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.blocks.read_exact_at(buffer, offset)?;
        let mut last = self.last.borrow_mut();
        last.clear();
        if buffer.len() <= MOST_BYTES {
            last.extend_from_slice(buffer);
        }
        Ok(())
    }
}

impl lamxfs::BlockRead for Watched {
    type Error = io::Error;

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read(offset, buffer)
    }
}

impl lambutter::BlockRead for Watched {
    type Error = io::Error;

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read(offset, buffer)
    }
}
