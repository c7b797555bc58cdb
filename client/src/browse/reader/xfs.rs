//! XFS by `lamxfs`, which replays the log in memory.
//!
//! It tells neither times nor owners: these are taken from the inode as it stands on the disk, which the library has just
//! read. Where the log holds a newer one (a volume that was not unmounted) the two are compared, and where they differ in mode or size
//! nothing more is told of that file: wrong owners would be worse.

use std::rc::Rc;

use lamxfs::{EntryKind, Error, Inode, Metadata, Path, Xfs};

use super::{
    super::{BrowseError, Entry, Kind},
    blocks::Blocks,
    raw_leaf::Watched,
    tree::{Each, FileSystem, Handle, Node, Place, Result},
};
use crate::fs::Head;

const BIGTIME: u64 = 1 << 3;
/// Of `bigtime`, nanoseconds count from here.
const BIGTIME_EPOCH: i64 = 1 << 31;

/// A volume.
pub(super) struct XfsFiles {
    fs: Xfs<Watched>,
    watched: Watched,
    inode_bytes: u64,
}

fn error(error: Error) -> BrowseError {
    match &error {
        Error::Io { token, offset } => {
            BrowseError::Read { what: format!("{token} at byte {offset} of the volume") }
        }
        Error::UnsupportedFeature(what) => BrowseError::unsupported(*what),
        Error::BadSuperblock(_) if error.token() == "sb_dirty_log" => BrowseError::unsupported(
            "its log has changes that can't be replayed here; restore the disk and mount it",
        ),
        Error::BadSuperblock(_) if error.token().contains("unsupported") => {
            BrowseError::unsupported(error.token())
        }
        Error::NotFound { .. } => BrowseError::Unknown { path: "such file".into() },
        _ => BrowseError::damaged(error.token()),
    }
}

impl XfsFiles {
    pub(super) fn open(blocks: Rc<Blocks>) -> Result<Self> {
        let watched = Watched::new(blocks);
        let fs = Xfs::open(watched.clone(), watched.len()).map_err(error)?;
        Ok(Self { fs, watched, inode_bytes: 256 })
    }

    fn entry(&mut self, name: &[u8], inode: Inode, path: &[u8]) -> Result<Entry> {
        self.watched.forget();
        let known = self.fs.metadata(&inode).map_err(error)?;
        let mut entry = Entry {
            name: name.to_vec(),
            size_bytes: known.size(),
            mode: Some(known.mode() & 0o7777),
            number: inode.ino,
            ..Entry::default()
        };
        entry.set_kind(Kind::of_mode(known.mode()));
        add_raw(&mut entry, &self.watched.last(), &known);
        if entry.kind() == Kind::Link {
            entry.target = self.fs.read_link(Path::new(path)).map_err(error)?;
        }
        Ok(entry)
    }
}

/// Adds what the inode on the disk says, where that is of the same state.
fn add_raw(entry: &mut Entry, inode: &[u8], known: &Metadata) -> Option<()> {
    let head = Head(inode);
    let is_same = head.be16(0)? == 0x494E
        && u32::from(head.be16(2)?) == known.mode()
        && head.be64(56)? == known.size();
    if !is_same {
        return None;
    }
    let is_v3 = head.u8(4)? >= 3;
    entry.names = head.be32(16)?;
    (entry.uid, entry.gid) = (Some(head.be32(8)?), Some(head.be32(12)?));
    let time = head.be64(40)?;
    let has_bigtime = is_v3 && head.be64(120)? & BIGTIME != 0;
    let (seconds, nanos) = if has_bigtime {
        let seconds = i64::try_from(time / 1_000_000_000).ok()? - BIGTIME_EPOCH;
        (seconds, (time % 1_000_000_000) as u32)
    } else {
        (i64::from((time >> 32) as i32), time as u32)
    };
    (entry.modified_seconds, entry.modified_nanos) = (Some(seconds), nanos.min(999_999_999));
    Some(())
}

impl FileSystem for XfsFiles {
    fn root(&mut self) -> Result<Node> {
        let inode = self.fs.resolve(Path::new(b"/")).map_err(error)?;
        let entry = self.entry(b"", inode, b"/")?;
        Ok(Node { entry, handle: Handle::Number(inode.ino) })
    }

    fn list(&mut self, folder: Place<'_>, each: Each<'_>) -> Result<()> {
        for found in self.fs.read_dir(Path::new(folder.path)).map_err(error)? {
            let name = found.name.as_slice();
            if name == b"." || name == b".." {
                continue;
            }
            let inode = Inode { ino: found.inode_number };
            let known = self.entry(name, inode, &folder.join(name));
            let entry = known.unwrap_or_else(|problem| {
                let mut entry = Entry::unreadable(name, problem);
                if found.kind == EntryKind::Directory {
                    entry.set_kind(Kind::Folder);
                }
                entry
            });
            each(Node { entry, handle: Handle::Number(inode.ino) })?;
        }
        Ok(())
    }

    fn read(&mut self, file: Place<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let Handle::Number(ino) = file.node.handle else {
            return Err(BrowseError::unknown(file.path));
        };
        self.fs.read_file_at(&Inode { ino }, offset, buffer).map_err(error)
    }

    /// Each folder has an inode of its own.
    fn most_folders(&self) -> u64 {
        self.watched.len() / self.inode_bytes
    }

    fn label(&self) -> String {
        self.fs.label().unwrap_or_default().to_owned()
    }
}
