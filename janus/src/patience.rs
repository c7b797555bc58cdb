//! How long a start may wait for servers that don't answer: however many fail it one after the other, a server that is
//! ready has it within a probe's deadline and [`HAND_OVER`].
//!
//! The first to be waited for may take all of its deadline. Whoever is waited for after that gets half of the time that
//! is left, so that there is always time for one more. Too little for a server on a slow line is no harm: one that
//! was passed over in haste is asked once more, at leisure, before a start is refused.

use std::time::Duration;

/// What a start may take longer than one probe's deadline.
pub const HAND_OVER: Duration = Duration::from_millis(900);
/// A start that is so young has not waited for anybody yet.
const YOUNG: Duration = Duration::from_millis(250);
/// Least wait, however little time is left.
const LEAST: Duration = Duration::from_millis(100);

/// How long a server is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// For a probe's whole deadline.
    Full,
    /// No longer than this, unless its round trips take longer.
    AtMost(Duration),
}

impl Wait {
    /// How long a start that came `elapsed` ago may wait for the next server, where a probe's deadline is `probe`.
    pub fn of_start(probe: Duration, elapsed: Duration) -> Self {
        match elapsed < YOUNG {
            true => Self::Full,
            false => {
                Self::AtMost((probe + HAND_OVER).saturating_sub(elapsed).div_f64(2.0).max(LEAST))
            }
        }
    }

    /// Pause between two questions whether a server that works on a start still lives.
    pub fn pause(self) -> Duration {
        const PAUSE: Duration = Duration::from_millis(200);
        match self {
            Self::Full => PAUSE,
            Self::AtMost(limit) => PAUSE.min(limit / 4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When a start has the last of `bad` servers behind it, each of which lives until just after it was asked.
    fn all_passed_over(probe: Duration, bad: usize) -> Duration {
        (0..bad).fold(Duration::ZERO, |elapsed, _| {
            let wait = Wait::of_start(probe, elapsed);
            let limit = if let Wait::AtMost(limit) = wait { limit } else { probe };
            elapsed + wait.pause() + limit
        })
    }

    #[test]
    fn servers_that_die_one_after_the_other_cost_less_than_two_seconds() {
        let probe = Duration::from_secs(1);
        for bad in 1..=4 {
            let took = all_passed_over(probe, bad);
            assert!(took < Duration::from_millis(1950), "{bad}: {took:?}");
        }
        assert_eq!(all_passed_over(probe, 1), Duration::from_millis(1200));
    }

    #[test]
    fn the_first_wait_is_whole_and_the_last_is_no_shorter_than_a_tenth_of_a_second() {
        let probe = Duration::from_secs(1);
        assert_eq!(Wait::of_start(probe, Duration::ZERO), Wait::Full);
        let late = Wait::of_start(probe, Duration::from_secs(60));
        assert_eq!(late, Wait::AtMost(Duration::from_millis(100)));
    }
}
