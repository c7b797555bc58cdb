//! A volume whose file system is read by a process of its own, and what that process may cost.
//!
//! It is served with bytes of its volume and of nothing else. It is ended when it says nothing for [`Bounds::silence`] (the
//! time that the disk takes isn't counted) or wants more bytes for one answer than any honest one needs. The question that it
//! could not answer fails; the next one starts another process, a few times.

use std::{
    io::{self, BufReader, BufWriter, Read, Write},
    ops::Range,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio_util::sync::CancellationToken;

use super::{
    BrowseError, Entry, reader,
    wire::{self, Failed, Open, Opened, Tag, Wanted},
};
use crate::{fs::FileSystemKind, source::medium::Medium};

/// What a reader may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest time between two words of it.
    pub silence: Duration,
    /// Bytes that it may ask for without giving any answer: folders of millions of files need many.
    pub unanswered_bytes: u64,
    /// How often it may be started.
    pub starts: u32,
    /// A file may have so many bytes beside 64 times those of its volume. Holes are passed over by reading zeros, 5 to
    /// 10 GiB a second, and a damaged size must not make that last for ever.
    pub hole_bytes: u64,
}

/// What a volume may be larger by than it is, in one file.
const HOLES: u64 = 64;

impl Default for Bounds {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(30),
            unanswered_bytes: 16 << 30,
            starts: 16,
            hole_bytes: 4 << 40,
        }
    }
}

/// Memory that the answer to one list may take.
const MOST_LIST_BYTES: usize = 1 << 30;
/// How often a user who wants to go is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// Takes what the reader says on the way to its answer.
type Each<'a> = &'a mut dyn FnMut(Tag, &[u8]) -> Result<(), BrowseError>;

/// Where a volume is.
#[derive(Debug, Clone)]
pub struct Window {
    /// Its disk.
    pub medium: Arc<dyn Medium>,
    /// Its bytes there.
    pub range: Range<u64>,
}

/// A volume, opened to be looked at.
#[derive(Debug)]
pub struct Volume {
    program: PathBuf,
    window: Window,
    kind: FileSystemKind,
    bounds: Bounds,
    stop: CancellationToken,
    process: Option<Process>,
    starts: u32,
    opened: Opened,
}

/// A part of a file, in order.
#[derive(Debug, Clone, Copy)]
pub enum Piece<'a> {
    /// Bytes at their offset; between pieces are zeros.
    Data(u64, &'a [u8]),
    /// Zeros until here.
    Zeros(u64),
}

impl Volume {
    /// Opens a volume; `program` is that of the client.
    ///
    /// # Errors
    /// When its file system isn't known here, is damaged, or can't be read.
    pub fn open(
        program: PathBuf,
        window: Window,
        kind: FileSystemKind,
        bounds: Bounds,
        stop: CancellationToken,
    ) -> Result<Self, BrowseError> {
        let (process, starts, opened) = (None, 0, Opened::default());
        let mut volume = Self { program, window, kind, bounds, stop, process, starts, opened };
        volume.start()?;
        Ok(volume)
    }

    /// More folders than this it can't have; 0: nobody knows.
    pub fn most_folders(&self) -> u64 {
        self.opened.most_folders
    }

    /// What the file system itself says it is called.
    pub fn label(&self) -> &str {
        &self.opened.label
    }

    /// What file system it has.
    pub fn kind(&self) -> FileSystemKind {
        self.kind
    }

    /// What is in the folder at `path`, by name.
    ///
    /// # Errors
    /// When there is none or it can't be read.
    pub fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>, BrowseError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        self.ask(Tag::List, path, &mut |tag, content| {
            bytes += content.len() + size_of::<Entry>();
            let entry = item(tag, content)?;
            if bytes > MOST_LIST_BYTES {
                return Err(BrowseError::unsupported("a folder with so many names"));
            }
            entries.push(entry);
            Ok(())
        })?;
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    /// What is at `path`.
    ///
    /// # Errors
    /// When there is nothing or it can't be read.
    pub fn look(&mut self, path: &[u8]) -> Result<Entry, BrowseError> {
        let mut found = None;
        self.ask(Tag::Look, path, &mut |tag, content| {
            found = Some(item(tag, content)?);
            Ok(())
        })?;
        found.ok_or_else(|| BrowseError::unknown(path))
    }

