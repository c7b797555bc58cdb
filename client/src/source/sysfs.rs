//! What Linux says about a block device under /sys/dev/block.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use janus_proto::ids::DiskId;

use crate::sources::Stillness;

/// Devices on devices on devices: as deep as is looked.
const MAX_DEPTH: u32 = 8;

/// A block device by number.
#[derive(Debug, Clone)]
pub struct Device {
    folder: PathBuf,
    number: String,
}

impl Device {
    /// The device with this number (`st_rdev`).
    pub fn of(rdev: u64) -> Self {
        let number = number(rdev);
        Self { folder: PathBuf::from("/sys/dev/block").join(&number), number }
    }

    /// `major:minor`.
    pub fn number(&self) -> &str {
        &self.number
    }

    /// Its file below /dev.
    pub fn node(&self) -> Option<PathBuf> {
        let folder = fs::canonicalize(&self.folder).ok()?;
        // `cciss/c0d0` is a folder named `cciss!c0d0` there.
        let node = Path::new("/dev").join(folder.file_name()?.to_str()?.replace('!', "/"));
        let is_it = fs::metadata(&node).is_ok_and(|meta| number(meta.rdev()) == self.number);
        is_it.then_some(node)
    }

    /// Numbers of this device, its partitions, what is stacked on any of them (dm, md), and what shares a btrfs with one.
    pub fn family(&self) -> Vec<String> {
        let mut found = vec![self.number.clone()];
        collect(self, &mut found, 0);
        add_members(&mut found);
        found
    }

    /// Numbers of this device and of those that share a btrfs with it.
    pub fn with_members(&self) -> Vec<String> {
        let mut found = vec![self.number.clone()];
        add_members(&mut found);
        found
    }

    /// What somebody may own by itself: what is stacked on this device, else its partitions, else itself.
    pub fn leaves(&self) -> Vec<Self> {
        let mut found = Vec::new();
        leaves(self.clone(), &mut found, 0);
        found
    }

    fn child(entry: &fs::DirEntry) -> Option<Self> {
        let folder = entry.path();
        let number = fs::read_to_string(folder.join("dev")).ok()?;
        Some(Self { number: number.trim().to_owned(), folder })
    }

    fn partitions(&self) -> Vec<Self> {
        let inside = entries(&self.folder);
        let is_one = |entry: &fs::DirEntry| entry.path().join("partition").exists();
        inside.filter(is_one).filter_map(|entry| Self::child(&entry)).collect()
    }

    /// Devices stacked on this one.
    fn holders(&self) -> Vec<Self> {
        entries(&self.folder.join("holders")).filter_map(|entry| Self::child(&entry)).collect()
    }

    /// Its partition with this number, as the kernel has it.
    pub fn partition(&self, number: u32) -> Option<Self> {
        let is_it =
            |one: &Self| one.read("partition").is_some_and(|text| text == number.to_string());
        self.partitions().into_iter().find(is_it)
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

/// `major:minor` of a device.
pub fn number(rdev: u64) -> String {
    format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

fn entries(folder: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(folder).into_iter().flatten().flatten()
}

fn collect(device: &Device, found: &mut Vec<String>, depth: u32) {
    if depth > MAX_DEPTH {
        return;
    }
    for child in device.partitions().into_iter().chain(device.holders()) {
        if !found.contains(&child.number) {
            found.push(child.number.clone());
            collect(&child, found, depth + 1);
        }
    }
}

fn leaves(device: Device, found: &mut Vec<Device>, depth: u32) {
    let stacked = device.holders();
    let below = if stacked.is_empty() { device.partitions() } else { stacked };
    if below.is_empty() || depth > MAX_DEPTH {
        return found.push(device);
    }
    below.into_iter().for_each(|below| leaves(below, found, depth + 1));
}

/// Adds what shares a btrfs with one of these: only one of its devices is named where it is mounted.
fn add_members(numbers: &mut Vec<String>) {
    for system in entries(Path::new("/sys/fs/btrfs")) {
        let members: Vec<String> = entries(&system.path().join("devices"))
            .filter_map(|entry| Device::child(&entry))
            .map(|device| device.number)
            .collect();
        if members.iter().any(|member| numbers.contains(member)) {
            numbers.extend(
                members.into_iter().filter(|member| !numbers.contains(member)).collect::<Vec<_>>(),
            );
        }
    }
}
