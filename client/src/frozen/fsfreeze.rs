//! Freezing and thawing a mounted file system, as fsfreeze(8) does. A module of its own since it needs `unsafe`: no library
//! wraps these calls.
#![allow(unsafe_code)]

use std::fs::File;

use rustix::{
    io::Errno,
    ioctl::{IntegerSetter, Opcode, ioctl, opcode},
};

/// `FIFREEZE` and `FITHAW` of linux/fs.h.
const FREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const THAW: Opcode = opcode::read_write::<i32>(b'X', 120);

/// Freezes the file system that `folder` is on: all who write to it wait. Blocks until what was written is on its device.
///
/// # Errors
/// `BUSY` when it is frozen already, `OPNOTSUPP` when it can't be.
pub(super) fn freeze(folder: &File) -> Result<(), Errno> {
    // SAFETY: Linux ignores the argument of FIFREEZE (`ioctl_fsfreeze` in fs/ioctl.c takes only the file), so the kernel
    // neither reads nor writes memory of ours for it; 0 is an argument like any other.
    let call = unsafe { IntegerSetter::<FREEZE>::new_usize(0) };
    // SAFETY: as above; the descriptor is open as long as `folder` is borrowed.
    unsafe { ioctl(folder, call) }
}

/// Lets them go on.
///
/// # Errors
/// `INVAL` when it isn't frozen.
pub(super) fn thaw(folder: &File) -> Result<(), Errno> {
    // SAFETY: Linux ignores the argument of FITHAW (`ioctl_fsthaw`), as that of FIFREEZE.
    let call = unsafe { IntegerSetter::<THAW>::new_usize(0) };
    // SAFETY: as above.
    unsafe { ioctl(folder, call) }
}
