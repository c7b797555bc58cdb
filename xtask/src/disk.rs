//! Disk images for tests and the demo: made, changed and compared.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use crate::{noise::Noise, packages};

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where the partition of `make` starts.
const PARTITION: u64 = MIB;

/// Makes a GPT disk of `size_bytes` with one ext4 partition: real files of this machine, noise that doesn't compress,
/// and logs that do; the rest was never written. Needs no root. Tools: `packages::DISK_TOOLS`.
///
/// # Errors
/// When a tool fails or there isn't enough space.
pub fn make(path: &Path, size_bytes: u64, seed: u64) -> Result<()> {
    ensure!(
        size_bytes >= 16 * MIB && size_bytes.is_multiple_of(MIB),
        "a disk has whole MiB, at least 16"
    );
    packages::require(packages::DISK_TOOLS)?;
    let folder = path.parent().context("path of the disk has no folder")?;
    let stage = tempfile::Builder::new().prefix("files-").tempdir_in(folder)?;
    fill(stage.path(), size_bytes, seed)?;
    blank(path, size_bytes)?;
    let last = size_bytes / 512 - 2049;
    let partition = format!("1:{}:{last}", PARTITION / 512);
    packages::output(
        packages::command("sgdisk")
            .args(["-o", "-n", &partition, "-t", "1:8300", "-c", "1:root"])
            .arg(path),
    )?;
    let blocks = ((size_bytes - 2 * MIB) / BLOCK).to_string();
    let options = format!("offset={PARTITION},root_owner=0:0,nodiscard");
    packages::output(
        packages::command("mke2fs")
            .args(["-q", "-t", "ext4", "-F", "-b", "4096", "-L", "root", "-E", &options, "-d"])
            .arg(stage.path())
            .arg(path)
            .arg(blocks),
    )?;
    Ok(())
}

/// Files for about 60 % of the disk.
fn fill(stage: &Path, size_bytes: u64, seed: u64) -> Result<()> {
    let mut noise = Noise::new(seed);
    copy_real_files(&stage.join("usr"), size_bytes * 30 / 100)?;
    let media = stage.join("srv/media");
    fs::create_dir_all(&media)?;
    let mut left = size_bytes * 20 / 100;
    for number in 0.. {
        let length = left.min(MIB + noise.below(4 * MIB));
        let mut bytes = vec![0; length as usize];
        noise.fill(&mut bytes);
        fs::write(media.join(format!("{number:04}.bin")), bytes)?;
        left -= length;
        if left == 0 {
            break;
        }
    }
    let logs = stage.join("var/log");
    fs::create_dir_all(&logs)?;
    fs::write(logs.join("app.log"), log(&mut noise, size_bytes * 10 / 100))?;
    Ok(())
}

fn log(noise: &mut Noise, length: u64) -> String {
    let mut text = String::with_capacity(length as usize + 100);
    let mut second = 0;
    while (text.len() as u64) < length {
        second += noise.below(3);
        let (unit, host) = (noise.below(6), noise.below(250));
        let time = format!("{:02}:{:02}:{:02}", second / 3600 % 24, second / 60 % 60, second % 60);
        text.push_str(&format!(
            "2026-01-05T{time}Z host7 unit{unit}: 10.0.0.{host} GET /api/items 200 completed\n"
        ));
    }
    text
}

