//! What is shown while disks are transferred: a bar on a terminal, a line every few seconds in a log.

use std::{
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use janus_proto::ids::SEGMENT_BYTES;
use tokio::task::JoinHandle;

const LINE_EVERY: Duration = Duration::from_secs(5);

/// How far a transfer is. Shared by the threads that work and the task that shows.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    done: AtomicU64,
    moved: AtomicU64,
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

    /// A segment was scanned; ends are cut off when shown.
    pub fn scanned(&self, _segment: u64) {
        self.advance(SEGMENT_BYTES);
    }

    /// So many bytes of disk are done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes went over the network.
    pub fn sent(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    fn figures(&self) -> (u64, u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total, self.moved.load(Ordering::Relaxed))
    }
}

/// Shows progress until dropped.
#[derive(Debug)]
pub struct Display(JoinHandle<()>);

impl Drop for Display {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Shows `progress` on stderr, unless `quiet` and no terminal is there to see it. Needs a tokio runtime.
pub fn show(doing: &'static str, progress: &Arc<Progress>) -> Display {
    let progress = progress.clone();
    Display(if std::io::stderr().is_terminal() {
        tokio::spawn(bar(doing, progress))
    } else {
        tokio::spawn(lines(doing, progress))
    })
}

struct Finish(ProgressBar);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn bar(doing: &'static str, progress: Arc<Progress>) {
    let bar = Finish(ProgressBar::with_draw_target(
        Some(progress.figures().1),
        ProgressDrawTarget::stderr(),
    ));
    if let Ok(style) = ProgressStyle::with_template(
        "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg}",
    ) {
        bar.0.set_style(style);
    }
    bar.0.set_prefix(doing);
    loop {
        let (done, total, moved) = progress.figures();
        bar.0.set_length(total);
        bar.0.set_position(done);
        bar.0.set_message(format!("{} MiB moved", moved >> 20));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn lines(doing: &'static str, progress: Arc<Progress>) {
    let started = Instant::now();
    loop {
        tokio::time::sleep(LINE_EVERY).await;
        let (done, total, moved) = progress.figures();
        let rate = done as f64 / started.elapsed().as_secs_f64() / f64::from(1 << 20);
        tracing::info!(
            "{doing}: {} of {} MiB, {} MiB moved, {rate:.0} MiB/s",
            done >> 20,
            total >> 20,
            moved >> 20
        );
    }
}
