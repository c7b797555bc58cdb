//! Blocks shared between two files. A module of its own since it needs `unsafe`: no library wraps FICLONERANGE.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
};

/// Lets `to` have the bytes of `from`, without a copy: ioctl_ficlonerange(2). A `len` of 0 means to the end of `from`.
pub(super) fn range(
    to: &File,
    offset: u64,
    from: &File,
    from_offset: u64,
    len: u64,
) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: from.as_fd().as_raw_fd().into(),
        src_offset: from_offset,
        src_length: len,
        dest_offset: offset,
    };
    let to = to.as_fd().as_raw_fd();
    // SAFETY: the call reads one `file_clone_range`, which has the kernel's layout and lives until it returns, writes no memory
    // and keeps nothing. Both descriptors are open: they are borrowed from their owners.
    let answer = unsafe { libc::ioctl(to, libc::FICLONERANGE, &raw const range) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
