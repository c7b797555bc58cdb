//! Ids and positions as types: a value of one of these types is valid, wherever it came from.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::WireError;

/// Bytes in a block, the unit of comparison. The last block of a disk may be shorter.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks in a segment.
pub const SEGMENT_BLOCKS: u64 = 1024;
/// Bytes in a segment (4 MiB).
pub const SEGMENT_BYTES: u64 = BLOCK_BYTES * SEGMENT_BLOCKS;
/// Largest disk a VHDX can hold (MS-VHDX section 2.6.2.2): 64 TiB.
pub const MAX_DISK_BYTES: u64 = 64 << 40;

/// BLAKE3-256 of a block, of a segment's block hashes, or of a whole table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// Bytes of a hash on the wire and on disk.
    pub const LEN: usize = 32;

    /// Reads a hash; `field` names it in the error.
    ///
    /// # Errors
    /// When `bytes` is not 32 bytes long.
    pub fn from_wire(field: &'static str, bytes: &[u8]) -> Result<Self, WireError> {
        let hash = bytes.try_into().map_err(|_| WireError::Length {
            field,
            expected: 32,
            actual: bytes.len(),
        })?;
        Ok(Self(hash))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for BlockHash {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let mut hash = [0; 32];
        hex::decode_to_slice(text, &mut hash).map_err(|_| WireError::Invalid {
            field: "hash",
            reason: "not 64 hex digits".into(),
        })?;
        Ok(Self(hash))
    }
}

impl Serialize for BlockHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BlockHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Number of blocks of a disk of `size_bytes`.
pub fn block_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

/// Number of segments of a disk of `size_bytes`.
pub fn segment_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(SEGMENT_BYTES)
}

/// Length in bytes of block `block` of a disk of `size_bytes`; 0 past the end.
pub fn block_len(size_bytes: u64, block: u64) -> usize {
    size_bytes.saturating_sub(block.saturating_mul(BLOCK_BYTES)).min(BLOCK_BYTES) as usize
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// A new id (UUIDv7: later ids sort later).
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(crate::chance::id())
            }

            /// The id's 16 bytes.
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = WireError;

            fn from_str(text: &str) -> Result<Self, WireError> {
                if text.is_empty() {
                    return Err(WireError::Missing { field: $field });
                }
                let id = uuid::Uuid::try_parse(text).map_err(|_| WireError::Invalid {
                    field: $field,
                    reason: format!("{:?} is not a UUID", crate::error::shorten(text)),
                })?;
                Ok(Self(id))
            }
        }
    };
}

uuid_id!(
    /// One run: made by the client, one for each backup of a machine to a server.
    BackupId,
    "backup_id"
);
uuid_id!(
    /// The transfer of one disk in a run.
    SessionId,
    "session_id"
);
uuid_id!(
    /// The committed content of one disk at one time on one server.
    SnapshotId,
    "snapshot_id"
);
uuid_id!(
    /// An opened snapshot.
    HandleId,
    "handle"
);
uuid_id!(
    /// A server's store; renewed by rebuild and import.
    StoreGeneration,
    "store_generation"
);

/// Checks a name that comes from outside: 1..=64 of `A-Za-z0-9._-`, first neither dot nor dash, last no dot, and none that
/// Windows keeps for devices, so that it can stand in a path, a header, a certificate and a log line as it is.
///
/// # Errors
/// When it is empty, too long, or has another character.
pub fn check_name(field: &'static str, name: &str) -> Result<(), WireError> {
    if name.is_empty() {
        return Err(WireError::Missing { field });
    }
    let first_fits = name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let all_fit = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if name.len() > 64 || !first_fits || !all_fit || name.ends_with('.') {
        return Err(WireError::Invalid {
            field,
            reason: format!(
                "{:?} is not a name: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot or a dash, not ending in a dot",
                crate::error::shorten(name)
            ),
        });
    }
    if is_device(name) {
        return Err(WireError::invalid(
            field,
            format!("{name:?} is a device on Windows: choose another"),
        ));
    }
    Ok(())
}

/// Windows opens a device under these names in every folder, whatever the case and whatever follows a dot.
fn is_device(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or(name).to_ascii_uppercase();
    let numbered = |stem: &str| {
        let number = stem.strip_prefix("COM").or_else(|| stem.strip_prefix("LPT"));
        number.is_some_and(|number| matches!(number.as_bytes(), [b'0'..=b'9']))
    };
    matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL") || numbered(&stem)
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = WireError;

            fn from_str(text: &str) -> Result<Self, WireError> {
                check_name($field, text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = WireError;

            fn try_from(text: String) -> Result<Self, WireError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_id!(
    /// A server, by the name in its certificate.
    ServerId,
    "server_id"
);
name_id!(
    /// A disk of a machine: configured name, else GPT disk GUID, else serial number.
    DiskId,
    "disk_id"
);

/// `<user>/<machine>`: equal machine names of two users never meet.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineKey {
    text: std::sync::Arc<str>,
    slash: usize,
}

impl MachineKey {
    /// A key of two names.
    ///
    /// # Errors
    /// When one is not a valid name.
    pub fn new(user: &str, machine: &str) -> Result<Self, WireError> {
        check_name("user", user)?;
        check_name("machine", machine)?;
        Ok(Self { text: format!("{user}/{machine}").into(), slash: user.len() })
    }

    /// The user's name.
    pub fn user(&self) -> &str {
        &self.text[..self.slash]
    }

    /// The machine's name.
    pub fn machine(&self) -> &str {
        &self.text[self.slash + 1..]
    }

    /// `<user>/<machine>`.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for MachineKey {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let (user, machine) = text.split_once('/').ok_or_else(|| WireError::Invalid {
            field: "machine",
            reason: format!("{:?} is not <user>/<machine>", crate::error::shorten(text)),
        })?;
        Self::new(user, machine)
    }
}

impl TryFrom<String> for MachineKey {
    type Error = WireError;

    fn try_from(text: String) -> Result<Self, WireError> {
        text.parse()
    }
}

impl From<MachineKey> for String {
    fn from(key: MachineKey) -> String {
        key.text.to_string()
    }
}

impl fmt::Display for MachineKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for MachineKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_a_folder_or_break_a_header() {
        let devices = ["CON", "nul", "Aux.img", "com1", "LPT9.raw"];
        let shapes = ["", ".", "..", "-x", "a/b", "a\\b", "a b", "a\n", "ä", "a.", "a:b", "a\0"];
        for bad in shapes.into_iter().chain(devices).chain([&*"x".repeat(65)]) {
            assert!(bad.parse::<DiskId>().is_err(), "{bad:?}");
        }
        for good in ["a", "sda1", "_x", "5F0C-22", "a.b-c_d", "console", "com10", "x.nul"] {
            assert_eq!(good.parse::<DiskId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn machine_keys_keep_users_apart() {
        let key: MachineKey = "alice/web1".parse().unwrap();
        assert_eq!((key.user(), key.machine()), ("alice", "web1"));
        assert!("web1".parse::<MachineKey>().is_err());
        assert!("a/b/c".parse::<MachineKey>().is_err());
    }

    #[test]
    fn a_short_last_block_has_its_own_length() {
        assert_eq!(block_count(4097), 2);
        assert_eq!(block_len(4097, 0), 4096);
        assert_eq!(block_len(4097, 1), 1);
        assert_eq!(block_len(4097, 2), 0);
    }
}
