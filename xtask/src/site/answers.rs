//! What `janus-client --json` prints, as types. Unknown fields are ignored, missing ones are errors.

use serde::Deserialize;

/// Any failure.
#[derive(Debug, Clone, Deserialize)]
pub struct Failure {
    /// One line for people.
    pub error: String,
    /// Name of the gRPC error reason, if one caused it.
    pub reason: Option<String>,
    /// The program's exit code.
    pub exit_code: i32,
    /// Parts of a snapshot that are lost, when that is the failure.
    #[serde(default)]
    pub lost: Vec<Lost>,
}

/// A lost part of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Lost {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// A server that was passed over.
#[derive(Debug, Clone, Deserialize)]
pub struct Skipped {
    /// Its name.
    pub server: String,
    /// Why.
    pub reason: String,
}

/// `backup`.
#[derive(Debug, Clone, Deserialize)]
pub struct Backup {
    /// Id of the run.
    pub backup_id: String,
    /// Server that took it.
    pub server: String,
    /// Use counter of this start.
    pub use_counter: u64,
    /// Servers that were passed over.
    pub skipped: Vec<Skipped>,
    /// The run went on after an interruption.
    pub resumed: bool,
    /// Wall time.
    pub seconds: f64,
    /// One for each disk.
    pub disks: Vec<Disk>,
}

/// One disk of a backup.
#[derive(Debug, Clone, Deserialize)]
pub struct Disk {
    /// Its id.
    pub disk_id: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Snapshot it became.
    pub snapshot_id: String,
    /// `full` or `delta`.
    pub kind: String,
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// Blocks found changed.
    pub changed_blocks: u64,
    /// Bytes of blocks sent, before packing.
    pub sent_bytes: u64,
    /// The same after packing.
    pub wire_bytes: u64,
    /// `cache`, `reconciled` or `full`.
    pub compare: String,
    /// What was read and why.
    pub reading: serde_json::Value,
    /// Path of the image below the server's image path.
    pub image: String,
    /// Allocated bytes of the image.
    pub image_allocated_bytes: u64,
    /// Length of the image.
    pub image_length_bytes: u64,
    /// Hex digits of the table digest.
    pub table_digest: String,
}

/// `list`.
#[derive(Debug, Clone, Deserialize)]
pub struct List {
    /// Newest first.
    pub snapshots: Vec<Snapshot>,
    /// Servers that did not answer.
    pub unreachable: Vec<Unreachable>,
}

/// One snapshot of `list`.
#[derive(Debug, Clone, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub snapshot_id: String,
    /// Server that holds it.
    pub server: String,
    /// `<user>/<machine>`.
    pub machine: String,
    /// Disk it is of.
    pub disk_id: String,
    /// Run it was made by.
    pub backup_id: String,
    /// Unix milliseconds.
    pub committed_ms: i64,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Hex digits of the table digest.
    pub table_digest: String,
    /// Snapshot its image is a delta to; none for a base.
    pub parent_snapshot_id: Option<String>,
    /// Path of the image below the server's image path.
    pub image: String,
    /// Its server answers.
    pub reachable: bool,
    /// What another server has of it, while its own doesn't answer.
    #[serde(default)]
    pub elsewhere: Option<Elsewhere>,
    /// Blocks that are known to be lost.
    pub damaged_blocks: u64,
    /// Blocks that aren't on its server yet.
    pub missing_blocks: u64,
    /// What its image takes.
    pub image_allocated_bytes: u64,
    /// Unix milliseconds since when all of it is proven; 0: not yet.
    pub verified_ms: i64,
    /// Unix milliseconds at which it was last proven; 0: not yet.
    pub proven_ms: i64,
    /// Key that it is sealed with; none: it isn't sealed, or its server is away.
    #[serde(default)]
    pub sealed_by: Option<String>,
}

