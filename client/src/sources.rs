//! What this machine has that could be backed up. Only reads, opens nothing that isn't a disk, and needs no server. A qcow2
//! image is looked into as a backup does, by a `qemu-nbd`, but without a dirty bitmap.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use crate::{
    config::DiskSpec,
    fs::FileSystemKind,
    journal::JournalKind,
    nbd::{self, NbdMedium},
    source::{
        self, Bytes,
        medium::Medium,
        mounts,
        qcow2::{self, Qcow2},
        sysfs,
    },
    volume::{self, TableKind, Volume},
};

/// Where a device is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The folder.
    pub path: String,
    /// The file system may be written to.
    pub is_writable: bool,
}

/// How a disk or volume can be held still while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stillness {
    /// Nobody writes to it: it is not mounted, or an image file that is held still by whoever owns it.
    Unmounted,
    /// It is mounted read-only.
    ReadOnly,
    /// By a snapshot of LVM.
    LvmSnapshot,
    /// By a snapshot of ZFS.
    ZfsSnapshot,
    /// Not at all: unmount it, or accept a smeared copy.
    None,
}

impl Stillness {
    /// As a word of the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unmounted => "unmounted",
            Self::ReadOnly => "read-only",
            Self::LvmSnapshot => "LVM snapshot",
            Self::ZfsSnapshot => "ZFS snapshot",
            Self::None => "no (allow_live)",
        }
    }
}

/// A volume of a disk.
#[derive(Debug)]
pub struct VolumeFound {
    /// What it is.
    pub volume: Volume,
    /// Where it is mounted.
    pub mount: Option<Mount>,
    /// The change journal that it can have.
    pub journal: Option<JournalKind>,
}

/// A disk, or an image file of the settings.
#[derive(Debug)]
pub struct DiskFound {
    /// Where it is.
    pub path: PathBuf,
    /// Its id: as the settings name it, else its GPT disk GUID, else its serial number.
    pub disk_id: Option<String>,
    /// The settings name it.
    pub is_configured: bool,
    /// Its size.
    pub size_bytes: u64,
    /// Where it, a part of it, or what is stacked on it is mounted.
    pub mount: Option<Mount>,
    /// How it can be held still; `None`: it is not there.
    pub stillness: Option<Stillness>,
    /// The change journal of the disk as a whole.
    pub journal: Option<JournalKind>,
    /// Its table and volumes, or why they can't be told.
    pub layout: Result<(TableKind, Vec<VolumeFound>), String>,
}

impl DiskFound {
    /// What to write into the setting `disks`.
    pub fn setting(&self) -> String {
        let id = self.disk_id.as_deref().unwrap_or("NAME");
        format!("disks = [\"{id}={}\"]", self.path.display())
    }
}

/// Disks of this machine, then those of the settings that are not among them.
pub fn find(configured: &[DiskSpec]) -> Vec<DiskFound> {
    let mut paths: Vec<_> = block_devices();
    for spec in configured {
        if !paths.contains(&spec.path) {
            paths.push(spec.path.clone());
        }
    }
    paths.iter().map(|path| look_at(path, configured)).collect()
}

/// Devices with something in them, but for memory and what only shows a file.
fn block_devices() -> Vec<PathBuf> {
    let names = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut names: Vec<_> =
        names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| {
        !["loop", "ram", "zram", "sr", "fd"].iter().any(|kind| is_numbered(name, kind))
    });
    names.retain(|name| {
        let size = fs::read_to_string(format!("/sys/block/{name}/size")).unwrap_or_default();
        size.trim().parse::<u64>().is_ok_and(|sectors| sectors > 0)
    });
    names.sort();
    names.iter().map(|name| device_path(name)).collect()
}

fn is_numbered(name: &str, kind: &str) -> bool {
    name.strip_prefix(kind).is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Volumes of LVM by their lasting names.
fn device_path(name: &str) -> PathBuf {
    match fs::read_to_string(format!("/sys/block/{name}/dm/name")) {
        Ok(lasting) => Path::new("/dev/mapper").join(lasting.trim()),
        Err(_) => Path::new("/dev").join(name.replace('!', "/")),
    }
}

fn look_at(path: &Path, configured: &[DiskSpec]) -> DiskFound {
    let spec = configured.iter().find(|spec| spec.path == path);
    let named = spec.and_then(|spec| spec.name.as_ref()).map(ToString::to_string);
    let mut found = DiskFound {
        path: path.to_owned(),
        disk_id: named,
        is_configured: spec.is_some(),
        size_bytes: 0,
        mount: None,
        stillness: None,
        journal: None,
        layout: Ok((TableKind::None, Vec::new())),
    };
    let text = path.to_string_lossy();
    if nbd::uri::is_uri(&text) {
        if let Err(error) = look_into_export(&mut found, &text) {
            found.layout = Err(error);
        }
        return found;
    }
    if let Some(image) = text.strip_prefix(qcow2::SCHEME) {
        if let Err(error) = look_into_qcow2(&mut found, Path::new(image)) {
            found.layout = Err(error);
        }
        return found;
    }
    if let Err(error) = look_into(&mut found) {
        found.layout = Err(format!("cannot be opened: {error}"));
    }
    found
}

fn look_into(found: &mut DiskFound) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(&found.path)?;
    let is_device = meta.file_type().is_block_device();
    if !is_device && !meta.is_file() {
        return Err(io::Error::other("neither a block device nor an image file"));
    }
    let device = is_device.then(|| sysfs::Device::of(meta.rdev()));
    found.mount = device.as_ref().and_then(|device| mount_of(&device.family()));
    let snapshots = device.as_ref().and_then(sysfs::Device::snapshots);
    found.stillness = Some(stillness(found.mount.as_ref(), snapshots));
    let file = source::open(&found.path)?;
    found.size_bytes = source::size_of(&file, is_device)?;
    let sector = device.as_ref().and_then(sysfs::Device::logical_sector_bytes).unwrap_or(512);
    if found.disk_id.is_none() {
        found.disk_id = source::own_id(&file, sector, device.as_ref()).map(|id| id.to_string());
    }
    found.layout = match volume::layout(&file, sector) {
        Ok(layout) => {
            let volumes = layout.volumes.into_iter();
            let volumes = volumes.map(|volume| volume_found(volume, device.as_ref()));
            Ok((layout.table, volumes.collect()))
        }
        Err(error) => Err(error.to_string()),
    };
    Ok(())
}

