//! Runs of chunks that wait to be fetched. What came while all fetchers were busy goes in one call: who reads here and there pays
//! for a call, not for the bytes.

use std::{collections::VecDeque, ops::Range};

/// Calls at the same time.
const FETCHERS: usize = 4;
/// Chunks of a call, where they come in several runs: 4 MiB.
const MOST_CHUNKS: u64 = 64;

/// What waits, and how many fetch.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<Range<u64>>,
    fetchers: usize,
}

impl Queue {
    /// Adds runs; answers how many more fetchers are to begin, each of which takes until there is nothing.
    pub(super) fn add(&mut self, runs: Vec<Range<u64>>) -> usize {
        let new = runs.len().min(FETCHERS.saturating_sub(self.fetchers));
        self.waiting.extend(runs);
        self.fetchers += new;
        new
    }

    /// The runs of one call, ascending and apart; `None`: the fetcher is not needed any more.
    pub(super) fn take(&mut self) -> Option<Vec<Range<u64>>> {
        let Some(first) = self.waiting.pop_front() else {
            self.fetchers -= 1;
            return None;
        };
        let len = |run: &Range<u64>| run.end - run.start;
        let mut chunks = len(&first);
        let mut runs = vec![first];
        while let Some(run) = self.waiting.front()
            && chunks + len(run) <= MOST_CHUNKS
        {
            chunks += len(run);
            runs.extend(self.waiting.pop_front());
        }
        runs.sort_unstable_by_key(|run| run.start);
        runs.dedup_by(|later, run| {
            let joins = run.end == later.start;
            if joins {
                run.end = later.end;
            }
            joins
        });
        Some(runs)
    }
}

#[cfg(test)]
// A list of one range is meant.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    #[test]
    fn what_came_meanwhile_goes_together_and_large_runs_alone() {
        let mut queue = Queue::default();
        assert_eq!(queue.add(vec![9..10]), 1);
        assert_eq!(queue.take(), Some(vec![9..10]));
        // While that is fetched.
        assert_eq!(queue.add(vec![7..8, 100..200]), 2);
        assert_eq!(queue.add(vec![300..301, 4..5, 301..303]), 1);
        assert_eq!(queue.add(vec![8..9]), 0);
        let calls: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(calls, [vec![7..8], vec![100..200], vec![4..5, 8..9, 300..303]]);
        assert_eq!(queue.fetchers, 3);
        assert_eq!((queue.take(), queue.fetchers), (None, 2));
    }
}
