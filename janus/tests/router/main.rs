//! A janus over real loopback sockets with TLS, before small servers that misbehave on demand.

// Helpers of tests are tests.
#![allow(clippy::unwrap_used)]

mod agreement;
mod backend;
mod catalog;
mod forwarding;
mod life;
mod limits;
mod site;
mod starts;
mod unusable;