    /// Reads a part of the file at `path`, or of one of its streams; returns where that part ended, which is before its end where the file
    /// does.
    ///
    /// # Errors
    /// When it can't be read, or `take` fails.
    pub fn read(
        &mut self,
        path: &[u8],
        stream: &str,
        part: Range<u64>,
        take: &mut dyn FnMut(Piece<'_>) -> Result<(), BrowseError>,
    ) -> Result<u64, BrowseError> {
        let volume_bytes = self.window.range.end - self.window.range.start;
        if part.end > volume_bytes.saturating_mul(HOLES).saturating_add(self.bounds.hole_bytes) {
            let what = format!("a file of {} bytes on a volume of {volume_bytes}", part.end);
            return Err(BrowseError::Unsupported { what });
        }
        let (offset, len) = (part.start, part.end.saturating_sub(part.start));
        let wanted = Wanted { path: path.to_vec(), stream: stream.to_owned(), offset, len };
        let mut at = offset;
        self.ask(Tag::Read, &wanted.encode_to_vec(), &mut |tag, content| {
            let strange = || BrowseError::Ended { what: "it told parts out of order".into() };
            let (place, bytes) = content.split_first_chunk().ok_or_else(strange)?;
            let place = u64::from_le_bytes(*place);
            let end = place.checked_add(bytes.len() as u64).ok_or_else(strange)?;
            if place < at || end > part.end {
                return Err(strange());
            }
            at = end;
            match tag {
                Tag::Data => take(Piece::Data(place, bytes)),
                Tag::Reached if bytes.is_empty() => take(Piece::Zeros(place)),
                _ => Err(strange()),
            }
        })?;
        Ok(at)
    }

    /// Asks, with another process where the last one has ended.
    fn ask(&mut self, tag: Tag, question: &[u8], each: Each<'_>) -> Result<(), BrowseError> {
        if self.process.is_none() {
            self.start()?;
        }
        self.ask_once(tag, question, each).map(drop)
    }

    fn start(&mut self) -> Result<(), BrowseError> {
        if self.starts >= self.bounds.starts {
            let what = format!("it has been started {} times", self.starts);
            return Err(BrowseError::Ended { what });
        }
        self.starts += 1;
        let fails = |error: io::Error| BrowseError::Start { what: error.to_string() };
        self.process = Some(Process::start(&self.program, &self.stop).map_err(fails)?);
        let kind = wire::name_of(self.kind);
        let kind = kind.ok_or_else(|| BrowseError::unsupported(self.kind.to_string()))?;
        let volume_bytes = self.window.range.end - self.window.range.start;
        let open = Open { kind: kind.into(), volume_bytes }.encode_to_vec();
        let opened = self.ask_once(Tag::Open, &open, &mut |_, _| Ok(()))?;
        let opened = Opened::decode(&*opened);
        self.opened = opened.map_err(|_| BrowseError::Ended { what: "it said nonsense".into() })?;
        Ok(())
    }

    /// Returns what the last word holds. Whoever fails leaves the process in the middle of something, or dead: it is ended.
    fn ask_once(
        &mut self,
        tag: Tag,
        question: &[u8],
        each: Each<'_>,
    ) -> Result<Vec<u8>, BrowseError> {
        let Some(mut process) = self.process.take() else {
            return Err(BrowseError::Start { what: "it is not there".into() });
        };
        let mut refused = None;
        let answered =
            process.converse(tag, question, &self.window, &self.bounds, &mut refused, each);
        let error = match answered {
            Ok(Ok(content)) => {
                self.process = Some(process);
                return Ok(content);
            }
            Ok(Err(error)) => {
                if !matches!(error, BrowseError::Ended { .. }) {
                    self.process = Some(process);
                }
                error
            }
            Err(error) => error,
        };
        // A library may say that it could not read, but not why.
        Err(refused.map_or(error, |what| BrowseError::Read { what }))
    }
}

fn item(tag: Tag, content: &[u8]) -> Result<Entry, BrowseError> {
    let strange = || BrowseError::Ended { what: "it said something else than a name".into() };
    if tag != Tag::Item {
        return Err(strange());
    }
    Entry::decode(content).map_err(|_| strange())
}

/// A running reader.
#[derive(Debug)]
struct Process {
    child: Child,
    input: BufWriter<ChildStdin>,
    output: BufReader<Timed>,
}

impl Process {
    fn start(program: &PathBuf, stop: &CancellationToken) -> io::Result<Self> {
        let mut child = Command::new(program)
            .arg(reader::COMMAND)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let missing = || io::Error::other("no pipe");
        let input = BufWriter::new(child.stdin.take().ok_or_else(missing)?);
        let output = child.stdout.take().ok_or_else(missing)?;
        let output = Timed { output, until: Instant::now(), stop: stop.clone() };
        Ok(Self { child, input, output: BufReader::with_capacity(128 << 10, output) })
    }

