//! Trees out of a volume into a folder here.
//!
//! Nothing is written outside of that folder, whatever the volume says: names that aren't any are refused, every folder on the way is
//! opened without following links (`target.rs`), files are only made anew, and links are made but never followed. What can't be copied is told
//! with its reason, and the rest goes on; a file that could not be read to its end is removed again. Devices, pipes and sockets
//! are told, not made. Extended attributes, ACLs and alternate streams are not copied.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_util::sync::CancellationToken;

use self::target::{Target, TargetError};
use super::{BrowseError, Entry, Kind, Volume, entry::check_name, shown, volume::Piece};
use crate::progress::Progress;

mod target;

pub use self::target::Owner;

/// Folders in folders.
const MOST_DEPTH: usize = 512;
/// Reasons that are kept; the others are counted.
const MOST_REASONS: usize = 1000;
/// What is asked for at once; a file that is longer is asked for again.
const READ_BYTES: u64 = 1 << 40;

/// Why a copy ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// What is to be copied can't be had.
    #[error(transparent)]
    Browse(#[from] BrowseError),
    /// Where to can't be written.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// It is a folder.
    #[error("{path} is a folder; copy it with all that is in it by -r")]
    Folder {
        /// Its path.
        path: String,
    },
    /// Asked to stop.
    #[error("interrupted; what was copied until now is there")]
    Interrupted,
    /// Folders contain each other.
    #[error("the file system is damaged: it has more folders than there can be")]
    Circle,
}

/// What is wished for.
#[derive(Debug, Clone, Copy)]
pub struct Wishes {
    /// Folders too, with all that is in them.
    pub recursive: bool,
    /// In place of files that exist.
    pub force: bool,
    /// Whose files they become.
    pub owner: Owner,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Report {
    /// Files written.
    pub files: u64,
    /// Names that were made for files that were written before.
    pub hard_links: u64,
    /// Folders made, or found there.
    pub folders: u64,
    /// Links made.
    pub links: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Of these, bytes that were written: the rest are holes.
    pub written_bytes: u64,
    /// Alternate streams that were left out.
    pub streams: u64,
    /// Files whose times or owners are not known.
    pub without_times: u64,
    /// What was not copied, and why.
    pub skipped: Vec<(String, String)>,
    /// How many those are.
    pub skipped_count: u64,
}

impl Report {
    fn skip(&mut self, path: &[u8], reason: impl ToString) {
        self.skipped_count += 1;
        if self.skipped.len() < MOST_REASONS {
            self.skipped.push((shown(path), reason.to_string()));
        }
    }
}

/// A copy.
pub struct Copy<'a> {
    volume: &'a mut Volume,
    wishes: Wishes,
    progress: Arc<Progress>,
    stop: CancellationToken,
    target: Target,
    report: Report,
    total_bytes: u64,
    /// The first name of each file that may have more.
    first_names: HashMap<(u64, u64), PathBuf>,
    seen_folders: HashSet<(u64, u64)>,
    entered: u64,
}

/// What is to be done next.
enum Step {
    Enter(Place),
    Leave(Place),
}

/// A folder on the volume, and where it goes below the target.
struct Place {
    path: Vec<u8>,
    to: PathBuf,
    entry: Entry,
    depth: usize,
}

impl<'a> Copy<'a> {
    /// Copies what is at `path` on the volume into the folder `to`, or as `to` where that isn't one.
    ///
    /// # Errors
    /// When nothing could be begun, or nothing more can be written.
    pub fn run(
        volume: &'a mut Volume,
        path: &[u8],
        to: &Path,
        wishes: Wishes,
        progress: Arc<Progress>,
        stop: CancellationToken,
    ) -> Result<Report, CopyError> {
        let entry = volume.look(path)?;
        if entry.kind() == Kind::Folder && !wishes.recursive {
            return Err(CopyError::Folder { path: shown(path) });
        }
        let own = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let (target, name) = Target::open(to, own, wishes.owner)?;
        let mut copy = Self {
            volume,
            wishes,
            progress,
            stop,
            target,
            report: Report::default(),
            total_bytes: 0,
            first_names: HashMap::new(),
            seen_folders: HashSet::new(),
            entered: 0,
        };
        copy.expect(std::slice::from_ref(&entry));
        let name = PathBuf::from(OsString::from_vec(name));
        if entry.kind() == Kind::Folder {
            copy.tree(Place { path: path.to_vec(), to: name, entry, depth: 0 })?;
        } else {
            copy.one(path, &name, &entry)?;
        }
        Ok(copy.report)
    }

