//! How much of a file the page cache holds. A module of its own since it needs `unsafe`: no library wraps this call yet.
#![allow(unsafe_code)]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
};

/// `cachestat`: the same number on all architectures but Alpha (Linux 6.5, `scripts/syscall.tbl`).
const CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of `linux/mman.h`.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// `struct cachestat`, in pages.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bytes of `len` from `offset` on that are in the page cache, in whole pages; `None` where the system doesn't tell: before
/// Linux 6.5, or about files that the caller may not write.
pub(crate) fn cached_bytes(file: &File, offset: u64, len: u64) -> Option<u64> {
    let (range, mut stat) = (Range { offset, len }, Stat::default());
    let file = file.as_fd().as_raw_fd();
    // SAFETY: the call reads one `Range` and writes one `Stat`, which have the kernel's layout and live until it returns; it
    // keeps neither. The descriptor is open: `file` is borrowed from its owner.
    let answer = unsafe {
        libc::syscall(CACHESTAT, file, &raw const range, &raw mut stat, 0 as libc::c_uint)
    };
    (answer == 0).then(|| stat.cached * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_just_written_is_there() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let Some(cached) = cached_bytes(&file, 0, 1 << 20) else { return };
        assert_eq!(cached, 1 << 20);
        assert_eq!(cached_bytes(&file, 1 << 20, 1 << 20), Some(0));
    }
}
