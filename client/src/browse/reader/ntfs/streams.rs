//! Streams of a file, from all of its records.

use std::collections::BTreeMap;

use super::{
    super::{super::BrowseError, tree::Result},
    error, lznt1,
};
use crate::fs::ntfs::{Attribute, Body, Bytes, Ntfs, Record, Run, join, types};

/// Records that a file may have beside the first.
const MOST_RECORDS: usize = 10_000;
/// Bytes of a list of attributes; Windows allows 256 KiB.
const MOST_LIST_BYTES: u64 = 1 << 20;
/// What is compressed together: 16 clusters of 4 KiB by Windows.
const MOST_UNIT_BYTES: u64 = 2 << 20;

const COMPRESSED: u16 = 0x00FF;
const ENCRYPTED: u16 = 0x4000;

/// What a stream has.
pub(super) struct Content {
    pub(super) size_bytes: u64,
    pub(super) is_encrypted: bool,
    bytes: Where,
}

enum Where {
    Record(Vec<u8>),
    Clusters { runs: Vec<Run>, initialised_bytes: u64, unit_clusters: Option<u64> },
}

pub(super) fn resident(attribute: &Attribute) -> Option<&[u8]> {
    match &attribute.body {
        Body::Resident(bytes) => Some(bytes),
        Body::Mapped(_) => None,
    }
}

/// The numbers of the other records of a file.
pub(super) fn extensions(ntfs: &Ntfs<'_>, base: &Record) -> Result<Vec<u64>> {
    let list = content(ntfs, std::slice::from_ref(base), types::ATTRIBUTE_LIST, "")?;
    let Some(list) = list else { return Ok(Vec::new()) };
    let list = list.small(ntfs, MOST_LIST_BYTES)?;
    let mut numbers = Vec::new();
    let mut at = 0;
    while at + 24 <= list.len() {
        let head = Bytes(&list);
        let len = usize::from(head.u16(at + 4).map_err(error)?);
        let number = head.u64(at + 16).map_err(error)? & 0xFFFF_FFFF_FFFF;
        if number != base.number {
            numbers.push(number);
        }
        if len < 24 {
            return Err(BrowseError::damaged("a list of attributes makes no sense"));
        }
        at += len;
    }
    numbers.sort_unstable();
    numbers.dedup();
    match numbers.len() > MOST_RECORDS {
        true => Err(BrowseError::unsupported("a file in so many parts")),
        false => Ok(numbers),
    }
}

/// All streams of data of a file, by name.
pub(super) fn contents(ntfs: &Ntfs<'_>, records: &[Record]) -> Result<BTreeMap<String, Content>> {
    let all = records.iter().flat_map(|record| &record.attributes);
    let names: Vec<_> = all.filter(|one| one.kind == types::DATA).map(|one| &one.name).collect();
    let mut contents = BTreeMap::new();
    for name in names {
        if !contents.contains_key(name)
            && let Some(content) = content(ntfs, records, types::DATA, name)?
        {
            contents.insert(name.clone(), content);
        }
    }
    Ok(contents)
}

/// One stream of a file.
pub(super) fn content(
    ntfs: &Ntfs<'_>,
    records: &[Record],
    kind: u32,
    name: &str,
) -> Result<Option<Content>> {
    let all = records.iter().flat_map(|record| &record.attributes);
    let parts: Vec<_> = all.filter(|one| one.is(kind, name)).collect();
    let is_encrypted = parts.iter().any(|part| part.flags & ENCRYPTED != 0);
    if let Some(bytes) = parts.iter().find_map(|part| resident(part)) {
        let bytes = bytes.to_vec();
        let size_bytes = bytes.len() as u64;
        return Ok(Some(Content { size_bytes, is_encrypted, bytes: Where::Record(bytes) }));
    }
    let mapped = |part: &&Attribute| match &part.body {
        Body::Mapped(mapped) => Some(mapped.clone()),
        Body::Resident(_) => None,
    };
    let mapped: Vec<_> = parts.iter().filter_map(mapped).collect();
    let Some(first) = mapped.iter().find(|part| part.first_vcn == 0) else { return Ok(None) };
    let mut pieces = Vec::with_capacity(parts.len());
    for part in &parts {
        if let Body::Mapped(mapped) = &part.body {
            pieces.push((mapped.first_vcn, ntfs.clusters_of(part).map_err(error)?));
        }
    }
    let is_compressed = parts.iter().any(|part| part.flags & COMPRESSED != 0);
    let unit_clusters = match first.unit_log {
        _ if !is_compressed => None,
        log @ 1..=16 => Some(1 << log),
        _ => return Err(BrowseError::damaged("compressed in units that make no sense")),
    };
    let too_large = |unit: &u64| unit * ntfs.boot.cluster_bytes > MOST_UNIT_BYTES;
    if unit_clusters.as_ref().is_some_and(too_large) {
        return Err(BrowseError::unsupported("compressed in units of this size"));
    }
    let (size_bytes, initialised_bytes) = (first.size_bytes, first.initialised_bytes);
    let runs = join(pieces).map_err(error)?;
    let bytes = Where::Clusters { runs, initialised_bytes, unit_clusters };
    Ok(Some(Content { size_bytes, is_encrypted, bytes }))
}

