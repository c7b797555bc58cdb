//! A snapshot over NBD: real servers, janus and client, read and written by the programs that administrators use.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod hostile;
#[path = "../../src/export/tests/raw.rs"]
#[allow(dead_code, unreachable_pub)]
mod raw;
mod real;
mod scene;
mod serving;