/// Copies plain files below `/usr` until `budget` bytes are full.
fn copy_real_files(to: &Path, budget: u64) -> Result<()> {
    fs::create_dir_all(to)?;
    let mut left = budget;
    let mut folders = vec![PathBuf::from("/usr/bin"), "/usr/lib".into(), "/usr/share".into()];
    let mut number = 0;
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let length = entry.metadata().map_or(0, |data| data.len());
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && length > 0 && length < left.min(32 * MIB) {
                // Numbered folders: names of different folders may be equal.
                let folder = to.join(format!("{:03}", number / 200));
                fs::create_dir_all(&folder)?;
                let Ok(copied) = fs::copy(entry.path(), folder.join(entry.file_name())) else {
                    continue;
                };
                left = left.saturating_sub(copied.next_multiple_of(BLOCK));
                number += 1;
            }
            if left < 64 * BLOCK {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Makes an empty sparse file.
///
/// # Errors
/// When it can't be written.
pub fn blank(path: &Path, size_bytes: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    file.set_len(size_bytes).with_context(|| format!("make {}", path.display()))
}

/// Writes noise over `range` of a disk.
///
/// # Errors
/// When it can't be written.
pub fn write_noise(path: &Path, range: std::ops::Range<u64>, seed: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let mut noise = Noise::new(seed);
    let mut bytes = vec![0; MIB as usize];
    let mut offset = range.start;
    while offset < range.end {
        let piece = &mut bytes[..MIB.min(range.end - offset) as usize];
        noise.fill(piece);
        file.write_all_at(piece, offset)?;
        offset += piece.len() as u64;
    }
    Ok(())
}

/// A sparse copy of a disk or device, which is only read.
///
/// # Errors
/// When it can't be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    packages::output(Command::new("cp").args(["--sparse=always", "--"]).arg(from).arg(to)).map(drop)
}

/// Blocks of a disk, by number.
pub type Blocks = BTreeSet<u64>;

/// Overwrites about `bytes` of the written part of a disk as work on it does: most in runs of 64 KiB, a fifth as
/// single blocks anywhere. Returns the blocks that differ now.
///
/// # Errors
/// When the disk can't be read or written, or was never written.
pub fn change(path: &Path, bytes: u64, seed: u64) -> Result<Blocks> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let written = written_ranges(&file)?;
    let total: u64 = written.iter().map(|range| (range.end - range.start) / BLOCK).sum();
    ensure!(total > 0, "{} has no written blocks to change", path.display());
    let mut noise = Noise::new(seed);
    let mut changed = Blocks::new();
    let wanted = (bytes / BLOCK).clamp(1, total / 2 + 1);
    while (changed.len() as u64) < wanted {
        let run = if (changed.len() as u64) < wanted * 8 / 10 { 16 } else { 1 };
        let first = nth_block(&written, noise.below(total));
        for block in first..first + run {
            // Only whole blocks that were written: a short last block is left as it is.
            if !changed.contains(&block) && written.iter().any(|r| r.contains(&(block * BLOCK))) {
                let mut data = [0; BLOCK as usize];
                noise.fill(&mut data);
                file.write_all_at(&data, block * BLOCK)?;
                changed.insert(block);
            }
        }
    }
    file.sync_all()?;
    Ok(changed)
}

fn nth_block(ranges: &[std::ops::Range<u64>], mut number: u64) -> u64 {
    for range in ranges {
        let blocks = (range.end - range.start) / BLOCK;
        if number < blocks {
            return range.start / BLOCK + number;
        }
        number -= blocks;
    }
    0
}

/// Whole blocks that are not holes, as byte ranges.
pub(crate) fn written_ranges(file: &File) -> Result<Vec<std::ops::Range<u64>>> {
    let end = file.metadata()?.len();
    let mut ranges = Vec::new();
    let mut offset = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(offset)) {
        offset = seek(file, SeekFrom::Hole(start))?.min(end);
        let range = start.next_multiple_of(BLOCK)..offset / BLOCK * BLOCK;
        if !range.is_empty() {
            ranges.push(range);
        }
    }
    Ok(ranges)
}

/// Bytes of a disk's blocks that are not all zeros: what a first backup has to send.
///
/// # Errors
/// When it can't be read.
pub fn data_bytes(path: &Path) -> Result<u64> {
    let file = File::open(path)?;
    let mut total = 0;
    for_each_piece(&file, |piece| {
        total += piece
            .chunks(BLOCK as usize)
            .filter(|b| b.iter().any(|v| *v != 0))
            .map(|b| b.len() as u64)
            .sum::<u64>();
    })?;
    Ok(total)
}

