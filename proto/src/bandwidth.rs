//! How much may travel, by the time of day: a smooth limit on the bytes of all connections together, each way for itself.
//!
//! Clients keep to it in all they do, servers in what they fetch from each other. It is kept below HTTP/2, in small pieces, so
//! that others on the same line notice no bursts; pings, which prove a connection alive, pass between frames. A window that begins
//! or ends in mid-run counts within a second.

use std::{
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    channel::{ConnectOptions, Dial, Dialer, Dialing, Stream, Target},
    clock,
    ids::ServerId,
    proof::Statement,
};

mod stream;

use stream::Limited;

/// With less, a frame would hold up a ping for longer than a peer waits for it.
const LEAST: u64 = 125_000;
/// What may go at once, as time.
const BURST: Duration = Duration::from_millis(50);
/// The smallest piece; below it the work outweighs the smoothness.
const PIECE: f64 = 4096.0;
/// How often the time of day is looked at.
const LOOK: Duration = Duration::from_secs(1);
const DAY: u16 = 24 * 60;

/// A limit that can't be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Not a limit.
    #[error(
        "{text:?}: {why}; write \"20 Mbit/s\", or \"08:00-18:00 20 Mbit/s\" for a part of the day"
    )]
    Text {
        /// As written.
        text: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Two limits at one time.
    #[error("{0:?} and {1:?} overlap; each time of day may have one limit")]
    Overlap(String, String),
}

/// A limit for a part of each day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// First minute of the day.
    from: u16,
    /// First minute after it; before `from`: on the next day.
    to: u16,
    bytes_per_second: u64,
}

impl FromStr for Window {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let bad = |why| LimitError::Text { text: text.to_owned(), why };
        let words: Vec<_> = text.split_whitespace().collect();
        let (span, rate) = match words.as_slice() {
            [span, rate @ ..] if span.contains(':') => (Some(*span), rate.concat()),
            rate => (None, rate.concat()),
        };
        let (from, to) = match span {
            None => (0, DAY),
            Some(span) => span
                .split_once('-')
                .and_then(|(from, to)| Some((minute(from)?, minute(to)?)))
                .filter(|(from, to)| from != to && *from < DAY)
                .ok_or_else(|| bad("not a time of day"))?,
        };
        let bytes_per_second = bytes(&rate).ok_or_else(|| {
            bad("not a rate in kbit/s, Mbit/s, Gbit/s, kB/s, MB/s, KiB/s or MiB/s")
        })?;
        if bytes_per_second < LEAST {
            return Err(bad("less than 1 Mbit/s, with which connections die"));
        }
        Ok(Self { from, to, bytes_per_second })
    }
}

fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| text.parse::<u16>().ok().filter(|_| text.len() <= 2);
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    let at = hours.checked_mul(60)? + minutes;
    (minutes < 60 && at <= DAY).then_some(at)
}

fn bytes(text: &str) -> Option<u64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let each = match unit {
        "kbit/s" => 125.0,
        "Mbit/s" => 125e3,
        "Gbit/s" => 125e6,
        "kB/s" => 1e3,
        "MB/s" => 1e6,
        "KiB/s" => 1024.0,
        "MiB/s" => 1_048_576.0,
        _ => return None,
    };
    let number: f64 = number.parse().ok().filter(|number: &f64| number.is_finite())?;
    (number > 0.0).then_some((number * each) as u64)
}

impl Window {
    /// So many bytes in a second at any time.
    pub fn always(bytes_per_second: u64) -> Self {
        Self { from: 0, to: DAY, bytes_per_second: bytes_per_second.max(LEAST) }
    }

    fn holds(&self, minute: u16) -> bool {
        match self.from < self.to {
            true => (self.from..self.to).contains(&minute),
            false => minute >= self.from || minute < self.to,
        }
    }
}

/// Reads the limits of the settings.
///
/// # Errors
/// When one can't be understood, or two count at the same time.
pub fn parse(texts: &[String]) -> Result<Vec<Window>, LimitError> {
    let windows = texts.iter().map(|text| text.parse()).collect::<Result<Vec<Window>, _>>()?;
    for (at, window) in windows.iter().enumerate() {
        let meets = |other: &Window| (0..DAY).any(|m| window.holds(m) && other.holds(m));
        if let Some(other) = windows[..at].iter().position(meets) {
            return Err(LimitError::Overlap(texts[other].clone(), texts[at].clone()));
        }
    }
    Ok(windows)
}

