//! Two sites, real lines between them, and everything that can be lost: each part, in each phase of a backup. Whatever a
//! reachable server could take is taken without a person, and afterwards both janus know the same.
//!
//! Every test has network namespaces of its own, so that many run at once: what takes time here is waiting until a
//! silence is long enough. Needs root. `JANUS_SOAK=1` runs every combination of lines.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod bandwidth;
mod full;
mod lines;
mod programs;
mod resumes;
mod scene;
