//! Purges that are killed or fail at every operation, with chains of VHDs: the tests of `merge_faults.rs`.

#[path = "merge_faults.rs"]
mod merge_faults;
