//! An NTFS image and the process that changes it as a driver would.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use janus_client::journal::{Journal, ntfs_usn::NtfsUsn};
use janus_proto::ranges::Ranges;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::Value;
use xtask::ntfs;

/// libntfs in a process of its own.
pub struct Library(ntfs::Library);

/// What it says after changes.
pub struct Changed {
    /// One for each operation.
    pub answers: Vec<Value>,
    bitmap: Vec<u8>,
}

impl Changed {
    /// What `$Bitmap` says.
    pub fn is_used(&self, cluster: u64) -> bool {
        self.bitmap[(cluster / 8) as usize] >> (cluster % 8) & 1 == 1
    }
}

impl Library {
    pub fn start() -> Self {
        Self(ntfs::Library::start().unwrap())
    }

    /// Mounts, changes and unmounts; `clean`: the log is left closed.
    pub fn change(&mut self, volume: &mut Volume, operations: Vec<Value>, clean: bool) -> Changed {
        volume.lsn += 100;
        let log = (volume.lsn, clean);
        let changed = self.0.change(volume.path(), volume.clusters(), &operations, log).unwrap();
        Changed { bitmap: hex::decode(changed.bitmap).unwrap(), answers: changed.answers }
    }
}

/// An image file.
pub struct Volume {
    _folder: tempfile::TempDir,
    path: PathBuf,
    cluster_bytes: u64,
    /// Of its log.
    pub lsn: u64,
}

impl Volume {
    pub fn new(mib: u64, cluster_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        ntfs::format(&path, mib << 20, cluster_bytes).unwrap();
        Self { _folder: folder, path, cluster_bytes, lsn: 1 << 20 }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    pub fn put_back(&self, bytes: &[u8]) {
        fs::write(&self.path, bytes).unwrap();
    }

    pub fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// Whole clusters; the last sector is the boot sector's copy.
    pub fn clusters(&self) -> u64 {
        (self.file().metadata().unwrap().len() - 512) / self.cluster_bytes
    }

    pub fn fill(&self, ranges: &Ranges, byte: u8) {
        for range in ranges.iter() {
            let bytes = vec![byte; (range.end - range.start) as usize];
            self.file().write_all_at(&bytes, range.start).unwrap();
        }
    }

    /// Empties the log, as ntfs-3g does when it mounts.
    pub fn empty_log(&self) {
        let bytes = self.bytes();
        let at = bytes.chunks(512).position(|sector| sector.starts_with(b"RSTR")).unwrap() * 512;
        self.file().write_all_at(&[0xFF; 8192], at as u64).unwrap();
    }

    /// Files of the root folder with their contents, by another reader.
    pub fn contents(&self) -> Vec<(String, Vec<u8>)> {
        let list = Command::new("ntfsls").arg(&self.path).output().unwrap();
        assert!(list.status.success(), "{list:?}");
        let names = String::from_utf8(list.stdout).unwrap();
        let read = |name: &str| {
            let content = Command::new("ntfscat").arg(&self.path).arg(name).output().unwrap();
            assert!(content.status.success(), "{name}: {content:?}");
            (name.to_owned(), content.stdout)
        };
        names.lines().filter(|name| name.starts_with('f')).map(read).collect()
    }
}

/// Flips some bytes of structures; says what came of it. Panics and hangs are the failures looked for.
pub fn mutated(image: &[u8], cursor: &[u8], seed: u64) -> &'static str {
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut image, mut cursor) = (image.to_vec(), cursor.to_vec());
    // Places of structures: all sectors that aren't empty, the first ones above all.
    let sectors: Vec<usize> = (0..image.len() / 512)
        .filter(|sector| image[sector * 512..][..512].iter().any(|byte| *byte != 0))
        .collect();
    for _ in 0..random.random_range(1..4) {
        let sector = match random.random_bool(0.3) {
            true => 0,
            false => sectors[random.random_range(0..sectors.len().min(600))],
        };
        let at = sector * 512 + random.random_range(0..512);
        image[at] = match random.random_range(0..4) {
            0 => 0,
            1 => 0xFF,
            2 => image[at] ^ 1 << random.random_range(0..8),
            _ => random.random(),
        };
    }
    if random.random_bool(0.2) {
        let at = random.random_range(0..cursor.len());
        cursor[at] = random.random();
    }
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&image, 0).unwrap();
    let free = janus_client::fs::ntfs::free(&file).is_ok();
    let answer = NtfsUsn::new(&file).changes(Some(&cursor));
    match (free, answer.changes.is_ok()) {
        (true, true) => "both answer",
        (true, false) => "free space only",
        (false, true) => "journal only",
        (false, false) => "neither answers",
    }
}
