//! How this process's memory allocator treats large blocks. A module of its own since it needs `unsafe`.
#![allow(unsafe_code)]

/// Freed memory is kept for the next use up to this, in bytes.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 64 << 20;
/// Blocks below this come from the heap, in bytes; glibc takes no more.
#[cfg(target_env = "gnu")]
const FROM_HEAP: i32 = 32 << 20;

/// For programs whose threads free what others allocated, such as the database of hashes: with a heap for each thread, each
/// keeps what it once had, twice as much in all. Other C libraries are left as they are.
///
/// To be called before threads are started.
pub fn one_heap() {
    #[cfg(target_env = "gnu")]
    set(libc::M_ARENA_MAX, 1);
}

/// For programs that pass data on in blocks of 1 MiB: freed blocks stay with the process and are used again.
///
/// By default glibc gives such a block back to the kernel, and takes a fresh one for the next frame: 256 page faults
/// for each MiB, which was a fourth of a router's CPU time. With one heap for all threads a block that one of them
/// freed serves the others; with several, each would keep its own. Other C libraries are left as they are.
///
/// To be called before threads are started.
pub fn keep_large_blocks() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_TRIM_THRESHOLD, KEPT),
        (libc::M_MMAP_THRESHOLD, FROM_HEAP),
    ] {
        set(option, value);
    }
}

#[cfg(target_env = "gnu")]
fn set(option: i32, value: i32) {
    // SAFETY: mallopt takes two integers by value, touches only the allocator's own state, under its own lock, and
    // returns 0 for what it doesn't know. Nothing that is allocated already is affected.
    let is_taken = unsafe { libc::mallopt(option, value) } == 1;
    debug_assert!(is_taken, "glibc knows option {option}");
}