impl Content {
    /// All of it, when it is not longer than `most`.
    pub(super) fn small(&self, ntfs: &Ntfs<'_>, most: u64) -> Result<Vec<u8>> {
        if self.size_bytes > most {
            return Err(BrowseError::damaged("a structure that is too long"));
        }
        let mut bytes = vec![0; self.size_bytes as usize];
        let mut done = 0;
        while done < bytes.len() {
            match self.read(ntfs, done as u64, &mut bytes[done..])? {
                0 => break,
                count => done += count,
            }
        }
        Ok(bytes)
    }

    /// The clusters that it has, each counted in order; none beyond them.
    pub(super) fn mapped_bytes(&self, ntfs: &Ntfs<'_>) -> u64 {
        match &self.bytes {
            Where::Record(bytes) => bytes.len() as u64,
            Where::Clusters { runs, .. } => runs
                .last()
                .map_or(0, |run| (run.vcn + run.count).saturating_mul(ntfs.boot.cluster_bytes)),
        }
    }

    pub(super) fn allocated_bytes(&self, ntfs: &Ntfs<'_>) -> u64 {
        match &self.bytes {
            Where::Record(_) => 0,
            Where::Clusters { runs, .. } => {
                runs.iter().map(|run| run.count).sum::<u64>() * ntfs.boot.cluster_bytes
            }
        }
    }

    /// Fills `buffer` from `offset` on; returns how much there was.
    pub(super) fn read(&self, ntfs: &Ntfs<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let left = self.size_bytes.saturating_sub(offset);
        let count = (buffer.len() as u64).min(left) as usize;
        let buffer = &mut buffer[..count];
        match &self.bytes {
            Where::Record(bytes) => {
                let from = offset.min(bytes.len() as u64) as usize;
                buffer.copy_from_slice(&bytes[from..from + count]);
            }
            Where::Clusters { runs, initialised_bytes, unit_clusters } => {
                let written = initialised_bytes.saturating_sub(offset).min(count as u64);
                let (data, zeros) = buffer.split_at_mut(written as usize);
                zeros.fill(0);
                match unit_clusters {
                    None => ntfs.read_stream(runs, offset, data).map_err(error)?,
                    Some(unit) => read_units(ntfs, runs, *unit, offset, data)?,
                }
            }
        }
        Ok(count)
    }

    /// The first byte from `offset` on that may not be zero.
    pub(super) fn next_data(&self, ntfs: &Ntfs<'_>, offset: u64) -> u64 {
        let Where::Clusters { runs, initialised_bytes, unit_clusters } = &self.bytes else {
            return offset;
        };
        let cluster = ntfs.boot.cluster_bytes;
        let next = runs.partition_point(|run| run.vcn + run.count <= offset / cluster);
        match runs.get(next) {
            _ if offset >= *initialised_bytes => self.size_bytes.max(offset),
            None => self.size_bytes.max(offset),
            Some(run) => {
                let unit = unit_clusters.unwrap_or(1);
                (run.vcn / unit * unit).saturating_mul(cluster).max(offset)
            }
        }
    }
}

/// Reads from a compressed stream, unit by unit.
fn read_units(
    ntfs: &Ntfs<'_>,
    runs: &[Run],
    unit: u64,
    offset: u64,
    buffer: &mut [u8],
) -> Result<()> {
    let unit_bytes = unit * ntfs.boot.cluster_bytes;
    let (mut at, mut left) = (offset, buffer);
    let mut plain = Vec::new();
    while !left.is_empty() {
        let first = at / unit_bytes * unit;
        read_unit(ntfs, runs, first..first + unit, &mut plain)?;
        let within = (at % unit_bytes) as usize;
        let count = left.len().min(plain.len() - within);
        let (now, later) = left.split_at_mut(count);
        now.copy_from_slice(&plain[within..within + count]);
        (at, left) = (at + count as u64, later);
    }
    Ok(())
}

/// One unit: all its clusters (it isn't compressed), none (zeros), or some, with holes after them.
fn read_unit(
    ntfs: &Ntfs<'_>,
    runs: &[Run],
    unit: std::ops::Range<u64>,
    plain: &mut Vec<u8>,
) -> Result<()> {
    let cluster = ntfs.boot.cluster_bytes;
    let wanted = ((unit.end - unit.start) * cluster) as usize;
    let from = runs.partition_point(|run| run.vcn + run.count <= unit.start);
    let here = runs[from..].iter().take_while(|run| run.vcn < unit.end);
    let count: u64 =
        here.map(|run| (run.vcn + run.count).min(unit.end) - run.vcn.max(unit.start)).sum();
    plain.clear();
    plain.resize(wanted, 0);
    if count == 0 {
        return Ok(());
    }
    if count == unit.end - unit.start {
        return ntfs.read_stream(runs, unit.start * cluster, plain).map_err(error);
    }
    let mut packed = vec![0; (count * cluster) as usize];
    ntfs.read_stream(runs, unit.start * cluster, &mut packed).map_err(error)?;
    lznt1::unpack(&packed, plain)
        .ok_or_else(|| BrowseError::damaged("compressed data makes no sense"))
}
