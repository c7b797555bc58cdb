//! Network file systems, which servers must not share.

use std::{io, path::Path};

/// Kind of the network file system that holds `path`, or will when it is made; `None`: a local one, as far as can be told.
///
/// # Errors
/// As the file system says.
pub fn network_file_system(path: &Path) -> io::Result<Option<&'static str>> {
    let absolute = std::path::absolute(path)?;
    let existing = absolute.ancestors().find(|folder| folder.exists()).unwrap_or(&absolute);
    // The type is of another width and sign on each architecture; the numbers have 32 bits.
    Ok(network_kind(rustix::fs::statfs(existing)?.f_type as u32))
}

/// By the numbers of `linux/magic.h` and statfs(2).
fn network_kind(magic: u32) -> Option<&'static str> {
    Some(match magic {
        0x0000_6969 => "NFS",
        0x0000_517B | 0xFF53_4D42 | 0xFE53_4D42 => "SMB",
        0x00C3_6400 => "Ceph",
        0x5346_414F | 0x6B41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x0102_1997 => "9P",
        0x4750_4653 => "GPFS",
        0x0BD0_0BD0 => "Lustre",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_told_from_local_ones() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("not/there/yet");
        assert_eq!(network_file_system(&missing).unwrap(), None);
        assert_eq!((network_kind(0x6969), network_kind(0xFF53_4D42)), (Some("NFS"), Some("SMB")));
        assert_eq!(network_kind(0xEF53), None, "ext4");
    }
}
