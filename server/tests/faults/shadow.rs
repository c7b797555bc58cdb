//! A file system in memory that knows what a power cut leaves.
//!
//! It is meaner than any real one, within what POSIX promises: without a sync each write, each cut and each name may be lost
//! or kept, whatever came after it, and of a write any sectors. A name is durable once its folder is synced, content once the
//! file is; a rename is one step.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs, io,
    path::Path,
    sync::Arc,
};

use janus_server::storage::Access;
use rand::{Rng, rngs::StdRng};

use crate::{
    recorder::Act,
    sparse::{PAGE, Sparse},
};

/// What a disk keeps in one piece.
const SECTOR: usize = 512;

/// Which of the changes that are not durable are found after a crash.
pub enum Kept<'a> {
    /// All: the machine went on, or the disk was quick.
    All,
    /// All, and half of this write or of what is to be shared.
    AllAnd(&'a Act),
    /// None.
    Nothing,
    /// Some, whole or in part, in any order.
    Some(&'a mut StdRng),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    File(usize),
    Folder(usize),
}

/// Names of all folders; number 0 is the root.
type Folders = Vec<BTreeMap<OsString, Node>>;

#[derive(Clone)]
/// A step in the namespace: durable when folder `by` is synced.
struct NameChange {
    by: usize,
    sets: Vec<(usize, OsString, Option<Node>)>,
}

#[derive(Clone)]
enum Change {
    Write { offset: u64, data: Arc<[u8]>, doomed: bool },
    SetLen(u64),
    Punch { offset: u64, len: u64 },
    Share { offset: u64, from: Arc<Shared>, from_offset: u64, len: u64, doomed: bool },
}

/// A file whose blocks another shares, as it was then.
struct Shared {
    now: Sparse,
    durable: Sparse,
}

#[derive(Clone, Default)]
struct FileState {
    now: Sparse,
    durable: Sparse,
    pending: Vec<Change>,
}

/// The file system.
#[derive(Clone)]
pub struct Shadow {
    files: Vec<FileState>,
    handles: HashMap<u64, usize>,
    now: Folders,
    durable: Folders,
    pending: Vec<NameChange>,
    /// Counts what became durable.
    pub syncs: usize,
}

impl Shadow {
    pub fn new() -> Self {
        let root = vec![BTreeMap::new()];
        Self {
            files: Vec::new(),
            handles: HashMap::new(),
            now: root.clone(),
            durable: root,
            pending: Vec::new(),
            syncs: 0,
        }
    }

    /// A file system that holds what `folder` does, all of it durable.
    pub fn of(folder: &Path) -> io::Result<Self> {
        let mut shadow = Self::new();
        shadow.load(folder, 0)?;
        shadow.now = shadow.durable.clone();
        Ok(shadow)
    }

    fn load(&mut self, folder: &Path, number: usize) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let node = if entry.file_type()?.is_dir() {
                self.durable.push(BTreeMap::new());
                let below = self.durable.len() - 1;
                self.load(&entry.path(), below)?;
                Node::Folder(below)
            } else {
                let content = Sparse::load(&entry.path())?;
                let file =
                    FileState { now: content.clone(), durable: content, pending: Vec::new() };
                self.files.push(file);
                Node::File(self.files.len() - 1)
            };
            self.durable[number].insert(entry.file_name(), node);
        }
        Ok(())
    }

    /// Nothing would be lost by a power cut now.
    pub fn is_durable(&self) -> bool {
        self.pending.is_empty() && self.files.iter().all(|file| file.pending.is_empty())
    }

    /// Does an operation.
    pub fn apply(&mut self, act: &Act) {
        match act {
            Act::Open { handle, path, access } => self.open(*handle, path, *access),
            Act::Write { handle, offset, data } => self.change(
                *handle,
                Change::Write { offset: *offset, data: data.clone(), doomed: false },
            ),
            Act::SetLen { handle, len } => self.change(*handle, Change::SetLen(*len)),
            Act::Punch { handle, offset, len } => {
                self.change(*handle, Change::Punch { offset: *offset, len: *len });
            }
            Act::Clone { handle, offset, from, from_offset, len } => {
                self.share(*handle, *offset, *from, *from_offset, *len);
            }
            Act::CloneAll { handle, from } => {
                self.change(*handle, Change::SetLen(0));
                self.share(*handle, 0, *from, 0, 0);
            }
            Act::Sync { handle, failed } => self.sync(*handle, *failed),
            Act::Rename { from, to } => self.rename(from, to),
            Act::Remove { path } => {
                if let Some((folder, name)) = self.parent(path)
                    && self.now[folder].contains_key(&name)
                {
                    self.name(folder, vec![(folder, name, None)]);
                }
            }
            Act::MakeFolder { path } => {
                if let Some((folder, name)) = self.parent(path)
                    && !self.now[folder].contains_key(&name)
                {
                    let made = Node::Folder(self.now.len());
                    self.now.push(BTreeMap::new());
                    self.durable.push(BTreeMap::new());
                    self.name(folder, vec![(folder, name, Some(made))]);
                }
            }
            Act::SyncFolder { path } => self.sync_folder(path),
        }
    }

    /// Writes what a crash leaves to the empty folder `to`.
    pub fn save(&self, mut kept: Kept<'_>, to: &Path) -> io::Result<()> {
        let mut folders = match kept {
            Kept::All | Kept::AllAnd(_) => self.now.clone(),
            Kept::Nothing | Kept::Some(_) => self.durable.clone(),
        };
        if let Kept::Some(chance) = &mut kept {
            let share = [0.1, 0.5, 0.9][chance.random_range(0..3)];
            for change in &self.pending {
                if chance.random_bool(share) {
                    change.apply(&mut folders);
                }
            }
        }
        self.save_folder(&folders, 0, to, &mut kept)
    }

    fn save_folder(
        &self,
        folders: &Folders,
        number: usize,
        to: &Path,
        kept: &mut Kept<'_>,
    ) -> io::Result<()> {
        fs::create_dir_all(to)?;
        for (name, node) in &folders[number] {
            match node {
                Node::File(file) => self.content(*file, kept).save(&to.join(name))?,
                Node::Folder(below) => self.save_folder(folders, *below, &to.join(name), kept)?,
            }
        }
        Ok(())
    }

    fn content(&self, number: usize, kept: &mut Kept<'_>) -> Sparse {
        let file = &self.files[number];
        match kept {
            Kept::All => file.now.clone(),
            Kept::Nothing => file.durable.clone(),
            Kept::Some(chance) => file.some(chance),
            Kept::AllAnd(act) => {
                let mut content = file.now.clone();
                self.half(act, number, &mut content);
                content
            }
        }
    }

    /// What half of an operation makes of a file, if it is the one that changes. The system goes page by page.
    fn half(&self, act: &Act, number: usize, content: &mut Sparse) {
        let half = |len: u64| len / 2 / PAGE * PAGE;
        let (Act::Write { handle, .. } | Act::Clone { handle, .. } | Act::CloneAll { handle, .. }) =
            act
        else {
            return;
        };
        if self.handles[handle] != number {
            return;
        }
        match act {
            Act::Write { offset, data, .. } => {
                content.write(*offset, &data[..half(data.len() as u64) as usize]);
            }
            Act::Clone { offset, from, from_offset, len, .. } => {
                let from = &self.files[self.handles[from]].now;
                content.copy_from(*offset, from, *from_offset, half(*len));
            }
            Act::CloneAll { from, .. } => {
                let from = &self.files[self.handles[from]].now;
                content.set_len(0);
                content.copy_from(0, from, 0, half(from.len));
            }
            _ => {}
        }
    }

    fn open(&mut self, handle: u64, path: &Path, access: Access) {
        let Some((folder, name)) = self.parent(path) else { return };
        match self.now[folder].get(&name) {
            Some(Node::File(file)) => drop(self.handles.insert(handle, *file)),
            Some(Node::Folder(_)) => {}
            None if matches!(access, Access::Create | Access::CreateNew) => {
                let file = self.files.len();
                self.files.push(FileState::default());
                self.handles.insert(handle, file);
                self.name(folder, vec![(folder, name, Some(Node::File(file)))]);
            }
            None => {}
        }
    }

    fn change(&mut self, handle: u64, change: Change) {
        let file = &mut self.files[self.handles[&handle]];
        change.apply(&mut file.now);
        file.pending.push(change);
    }

    fn share(&mut self, handle: u64, offset: u64, from: u64, from_offset: u64, len: u64) {
        let from = &self.files[self.handles[&from]];
        let len = if len == 0 { from.now.len - from_offset } else { len };
        let from = Arc::new(Shared { now: from.now.clone(), durable: from.durable.clone() });
        self.change(handle, Change::Share { offset, from, from_offset, len, doomed: false });
    }

    fn sync(&mut self, handle: u64, failed: bool) {
        let file = &mut self.files[self.handles[&handle]];
        if failed {
            for change in &mut file.pending {
                if let Change::Write { doomed, .. } | Change::Share { doomed, .. } = change {
                    *doomed = true;
                }
            }
            return;
        }
        self.syncs += usize::from(!file.pending.is_empty());
        for change in file.pending.drain(..) {
            match change {
                // An earlier sync has failed to write it, and Linux does not try again.
                Change::Write { offset, data, doomed: true } => {
                    file.durable.len = file.durable.len.max(offset + data.len() as u64);
                }
                Change::Share { offset, len, doomed: true, .. } => {
                    file.durable.len = file.durable.len.max(offset + len);
                }
                change => change.apply(&mut file.durable),
            }
        }
    }

    fn rename(&mut self, from: &Path, to: &Path) {
        let (Some((old, old_name)), Some((new, new_name))) = (self.parent(from), self.parent(to))
        else {
            return;
        };
        if let Some(node) = self.now[old].get(&old_name).copied() {
            self.name(new, vec![(old, old_name, None), (new, new_name, Some(node))]);
        }
    }

    fn name(&mut self, by: usize, sets: Vec<(usize, OsString, Option<Node>)>) {
        let change = NameChange { by, sets };
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    fn sync_folder(&mut self, path: &Path) {
        let Some(Node::Folder(folder)) = self.find(path) else { return };
        let (synced, pending) =
            std::mem::take(&mut self.pending).into_iter().partition(|change| change.by == folder);
        self.pending = pending;
        let synced: Vec<NameChange> = synced;
        self.syncs += usize::from(!synced.is_empty());
        for change in synced {
            change.apply(&mut self.durable);
        }
    }

    fn find(&self, path: &Path) -> Option<Node> {
        path.iter().try_fold(Node::Folder(0), |node, name| match node {
            Node::Folder(folder) => self.now[folder].get(name).copied(),
            Node::File(_) => None,
        })
    }

    fn parent(&self, path: &Path) -> Option<(usize, OsString)> {
        match self.find(path.parent()?)? {
            Node::Folder(folder) => Some((folder, path.file_name()?.to_owned())),
            Node::File(_) => None,
        }
    }
}

