//! What the reader and the client say to each other: frames of a kind, a length and a content. Both are one program of one
//! version, so there is no .proto to keep.
//!
//! The client asks (`Open`, `List`, `Look`, `Read`) and then serves what the reader wants (`Want`, answered by `Bytes` or
//! `Refused`), until the reader has said `Done` or `Failed`. Before that come `Item`s of a list or of a look, or `Data` and `Reached` of a
//! read.

use std::io::{self, Read, Write};

use super::BrowseError;
use crate::fs::FileSystemKind;

/// The longest frame: a read of 1 MiB at once.
pub(super) const MAX_BYTES: u32 = 1 << 20;

/// Kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Tag {
    Open = b'o',
    List = b'l',
    Look = b'k',
    Read = b'r',
    Bytes = b'b',
    Refused = b'x',
    Want = b'w',
    Item = b'i',
    Data = b'd',
    Reached = b'z',
    Done = b'.',
    Failed = b'!',
}

impl Tag {
    fn parse(byte: u8) -> io::Result<Self> {
        const ALL: [Tag; 12] = [
            Tag::Open,
            Tag::List,
            Tag::Look,
            Tag::Read,
            Tag::Bytes,
            Tag::Refused,
            Tag::Want,
            Tag::Item,
            Tag::Data,
            Tag::Reached,
            Tag::Done,
            Tag::Failed,
        ];
        ALL.into_iter().find(|tag| *tag as u8 == byte).ok_or_else(|| wrong("an unknown frame"))
    }
}

pub(super) fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Writes a frame whose content is in pieces.
pub(super) fn write(to: &mut impl Write, tag: Tag, pieces: &[&[u8]]) -> io::Result<()> {
    let len: usize = pieces.iter().map(|piece| piece.len()).sum();
    let len = u32::try_from(len).ok().filter(|len| *len <= MAX_BYTES);
    let len = len.ok_or_else(|| wrong("a frame that is too long"))?;
    to.write_all(&[tag as u8])?;
    to.write_all(&len.to_le_bytes())?;
    pieces.iter().try_for_each(|piece| to.write_all(piece))
}

/// Reads a frame into `content`.
pub(super) fn read(from: &mut impl Read, content: &mut Vec<u8>) -> io::Result<Tag> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [tag, len @ ..] = head;
    let len = u32::from_le_bytes(len);
    if len > MAX_BYTES {
        return Err(wrong("a frame that is too long"));
    }
    content.resize(len as usize, 0);
    from.read_exact(content)?;
    Tag::parse(tag)
}

/// What is to be opened.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Open {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(uint64, tag = "2")]
    pub(super) volume_bytes: u64,
}

/// What the reader tells of an opened volume, in `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Opened {
    /// More folders than this there can't be; 0: not known.
    #[prost(uint64, tag = "1")]
    pub(super) most_folders: u64,
    #[prost(string, tag = "2")]
    pub(super) label: String,
}

/// What is to be read.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Wanted {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) path: Vec<u8>,
    /// Empty: the content.
    #[prost(string, tag = "2")]
    pub(super) stream: String,
    #[prost(uint64, tag = "3")]
    pub(super) offset: u64,
    #[prost(uint64, tag = "4")]
    pub(super) len: u64,
}

/// An error on its way.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Failed {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(string, tag = "2")]
    what: String,
}

impl From<BrowseError> for Failed {
    fn from(error: BrowseError) -> Self {
        let (kind, what) = match error {
            BrowseError::Unknown { path } => (1, path),
            BrowseError::Kind { what } => (2, what),
            BrowseError::Unsupported { what } => (3, what),
            BrowseError::Damaged { what } => (4, what),
            BrowseError::Read { what } => (5, what),
            BrowseError::Ended { what } | BrowseError::Start { what } => (6, what),
        };
        Self { kind, what }
    }
}

impl From<Failed> for BrowseError {
    fn from(Failed { kind, what }: Failed) -> Self {
        match kind {
            1 => Self::Unknown { path: what },
            2 => Self::Kind { what },
            3 => Self::Unsupported { what },
            4 => Self::Damaged { what },
            5 => Self::Read { what },
            _ => Self::Ended { what },
        }
    }
}

const KINDS: [(&str, FileSystemKind); 7] = [
    ("ext2", FileSystemKind::Ext2),
    ("ext3", FileSystemKind::Ext3),
    ("ext4", FileSystemKind::Ext4),
    ("xfs", FileSystemKind::Xfs),
    ("btrfs", FileSystemKind::Btrfs),
    ("ntfs", FileSystemKind::Ntfs),
    ("fat", FileSystemKind::Fat),
];

/// The name of a kind that can be read here.
pub(super) fn name_of(kind: FileSystemKind) -> Option<&'static str> {
    KINDS.into_iter().find(|(_, known)| *known == kind).map(|(name, _)| name)
}

/// The kind that has this name.
pub(super) fn kind_of(name: &str) -> Option<FileSystemKind> {
    KINDS.into_iter().find(|(known, _)| *known == name).map(|(_, kind)| kind)
}
