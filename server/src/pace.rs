//! At most so many bytes in a second.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// What was not used for so long is not made up for.
const LONGEST_CREDIT: Duration = Duration::from_secs(1);

/// A limit that calls wait for.
pub(super) struct Pace {
    bytes_per_second: Option<u64>,
    /// When what was fetched so far is paid for.
    paid_at: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, paid_at: Mutex::default() }
    }

    /// Waits until so many bytes more are within the limit.
    pub(super) async fn pay(&self, bytes: u64) {
        if let Some(until) = self.due(bytes, Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    fn due(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let rate = self.bytes_per_second?;
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(LONGEST_CREDIT).unwrap_or(now);
        let from = paid_at.unwrap_or(now).max(earliest);
        let until = from + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        *paid_at = Some(until);
        Some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_and_a_pause_saves_a_second_at_most() {
        let (pace, now) = (Pace::new(Some(1 << 20)), Instant::now());
        let seconds = |after: u64| now + Duration::from_secs(after);
        let due = (0..40).map(|_| pace.due(256 << 10, now)).last();
        assert_eq!(due, Some(Some(seconds(10))));
        assert_eq!(pace.due(3 << 20, seconds(60)), Some(seconds(62)));
        assert_eq!(Pace::new(None).due(1 << 40, now), None);
    }
}
