//! Least privilege, as far as it shows from outside: which TLS is spoken, who may read files, what is in logs, arguments and core dumps,
//! and how far the units of the packages shut their services in.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod files;
mod secrets;
mod tls;
mod units;
