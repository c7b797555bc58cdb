//! Snapshots that the client makes, and freezing while it makes them.
//!
//! File systems, loop devices, freezing, server and client are real. `lvs`, `lvcreate`, `lvremove` and `zfs` are programs of
//! this test, since nothing here has a device-mapper or ZFS: a snapshot of theirs is a copy of the loop device's file.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod freezing;
mod snapshots;
mod volumes;
