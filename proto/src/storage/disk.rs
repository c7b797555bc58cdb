//! What lies below the store: opens files, changes folders.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io,
    ops::Bound,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::{
    FallocateFlags, IFlags, OFlags, StatVfsMountFlags, fallocate, ioctl_getflags, ioctl_setflags,
};

use super::{Access, File, Handle, Metadata, Op, Verdict, Watcher};
use crate::direct::DirectFile;

/// After this many bytes a session's image is synced in the background, so that commit has little left to sync.
const SYNC_BYTES: u64 = 64 << 20;

/// The file systems of this machine; cheap to clone. The default is what production uses.
#[derive(Debug, Clone)]
pub struct Disk {
    watcher: Option<Arc<dyn Watcher>>,
    boot: Option<Arc<str>>,
    up_ms: Option<Arc<AtomicU64>>,
    sync_bytes: u64,
    /// Folders whose names are durable, as far as this process has seen to it.
    known: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            watcher: None,
            boot: None,
            up_ms: None,
            sync_bytes: SYNC_BYTES,
            known: Arc::default(),
        }
    }
}

impl Disk {
    /// A disk with somebody who looks on. Work in the background then happens in place: one order of operations.
    pub fn watched(watcher: Arc<dyn Watcher>) -> Self {
        Self { watcher: Some(watcher), ..Self::default() }
    }

    /// The same disk, in a boot of the machine that a test names.
    #[must_use]
    pub fn in_boot(self, boot: &str) -> Self {
        Self { boot: Some(boot.into()), ..self }
    }

    /// The same disk, on a machine that is up for as long as a test says, in milliseconds.
    #[must_use]
    pub fn up_since(self, up_ms: Arc<AtomicU64>) -> Self {
        Self { up_ms: Some(up_ms), ..self }
    }

    /// The same disk, with another number of bytes after which images are synced in the background.
    #[must_use]
    pub fn sync_after(self, sync_bytes: u64) -> Self {
        Self { sync_bytes, ..self }
    }

    /// After so many bytes a file that is long written to should be synced in the background.
    pub fn sync_bytes(&self) -> u64 {
        self.sync_bytes
    }

    /// Names this boot of the machine; empty where the system doesn't say, which then counts as a reboot.
    pub fn boot(&self) -> String {
        match &self.boot {
            Some(boot) => boot.to_string(),
            None => fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default(),
        }
    }

    /// Milliseconds since this boot of the machine began, sleep included; no wall clock changes them. 0 where the system doesn't say.
    pub fn up_ms(&self) -> u64 {
        if let Some(up_ms) = &self.up_ms {
            return up_ms.load(Ordering::Relaxed);
        }
        let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let (seconds, rest) = text.split_once('.').unwrap_or((&text, "0"));
        let hundredths = rest.get(..2).and_then(|digits| digits.parse::<u64>().ok()).unwrap_or(0);
        seconds.parse::<u64>().map_or(0, |seconds| seconds * 1000 + hundredths * 10)
    }

    /// Says whether anybody, root included, may change, rename or remove a file, where the file system can be told (ext4, XFS,
    /// btrfs) and this process may. True when it is so now. Only ever a help, and no watcher is asked.
    pub fn set_immutable(&self, path: &Path, immutable: bool) -> bool {
        let set = || -> io::Result<bool> {
            let flags = OFlags::NOFOLLOW.bits().cast_signed();
            let file = options(Access::Read).custom_flags(flags).open(path)?;
            let flags = ioctl_getflags(&file)?;
            if flags.contains(IFlags::IMMUTABLE) == immutable {
                return Ok(true);
            }
            let mut wanted = flags;
            wanted.set(IFlags::IMMUTABLE, immutable);
            ioctl_setflags(&file, wanted)?;
            Ok(true)
        };
        self.watcher.is_none() && set().unwrap_or(false)
    }