    fn tree(&mut self, first: Place) -> Result<(), CopyError> {
        let mut steps = vec![Step::Enter(first)];
        while let Some(step) = steps.pop() {
            match step {
                Step::Enter(place) => self.enter(place, &mut steps)?,
                // After all that is in it, which would change its time.
                Step::Leave(place) => {
                    if let Err(error) = self.target.finish_folder(&place.to, &place.entry) {
                        self.problem(&place.path, error)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn enter(&mut self, place: Place, steps: &mut Vec<Step>) -> Result<(), CopyError> {
        self.entered += 1;
        let most = self.volume.most_folders();
        if most > 0 && self.entered > most {
            return Err(CopyError::Circle);
        }
        if place.depth > MOST_DEPTH {
            self.report.skip(&place.path, "folders lie in each other too deep");
            return Ok(());
        }
        if place.entry.id().is_some_and(|id| !self.seen_folders.insert(id)) {
            self.report
                .skip(&place.path, "the file system is damaged: this folder is in two places");
            return Ok(());
        }
        // Before it is made: what can't be listed leaves no empty folder that looks like a copy.
        let entries = match self.volume.list(&place.path) {
            Ok(entries) => entries,
            Err(error) => {
                self.check_stop()?;
                self.report.skip(&place.path, error);
                return Ok(());
            }
        };
        if let Err(error) = self.target.make_folder(&place.to, &place.entry) {
            return self.problem(&place.path, error);
        }
        self.report.folders += 1;
        self.expect(&entries);
        let (path, to, depth) = (place.path.clone(), place.to.clone(), place.depth + 1);
        steps.push(Step::Leave(place));
        for entry in entries {
            self.check_stop()?;
            let below = join(&path, &entry.name);
            if let Err(reason) = check_name(&entry.name) {
                self.report.skip(&below, format!("the file system is damaged: {reason}"));
                continue;
            }
            let to = to.join(OsString::from_vec(entry.name.clone()));
            match entry.kind() {
                Kind::Folder => steps.push(Step::Enter(Place { path: below, to, entry, depth })),
                _ => self.one(&below, &to, &entry)?,
            }
        }
        Ok(())
    }

    /// Anything but a folder.
    fn one(&mut self, path: &[u8], to: &Path, entry: &Entry) -> Result<(), CopyError> {
        self.report.streams += entry.streams.len() as u64;
        let done = match entry.kind() {
            _ if !entry.problem.is_empty() => {
                self.report.skip(path, &entry.problem);
                return Ok(());
            }
            Kind::File => self.file(path, to, entry),
            Kind::Link => self.link(to, entry),
            Kind::Folder | Kind::Unknown | Kind::Device | Kind::Pipe | Kind::Socket => {
                self.report.skip(path, format!("it is a {}", entry.kind().name()));
                return Ok(());
            }
        };
        if entry.modified_seconds.is_none() {
            self.report.without_times += 1;
        }
        match done {
            Ok(()) => Ok(()),
            Err(CopyError::Target(error)) => self.problem(path, error),
            Err(CopyError::Browse(error)) => {
                self.check_stop()?;
                self.report.skip(path, error);
                Ok(())
            }
            Err(other) => Err(other),
        }
    }

    fn link(&mut self, to: &Path, entry: &Entry) -> Result<(), CopyError> {
        self.target.make_link(to, entry, self.wishes.force)?;
        self.report.links += 1;
        Ok(())
    }

    fn file(&mut self, path: &[u8], to: &Path, entry: &Entry) -> Result<(), CopyError> {
        let id = entry.id().filter(|_| entry.names != 1);
        if let Some(first) = id.and_then(|id| self.first_names.get(&id)) {
            self.target.make_name(first, to, self.wishes.force)?;
            self.report.hard_links += 1;
            self.progress.advance(entry.size_bytes);
            return Ok(());
        }
        let mut file = self.target.make_file(to, entry, self.wishes.force)?;
        let (mut at, mut failed) = (0, None);
        while at < entry.size_bytes {
            let part = at..entry.size_bytes.min(at.saturating_add(READ_BYTES));
            let (progress, mut told) = (&self.progress, at);
            let mut take = |piece: Piece<'_>| {
                let end = match piece {
                    Piece::Data(offset, bytes) => {
                        file.write(offset, bytes)?;
                        offset + bytes.len() as u64
                    }
                    Piece::Zeros(end) => end,
                };
                progress.advance(end.saturating_sub(told));
                told = end;
                Ok(())
            };
            match self.volume.read(path, "", part.clone(), &mut take) {
                Ok(end) if end == part.end => at = end,
                Ok(end) => {
                    let what = format!("it ends at byte {end} of {}", entry.size_bytes);
                    failed = Some(BrowseError::Damaged { what });
                    break;
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let (written_bytes, trouble) = (file.written_bytes(), file.take_trouble());
        if let Some(trouble) = trouble {
            file.remove();
            return Err(trouble.into());
        }
        if let Some(error) = failed {
            file.remove();
            return Err(error.into());
        }
        file.finish(entry)?;
        self.report.files += 1;
        self.report.bytes += entry.size_bytes;
        self.report.written_bytes += written_bytes;
        if let Some(id) = id {
            self.first_names.insert(id, to.to_owned());
        }
        Ok(())
    }

    /// Goes on after a failure of the target that concerns one file only.
    fn problem(&mut self, path: &[u8], error: TargetError) -> Result<(), CopyError> {
        if error.is_final() {
            return Err(error.into());
        }
        self.report.skip(path, error);
        Ok(())
    }

    fn check_stop(&self) -> Result<(), CopyError> {
        if self.stop.is_cancelled() { Err(CopyError::Interrupted) } else { Ok(()) }
    }

    fn expect(&mut self, entries: &[Entry]) {
        let files = entries.iter().filter(|entry| entry.kind() == Kind::File);
        let more = files.fold(0u64, |sum, entry| sum.saturating_add(entry.size_bytes));
        self.total_bytes = self.total_bytes.saturating_add(more);
        self.progress.set_total(self.total_bytes);
    }
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    [folder.strip_suffix(b"/").unwrap_or(folder), b"/", name].concat()
}
