//! A disk as a folder: one folder for each volume, by its number, read-only, by FUSE.
//!
//! What the kernel asks is answered from [`Volume`]s, so that a damaged file system costs an error here too. Links are told as they
//! are: absolute ones lead to files of this machine, as in any mount.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, Request,
};

use super::{BrowseError, Entry, Kind, Volume, entry::check_name, volume::Piece};

/// Nothing in it changes.
const VALID: Duration = Duration::from_secs(3600);
const BLOCK_BYTES: u32 = 4096;

/// Opens a volume by its number.
pub type Opener = Box<dyn Fn(u32) -> Result<Volume, BrowseError> + Send + Sync>;

/// A disk that can be mounted.
pub struct Mountable {
    numbers: Vec<u32>,
    opener: Opener,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    volumes: BTreeMap<u32, Volume>,
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Place, u64>,
    last: u64,
    listed: Option<(u64, Arc<Vec<Entry>>)>,
}

/// A volume and a path on it.
type Place = (u32, Vec<u8>);

/// What the kernel knows by a number.
struct Node {
    place: Place,
    entry: Entry,
    lookups: u64,
}

impl Mountable {
    /// A disk with these volumes.
    pub fn new(numbers: Vec<u32>, opener: Opener) -> Self {
        let state = State { last: INodeNo::ROOT.0, ..State::default() };
        Self { numbers, opener, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, parent: u64, name: &[u8]) -> Result<(u64, Entry), Errno> {
        check_name(name).map_err(|_| Errno::ENOENT)?;
        let mut state = self.state();
        let place = if parent == INodeNo::ROOT.0 {
            let number = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
            let number = number.filter(|number| self.numbers.contains(number));
            (number.ok_or(Errno::ENOENT)?, b"/".to_vec())
        } else {
            let (volume, path) = &state.nodes.get(&parent).ok_or(Errno::ESTALE)?.place;
            (*volume, [path.strip_suffix(b"/").unwrap_or(path), b"/", name].concat())
        };
        let entry = state.volume(place.0, &self.opener)?.look(&place.1).map_err(errno)?;
        Ok((state.number(place, &entry), entry))
    }

    fn entry(&self, number: u64) -> Result<Entry, Errno> {
        if number == INodeNo::ROOT.0 {
            let mut root = Entry::default();
            root.set_kind(Kind::Folder);
            return Ok(root);
        }
        self.state().nodes.get(&number).map(|node| node.entry.clone()).ok_or(Errno::ESTALE)
    }

    /// The names in a folder, listed when it is begun.
    fn names(&self, number: u64, is_begin: bool) -> Result<Arc<Vec<Entry>>, Errno> {
        if number == INodeNo::ROOT.0 {
            return Ok(Arc::new(self.numbers.iter().map(|number| volume_entry(*number)).collect()));
        }
        let mut state = self.state();
        if let Some((listed, names)) = &state.listed
            && *listed == number
            && !is_begin
        {
            return Ok(names.clone());
        }
        let (volume, path) = state.nodes.get(&number).ok_or(Errno::ESTALE)?.place.clone();
        let mut names = state.volume(volume, &self.opener)?.list(&path).map_err(errno)?;
        names.retain(|entry| check_name(&entry.name).is_ok());
        let names = Arc::new(names);
        state.listed = Some((number, names.clone()));
        Ok(names)
    }

    fn bytes(&self, number: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut state = self.state();
        let (volume, path) = state.nodes.get(&number).ok_or(Errno::ESTALE)?.place.clone();
        let mut bytes = Vec::with_capacity(size as usize);
        let mut take = |piece: Piece<'_>| {
            let (start, data) = match piece {
                Piece::Data(at, data) => (at, data),
                Piece::Zeros(end) => (end, &[][..]),
            };
            // Within what was asked for: the volume has seen to that.
            bytes.resize((start - offset) as usize, 0);
            bytes.extend_from_slice(data);
            Ok(())
        };
        let part = offset..offset.saturating_add(size.into());
        state.volume(volume, &self.opener)?.read(&path, "", part, &mut take).map_err(errno)?;
        Ok(bytes)
    }
}

