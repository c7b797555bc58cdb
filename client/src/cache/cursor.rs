//! The change journals' cursors: a file of its own beside `CURRENT`, which names it by its digest. They may be large, and
//! most switches don't touch them.

use std::sync::Arc;

use janus_proto::ids::BlockHash;

use super::{CacheError, place::Place};

/// Bytes that say where the change journals stood when T was the disk's content.
#[derive(Clone, Default)]
pub(super) struct Cursor {
    bytes: Arc<[u8]>,
    digest: Option<BlockHash>,
    is_stored: bool,
}

impl Cursor {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let digest = (!bytes.is_empty()).then(|| digest_of(&bytes));
        Self { bytes: bytes.into(), digest, is_stored: false }
    }

    /// The one that `CURRENT` names. One that is missing or damaged is none: that costs time only.
    pub(super) fn load(place: &Place, name: &str) -> Result<Self, CacheError> {
        if name.is_empty() {
            return Ok(Self::default());
        }
        let bytes = match place.read_cursor(name) {
            Err(error) if error.is_unreadable() => Vec::new(),
            read => read?.unwrap_or_default(),
        };
        let mut cursor = Self::new(bytes);
        if cursor.name() != name {
            tracing::warn!(cache = %place.path().display(), "the change journals' cursors are lost; everything is compared");
            return Ok(Self::default());
        }
        cursor.is_stored = true;
        Ok(cursor)
    }

    /// Writes it, unless it is there. Durable when it returns.
    pub(super) fn store(&mut self, place: &Place) -> Result<(), CacheError> {
        if !self.is_stored && self.digest.is_some() {
            place.write_cursor(&self.name(), &self.bytes)?;
            self.is_stored = true;
        }
        Ok(())
    }

    pub(super) fn name(&self) -> String {
        self.digest.map(|digest| hex::encode(digest.0)).unwrap_or_default()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn digest(&self) -> Option<BlockHash> {
        self.digest
    }
}

fn digest_of(bytes: &[u8]) -> BlockHash {
    BlockHash(*blake3::hash(bytes).as_bytes())
}
