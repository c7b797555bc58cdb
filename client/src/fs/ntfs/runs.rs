//! Mapping pairs: where the clusters of a stream are.

use crate::fs::FsError;

/// Clusters that lie together. Holes have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Its first cluster in the stream.
    pub(crate) vcn: u64,
    /// Its first cluster on the volume.
    pub(crate) first: u64,
    /// How many.
    pub(crate) count: u64,
}

impl Run {
    /// Its clusters on the volume.
    pub(crate) fn clusters(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }
}

/// A stream may have so many runs in one attribute: they all fit a record of 64 KiB.
const MAX_RUNS: usize = 32 << 10;

/// Reads the pairs of a stream from cluster `vcn` to `end`.
pub(super) fn parse(mut bytes: &[u8], mut vcn: u64, end: u64) -> Result<Vec<Run>, FsError> {
    let bad = || FsError::damaged("a list of clusters makes no sense");
    let mut runs = Vec::new();
    let mut first: i64 = 0;
    loop {
        let Some((&head, rest)) = bytes.split_first() else { return Err(bad()) };
        if head == 0 {
            return if vcn == end { Ok(runs) } else { Err(bad()) };
        }
        let (count_bytes, place_bytes) = (usize::from(head & 0xF), usize::from(head >> 4));
        let (count, rest) = rest.split_at_checked(count_bytes).ok_or_else(bad)?;
        let (place, rest) = rest.split_at_checked(place_bytes).ok_or_else(bad)?;
        let count = u64::try_from(number(count).ok_or_else(bad)?).map_err(|_| bad())?;
        let next =
            vcn.checked_add(count).filter(|next| *next <= end && count > 0).ok_or_else(bad)?;
        if place_bytes > 0 {
            first = first.checked_add(number(place).ok_or_else(bad)?).ok_or_else(bad)?;
            let first = u64::try_from(first).map_err(|_| bad())?;
            runs.push(Run { vcn, first, count });
        }
        if runs.len() > MAX_RUNS {
            return Err(bad());
        }
        (vcn, bytes) = (next, rest);
    }
}

/// A signed number of 1 to 8 bytes, the lowest first.
fn number(bytes: &[u8]) -> Option<i64> {
    let sign = bytes.last()?.cast_signed() >> 7;
    let mut all = [sign.cast_unsigned(); 8];
    all.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(i64::from_le_bytes(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_from_the_one_before_and_holes_have_none() {
        // The example of the Linux-NTFS documentation: 0x30 at 0x60, 0x10 further on at 0x160, 0x20 as a hole, 0x8 back.
        let bytes = [0x21, 0x30, 0x60, 0, 0x21, 0x10, 0, 1, 0x01, 0x20, 0x11, 0x08, 0xF0, 0];
        let run = |vcn, first, count| Run { vcn, first, count };
        let expected = vec![run(0, 0x60, 0x30), run(0x30, 0x160, 0x10), run(0x60, 0x150, 8)];
        assert_eq!(parse(&bytes, 0, 0x68).unwrap(), expected);
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut], 0, 0x68).is_err(), "{cut}");
        }
        assert!(parse(&bytes, 0, 0x67).is_err());
        assert!(parse(&[0x11, 1, 0x80, 0], 0, 1).is_err(), "before the volume");
        assert!(parse(&[0x19, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], 0, 1).is_err(), "9 bytes");
        assert!(parse(&[0x11, 0xFF, 1, 0], 0, 1).is_err(), "a negative count");
    }
}
