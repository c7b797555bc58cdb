//! What is shown while disks are transferred: a bar on a terminal, a line a minute in a log, and with `--json` an event a
//! second on stdout, before the last line, which is the answer.
//!
//! A thread of its own shows it, so that nobody waits for a terminal or a pipe that takes nothing.

use std::{
    collections::VecDeque,
    io::{IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use janus_proto::{ids::SEGMENT_BYTES, show::amount};
use serde_json::{Value, json};

const LINE_EVERY: Duration = Duration::from_secs(60);
const EVENT_EVERY: Duration = Duration::from_secs(1);
/// Columns that a bar needs to be one.
const LEAST_BAR: usize = 6;
const BAR_EVERY: Duration = Duration::from_millis(200);
/// What the throughput is the mean of.
const WINDOW: Duration = Duration::from_secs(30);
/// Before so much time has passed nobody can say how long it will take.
const FIRST_ESTIMATE: Duration = Duration::from_secs(3);

/// How far a transfer is. Shared by the threads that work and the one that shows.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    done: AtomicU64,
    read: AtomicU64,
    changed: AtomicU64,
    wire: AtomicU64,
}

impl Progress {
    /// For this many bytes of disk.
    pub fn new(total_bytes: u64) -> Arc<Self> {
        Arc::new(Self { total: total_bytes.into(), ..Self::default() })
    }

    /// The whole, when it wasn't known at first.
    pub fn set_total(&self, total_bytes: u64) {
        self.total.store(total_bytes, Ordering::Relaxed);
    }

    /// So many segments were scanned for the first time; ends are cut off when shown.
    pub fn scanned(&self, segments: u64) {
        self.advance(segments * SEGMENT_BYTES);
    }

    /// So many bytes of disk are done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes were read of the disk.
    pub fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Of so many bytes that differ, so many go over the network.
    pub fn sent(&self, changed: u64, wire: u64) {
        self.changed.fetch_add(changed, Ordering::Relaxed);
        self.wire.fetch_add(wire, Ordering::Relaxed);
    }

    /// So many bytes came over the network.
    pub fn fetched(&self, wire: u64) {
        self.wire.fetch_add(wire, Ordering::Relaxed);
    }

    fn figures(&self) -> Figures {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let total = load(&self.total);
        let [read, changed, wire] = [&self.read, &self.changed, &self.wire].map(load);
        Figures { done: load(&self.done).min(total), total, read, changed, wire }
    }
}

#[derive(Debug, Clone, Copy)]
struct Figures {
    done: u64,
    total: u64,
    read: u64,
    changed: u64,
    wire: u64,
}

/// What is done, as its user calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// A backup.
    Backup,
    /// A restore.
    Restore,
    /// Files copied out of a snapshot.
    Copy,
}

impl Doing {
    fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Copy => "copy",
        }
    }
}

/// Shows progress until dropped; nothing is shown after that.
#[derive(Debug)]
pub struct Display {
    showing: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some((ending, thread)) = self.showing.take() {
            drop(ending);
            let _ = thread.join();
        }
    }
}

/// Shows `progress`: with `events` as JSON on stdout, else on stderr if that is a terminal, and otherwise in the log.
pub fn show(doing: Doing, progress: &Arc<Progress>, events: bool) -> Display {
    let progress = progress.clone();
    let (ending, end) = mpsc::channel();
    let end = Ticks(end);
    let span = tracing::Span::current();
    let work = move || {
        span.in_scope(|| match (events, std::io::stderr().is_terminal()) {
            (true, _) => write_events(doing, &progress, &end, &mut std::io::stdout()),
            (false, true) => draw(doing, &progress, &end),
            (false, false) => log(doing, &progress, &end),
        })
    };
    // Without a thread for it nothing is shown, and all goes on.
    let thread = thread::Builder::new().name("progress".into()).spawn(work).ok();
    Display { showing: thread.map(|thread| (ending, thread)) }
}

struct Ticks(mpsc::Receiver<()>);

impl Ticks {
    /// False at the end.
    fn wait(&self, pause: Duration) -> bool {
        self.0.recv_timeout(pause) == Err(RecvTimeoutError::Timeout)
    }
}

