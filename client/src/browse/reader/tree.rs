//! A file system by paths: folders are listed once and remembered, so that their files are found without looking again.
//!
//! Links are never followed, and names that aren't any are never looked up: what is reached by a path lies where the path says.

use std::{
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use super::{
    super::{BrowseError, Entry, Kind, entry::check_name},
    blocks::Blocks,
    btrfs::BtrfsFiles,
    ext4::Ext4Files,
    fat::FatFiles,
    ntfs::NtfsFiles,
    xfs::XfsFiles,
};
use crate::fs::FileSystemKind;

/// Names of folders that are remembered.
const REMEMBERED: usize = 200_000;
/// Names that one folder may have.
const MOST_NAMES: usize = 2_000_000;

pub(super) type Result<T> = std::result::Result<T, BrowseError>;
/// Takes the names of a folder one by one.
pub(super) type Each<'a> = &'a mut dyn FnMut(Node) -> Result<()>;

/// What one kind of file system answers.
pub(super) trait FileSystem {
    /// Its root folder.
    fn root(&mut self) -> Result<Node>;

    /// What is in a folder, but `.` and `..`, in any order. A file of which nothing is known but its name has a problem.
    fn list(&mut self, folder: Place<'_>, each: Each<'_>) -> Result<()>;

    /// Fills `buffer` from byte `offset` of a file's content, as far as it goes; returns how far that is.
    fn read(&mut self, file: Place<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize>;

    /// The same of a stream, where files have several; the content is the one without a name.
    fn read_stream(
        &mut self,
        file: Place<'_>,
        stream: &str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        match stream {
            "" => self.read(file, offset, buffer),
            _ => Err(BrowseError::Unknown { path: format!("stream {stream}") }),
        }
    }

    /// The first byte from `offset` on that may be other than zero, or any one before it.
    fn next_data(&mut self, _file: Place<'_>, _stream: &str, offset: u64) -> Result<u64> {
        Ok(offset)
    }

    /// More folders than this it can't have; 0: not known.
    fn most_folders(&self) -> u64 {
        0
    }

    /// Its label.
    fn label(&self) -> String {
        String::new()
    }
}

/// Fills a buffer by `read`, which may bring less than there is room for, until it brings nothing.
pub(super) fn fill(
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> Result<usize>,
) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..])? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// A file: what is told of it, and how its file system finds it again.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) entry: Entry,
    pub(super) handle: Handle,
}

/// How a file system finds a file again.
#[derive(Debug, Clone, Copy)]
pub(super) enum Handle {
    /// By its path.
    Path,
    /// By its number.
    Number(u64),
    /// By its subvolume and number.
    Btrfs(lambutter::Inode),
}

/// A file and its path.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) path: &'a [u8],
    pub(super) node: &'a Node,
}

impl Place<'_> {
    /// The path of something in this folder.
    pub(super) fn join(&self, name: &[u8]) -> Vec<u8> {
        join(self.path, name)
    }
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    [folder.strip_suffix(b"/").unwrap_or(folder), b"/", name].concat()
}

/// An opened file system.
pub(super) struct Tree {
    files: Box<dyn FileSystem>,
    folders: VecDeque<(Vec<u8>, Names)>,
}

type Names = Rc<HashMap<Vec<u8>, Rc<Node>>>;

impl Tree {
    pub(super) fn open(kind: FileSystemKind, blocks: Rc<Blocks>) -> Result<Self> {
        use FileSystemKind as K;
        let files: Box<dyn FileSystem> = match kind {
            K::Ext2 | K::Ext3 | K::Ext4 => Box::new(Ext4Files::open(blocks)?),
            K::Xfs => Box::new(XfsFiles::open(blocks)?),
            K::Btrfs => Box::new(BtrfsFiles::open(blocks)?),
            K::Ntfs => Box::new(NtfsFiles::open(blocks)?),
            K::Fat => Box::new(FatFiles::open(blocks)?),
            other => return Err(BrowseError::unsupported(other.to_string())),
        };
        Ok(Self { files, folders: VecDeque::new() })
    }

    pub(super) fn most_folders(&self) -> u64 {
        self.files.most_folders()
    }

    pub(super) fn label(&self) -> String {
        self.files.label()
    }

