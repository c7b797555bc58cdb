//! Which devices are mounted writable (proc_pid_mountinfo(5)).

use std::{fs, os::unix::fs::MetadataExt};

/// Where one of these devices (`major:minor`) is mounted writable.
pub fn writable_mount(devices: &[String]) -> Option<String> {
    find(&fs::read_to_string("/proc/self/mountinfo").ok()?, devices, true)
}

/// Where one of these devices is mounted at all.
pub fn any_mount(devices: &[String]) -> Option<String> {
    find(&fs::read_to_string("/proc/self/mountinfo").ok()?, devices, false)
}

fn find(mountinfo: &str, devices: &[String], writable: bool) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        let (number, mount) = (*left.get(2)?, *left.get(4)?);
        // btrfs mounts have a number of their own; their source names a device.
        let known =
            devices.iter().any(|device| device == number) || device_number(right.get(1)?, devices);
        let fits = !writable || right.get(2)?.split(',').any(|option| option == "rw");
        (known && fits).then(|| mount.replace("\\040", " "))
    })
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
        let find = |device: &str, writable| find(INFO, &[device.to_owned()], writable);
        assert_eq!(find("8:1", true).as_deref(), Some("/"));
        // Mounted read-only here, but the file system itself is writable elsewhere.
        assert_eq!(find("8:17", true).as_deref(), Some("/mnt/my data"));
        assert_eq!(find("8:33", true), None);
        assert_eq!(find("8:33", false).as_deref(), Some("/iso"));
        assert_eq!(find("8:99", false), None);
    }
}
