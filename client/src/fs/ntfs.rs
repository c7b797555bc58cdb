//! NTFS as far as backups need it: which clusters each file has, which are free, whether the volume is at rest.
//!
//! Names of structures and offsets: Linux-NTFS documentation and the headers of ntfs-3g (`layout.h`, `logfile.h`).
//! The whole MFT is read, record by record, so no index or attribute list has to be followed: an extension record names its
//! base record.

use std::{collections::BTreeMap, ops::Range};

use super::{FsError, zero_bits};
use janus_proto::ranges::Ranges;

use crate::source::view::ReadAt;

mod boot;
pub(crate) mod fixups;
mod logfile;
mod record;
mod runs;

pub(crate) use self::record::{Attribute, Body, Bytes, Record, text};
pub(crate) use self::runs::Run;
pub use self::{boot::Boot, logfile::LogState};

/// Records of the MFT that are read at once.
const BATCH_BYTES: u64 = 1 << 20;
/// More records than this are not looked at: 2^26 files need an MFT of 64 GiB.
const MAX_RECORDS: u64 = 1 << 26;
/// A stream that is read as a whole may have so many bytes: the bitmap of 64 TiB in clusters of 4 KiB.
const MAX_STREAM_BYTES: u64 = 2 << 30;

/// Numbers of records that every volume has.
pub(crate) mod numbers {
    /// The MFT itself.
    pub(crate) const MFT: u64 = 0;
    /// The log of changes to structures.
    pub(crate) const LOG_FILE: u64 = 2;
    /// Flags of the volume.
    pub(crate) const VOLUME: u64 = 3;
    /// The root folder.
    pub(crate) const ROOT: u64 = 5;
    /// Which clusters are used.
    pub(crate) const BITMAP: u64 = 6;
    /// Bad clusters, as a stream of holes as long as the volume.
    pub(crate) const BAD_CLUSTERS: u64 = 8;
    /// Folder of more such files.
    pub(crate) const EXTEND: u64 = 11;
    /// The first one that may be a user's file.
    pub(crate) const FIRST_USER: u64 = 24;
}

/// Types of attributes.
pub(crate) mod types {
    /// Times and attributes.
    pub(crate) const STANDARD_INFORMATION: u32 = 0x10;
    /// Where the other attributes of a file are.
    pub(crate) const ATTRIBUTE_LIST: u32 = super::record::ATTRIBUTE_LIST;
    /// A name, and the folder that it stands in.
    pub(crate) const FILE_NAME: u32 = 0x30;
    /// Version and flags of the volume.
    pub(crate) const VOLUME_INFORMATION: u32 = 0x70;
    /// A stream of data.
    pub(crate) const DATA: u32 = 0x80;
    /// The first names of a folder.
    pub(crate) const INDEX_ROOT: u32 = 0x90;
    /// The others, in blocks.
    pub(crate) const INDEX_ALLOCATION: u32 = 0xA0;
    /// Which blocks are used.
    pub(crate) const BITMAP: u32 = 0xB0;
    /// A link, or something that a driver of Windows interprets.
    pub(crate) const REPARSE_POINT: u32 = 0xC0;
}

/// A volume and its structures.
pub(crate) struct Ntfs<'a> {
    volume: &'a dyn ReadAt,
    /// Sizes.
    pub(crate) boot: Boot,
    /// Where the MFT is.
    mft: Vec<Run>,
    /// Its bytes that are initialised.
    mft_bytes: u64,
}

impl<'a> Ntfs<'a> {
    /// Reads the boot sector and the MFT's own records.
    ///
    /// # Errors
    /// When this is no NTFS, or a damaged one.
    pub(crate) fn open(volume: &'a dyn ReadAt) -> Result<Self, FsError> {
        let boot = Boot::read(volume)?;
        let first = Run { first: boot.mft_cluster, count: boot.record_clusters(), vcn: 0 };
        let mut ntfs = Self { volume, mft: vec![first], mft_bytes: boot.record_bytes, boot };
        let own =
            ntfs.record(0)?.ok_or_else(|| FsError::damaged("the MFT has no record of itself"))?;
        let data =
            own.stream(types::DATA, "").ok_or_else(|| FsError::damaged("the MFT has no data"))?;
        ntfs.mft_bytes = data.initialised_bytes;
        ntfs.mft = ntfs.mapped(data)?;
        // The MFT of a fragmented volume goes on in records that lie in what is known of it already.
        if own.attributes.iter().any(|one| one.kind == record::ATTRIBUTE_LIST) {
            ntfs.extend_mft()?;
        }
        let mapped: u64 = ntfs.mft.iter().map(|run| run.count).sum();
        if mapped.saturating_mul(ntfs.boot.cluster_bytes) < ntfs.mft_bytes {
            return Err(FsError::damaged("parts of the MFT have no place"));
        }
        Ok(ntfs)
    }