/// A server that did not answer a `list`.
#[derive(Debug, Clone, Deserialize)]
pub struct Unreachable {
    /// Its name, or its URL.
    pub server: String,
    /// Why.
    pub reason: String,
}

/// What other servers have of a snapshot.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
pub struct Elsewhere {
    /// The one that has most.
    pub server: String,
    /// Bytes in blocks of the snapshot that aren't zeros.
    pub content_bytes: u64,
    /// Those of them that it has.
    pub held_bytes: u64,
    /// Who has something, that one first.
    pub servers: Vec<String>,
    /// What they have together, at most.
    pub at_most_bytes: u64,
}

/// `restore`.
#[derive(Debug, Clone, Deserialize)]
pub struct Restore {
    /// Snapshot that was restored.
    pub snapshot_id: String,
    /// Server it came from.
    pub server: String,
    /// Disk it is of.
    pub disk_id: String,
    /// Where it was written.
    pub to: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// It went on from what an earlier one had left.
    pub resumed: bool,
    /// Bytes read of the target.
    pub read_bytes: u64,
    /// Bytes that travelled.
    pub fetched_bytes: u64,
    /// How much of it from which server.
    pub sources: Vec<Delivered>,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Bytes that have the snapshot's digests.
    pub verified_bytes: u64,
    /// Bytes read again in the end.
    pub read_back_bytes: u64,
    /// What is lost, and zeros now.
    pub lost: Vec<Lost>,
    /// Wall time.
    pub seconds: f64,
}

/// What a server delivered of a restore.
#[derive(Debug, Clone, Deserialize)]
pub struct Delivered {
    /// Its name.
    pub server: String,
    /// Bytes that travelled.
    pub bytes: u64,
}

/// A machine with damaged snapshots.
#[derive(Debug, Clone, Deserialize)]
pub struct Damaged {
    /// `<user>/<machine>`.
    pub machine: String,
    /// How many.
    pub snapshots: u64,
    /// A disk's newest is among them.
    pub newest: bool,
}

/// `status`.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// One for each server.
    pub servers: Vec<ServerStatus>,
    /// One for each machine.
    pub machines: Vec<MachineStatus>,
}

/// One machine of `status`.
#[derive(Debug, Clone, Deserialize)]
pub struct MachineStatus {
    /// `<user>/<machine>`.
    pub machine: String,
    /// How it stands with each server.
    pub uses: Vec<MachineUse>,
    /// Since when it starts backups, Unix milliseconds, when none was ever done.
    pub first_use_ms: Option<i64>,
}

/// A machine on one server.
#[derive(Debug, Clone, Deserialize)]
pub struct MachineUse {
    /// The server.
    pub server: String,
    /// What was proven of it there.
    pub proof: Option<Proof>,
    /// What looks like an attack there.
    pub alarm: Option<String>,
}

/// What was proven of a machine on a server.
#[derive(Debug, Clone, Deserialize)]
pub struct Proof {
    /// When, Unix milliseconds.
    pub proven_ms: Option<i64>,
    /// Why a restore would fail; empty: it would not.
    pub failure: String,
}

/// One server of `status`.
#[derive(Debug, Clone, Deserialize)]
pub struct ServerStatus {
    /// Its name; empty while it was never reached.
    pub server: String,
    /// Its URL.
    pub url: String,
    /// It takes backups.
    pub ready: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Milliseconds since the last message of its report stream; -1: no stream.
    pub report_age_ms: i64,
    /// Unix milliseconds of the last message of any report stream.
    pub last_report_ms: Option<i64>,
    /// Machines with damaged snapshots there.
    pub damaged: Vec<Damaged>,
    /// When a backup there was last proven, Unix milliseconds.
    pub proven_ms: Option<i64>,
    /// Starts that janus sent there.
    pub starts: u64,
    /// Body bytes that janus forwarded to it.
    pub bytes_sent: u64,
    /// Body bytes that janus forwarded from it.
    pub bytes_received: u64,
}
