//! What is backed up: a whole disk, read from a block device, an image file or an NBD export.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use janus_proto::{
    direct::{DirectFile, forget_cached},
    ids::{BLOCK_BYTES, DiskId, MAX_DISK_BYTES},
    pb::Consistency,
};
use rustix::fs::{OFlags, SeekFrom};

use crate::{
    config::DiskSpec,
    frozen::{Snapshots, Still},
    journal::Journal,
    nbd::{self, NbdError, NbdMedium, Uri, bitmap::QemuBitmap},
};

pub mod gpt;
mod in_use;
pub mod medium;
pub mod mounts;
pub mod qcow2;
pub mod sysfs;
pub mod view;

pub use self::medium::Stretch;
use self::{
    in_use::Use,
    medium::{FileMedium, Medium},
    qcow2::{Qcow2, Qcow2Error},
    view::ReadAt,
};

/// Why a disk can't be backed up.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Missing, or not permitted.
    #[error("{}: cannot be opened: {source}", path.display())]
    Open {
        /// Path of the disk.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("{}: is neither a block device nor an image file", path.display())]
    Kind {
        /// Path of the disk.
        path: PathBuf,
    },
    /// Empty, too large, or not in whole sectors.
    #[error("{}: has {size_bytes} bytes; a disk has a multiple of 512, at least 512 and at most 64 TiB", path.display())]
    Size {
        /// Path of the disk.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// Nothing on the disk says which one it is.
    #[error("{}: has neither a GPT disk GUID nor a serial number; name it in the settings: disks = [\"NAME={}\"]", path.display(), path.display())]
    Nameless {
        /// Path of the disk.
        path: PathBuf,
    },
    /// Two disks would be one.
    #[error("{} and {} both have the disk id {disk_id}; name one in the settings: disks = [\"NAME={}\"]", first.display(), second.display(), second.display())]
    Twice {
        /// The id.
        disk_id: DiskId,
        /// One disk.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Reading it now would mix different times.
    #[error("{}: is mounted writable at {mount}; unmount it, back up a snapshot of it, or set allow_live = true to accept a smeared copy", path.display())]
    Mounted {
        /// Path of the disk.
        path: PathBuf,
        /// Where it is mounted.
        mount: String,
    },
    /// Something may write to it that can't be seen from here.
    #[error("{}: {} is in use by something that isn't seen here, as a container, ZFS or an iSCSI target; stop that, back up a snapshot, or set allow_live = true to accept a smeared copy", path.display(), part.display())]
    InUse {
        /// Path of the disk.
        path: PathBuf,
        /// What of it.
        part: PathBuf,
    },
    /// The URI says nothing that can be reached.
    #[error("{}: {reason}", path.display())]
    Uri {
        /// As the settings have it.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The NBD export can't be had.
    #[error("{}: {source}", path.display())]
    Nbd {
        /// The export.
        path: PathBuf,
        /// Why.
        source: NbdError,
    },
    /// The qcow2 image can't be had.
    #[error("{}: {source}", path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// Why.
        source: Qcow2Error,
    },
    /// Nobody promises that an export stays as it is while it is read.
    #[error("{}: the export is writable, so it may change while it is read; export it read-only (qemu-nbd -r) or as a snapshot (QEMU: fleecing with blockdev-backup), or set allow_live = true to accept a smeared copy", path.display())]
    Writable {
        /// The export.
        path: PathBuf,
    },
    /// Its snapshot could not be read.
    #[error("{}: its snapshot {} cannot be read at offset {offset}: {source}; if the snapshot has overflowed, set snapshot_size larger", path.display(), snapshot.display())]
    Snapshot {
        /// Path of the disk.
        path: PathBuf,
        /// Device of its snapshot.
        snapshot: PathBuf,
        /// First unreadable byte, to one block.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The disk could not be read.
    #[error("{}: cannot be read at offset {offset}: {source}", path.display())]
    Read {
        /// Path of the disk.
        path: PathBuf,
        /// First unreadable byte, to one block.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// One disk, opened for reading. All methods may be called by several threads at once.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    backing: Backing,
    disk_id: DiskId,
    consistency: Consistency,
    /// Device that is read in its place.
    snapshot: Option<PathBuf>,
}

/// Where it is read from.
#[derive(Debug)]
enum Backing {
    File(FileMedium),
    Export(Box<Export>),
}

/// An NBD export, and the image behind it where that is ours to serve.
#[derive(Debug)]
struct Export {
    medium: NbdMedium,
    image: Option<Qcow2>,
    /// The dirty bitmap that began when it was frozen for this run.
    begun: Option<String>,
}

impl Source {
    /// Opens the disk that `spec` names, or the snapshot of it in its place. A disk that is mounted writable and has none is
    /// refused unless `allow_live`.
    ///
    /// # Errors
    /// When it is missing, has an unusable size, can't be identified, or is mounted.
    pub fn open(
        spec: &DiskSpec,
        snapshot: Option<&Still>,
        allow_live: bool,
    ) -> Result<Self, SourceError> {
        let path = spec.path.clone();
        let text = path.to_string_lossy();
        if nbd::uri::is_uri(&text) {
            return Self::open_nbd(spec, &text, allow_live);
        }
        if let Some(image) = text.strip_prefix(qcow2::SCHEME) {
            return Self::open_qcow2(spec, Path::new(image));
        }
        let file =
            open(&path).map_err(|source| SourceError::Open { path: path.clone(), source })?;
        let meta =
            file.metadata().map_err(|source| SourceError::Open { path: path.clone(), source })?;
        let device = meta.file_type().is_block_device();
        if !device && !meta.is_file() {
            return Err(SourceError::Kind { path });
        }
        let size_bytes = size_of(&file, device)
            .map_err(|source| SourceError::Open { path: path.clone(), source })?;
        check_size(&path, size_bytes)?;
        let sysfs = device.then(|| sysfs::Device::of(meta.rdev()));
        let consistency = match snapshot {
            Some(still) => still.consistency(),
            None => consistency(&path, sysfs.as_ref(), allow_live)?,
        };
        let sector_bytes =
            sysfs.as_ref().and_then(sysfs::Device::logical_sector_bytes).unwrap_or(512);
        let disk_id = id_of(spec, || own_id(&file, sector_bytes, sysfs.as_ref()))?;
        // The id is that of the disk itself: what a serial number says, its snapshot hasn't.
        let snapshot = snapshot.map(|still| still.device().to_owned());
        let file = match &snapshot {
            Some(snapshot) => {
                DirectFile::for_reading(open_snapshot(snapshot, size_bytes)?, snapshot)
            }
            None => DirectFile::for_reading(file, &path),
        };
        let medium = FileMedium::new(file, size_bytes, sector_bytes, device);
        Ok(Self { path, backing: Backing::File(medium), disk_id, consistency, snapshot })
    }

    fn open_nbd(spec: &DiskSpec, text: &str, allow_live: bool) -> Result<Self, SourceError> {
        let path = spec.path.clone();
        let uri =
            Uri::parse(text).map_err(|reason| SourceError::Uri { path: path.clone(), reason })?;
        let medium = NbdMedium::open(uri, nbd::Limits::default())
            .map_err(|source| SourceError::Nbd { path: path.clone(), source })?;
        let consistency = match (medium.is_read_only(), allow_live) {
            (true, _) => Consistency::Crash,
            (false, true) => {
                tracing::warn!(path = %path.display(), "the export is writable: parts may be from different times");
                Consistency::Smeared
            }
            (false, false) => return Err(SourceError::Writable { path }),
        };
        Self::of_export(spec, medium, None, consistency)
    }

    fn open_qcow2(spec: &DiskSpec, image: &Path) -> Result<Self, SourceError> {
        let (image, medium) = Qcow2::open(image)
            .map_err(|source| SourceError::Qcow2 { path: spec.path.clone(), source })?;
        Self::of_export(spec, medium, Some(image), Consistency::Crash)
    }

    fn of_export(
        spec: &DiskSpec,
        medium: NbdMedium,
        image: Option<Qcow2>,
        consistency: Consistency,
    ) -> Result<Self, SourceError> {
        let (path, size_bytes) = (spec.path.clone(), medium.size_bytes());
        check_size(&path, size_bytes)?;
        let disk_id = id_of(spec, || own_id(&Bytes(&medium), medium.sector_bytes(), None))?;
        let begun = image.as_ref().and_then(Qcow2::begun).map(str::to_owned);
        let export = Box::new(Export { medium, image, begun });
        Ok(Self { path, backing: Backing::Export(export), disk_id, consistency, snapshot: None })
    }

    /// Says that whoever freezes exports for this run was asked to begin a dirty bitmap of this name in each; see
    /// [`nbd::bitmap::new_name`].
    pub fn bitmap_begun(&mut self, name: &str) {
        if let Backing::Export(export) = &mut self.backing
            && export.image.is_none()
        {
            export.begun = Some(name.to_owned());
        }
    }

    /// The change journal of the disk as a whole, where it has one.
    pub fn journal(&self) -> Option<Box<dyn Journal + '_>> {
        let Backing::Export(export) = &self.backing else { return None };
        let Export { medium, image, begun } = &**export;
        let bad = image.as_ref().map(Qcow2::bad).unwrap_or_default();
        let is_there = begun.is_some() || !bad.is_empty() || medium.bitmaps().next().is_some();
        is_there.then(|| Box::new(QemuBitmap { medium, begun: begun.as_deref(), bad }) as _)
    }

    /// The run is committed, and the cache remembers it: what was kept for the case that it fails may go. The disk can't
    /// be read any more. Blocks.
    pub fn committed(&self) {
        if let Backing::Export(export) = &self.backing
            && let Some(image) = &export.image
        {
            image.committed();
        }
    }

    fn medium(&self) -> &dyn Medium {
        match &self.backing {
            Backing::File(medium) => medium,
            Backing::Export(export) => &export.medium,
        }
    }

    /// Opens all disks of a run.
    ///
    /// # Errors
    /// When one can't be opened, or two have the same id.
    pub fn open_all(
        specs: &[DiskSpec],
        snapshots: &Snapshots,
        may_live: impl Fn(&DiskSpec) -> bool,
    ) -> Result<Vec<Self>, SourceError> {
        let mut sources: Vec<Self> = Vec::with_capacity(specs.len());
        for spec in specs {
            let source = Self::open(spec, snapshots.of(&spec.path), may_live(spec))?;
            if let Some(other) = sources.iter().find(|other| other.disk_id == source.disk_id) {
                return Err(SourceError::Twice {
                    disk_id: source.disk_id,
                    first: other.path.clone(),
                    second: source.path,
                });
            }
            sources.push(source);
        }
        Ok(sources)
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// Names the first block that can't be read.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let Err(first) = self.medium().read_exact_at(buffer, offset) else { return Ok(()) };
        // A read of many blocks says only that one of them is bad: look for it.
        for (index, block) in buffer.chunks_mut(BLOCK_BYTES as usize).enumerate() {
            let offset = offset + index as u64 * BLOCK_BYTES;
            let read = self.medium().read_exact_at(block, offset);
            read.map_err(|source| self.unreadable(offset, source))?;
        }
        tracing::warn!(path = %self.path.display(), offset, error = %first, "a read failed once and then went through");
        Ok(())
    }

    fn unreadable(&self, offset: u64, source: io::Error) -> SourceError {
        let path = self.path.clone();
        match self.snapshot.clone() {
            Some(snapshot) => SourceError::Snapshot { path, snapshot, offset, source },
            None => SourceError::Read { path, offset, source },
        }
    }

    /// True when `range` can be read without waiting for a disk or a network, as far as is known.
    pub fn is_near(&self, range: Range<u64>) -> bool {
        self.medium().is_near(range)
    }

    /// The stretch that starts at `offset`: a hole or data, up to the end of the disk at most.
    pub fn stretch(&self, offset: u64) -> Stretch {
        self.medium().stretch(offset)
    }

    /// Its id: configured name, else GPT disk GUID, else serial number.
    pub fn disk_id(&self) -> &DiskId {
        &self.disk_id
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.medium().size_bytes()
    }

    /// Logical sector size: 512 or 4096.
    pub fn sector_bytes(&self) -> u32 {
        self.medium().sector_bytes()
    }

    /// How still it is held.
    pub fn consistency(&self) -> Consistency {
        self.consistency
    }
}

/// A medium, for those who read structures.
pub(crate) struct Bytes<'a>(pub(crate) &'a dyn Medium);

impl ReadAt for Bytes<'_> {
    fn len(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

/// Opens a file or device for reading, as it is now. A pipe without a writer would keep a plain open for ever; these don't mind.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    forget_cached(&file);
    Ok(file)
}

/// Opens a snapshot's device, which must be as large as the disk.
fn open_snapshot(path: &Path, size_bytes: u64) -> Result<File, SourceError> {
    let fails = |source| SourceError::Open { path: path.to_owned(), source };
    let file = open(path).map_err(fails)?;
    let size = size_of(&file, true).map_err(fails)?;
    if size != size_bytes {
        return Err(SourceError::Size { path: path.to_owned(), size_bytes: size });
    }
    Ok(file)
}

/// The id that a disk itself tells: its GPT's GUID, else the serial number of its device.
pub(crate) fn own_id(
    disk: &dyn ReadAt,
    sector_bytes: u32,
    device: Option<&sysfs::Device>,
) -> Option<DiskId> {
    gpt::disk_guid(disk, sector_bytes).or_else(|| device.and_then(sysfs::Device::serial))
}

/// The id that a disk is backed up under.
fn id_of(spec: &DiskSpec, own: impl FnOnce() -> Option<DiskId>) -> Result<DiskId, SourceError> {
    let nameless = || SourceError::Nameless { path: spec.path.clone() };
    spec.name.clone().or_else(own).ok_or_else(nameless)
}

fn check_size(path: &Path, size_bytes: u64) -> Result<(), SourceError> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(512) || size_bytes > MAX_DISK_BYTES {
        return Err(SourceError::Size { path: path.to_owned(), size_bytes });
    }
    Ok(())
}

/// Size of a file or block device.
///
/// # Errors
/// When the system doesn't tell.
pub fn size_of(file: &File, device: bool) -> io::Result<u64> {
    if device { Ok(rustix::fs::seek(file, SeekFrom::End(0))?) } else { Ok(file.metadata()?.len()) }
}

fn consistency(
    path: &Path,
    device: Option<&sysfs::Device>,
    allow_live: bool,
) -> Result<Consistency, SourceError> {
    // Nobody can tell whether a file is in use.
    let Some(device) = device else { return Ok(Consistency::Crash) };
    let refused = match in_use::of(path, device) {
        Use::Nobody => return Ok(Consistency::Frozen),
        Use::Perhaps => return Ok(Consistency::Crash),
        Use::Mounted(mount) => SourceError::Mounted { path: path.to_path_buf(), mount },
        Use::Unseen(part) => SourceError::InUse { path: path.to_path_buf(), part },
    };
    if !allow_live {
        return Err(refused);
    }
    tracing::warn!(path = %path.display(), why = %refused, "read all the same: parts will be from different times");
    Ok(Consistency::Smeared)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn image(size: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        (dir, path)
    }

    fn named(path: &Path) -> DiskSpec {
        DiskSpec { name: Some("d".parse().unwrap()), path: path.to_path_buf() }
    }

    #[test]
    fn holes_are_told_from_data() {
        let (_dir, path) = image(16 << 20);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[7; 4096], 8 << 20).unwrap();
        let source = Source::open(&named(&path), None, false).unwrap();
        let first = source.stretch(0);
        assert!(!first.hole || first.end == 8 << 20, "{first:?}");
        assert!(!source.stretch(8 << 20).hole);
        assert_eq!(source.consistency(), Consistency::Crash);
    }

    #[test]
    fn odd_sizes_and_nameless_disks_are_refused_with_the_way_out() {
        let (_dir, path) = image(1000);
        assert!(matches!(
            Source::open(&named(&path), None, false),
            Err(SourceError::Size { size_bytes: 1000, .. })
        ));
        let (_dir, path) = image(4096 + 512);
        let error = Source::open(&DiskSpec { name: None, path: path.clone() }, None, false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("disks = [\"NAME="), "{error}");
        assert!(Source::open(&named(&path), None, false).is_ok());
        let missing = Source::open(&named(Path::new("/nonexistent/disk")), None, false)
            .unwrap_err()
            .to_string();
        assert!(missing.starts_with("/nonexistent/disk: cannot be opened"), "{missing}");
    }

    #[test]
    fn two_disks_with_one_id_are_refused() {
        let (_dir, path) = image(4096);
        let error =
            Source::open_all(&[named(&path), named(&path)], &Snapshots::default(), |_| false)
                .unwrap_err();
        assert!(matches!(error, SourceError::Twice { .. }), "{error}");
    }

    #[test]
    fn a_source_that_shrinks_names_the_offset() {
        let (_dir, path) = image(1 << 20);
        let source = Source::open(&named(&path), None, false).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(8192).unwrap();
        let error = source.read_at(0, &mut vec![0; 65536]).unwrap_err();
        assert!(matches!(error, SourceError::Read { offset: 8192, .. }), "{error}");
    }
}
