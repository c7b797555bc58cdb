//! Machines that travel: URLs that lead nowhere or to strangers, thin lines, proxies.
//!
//! Tests called `as_root_*` make network namespaces.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod packing;
mod proxy;
mod urls;
