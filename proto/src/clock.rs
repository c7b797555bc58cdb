//! The wall clock: for people, and for rules that people make in days. Janus decides nothing by it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix milliseconds.
pub fn unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
