//! QEMU's dirty bitmaps as a change journal.
//!
//! The bitmap that began when the last committed run's disk was frozen says what changed since. Its name is random, and is
//! made anew for each run: a bitmap of that name can't have begun earlier. A bitmap of the same name in a copy of the image
//! speaks of that copy. Whoever freezes the disk begins the next one before anything is read.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::NbdMedium;
use crate::{
    cache::{CacheError, DiskCache},
    config::DiskSpec,
    journal::{
        Answer, Changes, Distrust, Journal, JournalKind,
        memory::{Memory, VolumeCursor},
    },
    source::medium::Medium,
};
use janus_proto::{ids::DiskId, ranges::Ranges};

const PREFIX: &str = "janus-";
const FORMAT: u8 = 1;

/// A name for the bitmap that begins now; later names sort after earlier ones.
pub fn new_name() -> String {
    format!("{PREFIX}{}", uuid::Uuid::now_v7().simple())
}

/// True for the names that [`new_name`] makes.
pub fn is_ours(name: &str) -> bool {
    let digits = name.strip_prefix(PREFIX).unwrap_or_default();
    digits.len() == 32 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The bitmap that a cursor speaks of.
pub fn remembered(cursor: &[u8]) -> Option<String> {
    Cursor::parse(cursor).map(|cursor| cursor.bitmap)
}

/// The bitmaps of a run, as told to whoever freezes its exports: `pre_backup`, and `post_backup` when all is over.
#[derive(Debug)]
pub struct Announced {
    /// To begin at the freeze, in each disk.
    pub new: String,
    /// Begun when the disk's last committed run froze it: to be exported, and to go when this run is committed.
    old: Vec<(DiskId, String)>,
}

impl Announced {
    /// For a run of the disks that `specs` name, whose caches are in `folder`. Of a disk without a name no old one is told.
    ///
    /// # Errors
    /// When a cache can't be read.
    pub fn new(specs: &[DiskSpec], folder: &Path) -> Result<Self, CacheError> {
        let mut old = Vec::new();
        for disk in specs.iter().filter_map(|spec| spec.name.as_ref()) {
            let memory = Memory::parse(&DiskCache::peek_cursor(folder, disk)?).unwrap_or_default();
            let is_it = |volume: &&VolumeCursor| volume.kind == JournalKind::QemuBitmap;
            let cursor = memory.volumes.iter().find(is_it);
            let bitmap = cursor.and_then(|volume| remembered(&volume.cursor));
            old.extend(bitmap.map(|bitmap| (disk.clone(), bitmap)));
        }
        Ok(Self { new: new_name(), old })
    }

    /// Names and values for a hook's environment.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        let old: Vec<_> = self.old.iter().map(|(disk, name)| format!("{disk}={name}")).collect();
        [("JANUS_NEW_BITMAP", self.new.clone()), ("JANUS_OLD_BITMAPS", old.join(" "))]
    }
}

#[derive(Serialize, Deserialize)]
struct Cursor {
    format: u8,
    bitmap: String,
    size_bytes: u64,
}

impl Cursor {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let cursor: Self = serde_json::from_slice(bytes).ok()?;
        (cursor.format == FORMAT && is_ours(&cursor.bitmap)).then_some(cursor)
    }
}

/// The journal of a whole disk.
#[derive(Debug)]
pub struct QemuBitmap<'a> {
    /// The disk.
    pub medium: &'a NbdMedium,
    /// The bitmap that began at this run's freeze, if one did.
    pub begun: Option<&'a str>,
    /// Bitmaps that are there and not to be believed.
    pub bad: &'a [(String, Distrust)],
}

impl QemuBitmap<'_> {
    fn since(&self, cursor: Option<&[u8]>) -> Result<Changes, Distrust> {
        let cursor = cursor.and_then(Cursor::parse).ok_or(Distrust::NoCursor)?;
        let (old, new) = (cursor.size_bytes, self.medium.size_bytes());
        if old != new {
            return Err(Distrust::Resized { old, new });
        }
        let name = cursor.bitmap;
        if let Some((_, reason)) = self.bad.iter().find(|(bad, _)| *bad == name) {
            return Err(reason.clone());
        }
        if !self.medium.bitmaps().any(|offered| offered == name) {
            return Err(Distrust::BitmapGone { name });
        }
        let unreadable = |error: super::NbdError| Distrust::Unreadable { what: error.to_string() };
        let changed = self.medium.dirty(&name).map_err(unreadable)?;
        Ok(Changes { changed, free: Ranges::new() })
    }
}

impl Journal for QemuBitmap<'_> {
    fn kind(&self) -> JournalKind {
        JournalKind::QemuBitmap
    }

    fn changes(&self, cursor: Option<&[u8]>) -> Answer {
        let next = self.begun.and_then(|name| {
            let size_bytes = self.medium.size_bytes();
            serde_json::to_vec(&Cursor { format: FORMAT, bitmap: name.to_owned(), size_bytes }).ok()
        });
        Answer { changes: self.since(cursor), next }
    }
}
