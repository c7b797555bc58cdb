//! What this machine can do at best: the rows of janus are compared with these.

use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use anyhow::Result;
use memmap2::{Advice, MmapMut};
use rustix::fs::OFlags;

use super::{Images, Row};
use crate::disk;

const PIECE: u64 = 1 << 20;
const BLOCK: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const ZERO: [u8; BLOCK] = [0; BLOCK];

/// Times of the limits, in seconds.
pub(super) struct Limits {
    /// Read the whole disk and hash it with BLAKE3, on all cores.
    pub read_and_hash: f64,
    /// Copy its data to a new file and sync that.
    pub copy: f64,
    pub rows: Vec<Row>,
}

pub(super) fn measure(images: &Images, work: &Path) -> Result<Limits> {
    // Once before, so that all rows find the image in memory as far as it fits.
    let read = timed(|| read_all(&images.base)).and_then(|_| timed(|| read_all(&images.base)))?;
    let read_and_hash = timed(|| hash_all(&images.base))?;
    let target = work.join("copy.raw");
    let copy = timed(|| {
        disk::copy(&images.base, &target)?;
        Ok(File::open(&target)?.sync_all()?)
    })?;
    std::fs::remove_file(&target)?;
    let rows = vec![
        images.row("limit", "read (1 thread)", read),
        images.row("limit", "read and hash (all cores)", read_and_hash),
        images.row("limit", "copy and sync", copy),
    ];
    Ok(Limits { read_and_hash, copy, rows })
}

pub(super) fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

pub(super) fn read_all(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; PIECE as usize];
    while file.read(&mut bytes)? > 0 {}
    Ok(())
}

/// Hashes what isn't a hole in pieces of 1 MiB, each as one tree, which is the fastest way to use BLAKE3.
fn hash_all(path: &Path) -> Result<()> {
    on_threads((cores(), Pages::Small), &File::open(path)?, PIECE, |bytes| {
        if bytes.chunks(BLOCK).any(|block| block != &ZERO[..block.len()]) {
            std::hint::black_box(blake3::hash(bytes));
        }
    })
}

/// The same in pieces that stay in a core's cache, whatever they hold.
pub(super) fn hash_pieces(path: &Path) -> Result<()> {
    on_threads((cores(), Pages::Small), &File::open(path)?, PIECE / 4, |bytes| {
        std::hint::black_box(blake3::hash(bytes));
    })
}

/// Pages that a disk reads into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pages {
    /// Those of any program.
    Small,
    /// Huge ones: a disk is asked for one place in memory instead of 256.
    Huge,
}

/// Reads what isn't a hole past the page cache, with two reads at a time for each core.
pub(super) fn read_direct(path: &Path, pages: Pages) -> Result<()> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    on_threads((2 * cores(), pages), &file, PIECE, |bytes| {
        std::hint::black_box(bytes);
    })
}

/// Reads what isn't a hole in pieces of `piece` bytes, on so many threads.
fn on_threads(
    (threads, pages): (usize, Pages),
    file: &File,
    piece: u64,
    work: impl Fn(&[u8]) + Sync,
) -> Result<()> {
    let pieces: Vec<_> = disk::written_ranges(file)?
        .into_iter()
        .flat_map(|range| {
            range.clone().step_by(piece as usize).map(move |at| at..(at + piece).min(range.end))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let read = || -> Result<()> {
        // Past the page cache memory must start where a page does.
        let mut memory = MmapMut::map_anon(HUGE_PAGE.max(piece as usize))?;
        if pages == Pages::Huge {
            memory.advise(Advice::HugePage)?;
        }
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let bytes = &mut memory[..(piece.end - piece.start) as usize];
            file.read_exact_at(bytes, piece.start)?;
            work(bytes);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        running.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        })
    })
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
