//! Restores with real processes over real TLS: what the target has is not fetched, a killed one goes on, several servers share
//! the work, and what comes back is the disk, bit by bit.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod debian;
mod delta;
mod meter;
mod reading;
mod resume;
mod scene;
mod sectors;
mod several;
mod targets;
