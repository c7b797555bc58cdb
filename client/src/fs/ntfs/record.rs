//! MFT records: the attributes of a file.

use super::{
    Boot, FsError,
    fixups::{self, Fixup},
    runs::{self, Run},
};
use crate::fs::Head;

pub(crate) const ATTRIBUTE_LIST: u32 = 0x20;
const END: u32 = 0xFFFF_FFFF;
/// Bytes before the content of an attribute, and before the list of its clusters.
const RESIDENT_HEAD: u16 = 24;
const MAPPED_HEAD: u16 = 64;

/// A record in use.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// Its place in the MFT.
    pub(crate) number: u64,
    /// It is a folder.
    pub(crate) is_folder: bool,
    /// The first record of its file: another one where the attributes did not fit into one.
    pub(crate) base: u64,
    /// Its attributes.
    pub(crate) attributes: Vec<Attribute>,
    /// Tells contents apart: all of it but the check words.
    pub(crate) digest: u64,
}

/// An attribute.
#[derive(Debug, Clone)]
pub(crate) struct Attribute {
    /// Its type.
    pub(crate) kind: u32,
    /// Its name; most have none.
    pub(crate) name: String,
    /// Compressed, encrypted, sparse.
    pub(crate) flags: u16,
    /// Its content.
    pub(crate) body: Body,
}

/// Where an attribute's content is.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    /// Here.
    Resident(Vec<u8>),
    /// In clusters.
    Mapped(Mapped),
}

/// A stream in clusters, or a part of one.
#[derive(Debug, Clone)]
pub(crate) struct Mapped {
    /// First cluster of this part in the stream.
    pub(crate) first_vcn: u64,
    /// Bytes; told by the first part only.
    pub(crate) size_bytes: u64,
    /// Bytes that were written; the rest reads as zeros.
    pub(crate) initialised_bytes: u64,
    /// Clusters that are compressed together, as a power of two; 0: it isn't compressed. Told by the first part only.
    pub(crate) unit_log: u16,
    /// The clusters of this part.
    pub(crate) runs: Vec<Run>,
}

impl Attribute {
    /// True when it has this type and name.
    pub(crate) fn is(&self, kind: u32, name: &str) -> bool {
        self.kind == kind && self.name == name
    }
}

impl Record {
    /// A record from the MFT; `None` when it isn't in use. Its check words are put back in place.
    pub(crate) fn parse(
        number: u64,
        bytes: &mut [u8],
        boot: &Boot,
    ) -> Result<Option<Self>, FsError> {
        // One that was never used is zeros; BAAD is what a check left of a torn one.
        if !bytes.starts_with(b"FILE") || Bytes(bytes).u16(22)? & 1 == 0 {
            return if bytes.starts_with(b"BAAD") { Err(damaged(number)) } else { Ok(None) };
        }
        fixups::put_back(bytes).map_err(|error| match error {
            Fixup::Malformed => damaged(number),
            Fixup::Torn => FsError::damaged(format!("MFT record {number} is torn")),
        })?;
        let used = Bytes(bytes).u32(24)? as usize;
        let body = Bytes(bytes.get(..used).ok_or_else(|| damaged(number))?);
        let base = body.u64(32)? & 0xFFFF_FFFF_FFFF;
        let mut record = Self {
            number,
            is_folder: body.u16(22)? & 2 != 0,
            base: if base == 0 { number } else { base },
            attributes: Vec::new(),
            digest: digest(bytes),
        };
        let mut at = usize::from(body.u16(20)?);
        loop {
            let kind = body.u32(at)?;
            if kind == END {
                return Ok(Some(record));
            }
            let len = body.u32(at + 4)? as usize;
            if len < 24 || !len.is_multiple_of(8) {
                return Err(damaged(number));
            }
            let bytes = body.part(at, len)?;
            record.attributes.push(attribute(kind, bytes, boot).map_err(|_| damaged(number))?);
            at += len;
        }
    }

    /// A stream in clusters, or its first part.
    pub(crate) fn stream(&self, kind: u32, name: &str) -> Option<&Mapped> {
        self.attributes.iter().find_map(|one| match &one.body {
            Body::Mapped(mapped) if one.is(kind, name) => Some(mapped),
            _ => None,
        })
    }
}

fn damaged(number: u64) -> FsError {
    FsError::damaged(format!("MFT record {number} makes no sense"))
}

fn digest(bytes: &[u8]) -> u64 {
    let words = fixups::place(bytes).unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes.get(..words.start).unwrap_or_default());
    hasher.update(bytes.get(words.end..).unwrap_or_default());
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().unwrap_or(&[0; 8]))
}

fn attribute(kind: u32, bytes: Bytes<'_>, boot: &Boot) -> Result<Attribute, FsError> {
    let name = bytes.part(usize::from(bytes.u16(10)?), usize::from(bytes.u8(9)?) * 2)?;
    let (name, flags) = (text(name.0), bytes.u16(12)?);
    if bytes.u8(8)? == 0 {
        // Else a lost flag would make a stream in clusters an empty one.
        if bytes.u16(20)? < RESIDENT_HEAD {
            return Err(FsError::damaged("an attribute without room for its head"));
        }
        let content = bytes.part(usize::from(bytes.u16(20)?), bytes.u32(16)? as usize)?;
        return Ok(Attribute { kind, name, flags, body: Body::Resident(content.0.to_vec()) });
    }
    let (first_vcn, last) = (bytes.u64(16)?, bytes.u64(24)?);
    // The last cluster of an empty stream is the one before the first.
    let end = last.wrapping_add(1);
    let most = u64::MAX / boot.cluster_bytes;
    if first_vcn > end || end > most {
        return Err(FsError::damaged("a stream of impossible length"));
    }
    if bytes.u16(32)? < MAPPED_HEAD {
        return Err(FsError::damaged("an attribute without room for its head"));
    }
    let pairs = bytes.0.get(usize::from(bytes.u16(32)?)..).unwrap_or_default();
    let runs = runs::parse(pairs, first_vcn, end)?;
    let (size_bytes, initialised_bytes) =
        if first_vcn == 0 { (bytes.u64(48)?, bytes.u64(56)?) } else { (0, 0) };
    let unit_log = if first_vcn == 0 { bytes.u16(34)? } else { 0 };
    let mapped = Mapped { first_vcn, size_bytes, initialised_bytes, unit_log, runs };
    Ok(Attribute { kind, name, flags, body: Body::Mapped(mapped) })
}

/// UTF-16 as text; what isn't any is replaced.
pub(crate) fn text(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// Bytes of others: what lies past their end is an error.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) fn part(self, at: usize, len: usize) -> Result<Self, FsError> {
        or_short(Head(self.0).bytes(at, len).map(Self))
    }

    pub(crate) fn u8(self, at: usize) -> Result<u8, FsError> {
        or_short(Head(self.0).u8(at))
    }

    pub(crate) fn u16(self, at: usize) -> Result<u16, FsError> {
        or_short(Head(self.0).u16(at))
    }

    pub(crate) fn u32(self, at: usize) -> Result<u32, FsError> {
        or_short(Head(self.0).u32(at))
    }

    pub(crate) fn u64(self, at: usize) -> Result<u64, FsError> {
        or_short(Head(self.0).u64(at))
    }
}

fn or_short<T>(read: Option<T>) -> Result<T, FsError> {
    read.ok_or_else(|| FsError::damaged("a structure ends too early"))
}