/// Calls `take` with each MiB of a file that may hold data; holes are left out.
fn for_each_piece(file: &File, mut take: impl FnMut(&[u8])) -> Result<()> {
    let end = file.metadata()?.len();
    let mut bytes = vec![0; MIB as usize];
    let mut offset = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(offset)) {
        offset = start / MIB * MIB;
        let piece = &mut bytes[..MIB.min(end - offset) as usize];
        file.read_exact_at(piece, offset)?;
        take(piece);
        offset += piece.len() as u64;
    }
    Ok(())
}

/// Compares two files byte by byte; parts that are holes in both are not read.
///
/// # Errors
/// When they differ, with the first differing byte, or can't be read.
pub fn compare(left: &Path, right: &Path) -> Result<()> {
    let (a, b) = (File::open(left)?, File::open(right)?);
    let (length, other) = (a.metadata()?.len(), b.metadata()?.len());
    if length != other {
        bail!("{} has {length} bytes, {} has {other}", left.display(), right.display());
    }
    let (mut x, mut y) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut offset = 0;
    while let Some(start) = next_data(&a, offset).into_iter().chain(next_data(&b, offset)).min() {
        offset = start / MIB * MIB;
        let piece = MIB.min(length - offset) as usize;
        a.read_exact_at(&mut x[..piece], offset)?;
        b.read_exact_at(&mut y[..piece], offset)?;
        if x[..piece] != y[..piece] {
            let at = x.iter().zip(&y).position(|(x, y)| x != y).unwrap_or(0) as u64;
            bail!(
                "{} and {} differ first at byte {}",
                left.display(),
                right.display(),
                offset + at
            );
        }
        offset += piece as u64;
    }
    Ok(())
}

fn next_data(file: &File, offset: u64) -> Option<u64> {
    seek(file, SeekFrom::Data(offset)).ok()
}

/// Bytes that a file takes on disk.
///
/// # Errors
/// When it can't be looked at.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path).with_context(|| format!("look at {}", path.display()))?.blocks() * 512)
}

/// A file, or all files below a folder; links and devices are none.
///
/// # Errors
/// When one can't be looked at.
pub fn files_below(path: &Path) -> Result<Vec<PathBuf>> {
    let meta = fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
    if !meta.is_dir() {
        return Ok(if meta.is_file() { vec![path.to_owned()] } else { Vec::new() });
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        files.extend(files_below(&entry?.path())?);
    }
    Ok(files)
}

/// Takes a file, or all files below a folder, out of the page cache.
///
/// # Errors
/// When one can't be opened or synced.
pub fn forget(path: &Path) -> Result<()> {
    for path in files_below(path)? {
        let file = File::open(path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Bytes that all files below a folder take on disk; what can't be looked at counts as nothing.
pub fn allocated_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => allocated_below(&entry.path()),
            _ => allocated_bytes(&entry.path()).unwrap_or(0),
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_found_by_compare_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        blank(&a, 32 * MIB + 512).unwrap();
        write_noise(&a, 3 * MIB..9 * MIB, 1).unwrap();
        copy(&a, &b).unwrap();
        compare(&a, &b).unwrap();
        assert_eq!(data_bytes(&a).unwrap(), 6 * MIB);
        let changed = change(&b, MIB, 2).unwrap();
        assert!(changed.len() as u64 >= MIB / BLOCK);
        let error = compare(&a, &b).unwrap_err().to_string();
        assert!(error.contains("differ first at byte"), "{error}");
        assert!(compare(&a, folder.path()).is_err());
    }

    #[test]
    fn data_that_only_one_file_has_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        blank(&a, 8 * MIB).unwrap();
        blank(&b, 8 * MIB).unwrap();
        compare(&a, &b).unwrap();
        write_noise(&b, 5 * MIB..5 * MIB + 1, 1).unwrap();
        assert!(compare(&a, &b).is_err());
    }
}
