//! A file's bytes in memory: pages that were written, zeros elsewhere. Cheap to clone.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

pub const PAGE: u64 = 4096;

/// Content of a file.
#[derive(Clone, Default)]
pub struct Sparse {
    pub len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
}

impl Sparse {
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.len = self.len.max(offset + data.len() as u64);
        for (page, at, part) in parts(offset, data.len() as u64) {
            let from = (page * PAGE + at - offset) as usize;
            let bytes = Arc::make_mut(self.pages.entry(page).or_insert_with(zeros));
            bytes[at as usize..(at + part) as usize]
                .copy_from_slice(&data[from..from + part as usize]);
        }
    }

    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            let end = self.len;
            self.len = len;
            self.punch(len, end - len);
        }
        self.len = len;
    }

    pub fn punch(&mut self, offset: u64, len: u64) {
        for (page, at, part) in parts(offset, len) {
            if part == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[at as usize..(at + part) as usize].fill(0);
            }
        }
    }

    /// Takes a range of another file over; both offsets are those of pages.
    pub fn copy_from(&mut self, offset: u64, from: &Self, from_offset: u64, len: u64) {
        self.len = self.len.max(offset + len);
        for (page, _, part) in parts(from_offset, len) {
            let (to, bytes) = (page * PAGE - from_offset + offset, from.pages.get(&page));
            match bytes {
                Some(bytes) if part == PAGE => drop(self.pages.insert(to / PAGE, bytes.clone())),
                Some(bytes) => self.write(to, &bytes[..part as usize]),
                None => self.punch(to, part),
            }
        }
    }

    /// Reads a real file.
    pub fn load(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        let mut content = Self { len: bytes.len() as u64, ..Self::default() };
        for (page, bytes) in (0..).zip(bytes.chunks(PAGE as usize)) {
            if bytes.iter().any(|byte| *byte != 0) {
                content.write(page * PAGE, bytes);
            }
        }
        Ok(content)
    }

    /// Makes a real file of it.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.len)?;
        for (page, bytes) in &self.pages {
            let start = page * PAGE;
            let end = self.len.min(start + PAGE);
            if start < end {
                file.write_all_at(&bytes[..(end - start) as usize], start)?;
            }
        }
        Ok(())
    }
}

fn zeros() -> Arc<[u8; PAGE as usize]> {
    Arc::new([0; PAGE as usize])
}

/// A range in parts that each lie in one page: the page, where in it, how long.
fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let (mut next, end) = (offset, offset + len);
    std::iter::from_fn(move || {
        let (page, at) = (next / PAGE, next % PAGE);
        let part = (PAGE - at).min(end - next);
        next += part;
        (part > 0).then_some((page, at, part))
    })
}