    pub(super) fn look(&mut self, path: &[u8]) -> Result<Entry> {
        Ok(self.node(path)?.entry.clone())
    }

    pub(super) fn list(
        &mut self,
        path: &[u8],
        each: &mut dyn FnMut(&Entry) -> Result<()>,
    ) -> Result<()> {
        let folder = self.node(path)?;
        self.names(path, &folder, each).map(drop)
    }

    pub(super) fn read(
        &mut self,
        path: &[u8],
        stream: &str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let node = self.file(path)?;
        self.files.read_stream(Place { path, node: &node }, stream, offset, buffer)
    }

    pub(super) fn next_data(&mut self, path: &[u8], stream: &str, offset: u64) -> Result<u64> {
        let node = self.file(path)?;
        self.files.next_data(Place { path, node: &node }, stream, offset)
    }

    fn file(&mut self, path: &[u8]) -> Result<Rc<Node>> {
        let node = self.node(path)?;
        if !node.entry.problem.is_empty() {
            return Err(BrowseError::damaged(&node.entry.problem));
        }
        // NTFS keeps streams of folders, too; who asks for the content of a folder is told by his file system.
        match node.entry.kind() {
            Kind::File | Kind::Folder => Ok(node),
            kind => Err(BrowseError::Kind { what: format!("this is a {}", kind.name()) }),
        }
    }

    fn node(&mut self, path: &[u8]) -> Result<Rc<Node>> {
        let unknown = || BrowseError::unknown(path);
        if path == b"/" {
            return Ok(Rc::new(self.files.root()?));
        }
        let slash = path.iter().rposition(|byte| *byte == b'/').ok_or_else(unknown)?;
        let (folder, name) = (&path[..slash.max(1)], &path[slash + 1..]);
        check_name(name).map_err(|_| unknown())?;
        let names = match self.folders.iter().find(|(known, _)| known == folder) {
            Some((_, names)) => names.clone(),
            None => self.walk(folder)?,
        };
        names.get(name).cloned().ok_or_else(unknown)
    }

    /// The names of a folder, found from the root on.
    fn walk(&mut self, path: &[u8]) -> Result<Names> {
        let mut node = Rc::new(self.files.root()?);
        let mut at = b"/".to_vec();
        let mut names = self.names(&at, &node, &mut |_| Ok(()))?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            node = names.get(name).cloned().ok_or_else(|| BrowseError::unknown(path))?;
            at = join(&at, name);
            names = match self.folders.iter().find(|(known, _)| *known == at) {
                Some((_, names)) => names.clone(),
                None => self.names(&at, &node, &mut |_| Ok(()))?,
            };
        }
        Ok(names)
    }

    /// Lists a folder and remembers it.
    fn names(
        &mut self,
        path: &[u8],
        folder: &Node,
        each: &mut dyn FnMut(&Entry) -> Result<()>,
    ) -> Result<Names> {
        match folder.entry.kind() {
            Kind::Folder => {}
            _ if !folder.entry.problem.is_empty() => {
                return Err(BrowseError::damaged(&folder.entry.problem));
            }
            kind => return Err(BrowseError::Kind { what: format!("this is a {}", kind.name()) }),
        }
        let mut names = HashMap::new();
        let mut count = 0;
        self.files.list(Place { path, node: folder }, &mut |node| {
            each(&node.entry)?;
            count += 1;
            if count > MOST_NAMES {
                let what = format!("a folder with more than {MOST_NAMES} names");
                return Err(BrowseError::Unsupported { what });
            }
            names.entry(node.entry.name.clone()).or_insert_with(|| Rc::new(node));
            Ok(())
        })?;
        let names = Rc::new(names);
        self.remember(path, names.clone());
        Ok(names)
    }

    fn remember(&mut self, path: &[u8], names: Names) {
        self.folders.retain(|(known, _)| known != path);
        self.folders.push_back((path.to_vec(), names));
        let count = |folders: &VecDeque<(_, Names)>| {
            folders.iter().map(|(_, names)| names.len() + 1).sum::<usize>()
        };
        while self.folders.len() > 1 && count(&self.folders) > REMEMBERED {
            self.folders.pop_front();
        }
    }
}
