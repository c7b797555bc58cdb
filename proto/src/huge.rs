//! Memory in huge pages. A module of its own since it needs `unsafe`: no library offers this for memory it didn't map itself.
#![allow(unsafe_code)]

use bytes::BytesMut;

/// A huge page of x86-64, and of ARM with pages of 4 KiB.
const PAGE: usize = 2 << 20;
/// Bytes of a half.
pub(crate) const HALF: usize = PAGE / 2;

/// Two parts of one huge page, 1 MiB each, filled with zeros. Without huge pages they are the same, of small ones.
pub(crate) fn halves() -> [BytesMut; 2] {
    // Fresh zeros of this size are mapped and not yet there, so that what is cut off at both ends costs nothing.
    let mut memory = BytesMut::zeroed(2 * PAGE);
    let before = memory.as_ptr().addr().wrapping_neg() % PAGE;
    let mut first = memory.split_off(before);
    first.truncate(PAGE);
    advise(&mut first);
    let second = first.split_off(HALF);
    [first, second]
}

/// Asks for huge pages from now on.
fn advise(memory: &mut [u8]) {
    // SAFETY: this advice changes how memory is backed, never what it holds (madvise(2)): whoever reads or writes it sees the same. The
    // range is the caller's own for the time of the call, and outlives it.
    let _ = unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_lie_beside_each_other_in_one_huge_page() {
        let [mut first, second] = halves();
        assert_eq!((first.len(), second.len()), (HALF, HALF));
        assert_eq!(first.as_ptr().addr() % PAGE, 0);
        assert_eq!(second.as_ptr().addr() - first.as_ptr().addr(), HALF);
        assert!(first.iter().chain(&second[..]).all(|byte| *byte == 0));
        first.fill(7);
        assert!(second.iter().all(|byte| *byte == 0));
    }
}
