//! What reads bytes that others wrote, as functions for fuzzers.
//!
//! Each function takes any bytes for what it reads, first as they are, then with the sums in them made right, so that a fuzzer
//! need not guess sums. Whatever the bytes: no panic, no endless loop, no memory beyond what the bytes can justify. Errors are
//! fine. `server/fuzz/` has a target of cargo-fuzz for each; `tests/hostile.rs` runs all of them on the stable toolchain.

mod archive;
mod images;
mod mirror;
mod records;
mod report;
mod services;

use std::{fs, io, io::Write, os::fd::AsRawFd, path::PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

pub use self::{
    archive::{fuzz_archive_index, fuzz_archive_manifest},
    images::{
        fuzz_parent_locator, fuzz_vhd, fuzz_vhdx_bat, fuzz_vhdx_header, fuzz_vhdx_log,
        fuzz_vhdx_metadata, fuzz_vhdx_regions,
    },
    mirror::{fuzz_mirror_record, fuzz_table_message},
    records::{fuzz_carried, fuzz_manifest, fuzz_session_journal, fuzz_table},
    report::fuzz_report,
    services::fuzz_services,
};
use crate::storage::{Access, Disk, File};

/// A reader of foreign bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also of its corpus folder.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&[u8]),
    /// Valid inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "vhd", run: fuzz_vhd, seeds: images::vhd_seeds },
    Target { name: "vhdx_header", run: fuzz_vhdx_header, seeds: images::header_seeds },
    Target { name: "vhdx_regions", run: fuzz_vhdx_regions, seeds: images::region_seeds },
    Target { name: "vhdx_metadata", run: fuzz_vhdx_metadata, seeds: images::metadata_seeds },
    Target { name: "vhdx_bat", run: fuzz_vhdx_bat, seeds: images::bat_seeds },
    Target { name: "vhdx_log", run: fuzz_vhdx_log, seeds: images::log_seeds },
    Target { name: "parent_locator", run: fuzz_parent_locator, seeds: images::locator_seeds },
    Target { name: "manifest", run: fuzz_manifest, seeds: records::manifest_seeds },
    Target { name: "carried", run: fuzz_carried, seeds: records::carried_seeds },
    Target { name: "table", run: fuzz_table, seeds: records::table_seeds },
    Target { name: "session_journal", run: fuzz_session_journal, seeds: records::journal_seeds },
    Target { name: "mirror_record", run: fuzz_mirror_record, seeds: mirror::record_seeds },
    Target { name: "table_message", run: fuzz_table_message, seeds: mirror::message_seeds },
    Target { name: "archive_manifest", run: fuzz_archive_manifest, seeds: archive::manifest_seeds },
    Target { name: "archive_index", run: fuzz_archive_index, seeds: archive::index_seeds },
    Target { name: "report", run: fuzz_report, seeds: report::report_seeds },
    Target { name: "services", run: fuzz_services, seeds: services::service_seeds },
];

/// A file that lives in memory. It is gone when the last of its handles is.
struct Scratch {
    file: fs::File,
}

impl Scratch {
    fn new(bytes: &[u8]) -> io::Result<Self> {
        let mut file = fs::File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC)?);
        file.write_all(bytes)?;
        Ok(Self { file })
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// The file as the store opens files.
    fn open(&self) -> io::Result<File> {
        Disk::default().open(&self.path(), Access::Write)
    }
}
