//! Verification: images are read and compared with the hashes that were recorded when they were committed.
//!
//! [`image`] checks one image; [`scrub`] does so in the background, the one that was checked longest ago first; what is found
//! is kept by [`crate::chain::health`], told to every janus, and asked for again when the machine's next backup starts.
//! A check changes nothing but what is known, and a manifest that went bad while the server runs, which is written again. A crash costs at most a minute of it.

pub mod image;
pub mod pace;
pub mod scrub;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

pub use self::{image::CheckError, pace::Pace};

use self::image::ImageCheck;
use crate::{
    chain::{
        Held,
        health::{Damage, ImageHealth, OpenCheck},
        opened::OpenError,
    },
    runs::{Runs, now_ms},
};

/// How often the progress of a check is kept.
const KEEP_EVERY: Duration = Duration::from_secs(60);

/// How a check is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the beginning, by so many threads.
    Anew(usize),
    /// Where an earlier check of this kind stopped.
    GoOn,
}

/// Checks the image of one snapshot and notes the result. Blocks the thread.
///
/// # Errors
/// When it was stopped, or a file can't be read now though it isn't damaged. How far it came is kept.
pub fn check_image(
    runs: &Runs,
    held: &Held,
    way: Way,
    pace: &dyn Pace,
) -> Result<Damage, CheckError> {
    runs.mend_manifest(held);
    let machine = runs.machine(&held.run.machine);
    if machine.is_some_and(|machine| machine.missing(held.snapshot()).is_some()) {
        return Err(CheckError::Stub);
    }
    let mut check = begun(runs, held, way);
    // A file that can't be opened gets a second chance, as damaged blocks do.
    let opened = match open(runs, held)? {
        Err(_) => open(runs, held)?,
        image => image,
    };
    let mut suspected = Damage::default();
    let found = match opened {
        Ok(image) => {
            run(runs, held, &image, way, &mut check, pace)?;
            // Also what others have met meanwhile, perhaps where this check had been before.
            suspected = known(runs, held).map(|known| known.damage).unwrap_or_default();
            suspected.extend(&check.found);
            confirmed(runs, held, &suspected, pace)?
        }
        Err(damage) => damage,
    };
    if is_current(runs, held) {
        runs.note_checked(held, check.began_ms, found.clone(), &suspected);
    }
    Ok(found)
}

fn known(runs: &Runs, held: &Held) -> Option<ImageHealth> {
    runs.machine(&held.run.machine)?.health().image(held.snapshot()).cloned()
}

fn begun(runs: &Runs, held: &Held, way: Way) -> OpenCheck {
    let fresh = OpenCheck { began_ms: now_ms(), next_segment: 0, found: Damage::default() };
    let known = known(runs, held).filter(|_| way == Way::GoOn);
    known.and_then(|known| known.check).unwrap_or(fresh)
}

fn open(runs: &Runs, held: &Held) -> Result<Result<ImageCheck, Damage>, OpenError> {
    let snapshot = held.snapshot();
    let parent = snapshot.parent.and_then(|id| runs.machine(&held.run.machine)?.link(id));
    let folder = runs.store().machine_folder(&held.run.machine);
    ImageCheck::open(runs.store().storage(), &folder, snapshot, parent.as_ref().map(Held::snapshot))
}

fn run(
    runs: &Runs,
    held: &Held,
    image: &ImageCheck,
    way: Way,
    check: &mut OpenCheck,
    pace: &dyn Pace,
) -> Result<(), CheckError> {
    let threads = if let Way::Anew(threads) = way { threads } else { 1 };
    let (from, earlier, mut kept) = (check.next_segment, check.found.clone(), Instant::now());
    let ended = image.run(from, threads, pace, |next_segment, found| {
        check.next_segment = next_segment;
        if !found.is_none() {
            check.found.clone_from(&earlier);
            check.found.extend(found);
        }
        if way == Way::GoOn && kept.elapsed() > KEEP_EVERY {
            kept = Instant::now();
            runs.note_progress(held, check.clone());
            runs.save_health();
        }
    });
    if ended.is_err() && way == Way::GoOn {
        runs.note_progress(held, check.clone());
    }
    ended.map(drop)
}

/// What is still damaged at a second look, with the files as they are now.
fn confirmed(
    runs: &Runs,
    held: &Held,
    suspected: &Damage,
    pace: &dyn Pace,
) -> Result<Damage, CheckError> {
    if suspected.is_none() {
        return Ok(Damage::default());
    }
    match open(runs, held)? {
        Ok(image) => image.confirm(suspected, pace),
        Err(damage) => Ok(damage),
    }
}

/// True while the snapshot still has the image that was checked.
fn is_current(runs: &Runs, held: &Held) -> bool {
    let machine = runs.machine(&held.run.machine);
    machine.is_some_and(|machine| machine.still_has(held))
}
