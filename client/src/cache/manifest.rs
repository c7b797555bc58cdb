//! `CURRENT`: a line with the BLAKE3 sum of the rest, then JSON that names all values that count.

use std::collections::BTreeMap;

use janus_proto::ids::ServerId;
use serde::{Deserialize, Serialize};

use super::{FreshReason, Head};

/// Format of everything in the folder.
pub(super) const FORMAT: u32 = 1;

/// The whole state: what is not named here does not exist.
#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Version of this and of the values.
    pub(super) format: u32,
    /// Number of the database folder.
    pub(super) database: u64,
    /// Grows with each switch.
    pub(super) generation: u64,
    /// Size of the disk that this speaks of.
    pub(super) size_bytes: u64,
    /// Oldest first: a later layer's hash replaces an earlier one's.
    pub(super) layers: Vec<StoredLayer>,
    /// Servers whose head is known.
    pub(super) servers: BTreeMap<ServerId, StoredServer>,
    /// Digest of the change journals' cursors, in hex: names their file. Empty: none.
    pub(super) cursor: String,
}

/// Where a layer is and how much of it there must be.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredLayer {
    pub(super) id: u64,
    /// Blocks from here on don't count: the disk changed its size.
    pub(super) limit_blocks: u64,
    pub(super) hashes: u64,
    /// How many segments and stored chunks of them its set has.
    pub(super) segments: u64,
    pub(super) chunks: u32,
}

/// What is known of one server.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredServer {
    pub(super) head: Head,
    pub(super) changed: StoredSet,
    /// For people.
    #[serde(default)]
    pub(super) changed_blocks: Option<u64>,
}

/// Where a set of blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredSet {
    pub(super) id: u64,
    pub(super) parts: u32,
    /// All blocks from here on are in the set too.
    pub(super) tail: u64,
}

/// Reads the file's bytes, or says why it can't be used.
pub(super) fn parse(bytes: &[u8]) -> Result<Manifest, FreshReason> {
    let damaged = |what: &str| FreshReason::Damaged(format!("CURRENT {what}"));
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("is not text"))?;
    let (sum, body) = text.split_once('\n').ok_or_else(|| damaged("is cut off"))?;
    if sum != sum_of(body) {
        return Err(damaged("has a wrong sum"));
    }
    // The format first: a newer one may lack or rename anything else.
    let Format { format } = serde_json::from_str(body).map_err(|_| damaged("names no format"))?;
    if format > FORMAT {
        return Err(FreshReason::Newer(format));
    }
    serde_json::from_str(body).map_err(|error| FreshReason::Damaged(format!("CURRENT: {error}")))
}

/// The file's bytes.
pub(super) fn write(manifest: &Manifest) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_string_pretty(manifest)?;
    Ok(format!("{}\n{body}", sum_of(&body)).into_bytes())
}

fn sum_of(body: &str) -> String {
    blake3::hash(body.as_bytes()).to_hex().to_string()
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let body = r#"{"format":2,"everything":"else"}"#;
        let newer = format!("{}\n{body}", sum_of(body));
        assert_eq!(parse(newer.as_bytes()).err(), Some(FreshReason::Newer(2)));
        assert!(matches!(
            parse(newer.replace("else", "elze").as_bytes()).err(),
            Some(FreshReason::Damaged(_))
        ));
        assert!(matches!(parse(b"").err(), Some(FreshReason::Damaged(_))));
    }
}
