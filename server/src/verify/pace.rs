//! How fast checks read, and when they stop: a rate, shared by all threads that read.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::image::CheckError;
use crate::pace::Rate;

/// Longest sleep before it is asked again whether to stop.
const SLICE: Duration = Duration::from_millis(50);
/// How often it is asked whether to wait.
const ASK: Duration = Duration::from_millis(500);
/// What an idle reader may catch up.
const CREDIT: Duration = Duration::from_millis(200);

/// Asks no more than twice in a second, and answers the same in between: what it asks takes locks.
pub fn seldom(ask: impl Fn() -> bool + Send + Sync) -> impl Fn() -> bool + Send + Sync {
    let asked = Mutex::new((Instant::now(), ask()));
    move || {
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.0.elapsed() > ASK {
            *asked = (Instant::now(), ask());
        }
        asked.1
    }
}

/// Asked before each read.
pub trait Pace: Sync {
    /// Waits until so many bytes may be read.
    ///
    /// # Errors
    /// `Stopped`.
    fn take(&self, bytes: u64) -> Result<(), CheckError>;
}

/// At most so many bytes in a second, and none while somebody else is busy.
pub struct Limit<'a> {
    rate: Option<Rate>,
    read: AtomicU64,
    stop: CancellationToken,
    is_busy: Box<dyn Fn() -> bool + Send + Sync + 'a>,
}

impl<'a> Limit<'a> {
    /// `bytes_per_second` 0: as fast as can be. Reading pauses while `is_busy`.
    pub fn new(
        bytes_per_second: u64,
        stop: CancellationToken,
        is_busy: impl Fn() -> bool + Send + Sync + 'a,
    ) -> Self {
        Self {
            rate: (bytes_per_second > 0).then(|| Rate::new(bytes_per_second, CREDIT)),
            read: AtomicU64::new(0),
            stop,
            is_busy: Box::new(is_busy),
        }
    }

    /// Bytes that were read.
    pub fn read_bytes(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn sleep_until(&self, due: Instant) -> Result<(), CheckError> {
        loop {
            if self.stop.is_cancelled() {
                return Err(CheckError::Stopped);
            }
            let Some(left) = due.checked_duration_since(Instant::now()) else { return Ok(()) };
            std::thread::sleep(left.min(SLICE));
        }
    }
}

impl Pace for Limit<'_> {
    fn take(&self, bytes: u64) -> Result<(), CheckError> {
        while (self.is_busy)() {
            self.sleep_until(Instant::now() + SLICE)?;
        }
        self.read.fetch_add(bytes, Ordering::Relaxed);
        let now = Instant::now();
        self.sleep_until(self.rate.as_ref().map_or(now, |rate| rate.take(bytes, now).start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept_and_a_stop_heard() {
        let stop = CancellationToken::new();
        let limit = Limit::new(1 << 20, stop.clone(), || false);
        let began = Instant::now();
        (0..9).for_each(|_| limit.take(1 << 16).unwrap());
        let took = began.elapsed();
        assert!(took > Duration::from_millis(250) && took < Duration::from_secs(2), "{took:?}");
        assert_eq!(limit.read_bytes(), 9 << 16);
        stop.cancel();
        assert!(matches!(limit.take(1), Err(CheckError::Stopped)));
    }
}
