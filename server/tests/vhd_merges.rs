//! Purges of dropped runs, with chains of VHDs: the tests of `merges.rs`.

#[path = "merges.rs"]
mod merges;
