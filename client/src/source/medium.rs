//! Where a disk's bytes come from.

use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use janus_proto::direct::DirectFile;
use rustix::fs::SeekFrom;

/// A disk as bytes. All methods block, and several threads may call them at once.
pub trait Medium: fmt::Debug + Send + Sync {
    /// Its size, the same as long as it is open.
    fn size_bytes(&self) -> u64;

    /// Logical sector size: 512 or 4096.
    fn sector_bytes(&self) -> u32;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When any byte of it can't be read.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The stretch that starts at `offset`: a hole or data, up to the end of the disk at most and never empty.
    fn stretch(&self, offset: u64) -> Stretch;

    /// `range` will be read soon: whoever has to fetch it may begin. Doesn't wait.
    fn expect(&self, _range: Range<u64>) {}

    /// True when `range` can be read without waiting for a disk or a network: a guess, for those who would rather not wait.
    fn is_near(&self, _range: Range<u64>) -> bool {
        false
    }
}

/// A part of a disk that is of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// First byte after it.
    pub end: u64,
    /// All zeros, known without reading.
    pub hole: bool,
}

/// A block device or an image file.
#[derive(Debug)]
pub struct FileMedium {
    file: DirectFile,
    size_bytes: u64,
    sector_bytes: u32,
    /// Cleared when the file system can't tell holes.
    tells_holes: AtomicBool,
}

impl FileMedium {
    /// Reads `file`; a device tells no holes.
    pub fn new(file: DirectFile, size_bytes: u64, sector_bytes: u32, device: bool) -> Self {
        Self { file, size_bytes, sector_bytes, tells_holes: AtomicBool::new(!device) }
    }

    fn file(&self) -> &File {
        self.file.file()
    }
}

impl Medium for FileMedium {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn is_near(&self, range: Range<u64>) -> bool {
        self.file.is_in_memory(range.start, (range.end - range.start) as usize)
    }

    fn stretch(&self, offset: u64) -> Stretch {
        let all = Stretch { end: self.size_bytes, hole: false };
        if !self.tells_holes.load(Ordering::Relaxed) {
            return all;
        }
        match rustix::fs::seek(self.file(), SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Stretch { end: data.min(self.size_bytes), hole: true },
            Ok(_) => match rustix::fs::seek(self.file(), SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => {
                    Stretch { end: hole.min(self.size_bytes), hole: false }
                }
                _ => all,
            },
            // Also the answer past the end of a file that has shrunk: that must be a failed read, not zeros.
            Err(rustix::io::Errno::NXIO) => {
                let whole = self.file().metadata().is_ok_and(|meta| meta.len() >= self.size_bytes);
                Stretch { end: self.size_bytes, hole: whole }
            }
            Err(_) => {
                self.tells_holes.store(false, Ordering::Relaxed);
                all
            }
        }
    }
}
