//! Randomness that something depends on: pauses and ids. The one place, so that a whole-system simulation can seed it.

use std::{cell::RefCell, ops::Range};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use uuid::Uuid;

thread_local! {
    static SEEDED: RefCell<Option<Seeded>> = const { RefCell::new(None) };
}

struct Seeded {
    rng: SmallRng,
    ids: u64,
}

/// From now on, all that this thread draws follows from `seed`. For simulations: such ids are neither secret nor unique.
pub fn seed_this_thread(seed: u64) {
    SEEDED.set(Some(Seeded { rng: SmallRng::seed_from_u64(seed), ids: 0 }));
}

/// A number of `range`.
pub fn between(range: Range<f64>) -> f64 {
    SEEDED.with_borrow_mut(|seeded| match seeded {
        Some(seeded) => seeded.rng.random_range(range),
        None => rand::random_range(range),
    })
}

/// A new id (UUIDv7: later ids sort later).
pub(crate) fn id() -> Uuid {
    let seeded = SEEDED.with_borrow_mut(|seeded| {
        let seeded = seeded.as_mut()?;
        seeded.ids += 1;
        let tail = seeded.rng.random::<[u8; 10]>();
        Some(uuid::Builder::from_unix_timestamp_millis(seeded.ids, &tail).into_uuid())
    });
    seeded.unwrap_or_else(Uuid::now_v7)
}
