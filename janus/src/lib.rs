//! The router before the backup servers: each new backup goes to the server that its machine used longest ago, what
//! follows to the server it belongs to, and a server that can't be reached is skipped.
//!
//! It forwards HTTP/2 requests untouched and keeps nothing that it can't lose. `serve` wires everything up; `balance`
//! and `selection` are usable alone.

pub mod agreement;
pub mod alert;
pub mod balance;
pub mod catalog;
pub mod config;
mod dashboard;
pub mod findings;
pub mod fleet;
mod health;
pub mod info;
pub mod maintenance;
pub mod metrics;
pub mod patience;
pub mod registry;
pub mod report;
pub mod router;
pub mod selection;
pub mod serve;
pub mod status;
pub mod traffic;
pub mod upstream;
mod view;
pub mod wake;
