//! Machines that travel: URLs that lead nowhere or to strangers, thin lines, proxies, no IPv4, servers that sleep.
//!
//! Tests called `as_root_*` make network namespaces.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod ipv6;
mod limits;
mod packing;
mod proxy;
mod test_command;
mod urls;
mod waking;