    /// Asks and serves until there is an answer. The inner error is the reader's own: it goes on living.
    fn converse(
        &mut self,
        tag: Tag,
        question: &[u8],
        window: &Window,
        bounds: &Bounds,
        refused: &mut Option<String>,
        each: Each<'_>,
    ) -> Result<Result<Vec<u8>, BrowseError>, BrowseError> {
        self.say(tag, question).map_err(|error| self.ended(&error))?;
        let mut content = Vec::new();
        let mut unanswered = 0;
        loop {
            self.output.get_mut().until = Instant::now() + bounds.silence;
            let tag = wire::read(&mut self.output, &mut content);
            match tag.map_err(|error| self.ended(&error))? {
                Tag::Want => {
                    unanswered += self.serve(&content, window, refused)?;
                    if unanswered > bounds.unanswered_bytes {
                        let what = format!("it read {unanswered} bytes without an answer");
                        return Err(BrowseError::Ended { what });
                    }
                }
                Tag::Done => return Ok(Ok(content)),
                Tag::Failed => {
                    let failed = Failed::decode(&*content);
                    let strange = |_| BrowseError::Ended { what: "it said nonsense".into() };
                    return Ok(Err(failed.map_err(strange)?.into()));
                }
                tag => {
                    unanswered = 0;
                    each(tag, &content)?;
                }
            }
        }
    }

    /// Answers with bytes of the volume; returns how many.
    fn serve(
        &mut self,
        wanted: &[u8],
        window: &Window,
        refused: &mut Option<String>,
    ) -> Result<u64, BrowseError> {
        let strange = || BrowseError::Ended { what: "it wants what its volume hasn't".into() };
        let (offset, len) = wanted.split_first_chunk().ok_or_else(strange)?;
        let len = u32::from_le_bytes(*len.first_chunk().ok_or_else(strange)?);
        let start = u64::from_le_bytes(*offset).checked_add(window.range.start);
        let start = start.ok_or_else(strange)?;
        let end = start.checked_add(len.into()).ok_or_else(strange)?;
        if len > wire::MAX_BYTES || end > window.range.end {
            return Err(strange());
        }
        let mut bytes = vec![0; len as usize];
        let said = match window.medium.read_exact_at(&mut bytes, start) {
            Ok(()) => self.say(Tag::Bytes, &bytes),
            Err(error) => {
                let what = error.to_string();
                let said = self.say(Tag::Refused, what.as_bytes());
                refused.get_or_insert(what);
                said
            }
        };
        said.map_err(|error| self.ended(&error))?;
        Ok(u64::from(len))
    }

    fn say(&mut self, tag: Tag, content: &[u8]) -> io::Result<()> {
        wire::write(&mut self.input, tag, &[content])?;
        self.input.flush()
    }

    fn ended(&mut self, error: &io::Error) -> BrowseError {
        let what = match error.kind() {
            io::ErrorKind::ConnectionAborted => {
                return BrowseError::Read { what: "interrupted".into() };
            }
            io::ErrorKind::TimedOut => "it said nothing for too long".to_owned(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => match self.child.wait() {
                Ok(status) => format!("it ended by itself: {status}"),
                Err(error) => error.to_string(),
            },
            _ => error.to_string(),
        };
        BrowseError::Ended { what }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It holds nothing that could be lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the reader says, waited for until a time, or until the user wants to go.
#[derive(Debug)]
struct Timed {
    output: ChildStdout,
    until: Instant,
    stop: CancellationToken,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.stop.is_cancelled() {
                // Not `Interrupted`, which would be tried again.
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let left = self.until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left.min(LOOK)).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(&self.output, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.output.read(buffer),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
