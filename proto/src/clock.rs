//! The wall clock: for people, and for rules that people make in days. Janus decides nothing by it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Says so in the log where the local time can't be told, and `what` of the settings therefore means UTC.
pub fn warn_without_zone(what: &str) {
    if let Err(error) = jiff::tz::TimeZone::try_system() {
        let zone = std::env::var("TZ").unwrap_or_default();
        tracing::warn!(TZ = zone, %error, "the local time can't be told, so {what} are UTC; set TZ (such as Europe/Berlin) or /etc/localtime");
    }
}

/// Unix milliseconds.
pub fn unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