/// An NBD export: whoever serves it holds it still, or doesn't.
fn look_into_export(found: &mut DiskFound, text: &str) -> Result<(), String> {
    let uri = nbd::Uri::parse(text)?;
    let medium = NbdMedium::open(uri, nbd::Limits::default()).map_err(|error| error.to_string())?;
    let stillness = if medium.is_read_only() { Stillness::ReadOnly } else { Stillness::None };
    found.stillness = Some(stillness);
    found.journal = medium.bitmaps().next().map(|_| JournalKind::QemuBitmap);
    look_into_medium(found, &medium)
}

/// An image that no machine uses, as a backup would read it.
fn look_into_qcow2(found: &mut DiskFound, image: &Path) -> Result<(), String> {
    let (_served, medium, keeps_bitmap) = Qcow2::look(image).map_err(|error| error.to_string())?;
    found.stillness = Some(Stillness::Unmounted);
    found.journal = keeps_bitmap.then_some(JournalKind::QemuBitmap);
    look_into_medium(found, &medium)
}

fn look_into_medium(found: &mut DiskFound, medium: &NbdMedium) -> Result<(), String> {
    found.size_bytes = medium.size_bytes();
    let bytes = Bytes(medium);
    if found.disk_id.is_none() {
        let id = source::own_id(&bytes, medium.sector_bytes(), None);
        found.disk_id = id.map(|id| id.to_string());
    }
    let layout =
        volume::layout(&bytes, medium.sector_bytes()).map_err(|error| error.to_string())?;
    let volumes = layout.volumes.into_iter().map(|volume| volume_found(volume, None));
    found.layout = Ok((layout.table, volumes.collect()));
    Ok(())
}

fn volume_found(volume: Volume, disk: Option<&sysfs::Device>) -> VolumeFound {
    let family = match (disk, volume.number) {
        (None, _) => Vec::new(),
        (Some(disk), 0) => disk.family(),
        (Some(disk), number) => disk.partition(number).map_or_else(Vec::new, |p| p.family()),
    };
    let journal =
        (volume.file_system == Some(FileSystemKind::Ntfs)).then_some(JournalKind::NtfsUsn);
    VolumeFound { mount: mount_of(&family), volume, journal }
}

fn mount_of(family: &[String]) -> Option<Mount> {
    if let Some(path) = mounts::writable_mount(family) {
        return Some(Mount { path, is_writable: true });
    }
    mounts::any_mount(family).map(|path| Mount { path, is_writable: false })
}

fn stillness(mount: Option<&Mount>, snapshots: Option<Stillness>) -> Stillness {
    match mount {
        None => Stillness::Unmounted,
        Some(mount) if !mount.is_writable => Stillness::ReadOnly,
        Some(_) => snapshots.unwrap_or(Stillness::None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_mounted_writable_needs_a_snapshot() {
        let mount = |is_writable| Mount { path: "/".into(), is_writable };
        let lvm = Some(Stillness::LvmSnapshot);
        assert_eq!(stillness(None, lvm), Stillness::Unmounted);
        assert_eq!(stillness(Some(&mount(false)), lvm), Stillness::ReadOnly);
        assert_eq!(stillness(Some(&mount(true)), lvm), Stillness::LvmSnapshot);
        assert_eq!(stillness(Some(&mount(true)), None), Stillness::None);
    }

    #[test]
    fn an_image_of_the_settings_is_listed_and_a_missing_one_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        let mut bytes = vec![0; 1 << 20];
        bytes[3..11].copy_from_slice(b"NTFS    ");
        fs::write(&image, bytes).unwrap();
        let spec = |name: &str, path: &Path| DiskSpec {
            name: Some(name.parse().unwrap()),
            path: path.to_owned(),
        };
        let missing = folder.path().join("missing");
        let found = find(&[spec("one", &image), spec("two", &missing)]);
        let [.., image, missing] = &*found else { panic!("{found:?}") };
        assert!(image.is_configured && image.stillness == Some(Stillness::Unmounted));
        let (table, volumes) = image.layout.as_ref().unwrap();
        assert_eq!((*table, volumes.len()), (TableKind::None, 1));
        assert_eq!(volumes[0].journal, Some(JournalKind::NtfsUsn));
        assert!(image.setting().starts_with("disks = [\"one=/"), "{}", image.setting());
        assert!(missing.layout.as_ref().unwrap_err().contains("cannot be opened"));
    }
}