/// Whose day the parts are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// This system's.
    Local,
    /// The same everywhere.
    Utc,
}

/// `dialer`, with all that it makes kept to the limits together.
pub fn limited(dialer: Dialer, windows: &[Window], zone: Zone) -> Dialer {
    if windows.is_empty() {
        return dialer;
    }
    let is_daily = windows.iter().any(|window| (window.from, window.to) != (0, DAY));
    if is_daily && zone == Zone::Local {
        clock::warn_without_zone("times of `bandwidth`");
    }
    let minute_of_day = match zone {
        Zone::Local => local_minute,
        Zone::Utc => utc_minute,
    };
    let bucket = || Arc::new(Bucket::new(windows.to_vec(), minute_of_day));
    Arc::new(LimitedDialer { dialer, sending: bucket(), receiving: bucket() })
}

fn utc_minute() -> u16 {
    let minute = (clock::unix_ms() / 60_000).rem_euclid(i64::from(DAY));
    u16::try_from(minute).unwrap_or(0)
}

fn local_minute() -> u16 {
    let now = jiff::ZonedDateTime::now();
    u16::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute())).unwrap_or(0)
}

struct LimitedDialer {
    dialer: Dialer,
    sending: Arc<Bucket>,
    receiving: Arc<Bucket>,
}

impl Dial for LimitedDialer {
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let (stream, peer) = self.dialer.dial(target, options).await?;
            let limited = Limited::new(stream, self.sending.clone(), self.receiving.clone());
            Ok((Box::new(limited) as Stream, peer))
        })
    }

    fn prove(&self, statement: &Statement, server: Option<&ServerId>) -> Option<String> {
        self.dialer.prove(statement, server)
    }
}

/// What may go one way.
struct Bucket {
    windows: Vec<Window>,
    minute_of_day: fn() -> u16,
    state: Mutex<State>,
}

struct State {
    /// Bytes for each second; `None`: no limit now.
    rate: Option<f64>,
    looked: Instant,
    tokens: f64,
    filled: Instant,
}

/// What may be done now.
#[derive(Debug, PartialEq)]
enum Grant {
    /// Anything.
    All,
    /// So many bytes.
    Bytes(usize),
    /// Nothing until then.
    Wait(Duration),
}

impl Bucket {
    fn new(windows: Vec<Window>, minute_of_day: fn() -> u16) -> Self {
        let now = Instant::now();
        let rate = rate_at(&windows, minute_of_day());
        let state = State { rate, looked: now, tokens: 0.0, filled: now };
        Self { windows, minute_of_day, state: Mutex::new(state) }
    }

    fn grant(&self, wanted: usize) -> Grant {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now - state.looked >= LOOK {
            state.looked = now;
            state.rate = rate_at(&self.windows, (self.minute_of_day)());
        }
        let filled = std::mem::replace(&mut state.filled, now);
        let Some(rate) = state.rate else {
            state.tokens = 0.0;
            return Grant::All;
        };
        let burst = (rate * BURST.as_secs_f64()).max(PIECE);
        state.tokens = (state.tokens + rate * (now - filled).as_secs_f64()).min(burst);
        let least = PIECE.min(wanted as f64);
        if state.tokens >= least {
            return Grant::Bytes(wanted.min(state.tokens as usize).max(1));
        }
        let wait = Duration::from_secs_f64((least - state.tokens) / rate);
        Grant::Wait(wait.clamp(Duration::from_millis(1), LOOK))
    }

    fn used(&self, bytes: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tokens -= bytes as f64;
    }
}