/// Throughput of late, from samples that are fed to it.
#[derive(Debug, Default)]
struct Pace {
    samples: VecDeque<(Duration, u64)>,
}

impl Pace {
    /// Bytes a second, and the time that the rest takes at that; both unknown at first.
    fn sample(&mut self, now: Duration, figures: &Figures) -> (Option<u64>, Option<Duration>) {
        self.samples.push_back((now, figures.done));
        while self.samples.len() > 2
            && self.samples.get(1).is_some_and(|(at, _)| now - *at >= WINDOW)
        {
            self.samples.pop_front();
        }
        let (since, before) = self.samples.front().copied().unwrap_or_default();
        let took = now.saturating_sub(since);
        if took < FIRST_ESTIMATE.min(EVENT_EVERY / 2) {
            return (None, None);
        }
        let rate = figures.done.saturating_sub(before) as f64 / took.as_secs_f64();
        let left = (figures.total - figures.done) as f64 / rate;
        let left = (took >= FIRST_ESTIMATE).then(|| Duration::try_from_secs_f64(left).ok());
        (Some(rate as u64), left.flatten())
    }
}

fn write_events(doing: Doing, progress: &Progress, ticks: &Ticks, out: &mut dyn Write) {
    let (began, mut pace) = (Instant::now(), Pace::default());
    pace.sample(Duration::ZERO, &progress.figures());
    let mut line_at = LINE_EVERY;
    while ticks.wait(EVENT_EVERY) {
        let (now, figures) = (began.elapsed(), progress.figures());
        let (rate, left) = pace.sample(now, &figures);
        // Whoever listened has gone; the work goes on.
        let _ = writeln!(out, "{}", event(doing, &figures, rate, left)).and_then(|()| out.flush());
        if now >= line_at {
            line_at += LINE_EVERY;
            tracing::info!("{}", line(doing, &figures, (rate, left), Details::All));
        }
    }
}

fn log(doing: Doing, progress: &Progress, ticks: &Ticks) {
    let (began, mut pace) = (Instant::now(), Pace::default());
    pace.sample(Duration::ZERO, &progress.figures());
    while ticks.wait(LINE_EVERY) {
        let figures = progress.figures();
        let (rate, left) = pace.sample(began.elapsed(), &figures);
        tracing::info!("{}", line(doing, &figures, (rate, left), Details::All));
    }
}

/// How much a line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Details {
    All,
    Pace,
    Share,
}

/// Columns of the terminal; 80 where it doesn't tell.
fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stderr());
    size.ok().map(|size| size.ws_col.into()).filter(|columns| *columns > 0).unwrap_or(80)
}

/// The line that says most and leaves room for the bar: one that is too long would be broken, and drawn again and again.
fn fitting(columns: usize, line: impl Fn(Details) -> String) -> String {
    let fits = |line: &String| line.chars().count() + LEAST_BAR <= columns;
    let lines = [Details::All, Details::Pace].map(&line);
    let found = lines.into_iter().find(fits);
    let shortest = || line(Details::Share).chars().take(columns.saturating_sub(1)).collect();
    found.unwrap_or_else(shortest)
}

fn draw(doing: Doing, progress: &Progress, ticks: &Ticks) {
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {msg}") {
        bar.set_style(style);
    }
    let (began, mut pace) = (Instant::now(), Pace::default());
    loop {
        let figures = progress.figures();
        let (rate, left) = pace.sample(began.elapsed(), &figures);
        bar.set_length(figures.total);
        bar.set_position(figures.done);
        bar.set_message(fitting(columns(), |details| line(doing, &figures, (rate, left), details)));
        if !ticks.wait(BAR_EVERY) {
            return bar.finish_and_clear();
        }
    }
}

fn event(doing: Doing, figures: &Figures, rate: Option<u64>, left: Option<Duration>) -> Value {
    let mut event = json!({
        "event": "progress",
        "doing": doing.name(),
        "done_bytes": figures.done,
        "total_bytes": figures.total,
        "bytes_per_second": rate,
        "seconds_left": left.map(|left| left.as_secs()),
    });
    match doing {
        Doing::Backup => {
            event["read_bytes"] = figures.read.into();
            event["changed_bytes"] = figures.changed.into();
            event["sent_bytes"] = figures.wire.into();
        }
        Doing::Restore => event["fetched_bytes"] = figures.wire.into(),
        // The total is what was found until now.
        Doing::Copy => {}
    }
    event
}

