//! Blocks that the server has lost: which, told in bytes, and a map of them for `--partial`.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use janus_proto::ids::BLOCK_BYTES;

/// Ranges named in a message.
const MOST_SAID: usize = 8;

/// Lost parts of a disk in bytes, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lost {
    ranges: Vec<Range<u64>>,
}

impl Lost {
    /// Of ranges of blocks, ascending, on a disk of so many bytes.
    pub(super) fn new(blocks: &[Range<u64>], size_bytes: u64) -> Self {
        let bytes = |range: &Range<u64>| {
            range.start * BLOCK_BYTES..(range.end * BLOCK_BYTES).min(size_bytes)
        };
        Self { ranges: blocks.iter().map(bytes).collect() }
    }

    /// What is lost of a part of the disk, in bytes from its start.
    pub(super) fn within(&self, window: &Range<u64>) -> Self {
        let inside = |range: &Range<u64>| {
            let start = range.start.max(window.start);
            let end = range.end.min(window.end);
            (start < end).then(|| start - window.start..end - window.start)
        };
        Self { ranges: self.ranges.iter().filter_map(inside).collect() }
    }

    /// True when nothing is lost.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges of bytes.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// How much is lost.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// The first ranges, in words.
    pub fn said(&self) -> String {
        let mut text = String::new();
        for (index, range) in self.ranges.iter().take(MOST_SAID).enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            let _ = write!(text, "{comma}{}-{}", range.start, range.end - 1);
        }
        match self.ranges.len().saturating_sub(MOST_SAID) {
            0 => {}
            more => {
                let _ = write!(text, " and {more} more ranges");
            }
        }
        text
    }

    /// Writes a map of the disk as GNU ddrescue does, so that its tools can fill the gaps from elsewhere.
    pub(super) fn write_map(&self, path: &Path, size_bytes: u64) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(self.map(size_bytes).as_bytes())?;
        file.sync_all()?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn map(&self, size_bytes: u64) -> String {
        let mut map = String::from(
            "# Mapfile. Lost parts (-) are zeros in the restored disk; the rest (+) was checked.\n# current_pos  current_status  current_pass\n0x00000000     +               1\n#      pos        size  status\n",
        );
        let mut next = 0;
        let mut line = |range: Range<u64>, status: char| {
            if !range.is_empty() {
                let _ = writeln!(
                    map,
                    "0x{:08X}  0x{:08X}  {status}",
                    range.start,
                    range.end - range.start
                );
            }
        };
        for range in &self.ranges {
            line(next..range.start, '+');
            line(range.clone(), '-');
            next = range.end;
        }
        line(next..size_bytes, '+');
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_covers_the_disk() {
        let lost = Lost::new(&[1..2, 4..6], 5 * 4096 + 512);
        assert_eq!(lost.said(), "4096-8191, 16384-20991");
        assert_eq!(lost.bytes(), 4096 + 4096 + 512);
        let map = lost.map(5 * 4096 + 512);
        let lines: Vec<&str> = map.lines().skip(4).collect();
        assert_eq!(
            lines,
            [
                "0x00000000  0x00001000  +",
                "0x00001000  0x00001000  -",
                "0x00002000  0x00002000  +",
                "0x00004000  0x00001200  -",
            ]
        );
    }
}
