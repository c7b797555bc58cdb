//! Which devices are mounted writable (proc_pid_mountinfo(5)).

use std::{fs, os::unix::fs::MetadataExt};

/// Where one of these devices (`major:minor`) is mounted writable.
pub fn writable_mount(devices: &[String]) -> Option<String> {
    lines(&mountinfo()?).find(|one| one.is_writable && one.is_of(devices)).map(|one| one.folder)
}

/// Where one of these devices is mounted at all.
pub fn any_mount(devices: &[String]) -> Option<String> {
    lines(&mountinfo()?).find(|one| one.is_of(devices)).map(|one| one.folder)
}

/// A file system that can be written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writable {
    number: String,
    /// Its mounts by id and folder; a folder may be hidden by another mount.
    pub mounts: Vec<(u64, String)>,
    /// It is on the first of the devices itself, not on one that is a part of it or stacked on it.
    pub is_direct: bool,
}

/// File systems on these devices that can be written to, in the order in which they were mounted.
pub fn writable(devices: &[String]) -> Vec<Writable> {
    mountinfo().map_or_else(Vec::new, |text| writable_in(&text, devices))
}

fn writable_in(mountinfo: &str, devices: &[String]) -> Vec<Writable> {
    let mut found: Vec<Writable> = Vec::new();
    for one in lines(mountinfo).filter(|one| one.is_writable && one.is_of(devices)) {
        let mount = (one.id, one.folder.clone());
        match found.iter_mut().find(|known| known.number == one.number) {
            Some(known) => known.mounts.push(mount),
            None => {
                let is_direct = one.is_of(&devices[..1]);
                found.push(Writable {
                    number: one.number.to_owned(),
                    mounts: vec![mount],
                    is_direct,
                });
            }
        }
    }
    found
}

fn mountinfo() -> Option<String> {
    fs::read_to_string("/proc/self/mountinfo").ok()
}

struct Line<'a> {
    id: u64,
    number: &'a str,
    folder: String,
    source: &'a str,
    /// The file system is, whatever this mount of it is.
    is_writable: bool,
}

fn lines(mountinfo: &str) -> impl Iterator<Item = Line<'_>> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        Some(Line {
            id: left.first()?.parse().ok()?,
            number: left.get(2)?,
            folder: unescape(left.get(4)?),
            source: right.get(1)?,
            is_writable: right.get(2)?.split(',').any(|option| option == "rw"),
        })
    })
}

impl Line<'_> {
    fn is_of(&self, devices: &[String]) -> bool {
        // btrfs mounts have a number of their own; their source names a device.
        devices.iter().any(|device| device == self.number) || device_number(self.source, devices)
    }
}

/// Blanks, tabs, line ends and backslashes are octal there.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

fn device_number(source: &str, devices: &[String]) -> bool {
    if !source.starts_with("/dev/") {
        return false;
    }
    let Ok(meta) = fs::metadata(source) else { return false };
    let number = format!("{}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    devices.contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/nosuch1 rw,errors=remount-ro
40 22 8:17 / /mnt/my\\040data ro,relatime - ext4 /dev/nosuch2 rw
41 22 8:33 / /iso ro,relatime - iso9660 /dev/nosuch3 ro";

    #[test]
    fn the_superblock_decides_whether_a_mount_is_writable() {
        let find = |device: &str, writable: bool| {
            let devices = [device.to_owned()];
            lines(INFO)
                .find(|one| (one.is_writable || !writable) && one.is_of(&devices))
                .map(|one| one.folder)
        };
        assert_eq!(find("8:1", true).as_deref(), Some("/"));
        // Mounted read-only here, but the file system itself is writable elsewhere.
        assert_eq!(find("8:17", true).as_deref(), Some("/mnt/my data"));
        assert_eq!(find("8:33", true), None);
        assert_eq!(find("8:33", false).as_deref(), Some("/iso"));
        assert_eq!(find("8:99", false), None);
    }

    #[test]
    fn a_file_system_that_is_mounted_twice_is_one() {
        let info = "\
22 1 253:0 / / rw - ext4 /dev/nosuch1 rw
23 22 253:2 / /home rw - xfs /dev/nosuch2 rw
24 22 253:0 /var /srv/a\\134b ro - ext4 /dev/nosuch1 rw
25 22 253:3 / /old ro - ext4 /dev/nosuch3 ro";
        let devices = ["253:0", "253:2", "253:3"].map(str::to_owned);
        let found = writable_in(info, &devices);
        let [root, home] = &*found else { panic!("{found:?}") };
        assert_eq!(root.mounts, [(22, "/".to_owned()), (24, "/srv/a\\b".to_owned())]);
        assert_eq!((root.is_direct, home.is_direct), (true, false));
    }
}