    /// Adds the parts that the MFT's extension records name. Each record is looked at once, however many parts there are.
    fn extend_mft(&mut self) -> Result<(), FsError> {
        let mut parts: BTreeMap<u64, Vec<Run>> = BTreeMap::new();
        let mut looked = 0;
        loop {
            let reached = self.mft.last().map_or(0, |run| run.vcn + run.count);
            if reached > self.boot.clusters {
                return Err(FsError::damaged("the MFT has more clusters than the volume"));
            }
            let known =
                (reached * self.boot.cluster_bytes / self.boot.record_bytes).min(self.records());
            self.each_record_of(looked..known, |record| {
                let is_ours = record.base == numbers::MFT && record.number != numbers::MFT;
                for part in
                    record.attributes.iter().filter(|one| is_ours && one.is(types::DATA, ""))
                {
                    if let Body::Mapped(mapped) = &part.body {
                        parts.insert(mapped.first_vcn, mapped.runs.clone());
                    }
                }
                Ok(())
            })?;
            looked = known.max(looked);
            let Some(next) = parts.remove(&reached) else { return Ok(()) };
            if next.is_empty() {
                return Err(FsError::damaged("a part of the MFT is empty"));
            }
            self.mft.extend(self.checked(next)?);
        }
    }

    /// Bytes of the volume, with what lies behind the last cluster.
    pub(crate) fn volume_bytes(&self) -> u64 {
        self.volume.len()
    }

    /// How many records the MFT has.
    pub(crate) fn records(&self) -> u64 {
        self.mft_bytes / self.boot.record_bytes
    }

    /// One record; `None` when it isn't in use.
    pub(crate) fn record(&self, number: u64) -> Result<Option<Record>, FsError> {
        let mut bytes = vec![0; self.boot.record_bytes as usize];
        self.read_stream(&self.mft, number * self.boot.record_bytes, &mut bytes)?;
        Record::parse(number, &mut bytes, &self.boot)
    }

    /// Hands out all records in use, ascending.
    pub(crate) fn each_record(
        &self,
        each: impl FnMut(Record) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        self.each_record_of(0..self.records(), each)
    }

    fn each_record_of(
        &self,
        numbers: Range<u64>,
        mut each: impl FnMut(Record) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        let Range { start: mut number, end } = numbers;
        if end > MAX_RECORDS {
            return Err(FsError::unsupported(format!("{end} files")));
        }
        let size = self.boot.record_bytes;
        let most = end.saturating_sub(number).saturating_mul(size).min(BATCH_BYTES);
        let mut bytes = vec![0; most as usize];
        while number < end {
            let count = (BATCH_BYTES / size).min(end - number);
            let bytes = &mut bytes[..(count * size) as usize];
            self.read_stream(&self.mft, number * size, bytes)?;
            for record in bytes.chunks_mut(size as usize) {
                if let Some(record) = Record::parse(number, record, &self.boot)? {
                    each(record)?;
                }
                number += 1;
            }
        }
        Ok(())
    }

    /// Fills `buffer` from byte `offset` of the stream with these runs; holes are zeros.
    pub(crate) fn read_stream(
        &self,
        runs: &[Run],
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), FsError> {
        let cluster = self.boot.cluster_bytes;
        let (mut at, mut left) = (offset, buffer);
        while !left.is_empty() {
            let vcn = at / cluster;
            let next = runs.partition_point(|run| run.vcn + run.count <= vcn);
            let run = runs.get(next);
            let end = match run {
                Some(run) if run.vcn <= vcn => run.vcn + run.count,
                Some(run) => run.vcn,
                None => u64::MAX / cluster,
            };
            let len = (end * cluster - at).min(left.len() as u64) as usize;
            let (now, later) = left.split_at_mut(len);
            match run.filter(|run| run.vcn <= vcn) {
                Some(run) => {
                    let place = (run.first + (vcn - run.vcn)) * cluster + at % cluster;
                    self.volume.read_exact_at(now, place)?;
                }
                None => now.fill(0),
            }
            (at, left) = (at + len as u64, later);
        }
        Ok(())
    }

    /// The runs of a stream that has all its parts in one attribute.
    fn mapped(&self, stream: &record::Mapped) -> Result<Vec<Run>, FsError> {
        if stream.first_vcn != 0 {
            return Err(FsError::damaged("a stream begins in its middle"));
        }
        self.checked(stream.runs.clone())
    }

    /// Runs that lie on the volume and are not longer than it: whoever reads them all reads no more than that.
    fn checked(&self, runs: Vec<Run>) -> Result<Vec<Run>, FsError> {
        let mut left = self.boot.clusters;
        for run in &runs {
            if run.first.checked_add(run.count).is_none_or(|end| end > self.boot.clusters) {
                return Err(FsError::damaged("a file has clusters behind the end of the volume"));
            }
            left = left
                .checked_sub(run.count)
                .ok_or_else(|| FsError::damaged("a file has more clusters than the volume"))?;
        }
        Ok(runs)
    }

