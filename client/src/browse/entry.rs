//! What is known of a file, as it travels from the reader.

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Something else, or nothing that could be read.
    Unknown = 0,
    /// A file.
    File = 1,
    /// A folder.
    Folder = 2,
    /// A symbolic link, or a junction of Windows.
    Link = 3,
    /// A device.
    Device = 4,
    /// A pipe.
    Pipe = 5,
    /// A socket.
    Socket = 6,
}

impl Kind {
    /// From the mode that Unix keeps.
    pub(super) fn of_mode(mode: u32) -> Self {
        match mode & 0o170_000 {
            0o100_000 => Self::File,
            0o040_000 => Self::Folder,
            0o120_000 => Self::Link,
            0o020_000 | 0o060_000 => Self::Device,
            0o010_000 => Self::Pipe,
            0o140_000 => Self::Socket,
            _ => Self::Unknown,
        }
    }

    /// How messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::File => "file",
            Self::Folder => "folder",
            Self::Link => "link",
            Self::Device => "device",
            Self::Pipe => "pipe",
            Self::Socket => "socket",
        }
    }
}

/// A name in a folder, and what is known of its file. What a file system doesn't keep is `None`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Entry {
    /// Its name, as bytes; NTFS and FAT names are UTF-8.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// What it is.
    #[prost(enumeration = "Kind", tag = "2")]
    pub kind: i32,
    /// Bytes of a file.
    #[prost(uint64, tag = "3")]
    pub size_bytes: u64,
    /// Bytes that it takes up.
    #[prost(uint64, optional, tag = "4")]
    pub allocated_bytes: Option<u64>,
    /// When its content changed: seconds since 1970, UTC.
    #[prost(int64, optional, tag = "5")]
    pub modified_seconds: Option<i64>,
    /// Parts of a second beside that.
    #[prost(uint32, tag = "6")]
    pub modified_nanos: u32,
    /// Permissions as Unix has them, 12 bits.
    #[prost(uint32, optional, tag = "7")]
    pub mode: Option<u32>,
    /// Owner.
    #[prost(uint32, optional, tag = "8")]
    pub uid: Option<u32>,
    /// Its group.
    #[prost(uint32, optional, tag = "9")]
    pub gid: Option<u32>,
    /// Number of its file; two names with the same one, and the same `tree`, are the same file. 0: not known.
    #[prost(uint64, tag = "10")]
    pub number: u64,
    /// Of several trees of files on a volume, the one that its number counts in.
    #[prost(uint64, tag = "11")]
    pub tree: u64,
    /// Names that the file has; 0: not known.
    #[prost(uint32, tag = "12")]
    pub names: u32,
    /// Where a link leads.
    #[prost(bytes = "vec", tag = "13")]
    pub target: Vec<u8>,
    /// More streams of NTFS.
    #[prost(message, repeated, tag = "14")]
    pub streams: Vec<Stream>,
    /// Attributes of Windows, as letters: R read-only, H hidden, S system, A archive, C compressed, E encrypted, P sparse.
    #[prost(string, tag = "15")]
    pub attributes: String,
    /// Why nothing more is known; empty: it is.
    #[prost(string, tag = "16")]
    pub problem: String,
}

/// A stream of a file beside its content.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stream {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its bytes.
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
}

impl Entry {
    /// A name of which nothing more could be read.
    pub(super) fn unreadable(name: &[u8], problem: impl ToString) -> Self {
        Self { name: name.to_vec(), problem: problem.to_string(), ..Self::default() }
    }

    /// What tells its file from others of the volume; `None` where nothing does.
    pub fn id(&self) -> Option<(u64, u64)> {
        (self.number != 0).then_some((self.tree, self.number))
    }
}

/// Why a name can't be one of a file; an attacker's would lead elsewhere.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" => Err("it has no name"),
        b"." | b".." => Err("its name means another folder"),
        name if name.contains(&b'/') => Err("its name has a slash"),
        name if name.contains(&0) => Err("its name has a zero byte"),
        // 255 UTF-16 units of NTFS may be more, and are then no name here.
        name if name.len() > 255 * 3 => Err("its name is too long"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_none() {
        for name in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0b", &[b'x'; 800]] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for name in
            [&b"a"[..], b"...", b"..a", b"a b", b"\xff", "日本".as_bytes(), b"a\\b", b"a\nb"]
        {
            assert_eq!(check_name(name), Ok(()), "{name:?}");
        }
    }
}
