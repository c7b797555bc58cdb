//! What a run changes on a disk, and whether that looks like an attack. [`judge`] is pure.
//!
//! Two rules, for each disk that was backed up here before:
//!
//! - *much*: it changes more than a fifth of the disk, and more than five times the median of its last ten runs here;
//! - *unreadable*: of the blocks that it changes, more than half held something that could be packed and hold nothing of
//!   the kind any more, as after encryption in place. Small changes are left out: programs replace logs by packed ones.
//!
//! The second looks at a sample of the blocks, drawn by chance when the run is committed: nothing is done while they arrive.

use std::fmt;

use janus_proto::{ids::BLOCK_BYTES, model::packed_len, pb::Encoding, show::amount};

/// Runs whose median is taken.
const MEDIAN_OF: usize = 10;
/// With fewer nobody knows what is usual.
const LEAST_RUNS: usize = 3;
const TIMES: u64 = 5;
/// One part in so many of the disk is much.
const MUCH: u64 = 5;
/// Blocks that are looked at.
pub const SAMPLE: usize = 256;
/// Fewer say nothing.
const LEAST_SAMPLE: u64 = 64;
/// Changes below this, or below one part in so many of the disk, are small.
const SMALL_BLOCKS: u64 = 256;
const SMALL_PART: u64 = 200;

/// What a run changes on a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// Blocks that it changes, or makes zeros.
    pub changed_blocks: u64,
    /// Blocks of the disk.
    pub disk_blocks: u64,
    /// Changed blocks that were looked at.
    pub sampled: u64,
    /// Of them those that could be packed, and can't any more.
    pub turned: u64,
}

impl Change {
    /// So little that what it holds says nothing.
    pub fn is_small(&self) -> bool {
        self.changed_blocks < SMALL_BLOCKS.max(self.disk_blocks / SMALL_PART)
    }
}

/// What looks like an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspicion {
    /// It changes much more than usual.
    Much {
        /// So many blocks.
        changed_blocks: u64,
        /// Of so many.
        disk_blocks: u64,
        /// So many are usual.
        median: u64,
    },
    /// What it changes can't be packed any more.
    Unreadable {
        /// So many percent of what it changes.
        percent: u64,
        /// Blocks that it changes.
        changed_blocks: u64,
    },
}

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |blocks: u64| amount(blocks.saturating_mul(BLOCK_BYTES));
        match self {
            Self::Much { changed_blocks, disk_blocks, median } => write!(
                f,
                "{} of {} changed, usual are {}",
                bytes(*changed_blocks),
                bytes(*disk_blocks),
                bytes(*median)
            ),
            Self::Unreadable { percent, changed_blocks } => write!(
                f,
                "{percent}% of {} that changed could be packed before and can't any more, as after encryption",
                bytes(*changed_blocks)
            ),
        }
    }
}

/// What is suspicious about a change. `earlier` are the changed blocks of the disk's runs before, newest first.
pub fn judge(change: &Change, earlier: impl Iterator<Item = u64>) -> Vec<Suspicion> {
    let Change { changed_blocks, disk_blocks, sampled, turned } = *change;
    let mut found = Vec::new();
    let mut last: Vec<u64> = earlier.take(MEDIAN_OF).collect();
    last.sort_unstable();
    if let Some(median) = median(&last).filter(|_| last.len() >= LEAST_RUNS) {
        let is_much = changed_blocks.saturating_mul(MUCH) > disk_blocks;
        if is_much && changed_blocks > median.saturating_mul(TIMES) {
            found.push(Suspicion::Much { changed_blocks, disk_blocks, median });
        }
    }
    if !change.is_small() && sampled >= LEAST_SAMPLE && turned * 2 > sampled {
        let percent = turned * 100 / sampled;
        found.push(Suspicion::Unreadable { percent, changed_blocks });
    }
    found
}

/// The middle of sorted numbers, or of the two in the middle.
fn median(sorted: &[u64]) -> Option<u64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some(lower.midpoint(upper))
}

/// True for bytes that can't be packed, as what is encrypted, and what is packed already.
pub fn is_packed(bytes: &[u8]) -> bool {
    packed_len(Encoding::Zstd, bytes) >= bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngCore, SeedableRng, rngs::SmallRng};

    use super::*;

    fn change(changed_blocks: u64, disk_blocks: u64) -> Change {
        Change { changed_blocks, disk_blocks, ..Change::default() }
    }

    fn is_much(changed: u64, disk: u64, earlier: &[u64]) -> bool {
        !judge(&change(changed, disk), earlier.iter().copied()).is_empty()
    }

    #[test]
    fn much_is_more_than_usual_and_a_fifth_of_the_disk() {
        assert!(is_much(201, 1000, &[10, 10, 10]));
        assert!(!is_much(200, 1000, &[10, 10, 10]), "a fifth is not more than a fifth");
        assert!(!is_much(900, 1000, &[10, 10]), "nobody knows what is usual");
        assert!(!is_much(300, 1000, &[60, 60, 60, 60]), "five times, not more");
        assert!(is_much(301, 1000, &[60, 60, 60, 60]));
        assert!(is_much(201, 1000, &[0, 0, 0, 900, 900]), "one large backup is not what is usual");
        let ten_and_older: Vec<u64> = [1; 10].into_iter().chain([900; 20]).collect();
        assert!(is_much(500, 1000, &ten_and_older), "only ten count");
    }

    #[test]
    fn what_can_not_be_packed_any_more_is_suspicious_from_half_of_it_on() {
        let of = |sampled, turned, changed_blocks| {
            let change = Change { changed_blocks, disk_blocks: 100_000, sampled, turned };
            judge(&change, std::iter::empty())
        };
        assert_eq!(of(256, 129, 500), [Suspicion::Unreadable { percent: 50, changed_blocks: 500 }]);
        assert_eq!(of(256, 128, 500), []);
        assert_eq!(of(256, 256, 499), [], "small");
        assert_eq!(of(63, 63, 500), [], "hardly looked at");
    }

    #[test]
    fn random_bytes_can_not_be_packed_and_others_can() {
        let mut random = vec![0; 4096];
        SmallRng::seed_from_u64(1).fill_bytes(&mut random);
        assert!(is_packed(&random));
        let text = b"it is written, it can be read; ".repeat(140);
        assert!(!is_packed(&text[..4096]));
        assert!(!is_packed(&[0; 4096]));
        let digits: Vec<u8> = random.iter().map(|byte| b'0' + byte % 10).collect();
        assert!(!is_packed(&digits));
    }

    proptest! {
        #[test]
        fn any_numbers_are_judged(
            change in (any::<u64>(), any::<u64>(), 0..=256u64, 0..=256u64),
            earlier in prop::collection::vec(any::<u64>(), 0..20),
        ) {
            let (changed_blocks, disk_blocks, sampled, turned) = change;
            let found = judge(
                &Change { changed_blocks, disk_blocks, sampled, turned },
                earlier.iter().copied(),
            );
            for suspicion in &found {
                prop_assert!(!suspicion.to_string().is_empty());
            }
            let is_much = found.iter().any(|it| matches!(it, Suspicion::Much { .. }));
            prop_assert!(!is_much || changed_blocks > disk_blocks / 5);
        }
    }
}
