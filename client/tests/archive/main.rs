//! Archives in an object store: what goes there, what comes back, and what faults of the store cost.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod azure;
mod damage;
mod faults;
mod folder;
mod readers;
mod s3;
mod scene;
