//! Btrfs by `lambutter`: one device, or any of a mirror; all ways to compress. Subvolumes and snapshots are folders, as a mount shows
//! them. What a crash left in its log tree (the last `fsync`s) isn't seen.
//!
//! The library reads an inode's times but doesn't tell them: they are taken from the leaf that it has just read.

use std::rc::Rc;

use lambutter::{Btrfs, Error, Inode, Path};

use super::{
    super::{BrowseError, Entry, Kind},
    blocks::Blocks,
    raw_leaf::Watched,
    tree::{Each, FileSystem, Handle, Node, Place, Result},
};
use crate::fs::Head;

const LEAF_HEAD: usize = 101;
const ITEM_BYTES: usize = 25;
const INODE_ITEM: u8 = 1;
/// Where an inode item has the time of its content.
const MODIFIED: usize = 136;

/// A volume.
pub(super) struct BtrfsFiles {
    fs: Btrfs<Watched>,
    watched: Watched,
}

fn error(error: Error) -> BrowseError {
    match &error {
        Error::Io { token, offset } => {
            BrowseError::Read { what: format!("{token} at byte {offset} of the volume") }
        }
        Error::UnsupportedFeature(what)
        | Error::UnsupportedProfile(what)
        | Error::UnsupportedChecksum(what) => BrowseError::unsupported(*what),
        Error::NotFound => BrowseError::Unknown { path: "such file".into() },
        Error::NotARegularFile => BrowseError::Kind { what: "this is no file".into() },
        error => BrowseError::damaged(error),
    }
}

impl BtrfsFiles {
    pub(super) fn open(blocks: Rc<Blocks>) -> Result<Self> {
        let watched = Watched::new(blocks);
        let fs = Btrfs::open(watched.clone(), watched.len()).map_err(error)?;
        Ok(Self { fs, watched })
    }

    fn entry(&mut self, name: &[u8], inode: Inode, path: &[u8]) -> Result<Entry> {
        self.watched.forget();
        let known = self.fs.metadata(&inode).map_err(error)?;
        let mut entry = Entry {
            name: name.to_vec(),
            size_bytes: known.size,
            allocated_bytes: Some(known.nbytes),
            mode: Some(known.mode & 0o7777),
            uid: Some(known.uid),
            gid: Some(known.gid),
            number: inode.objectid(),
            tree: inode.subvolume(),
            names: known.nlink,
            ..Entry::default()
        };
        entry.set_kind(Kind::of_mode(known.mode));
        if let Some((seconds, nanos)) = modified(&self.watched.last(), inode.objectid()) {
            entry.modified_seconds = Some(seconds);
            entry.modified_nanos = nanos.min(999_999_999);
        }
        if entry.kind() == Kind::Link {
            let path = Path::new(path).ok_or_else(|| BrowseError::unknown(path))?;
            entry.target = self.fs.read_link(path).map_err(error)?;
        }
        Ok(entry)
    }
}

/// The time of inode `number` in a leaf that holds it.
fn modified(leaf: &[u8], number: u64) -> Option<(i64, u32)> {
    let head = Head(leaf);
    if head.u8(100)? != 0 {
        return None;
    }
    let items = head.u32(96)? as usize;
    let most = leaf.len().checked_sub(LEAF_HEAD)? / ITEM_BYTES;
    let at = (0..items.min(most)).map(|item| LEAF_HEAD + item * ITEM_BYTES);
    let item = at
        .into_iter()
        .find(|at| head.u64(*at) == Some(number) && head.u8(at + 8) == Some(INODE_ITEM))?;
    let data = LEAF_HEAD.checked_add(head.u32(item + 17)? as usize)?.checked_add(MODIFIED)?;
    Some((head.u64(data)?.cast_signed(), head.u32(data + 8)?))
}

impl FileSystem for BtrfsFiles {
    fn root(&mut self) -> Result<Node> {
        let path = Path::new(b"/").ok_or_else(|| BrowseError::unknown(b"/"))?;
        let inode = self.fs.resolve(path).map_err(error)?;
        Ok(Node { entry: self.entry(b"", inode, b"/")?, handle: Handle::Btrfs(inode) })
    }

    fn list(&mut self, folder: Place<'_>, each: Each<'_>) -> Result<()> {
        let path = Path::new(folder.path).ok_or_else(|| BrowseError::unknown(folder.path))?;
        for found in self.fs.read_dir(path).map_err(error)? {
            let known = self.entry(&found.name, found.inode, &folder.join(&found.name));
            let entry = known.unwrap_or_else(|problem| Entry::unreadable(&found.name, problem));
            each(Node { entry, handle: Handle::Btrfs(found.inode) })?;
        }
        Ok(())
    }

    fn read(&mut self, file: Place<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let Handle::Btrfs(inode) = file.node.handle else {
            return Err(BrowseError::unknown(file.path));
        };
        self.fs.read_file_at(&inode, offset, buffer).map_err(error)
    }
}
