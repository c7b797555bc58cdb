//! An image with other bytes in some places, and sums that are made right again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex},
};

use janus_client::source::medium::{Medium, Stretch};

const PAGE: usize = 4096;

/// An image with other bytes in some pages.
pub struct Damaged {
    image: Arc<Vec<u8>>,
    pages: BTreeMap<usize, Vec<u8>>,
    read: Arc<Mutex<BTreeSet<usize>>>,
}

impl std::fmt::Debug for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Damaged").field("pages", &self.pages.keys()).finish_non_exhaustive()
    }
}

impl Damaged {
    pub fn new(image: Arc<Vec<u8>>) -> Self {
        Self { image, pages: BTreeMap::new(), read: Arc::default() }
    }

    /// The pages that somebody reads from now on.
    pub fn read_pages(&self) -> Arc<Mutex<BTreeSet<usize>>> {
        self.read.clone()
    }

    pub fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let byte = |at: usize| match self.pages.get(&(at / PAGE)) {
            Some(page) => page[at % PAGE],
            None => self.image[at],
        };
        (at..at + len).map(byte).collect()
    }

    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            let from = at / PAGE * PAGE;
            let until = (from + PAGE).min(self.image.len());
            let whole = || self.image[from..until].to_vec();
            self.pages.entry(at / PAGE).or_insert_with(whole)[at % PAGE] = *byte;
        }
    }

    pub fn into_bytes(self) -> Vec<u8> {
        let mut bytes = self.image.to_vec();
        for (number, page) in self.pages {
            bytes[number * PAGE..number * PAGE + page.len()].copy_from_slice(&page);
        }
        bytes
    }

    fn sum(&mut self, start: usize, len: usize, sum: usize) {
        self.set(start + sum, &[0; 4]);
        let right = crc32c::crc32c(&self.get(start, len));
        self.set(start + sum, &right.to_le_bytes());
    }
}

impl Medium for Damaged {
    fn size_bytes(&self) -> u64 {
        self.image.len() as u64
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = offset as usize;
        buffer.copy_from_slice(&self.image[from..from + buffer.len()]);
        let pages = from / PAGE..=(from + buffer.len()) / PAGE;
        self.read.lock().unwrap().extend(pages.clone());
        for (number, page) in self.pages.range(pages) {
            for (at, byte) in (number * PAGE..).zip(page) {
                if (from..from + buffer.len()).contains(&at) {
                    buffer[at - from] = *byte;
                }
            }
        }
        Ok(())
    }

    fn stretch(&self, _: u64) -> Stretch {
        Stretch { end: self.size_bytes(), hole: false }
    }
}

/// Makes the sum right of what has a byte at this place, so that damage isn't found by it.
pub type Mend = fn(&mut Damaged, usize);

pub fn nothing(_: &mut Damaged, _: usize) {}

/// Nodes of btrfs have 16 KiB, its superblock 4 KiB; both begin with the CRC-32C of what follows at 32.
pub fn btrfs(damaged: &mut Damaged, at: usize) {
    const SUPERBLOCK: usize = 64 << 10;
    let fsid = damaged.get(SUPERBLOCK + 32, 16);
    let (start, len) = match at / PAGE * PAGE {
        SUPERBLOCK => (SUPERBLOCK, PAGE),
        _ => (at / (16 << 10) * (16 << 10), 16 << 10),
    };
    if start + len <= damaged.image.len() && damaged.get(start + 32, 16) == fsid {
        let sum = crc32c::crc32c(&damaged.get(start + 32, len - 32));
        damaged.set(start, &sum.to_le_bytes());
    }
}

/// XFS 5 with inodes of 512 bytes and blocks of 4 KiB: where the CRC-32C is, by what the structure begins with.
pub fn xfs(damaged: &mut Damaged, at: usize) {
    let (sector, block) = (at / 512 * 512, at / PAGE * PAGE);
    let begins = |damaged: &Damaged, at: usize, word: &[u8]| damaged.get(at, word.len()) == word;
    if begins(damaged, sector, b"IN") {
        return damaged.sum(sector, 512, 100);
    }
    if begins(damaged, sector, b"XFSB") {
        return damaged.sum(sector, 512, 224);
    }
    for (word, sum) in [(b"XDB3", 4), (b"XDD3", 4), (b"BMA3", 64), (b"XSLM", 12)] {
        if begins(damaged, block, word) {
            return damaged.sum(block, PAGE, sum);
        }
    }
    // Leaves and nodes of folders.
    if [[0x3D, 0xF1], [0x3D, 0xFF], [0x3E, 0xBE]]
        .contains(&[damaged.get(block + 8, 1)[0], damaged.get(block + 9, 1)[0]])
    {
        damaged.sum(block, PAGE, 12);
    }
}
