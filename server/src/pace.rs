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

    /// Waits until so many bytes more are within the rate.
    pub(crate) async fn pay(&self, bytes: u64) {
        tokio::time::sleep_until(self.take(bytes, Instant::now()).end).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_and_a_pause_saves_a_second_at_most() {
        let second = Duration::from_secs(1);
        let (rate, now) = (Rate::new(1 << 20, second), Instant::now());
        let seconds = |after: u64| now + Duration::from_secs(after);
        let due = (0..40).map(|_| rate.take(256 << 10, now).end).last();
        assert_eq!(due, Some(seconds(10)));
        assert_eq!(rate.take(3 << 20, seconds(60)).end, seconds(62));
    }
}