    /// The first bytes of a small stream of a record that has it in one piece.
    fn small_stream(&self, number: u64, name: &str, bytes: u64) -> Result<Vec<u8>, FsError> {
        let missing = || FsError::damaged(format!("record {number} lacks its data"));
        let record = self.record(number)?.ok_or_else(missing)?;
        if record.attributes.iter().any(|one| one.kind == record::ATTRIBUTE_LIST) {
            return Err(FsError::unsupported(format!("record {number} in many parts")));
        }
        let stream = record.stream(types::DATA, name).ok_or_else(missing)?;
        if bytes > MAX_STREAM_BYTES || bytes > stream.size_bytes.min(stream.initialised_bytes) {
            return Err(FsError::damaged(format!(
                "record {number} has {} bytes and should have {bytes}",
                stream.size_bytes
            )));
        }
        let mut content = vec![0; bytes as usize];
        self.read_stream(&self.mapped(stream)?, 0, &mut content)?;
        Ok(content)
    }

    /// Clusters that `$Bitmap` calls free.
    pub(crate) fn free_clusters(&self) -> Result<Ranges, FsError> {
        let bitmap = self.small_stream(numbers::BITMAP, "", self.boot.clusters.div_ceil(8))?;
        Ok(zero_bits(&bitmap, self.boot.clusters))
    }

    /// How the log was left, and that no check of the volume is due.
    ///
    /// # Errors
    /// [`FsError::NotClean`] when a check is due or the log speaks of changes that are not in the structures yet.
    pub(crate) fn state_at_rest(&self) -> Result<LogState, FsError> {
        let flags = self.flags()?;
        // Dirty, chkdsk underway, changed by chkdsk.
        for (bit, what) in [
            (0x0001, "it is marked dirty"),
            (0x4000, "chkdsk is underway"),
            (0x8000, "chkdsk has changed it"),
        ] {
            if flags & bit != 0 {
                return Err(FsError::not_clean(what));
            }
        }
        let missing = || FsError::damaged("there is no $LogFile");
        let log = self.record(numbers::LOG_FILE)?.ok_or_else(missing)?;
        let stream = log.stream(types::DATA, "").ok_or_else(missing)?;
        let runs = self.mapped(stream)?;
        logfile::state(stream.size_bytes, |offset, buffer| self.read_stream(&runs, offset, buffer))
    }

    /// Flags of the volume.
    pub(crate) fn flags(&self) -> Result<u16, FsError> {
        let volume = self.record(numbers::VOLUME)?;
        let information = volume.as_ref().and_then(|record| {
            record.attributes.iter().find(|one| one.kind == types::VOLUME_INFORMATION)
        });
        let flags = match information.map(|one| &one.body) {
            Some(Body::Resident(bytes)) => {
                bytes.get(10..12).map(|two| u16::from_le_bytes([two[0], two[1]]))
            }
            _ => None,
        };
        flags.ok_or_else(|| FsError::damaged("$Volume has no flags"))
    }

    /// The clusters of an attribute, all on the volume.
    pub(crate) fn clusters_of(&self, attribute: &Attribute) -> Result<Vec<Run>, FsError> {
        match &attribute.body {
            Body::Resident(_) => Ok(Vec::new()),
            Body::Mapped(mapped) => self.checked(mapped.runs.clone()),
        }
    }
}

/// Bytes of the volume that nothing uses: clusters that `$Bitmap` calls free and no file has.
///
/// # Errors
/// When the volume is not at rest, or its structures contradict each other.
pub fn free(volume: &dyn ReadAt) -> Result<Ranges, FsError> {
    let ntfs = Ntfs::open(volume)?;
    ntfs.state_at_rest()?;
    let free = ntfs.free_clusters()?;
    let mut used = Vec::new();
    ntfs.each_record(|record| {
        if record.number != numbers::BAD_CLUSTERS {
            for attribute in &record.attributes {
                used.extend(ntfs.clusters_of(attribute)?.iter().map(Run::clusters));
            }
        }
        Ok(())
    })?;
    match contradiction(&free, &used.into()) {
        Some(what) => Err(FsError::Damaged { what }),
        None => Ok(free.scaled(ntfs.boot.cluster_bytes)),
    }
}

/// What is wrong where a file has a cluster that `$Bitmap` calls free.
pub(crate) fn contradiction(free: &Ranges, used: &Ranges) -> Option<String> {
    let both = free.intersect(used).iter().next()?;
    Some(format!("a file has cluster {}, which $Bitmap calls free", both.start))
}

/// A stream of a file that may be in many parts, from all its records.
pub(crate) fn join(parts: impl IntoIterator<Item = (u64, Vec<Run>)>) -> Result<Vec<Run>, FsError> {
    let mut parts: Vec<_> = parts.into_iter().collect();
    parts.sort_unstable_by_key(|(vcn, _)| *vcn);
    let all: Vec<Run> = parts.into_iter().flat_map(|(_, runs)| runs).collect();
    match all.windows(2).all(|pair| pair[0].vcn + pair[0].count <= pair[1].vcn) {
        true => Ok(all),
        false => Err(FsError::damaged("parts of a stream overlap")),
    }
}