impl NameChange {
    fn apply(&self, folders: &mut Folders) {
        for (folder, name, node) in &self.sets {
            match node {
                Some(node) => drop(folders[*folder].insert(name.clone(), *node)),
                None => drop(folders[*folder].remove(name)),
            }
        }
    }
}

impl Change {
    fn apply(&self, content: &mut Sparse) {
        match self {
            Self::Write { offset, data, .. } => content.write(*offset, data),
            Self::SetLen(len) => content.set_len(*len),
            // Past the end there is nothing to punch, and the length stays.
            Self::Punch { offset, len } => content.punch(*offset, *len),
            Self::Share { offset, from, from_offset, len, .. } => {
                content.copy_from(*offset, &from.now, *from_offset, *len);
            }
        }
    }

    /// Some of its sectors, or of its shared blocks, which hold what their file had durable where it had more.
    fn apply_torn(&self, content: &mut Sparse, chance: &mut StdRng) {
        let share = chance.random_range(0.0..1.0);
        match self {
            Self::Write { offset, data, .. } => {
                let mut at = 0;
                while at < data.len() {
                    let to_border = SECTOR - (*offset as usize + at) % SECTOR;
                    let part = to_border.min(data.len() - at);
                    if chance.random_bool(share) {
                        content.write(offset + at as u64, &data[at..at + part]);
                    }
                    at += part;
                }
            }
            Self::Share { offset, from, from_offset, len, .. } => {
                for at in (0..*len).step_by(PAGE as usize) {
                    let from = if chance.random_bool(0.5) { &from.now } else { &from.durable };
                    if chance.random_bool(share) {
                        let part = PAGE.min(len - at);
                        content.copy_from(offset + at, from, from_offset + at, part);
                    }
                }
            }
            Self::SetLen(_) | Self::Punch { .. } => self.apply(content),
        }
    }
}

impl FileState {
    /// What is found of the file when only some of its changes got to the disk.
    fn some(&self, chance: &mut StdRng) -> Sparse {
        let mut content = self.durable.clone();
        if self.pending.is_empty() {
            return content;
        }
        let kept = [0.1, 0.5, 0.9][chance.random_range(0..3)];
        for change in &self.pending {
            if !chance.random_bool(kept) {
                continue;
            }
            if chance.random_bool(0.5) {
                change.apply(&mut content);
            } else {
                change.apply_torn(&mut content, chance);
            }
        }
        // The length may get to the disk before the data.
        if chance.random_bool(0.2) {
            content.len = content.len.max(self.now.len);
        }
        content
    }
}
