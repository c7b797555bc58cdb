//! Sealed machines: what leaves this machine is encrypted here, and whoever keeps it never has the key.
//!
//! A machine has one master key (`key.rs`), in a file of its own and, for people, as a recovery key (`recovery.rs`). From it each
//! disk gets its own (`disk.rs`): AES-256-XTS for each block at its place, zeros stay zeros. So equal content at the same place is the
//! same there, too, and hashes, deltas, scrub, seeding and healing are those of any disk. Each run carries a seal (`run.rs`) which
//! says by which key it was sealed and proves the digests of its disks; [`Keys`] looks at it before anything of a snapshot is
//! believed, and names what is wrong: another key, no key, a changed seal, no seal.
//!
//! Keys are wiped from memory when they go, and nothing here prints them but [`RecoveryKey::shown`].

use std::{io, path::PathBuf};

use janus_proto::ids::{DiskId, MachineKey};

mod disk;
mod key;
mod keys;
mod recovery;
mod run;
mod xts;

pub use self::{
    disk::{DiskSeal, Sealer},
    key::{KeyId, MasterKey, init},
    keys::{Keys, Wishes},
    recovery::{RecoveryError, RecoveryKey},
    run::{RunSeal, SealedDisk},
};

/// What keeps something from being sealed or opened. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// A key is never overwritten.
    #[error(
        "{}: there is a file already, and a key is never overwritten: sealed backups can't be read without theirs. Move it to a safe place first, or set seal_key to another file", .0.display()
    )]
    Exists(PathBuf),
    /// The file can't be used.
    #[error("{}: the key can't be {action}: {source}", path.display())]
    Io {
        /// The key file.
        path: PathBuf,
        /// What was wanted.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Others can read it.
    #[error("{}: others than its owner may read this key (mode {mode:04o}): chmod 600 {}", path.display(), path.display())]
    Loose {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It holds no key.
    #[error("{}: holds no key: {source}; `janus-client recover` writes it from the recovery key, once this file is moved away", path.display())]
    Damaged {
        /// The key file.
        path: PathBuf,
        /// What is wrong.
        source: RecoveryError,
    },
    /// Backups are to be sealed, and there is no key.
    #[error(
        "encryption = \"client\", and there is no key {}: `janus-client seal init` makes one, `janus-client recover` writes the old one from its recovery key", .0.display()
    )]
    NoKey(PathBuf),
    /// The system gives no random bytes.
    #[error("a key can't be made: {0}")]
    Random(String),
    /// Ciphers need whole sectors.
    #[error(
        "disk {disk} has {size_bytes} bytes: only disks of whole sectors of 512 bytes are sealed"
    )]
    Size {
        /// The disk.
        disk: DiskId,
        /// Its size.
        size_bytes: u64,
    },
    /// A snapshot is sealed, and there is no key here.
    #[error(
        "snapshot {snapshot} is sealed with key {wanted}, and that can't be used: {why}; `janus-client recover` writes it from its recovery key, --seal-key names another file"
    )]
    Locked {
        /// The snapshot.
        snapshot: String,
        /// Its key.
        wanted: KeyId,
        /// What is wrong with the key here.
        why: String,
    },
    /// A snapshot is sealed by another key.
    #[error(
        "snapshot {snapshot} is sealed with key {wanted}, and {} is key {found}: name the right file by --seal-key, or write it from its recovery key: janus-client recover --seal-key FILE", path.display()
    )]
    OtherKey {
        /// The snapshot.
        snapshot: String,
        /// Its key.
        wanted: KeyId,
        /// The key here.
        found: KeyId,
        /// Its file.
        path: PathBuf,
    },
    /// What the server tells isn't what the client sealed.
    #[error(
        "snapshot {snapshot} on server {server} is not what this machine sealed as disk {disk}: its seal or its content was changed there ({what}). Restore another snapshot, or this one from another server"
    )]
    Changed {
        /// The snapshot.
        snapshot: String,
        /// Its server.
        server: String,
        /// The disk that it is said to be of.
        disk: String,
        /// How that shows.
        what: &'static str,
    },
    /// Sealed by a newer program.
    #[error(
        "snapshot {snapshot} is sealed in format {version}, which this program doesn't know: use a newer one"
    )]
    Newer {
        /// The snapshot.
        snapshot: String,
        /// The format.
        version: u8,
    },
    /// Sealed under another name.
    #[error(
        "snapshot {snapshot} was sealed as {sealed_as}, and server {server} says that it is of {machine}: if it was imported under that name, --sealed-as {sealed_as}"
    )]
    OtherMachine {
        /// The snapshot.
        snapshot: String,
        /// Its server.
        server: String,
        /// Who sealed it.
        sealed_as: MachineKey,
        /// Whose it is said to be.
        machine: String,
    },
    /// Not sealed, where all should be.
    #[error(
        "snapshot {snapshot} on server {server} is not sealed, and this machine seals its backups (encryption = \"client\"): it is from before that, or somebody put it there. If you know that it is right: --allow-unsealed"
    )]
    Unsealed {
        /// The snapshot.
        snapshot: String,
        /// Its server.
        server: String,
    },
    /// A recovery key that is none.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
}
