//! Tables that servers mirror from each other: what a snapshot on a dead server consists of is known, the share of it that others
//! have is told and is what comes back, and what the tables say is not believed but checked.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod caller;
mod holes;
mod keeping;
mod parts;
mod rights;
mod scene;
