//! Names of the metadata that routing is decided by.

/// Machine key `<user>/<machine>` whose recency counts; a client's must equal its certificate's.
pub const MACHINE: &str = "janus-machine";
/// Request: only this server. Answer: the server that answered.
pub const SERVER: &str = "janus-server";
/// `backup_id` of the run a call belongs to.
pub const RUN: &str = "janus-run";
/// Use counter: in StartBackup the caller's highest known + 1, in its answer the counter of this start.
pub const USE: &str = "janus-use";
/// The caller's certificate (DER, base64), set by janus and believed only from a peer with the janus role.
pub const PRINCIPAL: &str = "janus-principal";
/// The caller's signature over what it asks, as [`proof`](crate::proof) says.
pub const PROOF: &str = "janus-proof";
/// Answer of StartBackup through janus: `<server>: <reason>`, one value for each server passed over.
pub const SKIPPED: &str = "janus-skipped";
/// Answer of StartBackup through janus: something an administrator should look at, one value for each.
pub const WARNING: &str = "janus-warning";
