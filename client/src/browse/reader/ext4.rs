//! ext2, ext3 and ext4 by `ext4-view`, which replays the journal in memory.
//!
//! It tells neither inode numbers of folders nor how many names a file has: see `most_folders` for loops, and hard links are
//! found by the numbers of files.

use std::{error::Error, rc::Rc};

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, Metadata, Path};

use super::{
    super::{BrowseError, Entry, Kind},
    blocks::Blocks,
    tree::{Each, FileSystem, Handle, Node, Place, Result, fill},
};
use crate::{fs::Head, source::view::ReadAt};

/// How the library fails where a list of blocks, as ext2 and ext3 have them, is itself a hole.
const HOLE: &str = "from block 0 (originally 0)";

/// A volume, and the file that was read last.
pub(super) struct Ext4Files {
    fs: Ext4,
    inodes: u64,
    open: Option<Open>,
}

struct Open {
    path: Vec<u8>,
    file: File,
    position: u64,
}

struct Volume(Rc<Blocks>);

impl Ext4Read for Volume {
    fn read(
        &mut self,
        start: u64,
        buffer: &mut [u8],
    ) -> std::result::Result<(), Box<dyn Error + Send + Sync + 'static>> {
        self.0.read_exact_at(buffer, start).map_err(Into::into)
    }
}

fn error(error: Ext4Error) -> BrowseError {
    match error {
        Ext4Error::Io(error) => BrowseError::Read { what: error.to_string() },
        Ext4Error::NotFound => BrowseError::Unknown { path: "such file".into() },
        Ext4Error::Incompatible(what) => BrowseError::unsupported(what.to_string()),
        Ext4Error::Encrypted => BrowseError::unsupported("it is encrypted"),
        error => {
            let what = error.to_string();
            if what.contains(HOLE) {
                BrowseError::unsupported("a file with large holes on ext2 or ext3")
            } else if what.contains("invalid timestamp") {
                BrowseError::unsupported("times before 1970 or after 2038")
            } else {
                BrowseError::Damaged { what }
            }
        }
    }
}

impl Ext4Files {
    pub(super) fn open(blocks: Rc<Blocks>) -> Result<Self> {
        let mut superblock = [0; 4];
        let read = blocks.read_exact_at(&mut superblock, 1024);
        read.map_err(|error| BrowseError::Read { what: error.to_string() })?;
        let inodes = Head(&superblock).u32(0).unwrap_or(0).into();
        Ok(Self { fs: Ext4::load(Box::new(Volume(blocks))).map_err(error)?, inodes, open: None })
    }

    fn entry(&self, path: &[u8], name: &[u8], metadata: &Metadata) -> Result<Entry> {
        let kind = kind(metadata);
        let at = Path::try_from(path).map_err(BrowseError::damaged)?;
        let mut entry = Entry {
            name: name.to_vec(),
            size_bytes: metadata.len(),
            modified_seconds: Some(metadata.modified().seconds()),
            modified_nanos: metadata.modified().nanoseconds(),
            mode: Some(metadata.mode().into()),
            uid: Some(metadata.uid()),
            gid: Some(metadata.gid()),
            ..Entry::default()
        };
        entry.set_kind(kind);
        match kind {
            Kind::File => entry.number = number(&self.fs.open(at).map_err(error)?),
            Kind::Link => {
                let target = self.fs.read_link(at).map_err(error)?;
                entry.target = <_ as AsRef<[u8]>>::as_ref(&target).to_vec();
            }
            _ => {}
        }
        Ok(entry)
    }

    /// The file at `path`, ready to be read from `offset` on.
    fn opened(&mut self, path: &[u8], offset: u64) -> Result<&mut Open> {
        let is_it = |open: &Open| open.path == path && open.position <= offset;
        if !self.open.as_ref().is_some_and(is_it) {
            let at = Path::try_from(path).map_err(BrowseError::damaged)?;
            let file = self.fs.open(at).map_err(error)?;
            self.open = Some(Open { path: path.to_vec(), file, position: 0 });
        }
        let Some(open) = &mut self.open else { return Err(BrowseError::unknown(path)) };
        if open.position != offset {
            let sought = std::io::Seek::seek(&mut open.file, std::io::SeekFrom::Start(offset));
            sought.map_err(BrowseError::damaged)?;
            open.position = offset;
        }
        Ok(open)
    }
}

fn kind(metadata: &Metadata) -> Kind {
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => Kind::Folder,
        () if kind.is_symlink() => Kind::Link,
        () if kind.is_regular_file() => Kind::File,
        () if kind.is_fifo() => Kind::Pipe,
        () if kind.is_socket() => Kind::Socket,
        () => Kind::Device,
    }
}

/// The inode number of a file, which the library only tells in its debug format: `File { inode: 12, …`. 0: not there.
fn number(file: &File) -> u64 {
    let text = format!("{file:?}");
    let digits = text.split_once("inode: ").map(|(_, rest)| rest);
    let digits = digits.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

impl FileSystem for Ext4Files {
    fn root(&mut self) -> Result<Node> {
        let metadata = self.fs.metadata(Path::new("/")).map_err(error)?;
        Ok(Node { entry: self.entry(b"/", b"", &metadata)?, handle: Handle::Path })
    }

    fn list(&mut self, folder: Place<'_>, each: Each<'_>) -> Result<()> {
        let path = Path::try_from(folder.path).map_err(BrowseError::damaged)?;
        for found in self.fs.read_dir(path).map_err(error)? {
            let found = found.map_err(error)?;
            let name = found.file_name();
            let name: &[u8] = name.as_ref();
            if name == b"." || name == b".." {
                continue;
            }
            let known = found.metadata().map_err(error);
            let known = known.and_then(|known| self.entry(&folder.join(name), name, &known));
            let entry = known.unwrap_or_else(|problem| Entry::unreadable(name, problem));
            each(Node { entry, handle: Handle::Path })?;
        }
        Ok(())
    }

    fn read(&mut self, file: Place<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let open = self.opened(file.path, offset)?;
        let done = fill(buffer, |rest| open.file.read_bytes(rest).map_err(error))?;
        open.position += done as u64;
        Ok(done)
    }

    /// Each folder has an inode of its own.
    fn most_folders(&self) -> u64 {
        self.inodes
    }
}