fn line(
    doing: Doing,
    figures: &Figures,
    (rate, left): (Option<u64>, Option<Duration>),
    details: Details,
) -> String {
    let percent = (figures.done * 100).checked_div(figures.total).unwrap_or(0);
    if details == Details::Share {
        return format!("{percent} %");
    }
    let rate = rate.map_or_else(String::new, |rate| format!(" at {}/s", amount(rate)));
    let left = left.map_or_else(String::new, |left| format!("; {} left", span(left)));
    let moved = match doing {
        Doing::Backup => format!(
            "{} read, {} changed, {} sent",
            amount(figures.read),
            amount(figures.changed),
            amount(figures.wire)
        ),
        Doing::Restore => format!("{} fetched", amount(figures.wire)),
        Doing::Copy => format!("{} copied", amount(figures.done)),
    };
    let (doing, total) = (doing.name(), amount(figures.total));
    match details {
        Details::All => format!("{doing} {percent} % of {total}{rate}; {moved}{left}"),
        _ => format!("{doing} {percent} % of {total}{rate}{left}"),
    }
}

/// As exact as an estimate is.
fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_the_throughput_of_late() {
        let mut pace = Pace::default();
        let mut at = |seconds: u64, done: u64| {
            let figures = Figures { done, total: 10_000, read: 0, changed: 0, wire: 0 };
            pace.sample(Duration::from_secs(seconds), &figures)
        };
        assert_eq!(at(0, 0), (None, None));
        assert_eq!(at(1, 100), (Some(100), None), "too early");
        let mut last = (None, None);
        (2..=40).for_each(|second| last = at(second, second * 100));
        assert_eq!(last, (Some(100), Some(Duration::from_secs(60))));
        (41..=80).for_each(|second| last = at(second, 4000 + (second - 40) * 10));
        assert_eq!(last, (Some(10), Some(Duration::from_secs(560))));
        (81..=120).for_each(|second| last = at(second, 4400));
        assert_eq!(last, (Some(0), None), "it stands still");
    }

    #[test]
    fn lines_and_events_say_the_same() {
        let progress = Progress::new(10 << 20);
        progress.scanned(1);
        progress.read(3 << 20);
        progress.sent(2 << 20, 1 << 20);
        let (figures, rate, left) =
            (progress.figures(), Some(512 << 10), Some(Duration::from_secs(75)));
        assert_eq!(
            line(Doing::Backup, &figures, (rate, left), Details::All),
            "backup 40 % of 10.0 MiB at 512.0 KiB/s; 3.0 MiB read, 2.0 MiB changed, 1.0 MiB sent; 2 min left"
        );
        let event = event(Doing::Backup, &figures, rate, left);
        assert_eq!((&event["seconds_left"], &event["sent_bytes"]), (&75.into(), &(1 << 20).into()));
        assert_eq!(
            line(Doing::Restore, &figures, (None, None), Details::All),
            "restore 40 % of 10.0 MiB; 1.0 MiB fetched"
        );
        progress.scanned(9);
        assert_eq!(progress.figures().done, 10 << 20, "the last segment is cut off");
    }

    #[test]
    fn a_line_leaves_room_for_the_bar_on_any_terminal() {
        let tib = 1 << 40;
        let figures = Figures { done: tib, total: 10 * tib, read: tib, changed: tib, wire: tib };
        let pace = (Some(1023 << 20), Some(Duration::from_secs(360_000)));
        for doing in [Doing::Backup, Doing::Restore, Doing::Copy] {
            for columns in 0..200 {
                let line = fitting(columns, |details| line(doing, &figures, pace, details));
                assert!(line.chars().count() < columns.max(1), "{columns}: {line}");
            }
            let at_80 = fitting(80, |details| line(doing, &figures, pace, details));
            assert!(at_80.contains("100 h 0 min left"), "{at_80}");
        }
        let wide = fitting(132, |details| line(Doing::Backup, &figures, pace, details));
        assert!(wide.contains("sent"), "{wide}");
    }
}