impl State {
    fn volume(&mut self, number: u32, opener: &Opener) -> Result<&mut Volume, Errno> {
        use std::collections::btree_map::Entry;
        match self.volumes.entry(number) {
            Entry::Occupied(there) => Ok(there.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(opener(number).map_err(errno)?)),
        }
    }

    fn number(&mut self, place: Place, entry: &Entry) -> u64 {
        let number = *self.numbers.entry(place.clone()).or_insert_with(|| {
            self.last += 1;
            self.last
        });
        let node = Node { place, entry: entry.clone(), lookups: 0 };
        self.nodes.entry(number).or_insert(node).lookups += 1;
        number
    }

    fn forget(&mut self, number: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0
            && let Some(node) = self.nodes.remove(&number)
        {
            self.numbers.remove(&node.place);
        }
    }
}

fn volume_entry(number: u32) -> Entry {
    let mut entry = Entry { name: number.to_string().into_bytes(), ..Entry::default() };
    entry.set_kind(Kind::Folder);
    entry
}

fn errno(error: BrowseError) -> Errno {
    tracing::debug!(%error, "a question of the kernel failed");
    match error {
        BrowseError::Unknown { .. } => Errno::ENOENT,
        BrowseError::Kind { .. } => Errno::EINVAL,
        BrowseError::Unsupported { .. } => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::Link => FileType::Symlink,
        Kind::Pipe => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Device => FileType::CharDevice,
        Kind::File | Kind::Unknown => FileType::RegularFile,
    }
}

fn attributes(number: u64, entry: &Entry) -> FileAttr {
    let kind = entry.kind();
    let usual = if kind == Kind::Folder { 0o755 } else { 0o644 };
    let modified = modified(entry).unwrap_or(UNIX_EPOCH);
    FileAttr {
        ino: INodeNo(number),
        size: if kind == Kind::Link { entry.target.len() as u64 } else { entry.size_bytes },
        blocks: entry.allocated_bytes.unwrap_or(entry.size_bytes).div_ceil(512),
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: modified,
        kind: file_type(kind),
        perm: entry.mode.map_or(usual, |mode| (mode & 0o7777) as u16),
        nlink: entry.names.max(1),
        uid: entry.uid.unwrap_or_else(|| rustix::process::getuid().as_raw()),
        gid: entry.gid.unwrap_or_else(|| rustix::process::getgid().as_raw()),
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

fn modified(entry: &Entry) -> Option<SystemTime> {
    let seconds = entry.modified_seconds?;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = match seconds {
        0.. => UNIX_EPOCH.checked_add(whole),
        _ => UNIX_EPOCH.checked_sub(whole),
    };
    time?.checked_add(Duration::from_nanos(entry.modified_nanos.into()))
}

impl Filesystem for Mountable {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.look(parent.0, name.as_bytes()) {
            Ok((number, entry)) => {
                reply.entry(&VALID, &attributes(number, &entry), Generation(0));
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn forget(&self, _: &Request, number: INodeNo, lookups: u64) {
        self.state().forget(number.0, lookups);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.entry(number.0) {
            Ok(entry) => reply.attr(&VALID, &attributes(number.0, &entry)),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        match self.entry(number.0) {
            Ok(entry) if entry.kind() == Kind::Link => reply.data(&entry.target),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.bytes(number.0, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let names = match self.names(number.0, offset == 0) {
            Ok(names) => names,
            Err(errno) => return reply.error(errno),
        };
        // Numbers are given when a name is looked up; these only have to be there.
        const SOME: INodeNo = INodeNo(u64::MAX >> 1);
        for (at, entry) in names.iter().enumerate().skip(offset as usize) {
            let (kind, name) = (file_type(entry.kind()), OsStr::from_bytes(&entry.name));
            if reply.add(SOME, at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
