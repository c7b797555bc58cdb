//! Volumes that are small as inputs: their size in sectors, then the sectors that aren't zeros, each behind its number.

use std::{cell::Cell, collections::BTreeMap, io};

use crate::source::view::ReadAt;

const SECTOR: usize = 512;
/// Larger inputs are cut: 64 MiB.
const MOST_SECTORS: u32 = 1 << 17;
/// One structure is read so often at most, however large it is said to be.
const READS: u64 = 50_000;

/// A volume, and what was read of it.
#[derive(Debug, Clone)]
pub struct Sparse {
    sectors: BTreeMap<u32, [u8; SECTOR]>,
    count: u32,
    reads: Cell<u64>,
    bytes: Cell<u64>,
}

impl Sparse {
    /// Reads an input; a sector that is cut off has zeros behind it.
    pub fn decode(input: &[u8]) -> Self {
        let (count, mut rest) = number(input);
        let mut sectors = BTreeMap::new();
        while !rest.is_empty() {
            let (at, bytes) = number(rest);
            let (bytes, after) = bytes.split_at(bytes.len().min(SECTOR));
            let mut sector = [0; SECTOR];
            sector[..bytes.len()].copy_from_slice(bytes);
            sectors.insert(at, sector);
            rest = after;
        }
        let count = count.min(MOST_SECTORS);
        Self { sectors, count, reads: Cell::default(), bytes: Cell::default() }
    }

    /// Fills `buffer` without counting; false past the end.
    pub(super) fn peek(&self, buffer: &mut [u8], offset: u64) -> bool {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.len()) {
            return false;
        }
        let mut at = offset;
        let mut left = buffer;
        while !left.is_empty() {
            let within = (at % SECTOR as u64) as usize;
            let (now, later) = left.split_at_mut((SECTOR - within).min(left.len()));
            match self.sectors.get(&((at / SECTOR as u64) as u32)) {
                Some(sector) => now.copy_from_slice(&sector[within..within + now.len()]),
                None => now.fill(0),
            }
            at += now.len() as u64;
            left = later;
        }
        true
    }

    /// `len` bytes, or fewer at the end.
    pub(super) fn part(&self, offset: u64, len: usize) -> Vec<u8> {
        let left = self.len().saturating_sub(offset).min(len as u64);
        let mut bytes = vec![0; left as usize];
        self.peek(&mut bytes, offset);
        bytes
    }

    /// Changes bytes, in sectors that are not zeros already.
    pub(super) fn patch(&mut self, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            if let Some(sector) = self.sectors.get_mut(&((at / SECTOR as u64) as u32)) {
                sector[(at % SECTOR as u64) as usize] = *byte;
            }
        }
    }

    /// Where sectors are that are not zeros.
    pub fn places(&self) -> Vec<u64> {
        self.sectors.keys().map(|sector| u64::from(*sector) * SECTOR as u64).collect()
    }

    /// Nobody reads a volume more than a few times over, however its structures refer to each other.
    pub(super) fn assert_bounded(&self) {
        let (reads, bytes) = (self.reads.get(), self.bytes.get());
        assert!(
            reads <= READS + self.len() / SECTOR as u64,
            "{reads} reads of {} bytes",
            self.len()
        );
        assert!(bytes <= 8 * self.len() + (64 << 20), "{bytes} bytes read of {}", self.len());
        self.reads.set(0);
        self.bytes.set(0);
    }
}

/// The number at the start of an input, and the rest.
fn number(input: &[u8]) -> (u32, &[u8]) {
    match input.split_first_chunk() {
        Some((number, rest)) => (u32::from_le_bytes(*number), rest),
        None => (0, &[]),
    }
}

impl ReadAt for Sparse {
    fn len(&self) -> u64 {
        u64::from(self.count) * SECTOR as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.set(self.reads.get() + 1);
        self.bytes.set(self.bytes.get() + buffer.len() as u64);
        if self.peek(buffer, offset) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// An input that holds those sectors of `image` which `run` reads, for the corpus.
pub fn encode(image: &[u8], run: impl Fn(&dyn ReadAt)) -> Vec<u8> {
    let traced = Traced { image, read: Cell::default() };
    run(&traced);
    let count = (image.len() / SECTOR) as u32;
    let mut input = count.to_le_bytes().to_vec();
    let mut read = traced.read.take();
    read.sort_unstable();
    read.dedup();
    for number in read {
        let sector = &image[number as usize * SECTOR..][..SECTOR];
        if sector.iter().any(|byte| *byte != 0) {
            input.extend(number.to_le_bytes());
            input.extend(sector);
        }
    }
    input
}

/// Remembers which sectors are read.
struct Traced<'a> {
    image: &'a [u8],
    read: Cell<Vec<u32>>,
}

impl ReadAt for Traced<'_> {
    fn len(&self) -> u64 {
        self.image.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (start, len) = (offset as usize, buffer.len());
        let end = start.checked_add(len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let bytes = self.image.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        let mut read = self.read.take();
        read.extend((start / SECTOR) as u32..end.div_ceil(SECTOR) as u32);
        self.read.set(read);
        Ok(())
    }
}
