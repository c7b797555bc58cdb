//! Small writes one after another, gathered.

use std::io;

use super::File;

/// Bytes gathered before they are written.
const GATHERED: usize = 1 << 18;

/// Writes to the end of what it wrote before.
#[derive(Debug)]
pub struct Appender {
    file: File,
    offset: u64,
    gathered: Vec<u8>,
}

impl Appender {
    /// Writes from byte `offset` on.
    pub fn new(file: File, offset: u64) -> Self {
        Self { file, offset, gathered: Vec::with_capacity(GATHERED) }
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// As the file system says; nothing more may be added then.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.gathered.len() + bytes.len() > GATHERED {
            self.flush()?;
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes what is left and hands the file back, not yet synced.
    ///
    /// # Errors
    /// As the file system says.
    pub fn finish(mut self) -> io::Result<File> {
        self.flush()?;
        Ok(self.file)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            self.file.write_all_at(&self.gathered, self.offset)?;
            self.offset += self.gathered.len() as u64;
            self.gathered.clear();
        }
        Ok(())
    }
}
