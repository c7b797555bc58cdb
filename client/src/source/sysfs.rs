//! What Linux says about a block device under /sys/dev/block.

use std::{fs, path::PathBuf};

use janus_proto::ids::DiskId;

use crate::sources::Stillness;

/// A block device by number.
#[derive(Debug)]
pub struct Device {
    folder: PathBuf,
    number: String,
}

impl Device {
    /// The device with this number (`st_rdev`).
    pub fn of(rdev: u64) -> Self {
        let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
        Self { folder: PathBuf::from("/sys/dev/block").join(&number), number }
    }

    /// Numbers (`major:minor`) of this device, its partitions, and what is stacked on any of them (dm, md).
    pub fn family(&self) -> Vec<String> {
        let mut found = vec![self.number.clone()];
        collect(&self.folder, &mut found, 0);
        found
    }

    /// Its partition with this number, as the kernel has it.
    pub fn partition(&self, number: u32) -> Option<Self> {
        let inside = fs::read_dir(&self.folder).ok()?.flatten();
        let is_it = |entry: &fs::DirEntry| {
            let text = fs::read_to_string(entry.path().join("partition"));
            text.is_ok_and(|text| text.trim() == number.to_string())
        };
        let folder = inside.filter(is_it).map(|entry| entry.path()).next()?;
        let device = fs::read_to_string(folder.join("dev")).ok()?;
        Some(Self { number: device.trim().to_owned(), folder })
    }

    /// Snapshots that could be made of it.
    pub fn snapshots(&self) -> Option<Stillness> {
        if self.read("dm/uuid").is_some_and(|uuid| uuid.starts_with("LVM-")) {
            return Some(Stillness::LvmSnapshot);
        }
        let name = fs::canonicalize(&self.folder).ok()?;
        let is_zvol = name.file_name()?.to_str()?.starts_with("zd");
        is_zvol.then_some(Stillness::ZfsSnapshot)
    }

    /// A disk of hardware, or a partition of anything: never a volume of LVM or ZFS.
    pub fn is_hardware(&self) -> bool {
        ["device", "partition"].iter().any(|name| self.folder.join(name).exists())
    }

    /// Logical sector size, when it is one we can keep.
    pub fn logical_sector_bytes(&self) -> Option<u32> {
        let bytes = self
            .read("queue/logical_block_size")
            .or_else(|| self.read("../queue/logical_block_size"))?;
        bytes.parse().ok().filter(|bytes| [512, 4096].contains(bytes))
    }

    /// Serial number of a whole disk, made a name. Partitions have none of their own.
    pub fn serial(&self) -> Option<DiskId> {
        if self.folder.join("partition").exists() {
            return None;
        }
        let serial = self.read("device/serial").or_else(|| self.read("serial"))?;
        let name: String = serial
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' })
            .collect();
        name.trim_start_matches(['.', '-']).parse().ok()
    }

    fn read(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.folder.join(name)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }
}

/// Partitions are folders with a `dev` file; holders are links to devices stacked on this one.
fn collect(folder: &std::path::Path, found: &mut Vec<String>, depth: u32) {
    if depth > 8 {
        return;
    }
    let inside = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().join("partition").exists());
    let holders = fs::read_dir(folder.join("holders")).into_iter().flatten().flatten();
    for entry in inside.chain(holders) {
        let Ok(number) = fs::read_to_string(entry.path().join("dev")) else { continue };
        let number = number.trim().to_owned();
        if !found.contains(&number) {
            found.push(number);
            collect(&entry.path(), found, depth + 1);
        }
    }
}