    /// Opens a file for structures and small writes.
    ///
    /// # Errors
    /// As the file system says.
    pub fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let handle = self.handle(path);
        self.ask(Op::Open { file: &handle, access })?;
        let file = options(access).open(path)?;
        Ok(File::new(file.into(), handle, self.watcher.clone()))
    }

    /// Opens a file for data: large reads and writes go past the page cache.
    ///
    /// # Errors
    /// As the file system says.
    pub fn open_data(&self, path: &Path, access: Access) -> io::Result<File> {
        let handle = self.handle(path);
        self.ask(Op::Open { file: &handle, access })?;
        let file = options(access).open(path)?;
        let direct = match access {
            Access::Read => DirectFile::for_reading(file, path),
            _ => DirectFile::for_writing(file, path),
        };
        Ok(File::new(direct, handle, self.watcher.clone()))
    }

    /// Opens a file that others have made for reading data: nothing that is a link, or no file.
    ///
    /// # Errors
    /// As the file system says, and `InvalidInput` for what is no file.
    pub fn open_regular(&self, path: &Path) -> io::Result<File> {
        self.open_if(path, OFlags::NOFOLLOW, |kind| kind.is_file())
    }

    /// Opens what an operator names for reading data: a file, also behind a link, or a block device.
    ///
    /// # Errors
    /// As the file system says, and `InvalidInput` for what is neither.
    pub fn open_named(&self, path: &Path) -> io::Result<File> {
        self.open_if(path, OFlags::empty(), |kind| kind.is_file() || kind.is_block_device())
    }

    fn open_if(
        &self,
        path: &Path,
        flags: OFlags,
        fits: impl Fn(fs::FileType) -> bool,
    ) -> io::Result<File> {
        let handle = self.handle(path);
        self.ask(Op::Open { file: &handle, access: Access::Read })?;
        // A pipe must not keep us waiting.
        let flags = (flags | OFlags::NONBLOCK).bits().cast_signed();
        let file = options(Access::Read).custom_flags(flags).open(path)?;
        if !fits(file.metadata()?.file_type()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
        }
        Ok(File::new(DirectFile::for_reading(file, path), handle, self.watcher.clone()))
    }

    /// Reads a file of at most `most` bytes; `None` when it is not there.
    ///
    /// # Errors
    /// `FileTooLarge` when it is longer, else as the file system says.
    pub fn read(&self, path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open(path, Access::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let length = file.metadata()?.length_bytes;
        if length > most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(Some(bytes))
    }

    /// Replaces `path` by `bytes`: writes beside it, syncs, renames, syncs the folder.
    ///
    /// # Errors
    /// As the file system says. The old content stays then, unless only the last sync failed.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let folder = folder_of(path)?;
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_os_string();
        name.push(".new");
        let fresh = folder.join(name);
        let file = self.open(&fresh, Access::Create)?;
        file.set_len(0)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        self.rename(&fresh, path)?;
        self.sync_folder(folder)
    }

    /// Gives a file or folder another name; a file that has it is gone. Durable with the folders.
    ///
    /// # Errors
    /// As the file system says.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.ask(Op::Rename { from, to })?;
        self.forget_below(from);
        fs::rename(from, to)
    }

    /// Removes a file; that it is absent already is no error.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.ask(Op::Remove { path })?;
        or_absent(fs::remove_file(path))
    }

    /// Removes an empty folder; that it is absent already is no error.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.ask(Op::RemoveFolder { path })?;
        self.known().remove(path);
        or_absent(fs::remove_dir(path))
    }

    /// Makes renames and new files in `folder` durable.
    ///
    /// # Errors
    /// As the file system says.
    pub fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.ask(Op::SyncFolder { path: folder })?;
        fs::File::open(folder)?.sync_all()
    }

    /// Makes a folder and those above it, durably, readable by the owner alone.
    ///
    /// One that is there may have been made just before a kill, so its name is synced too, once in a process.
    ///
    /// # Errors
    /// As the file system says.
    pub fn make_folder(&self, path: &Path) -> io::Result<()> {
        let is_there = self.is_folder(path)?;
        if is_there && self.known().contains(path) {
            return Ok(());
        }
        let parent = folder_of(path)?;
        // Above the first folder that was asked for, what others have made is theirs.
        if self.is_below_known(path) || !self.is_folder(parent)? {
            self.make_folder(parent)?;
        }
        if !is_there {
            self.ask(Op::MakeFolder { path })?;
            fs::DirBuilder::new().mode(0o700).create(path)?;
        }
        match self.sync_folder(parent) {
            Err(error) if is_there && error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other?,
        }
        self.known().insert(path.to_owned());
        Ok(())
    }

    /// What lies at a path, links followed; `None` when nothing does.
    ///
    /// # Errors
    /// As the file system says.
    pub fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        self.ask(Op::Look { path })?;
        match fs::metadata(path) {
            Err(error) if is_absent(&error) => Ok(None),
            other => other.map(|metadata| Some(metadata.into())),
        }
    }

    /// True when something lies at a path.
    ///
    /// # Errors
    /// As the file system says.
    pub fn exists(&self, path: &Path) -> io::Result<bool> {
        self.metadata(path).map(|there| there.is_some())
    }

    /// True when a folder lies at a path.
    ///
    /// # Errors
    /// As the file system says.
    pub fn is_folder(&self, path: &Path) -> io::Result<bool> {
        Ok(self.metadata(path)?.is_some_and(|there| there.is_folder))
    }

    /// What is in a folder, in the order of names; nothing when the folder is absent.
    ///
    /// # Errors
    /// As the file system says.
    pub fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        self.ask(Op::List { path: folder })?;
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut paths =
            entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()?;
        paths.sort_unstable();
        Ok(paths)
    }

    /// Free and total bytes of the file system that holds `path`.
    ///
    /// # Errors
    /// As the file system says.
    pub fn space(&self, path: &Path) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(path)?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }

    /// True when the file system that holds `path` says that nothing can be written.
    pub fn is_read_only(&self, path: &Path) -> bool {
        let stat = rustix::fs::statvfs(path);
        stat.is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
    }

    /// Makes a file that takes this much space, unless it is there. Only ever a help: what fails leaves nothing, and no watcher
    /// is asked.
    pub fn allocate(&self, path: &Path, bytes: u64) {
        let is_there = || fs::metadata(path).is_ok_and(|file| file.len() >= bytes);
        if self.watcher.is_some() || is_there() {
            return;
        }
        let made =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
        if !made.is_ok_and(|file| fallocate(&file, FallocateFlags::empty(), 0, bytes).is_ok()) {
            let _ = fs::remove_file(path);
        }
    }

    /// Does `work` on a thread of its own, which ends by itself; in place when somebody watches.
    pub fn in_background(&self, work: impl FnOnce() + Send + 'static) {
        match self.watcher {
            Some(_) => work(),
            None => drop(std::thread::spawn(work)),
        }
    }

    fn is_below_known(&self, path: &Path) -> bool {
        let known = self.known();
        path.ancestors().skip(1).any(|above| known.contains(above))
    }

    /// Forgets a folder and those below it, which sort right behind it.
    fn forget_below(&self, path: &Path) {
        let mut known = self.known();
        let below = known.range::<Path, _>((Bound::Included(path), Bound::Unbounded));
        let below: Vec<PathBuf> =
            below.take_while(|folder| folder.starts_with(path)).cloned().collect();
        for folder in &below {
            known.remove(folder);
        }
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        // A set is whole whatever panicked beside it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, path: &Path) -> Handle {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = self.watcher.as_ref().map_or(0, |_| NEXT.fetch_add(1, Ordering::Relaxed));
        Handle { number, path: path.to_owned() }
    }

    fn ask(&self, op: Op<'_>) -> io::Result<()> {
        ask(self.watcher.as_deref(), op)
    }
}

/// Shows an operation that is done or not, never in part.
pub(super) fn ask(watcher: Option<&dyn Watcher>, op: Op<'_>) -> io::Result<()> {
    match watcher.map_or(Ok(Verdict::Go), |watcher| watcher.before(&op))? {
        Verdict::Go | Verdict::Shared => Ok(()),
        Verdict::Short { error, .. } => Err(error),
    }
}

fn options(access: Access) -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.read(true);
    match access {
        Access::Read => {}
        Access::Write => drop(options.write(true)),
        Access::Create => drop(options.write(true).create(true).truncate(false)),
        Access::CreateNew => drop(options.write(true).create_new(true)),
    }
    options
}

fn or_absent(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A file where a folder is expected holds nothing either.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn folder_of(path: &Path) -> io::Result<&Path> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}
