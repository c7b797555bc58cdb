//! The wire contract of Janus Backup, and what every program does with it the same way.
//!
//! `pb` holds the generated bindings of `proto/schema`. Beside them stand the ids, the one place that computes
//! hashes, the table of error reasons, and the TLS and HTTP/2 settings of every connection.

/// Generated bindings of package `janus.v1`; written only by `cargo xtask bindings`.
#[allow(missing_docs, clippy::all)]
pub mod pb {
    include!("gen/janus.v1.rs");
    /// Encoded `FileDescriptorSet` of the package, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!("gen/descriptors.bin");
}

mod cached;
mod huge;
mod outside;

#[cfg(feature = "archive")]
pub mod archive;
pub mod asked;
pub mod bandwidth;
pub mod buffers;
pub mod carried;
pub mod chance;
pub mod channel;
pub mod child;
pub mod clock;
pub mod direct;
pub mod enroll;
pub mod error;
pub mod grants;
pub mod hash;
pub mod health;
pub mod ids;
pub mod image;
pub mod listener;
pub mod log;
pub mod manual;
pub mod memory;
pub mod metadata;
pub mod model;
pub mod places;
pub mod plain_health;
pub mod plain_http;
pub mod probe;
pub mod program;
pub mod proof;
pub mod punctual;
pub mod ranges;
pub mod revoked;
pub mod settings;
pub mod shares;
pub mod show;
pub mod spans;
pub mod storage;
pub mod summed;
pub mod table;
pub mod tls;
pub mod trace;
pub mod trust;
pub mod wake;
pub mod webhook;
