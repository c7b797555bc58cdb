//! At most so many bytes in a second.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// A rate that several share.
pub(crate) struct Rate {
    bytes_per_second: u64,
    /// What was not used for longer is not made up for.
    credit: Duration,
    /// When what was taken so far is paid for.
    paid_at: Mutex<Option<Instant>>,
}

impl Rate {
    pub(crate) fn new(bytes_per_second: u64, credit: Duration) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), credit, paid_at: Mutex::default() }
    }

    /// Takes so many bytes: from when all before them are paid for, to when they are.
    pub(crate) fn take(&self, bytes: u64, now: Instant) -> Range<Instant> {
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(self.credit).unwrap_or(now);
        let from = paid_at.unwrap_or(now).max(earliest);
        let until = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        *paid_at = Some(until);
        from..until
    }
}

/// A limit that calls wait for.
pub(crate) struct Pace(Option<Rate>);

impl Pace {
    /// Without a limit for `None`; what wasn't used for `credit` may be made up for.
    pub(crate) fn new(bytes_per_second: Option<u64>, credit: Duration) -> Self {
        Self(bytes_per_second.map(|rate| Rate::new(rate, credit)))
    }

    /// Waits until so many bytes more are within the limit.
    pub(crate) async fn pay(&self, bytes: u64) {
        if let Some(until) = self.due(bytes, Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    fn due(&self, bytes: u64, now: Instant) -> Option<Instant> {
        self.0.as_ref().map(|rate| rate.take(bytes, now).end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_and_a_pause_saves_a_second_at_most() {
        let second = Duration::from_secs(1);
        let (pace, now) = (Pace::new(Some(1 << 20), second), Instant::now());
        let seconds = |after: u64| now + Duration::from_secs(after);
        let due = (0..40).map(|_| pace.due(256 << 10, now)).last();
        assert_eq!(due, Some(Some(seconds(10))));
        assert_eq!(pace.due(3 << 20, seconds(60)), Some(seconds(62)));
        assert_eq!(Pace::new(None, second).due(1 << 40, now), None);
    }
}
