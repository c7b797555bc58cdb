//! Several ways to the same, tried together: each has a head start over the next one, and the first that succeeds wins.
//!
//! A way that fails doesn't cost the next one its head start, and one that stays silent costs no more than that
//! (RFC 8305). Attempts that have not won are dropped.

use std::time::Duration;

use futures::{StreamExt, stream::FuturesUnordered};

/// Head start of a way over the next one.
pub const HEAD_START: Duration = Duration::from_millis(250);

/// What a race came to.
#[derive(Debug)]
pub struct Raced<T, E> {
    /// Place of the winner among the ways, and what it brought; `None`: all have failed.
    pub won: Option<(usize, T)>,
    /// Places of those that failed before, ascending, and why.
    pub failed: Vec<(usize, E)>,
}

/// Tries `ways` in their order, each with `head_start` over the next one.
pub async fn race<T, E, F>(ways: impl IntoIterator<Item = F>, head_start: Duration) -> Raced<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let numbered = |(place, way): (usize, F)| async move { (place, way.await) };
    let mut waiting = ways.into_iter().enumerate().map(numbered).peekable();
    let mut running = FuturesUnordered::new();
    let mut failed = Vec::new();
    let mut won = None;
    running.extend(waiting.next());
    while !running.is_empty() {
        let ended = tokio::select! {
            biased;
            ended = running.next() => ended,
            () = tokio::time::sleep(head_start), if waiting.peek().is_some() => None,
        };
        match ended {
            Some((place, Ok(brought))) => {
                won = Some((place, brought));
                break;
            }
            Some((place, Err(error))) => failed.push((place, error)),
            None => {}
        }
        running.extend(waiting.next());
    }
    failed.sort_by_key(|(place, _)| *place);
    Raced { won, failed }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    const NEVER: u64 = 1_000_000;

    /// Each way: after so many milliseconds it succeeds or fails. Returns the winner, the losers, and what it took.
    async fn run(ways: &[(u64, bool)]) -> (Option<usize>, Vec<usize>, u128) {
        let began = Instant::now();
        let way = |(after, is_good): &(u64, bool)| {
            let (after, is_good) = (*after, *is_good);
            async move {
                sleep(Duration::from_millis(after)).await;
                if is_good { Ok(()) } else { Err(()) }
            }
        };
        let raced = race(ways.iter().map(way), HEAD_START).await;
        let failed = raced.failed.into_iter().map(|(place, ())| place).collect();
        (raced.won.map(|(place, ())| place), failed, began.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_wins_when_it_answers_in_time() {
        assert_eq!(run(&[(200, true), (1, true)]).await, (Some(0), vec![], 200));
        assert_eq!(run(&[(254, true), (10, true)]).await, (Some(0), vec![], 254));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_one_costs_its_head_start() {
        assert_eq!(run(&[(NEVER, true), (10, true)]).await, (Some(1), vec![], 260));
        assert_eq!(run(&[(NEVER, true), (NEVER, true), (10, true)]).await, (Some(2), vec![], 510));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_fails_costs_nothing_more() {
        assert_eq!(run(&[(1, false), (2, false), (10, true)]).await, (Some(2), vec![0, 1], 13));
        assert_eq!(run(&[(300, false), (100, false)]).await, (None, vec![0, 1], 350));
        assert_eq!(run(&[]).await, (None, vec![], 0));
    }
}
