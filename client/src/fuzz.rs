//! What reads bytes that others wrote, as functions for fuzzers.
//!
//! Each function takes any bytes for what it reads, first as they are, then with the sums in them made right, so that a fuzzer
//! need not guess sums. Whatever the bytes: no panic, no more reads than a volume of that size can justify, no memory beyond
//! that, and no answer that reaches past the volume. Errors are fine. `client/fuzz/` has a target of cargo-fuzz for each;
//! `tests/hostile` runs all of them on the stable toolchain.

mod nbd;
mod nbd_server;
mod parts;
mod sparse;
mod sums;
mod volumes;

pub use self::{
    nbd::fuzz_nbd,
    nbd_server::fuzz_nbd_server,
    parts::{fuzz_cursor, fuzz_mft_record, fuzz_qcow2_info, fuzz_usn_records},
    sparse::{Sparse, encode},
    volumes::{fuzz_ext4, fuzz_ntfs, fuzz_partitions, fuzz_xfs},
};

/// A reader of foreign bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also of its corpus folder.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&[u8]),
    /// Valid inputs to begin with; those of volumes are committed, since only other programs make them.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "ntfs", run: fuzz_ntfs, seeds: Vec::new },
    Target { name: "mft_record", run: fuzz_mft_record, seeds: Vec::new },
    Target { name: "usn_records", run: fuzz_usn_records, seeds: parts::usn_seeds },
    Target { name: "ext4", run: fuzz_ext4, seeds: Vec::new },
    Target { name: "xfs", run: fuzz_xfs, seeds: Vec::new },
    Target { name: "partitions", run: fuzz_partitions, seeds: Vec::new },
    Target { name: "qcow2_info", run: fuzz_qcow2_info, seeds: parts::qcow2_seeds },
    Target { name: "cursor", run: fuzz_cursor, seeds: parts::cursor_seeds },
    Target { name: "nbd", run: fuzz_nbd, seeds: nbd::seeds },
    Target { name: "nbd_server", run: fuzz_nbd_server, seeds: nbd_server::seeds },
];
