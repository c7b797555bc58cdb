//! The background check of all images: slowly, one after another, the one that was checked longest ago first. It pauses
//! while a client writes, and goes on where it was after a restart.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    CheckError, Way, check_image,
    pace::{Limit, seldom},
};
use crate::{
    blocking,
    chain::Held,
    runs::{Runs, now_ms},
};

/// Pause when nothing is due.
const IDLE: Duration = Duration::from_secs(15);
/// An image that can't be read now is tried again after this.
const LATER: Duration = Duration::from_secs(3600);

/// The background check.
pub struct Scrub {
    /// What is checked.
    pub runs: Arc<Runs>,
    /// At most so much is read.
    pub bytes_per_second: u64,
    /// An image is checked again after this.
    pub again: Duration,
}

impl Scrub {
    /// Checks until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut failed: HashMap<Uuid, Instant> = HashMap::new();
        while !shutdown.is_cancelled() {
            failed.retain(|_, since| since.elapsed() < LATER);
            let Some(held) = self.next(failed.keys().copied().collect()).await else {
                shutdown.run_until_cancelled(tokio::time::sleep(IDLE)).await;
                continue;
            };
            let (runs, rate, stop) = (self.runs.clone(), self.bytes_per_second, shutdown.clone());
            let checked = held.clone();
            let result = blocking(move || check(&runs, &checked, rate, stop)).await;
            if let Ok(Err(CheckError::Io(error))) = &result {
                tracing::warn!(%error, image = held.snapshot().image, "an image can't be checked now");
            }
            if !matches!(result, Ok(Ok(()) | Err(CheckError::Stopped))) {
                failed.insert(held.snapshot().data_write, Instant::now());
            }
        }
        let runs = self.runs.clone();
        let _ = blocking(move || runs.save_health()).await;
    }

    /// The image to check next, but for those that can't be read now.
    async fn next(&self, failed: HashSet<Uuid>) -> Option<Held> {
        let again_ms = i64::try_from(self.again.as_millis()).unwrap_or(i64::MAX);
        let (runs, before_ms) = (self.runs.clone(), now_ms().saturating_sub(again_ms));
        let found = blocking(move || {
            let skip = |held: &Held| failed.contains(&held.snapshot().data_write);
            runs.next_to_check(before_ms, &skip)
        });
        found.await.ok().flatten()
    }
}

fn check(
    runs: &Arc<Runs>,
    held: &Held,
    bytes_per_second: u64,
    stop: CancellationToken,
) -> Result<(), CheckError> {
    let limit = Limit::new(bytes_per_second, stop, seldom(|| runs.is_busy()));
    let began = Instant::now();
    check_image(runs, held, Way::GoOn, &limit)?;
    tracing::info!(image = held.snapshot().image, machine = %held.run.machine, read_bytes = limit.read_bytes(), seconds = began.elapsed().as_secs(), "image checked");
    Ok(())
}
