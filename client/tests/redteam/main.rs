//! A machine with a valid certificate does all that HTTP/2 and the contract let it do, to a real server and a real janus. After each case
//! a good machine is served, memory is bounded, and in the end nothing is lost and nothing is held.
//!
//! Frames are written by hand (`raw.rs`): no library sends such. h2 0.4.20 and hyper 1.12 end some of it by themselves, the listener
//! the rest (`proto/src/listener.rs`); each case says what did.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod calls;
mod frames;
mod raw;
mod scene;
mod slow;