fn rate_at(windows: &[Window], minute: u16) -> Option<f64> {
    let window = windows.iter().find(|window| window.holds(minute))?;
    Some(window.bytes_per_second as f64)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn limits_are_rates_for_parts_of_the_day() {
        let windows = parse(&texts(&[
            "08:00-18:00 20 Mbit/s",
            "22:30-6:05 1.5MiB/s",
            "18:00-22:00 100 Mbit/s",
        ]))
        .unwrap();
        let at = |time: &str| rate_at(&windows, minute(time).unwrap());
        assert_eq!(at("08:00"), Some(2_500_000.0));
        assert_eq!(at("17:59"), Some(2_500_000.0));
        assert_eq!(at("18:00"), Some(12_500_000.0));
        assert_eq!(at("22:00"), None);
        assert_eq!((at("23:59"), at("06:04")), (Some(1_572_864.0), Some(1_572_864.0)));
        assert_eq!(at("06:05"), None);
        let always = parse(&texts(&["1 Gbit/s"])).unwrap();
        assert_eq!(rate_at(&always, 0), Some(125e6));
    }

    #[test]
    fn wrong_limits_say_how_to_write_them() {
        for bad in [
            "",
            "20",
            "fast",
            "20 Mbit",
            "-1 Mbit/s",
            "nan Mbit/s",
            "8-18 20 Mbit/s",
            "08:00 20 Mbit/s",
            "08:60-18:00 20 Mbit/s",
            "25:00-26:00 20 Mbit/s",
            "08:00-08:00 20 Mbit/s",
            "100 kbit/s",
        ] {
            let error = parse(&texts(&[bad])).unwrap_err().to_string();
            assert!(error.contains("08:00-18:00 20 Mbit/s"), "{bad}: {error}");
        }
        let error = parse(&texts(&["08:00-18:00 20 Mbit/s", "17:00-19:00 1 Mbit/s"])).unwrap_err();
        assert!(matches!(error, LimitError::Overlap(..)));
        assert!(parse(&texts(&["2 Mbit/s", "22:00-23:00 1 Mbit/s"])).is_err());
    }

    static MINUTE: AtomicU16 = AtomicU16::new(0);

    /// Bytes that go through for so long, second by second.
    async fn pass(seconds: u64, bucket: &Arc<Bucket>) -> Vec<f64> {
        let (near, mut far) = tokio::io::duplex(64 << 10);
        let mut limited = Limited::new(Box::new(near), bucket.clone(), bucket.clone());
        let counting = tokio::spawn(async move {
            let (began, mut by_second) = (Instant::now(), vec![0.0; seconds as usize]);
            let mut piece = vec![0; 1 << 20];
            while let Ok(count @ 1..) = far.read(&mut piece).await {
                let second = began.elapsed().as_secs() as usize;
                if let Some(sum) = by_second.get_mut(second) {
                    *sum += count as f64;
                }
            }
            by_second
        });
        let data = vec![7; 1 << 20];
        let end = Duration::from_secs(seconds);
        let _ =
            tokio::time::timeout(end, async { while limited.write_all(&data).await.is_ok() {} })
                .await;
        drop(limited);
        counting.await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_is_smooth_and_changes_in_mid_run() {
        let windows = parse(&texts(&["08:00-18:00 20 Mbit/s", "18:00-22:00 100 Mbit/s"])).unwrap();
        MINUTE.store(17 * 60 + 59, Ordering::Relaxed);
        let bucket = Arc::new(Bucket::new(windows, || MINUTE.load(Ordering::Relaxed)));
        let evening = tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(4500)).await;
            MINUTE.store(18 * 60, Ordering::Relaxed);
        });
        let seconds = pass(10, &bucket).await;
        println!("bytes by second: {seconds:?}");
        evening.await.unwrap();
        for slow in &seconds[1..4] {
            assert!((slow / 2.5e6 - 1.0).abs() < 0.05, "{seconds:?}");
        }
        for fast in &seconds[6..9] {
            assert!((fast / 12.5e6 - 1.0).abs() < 0.05, "{seconds:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn reading_is_limited_too() {
        let windows = parse(&texts(&["20 Mbit/s"])).unwrap();
        let bucket = || Arc::new(Bucket::new(windows.clone(), || 0));
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut limited = Limited::new(Box::new(near), bucket(), bucket());
        let sending = tokio::spawn(async move { far.write_all(&vec![7; 5 << 20]).await });
        let (began, mut all) = (Instant::now(), Vec::new());
        limited.read_to_end(&mut all).await.unwrap();
        sending.await.unwrap().unwrap();
        assert_eq!(all.len(), 5 << 20);
        let expected = (5 << 20) as f64 / 2.5e6;
        assert!((began.elapsed().as_secs_f64() / expected - 1.0).abs() < 0.05);
    }
}
