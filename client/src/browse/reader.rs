//! The process that reads a file system. It answers one question after the other and asks for bytes of its volume meanwhile;
//! it opens no file. It ends with its client, and when it needs more memory than [`MEMORY_BYTES`].

use std::{
    cell::RefCell,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    rc::Rc,
};

use janus_proto::hash::is_zero;
use prost::Message;
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};

use self::{blocks::Pipes, tree::Tree};
use super::{
    BrowseError, Entry,
    wire::{self, Failed, Open, Opened, Tag, Wanted},
};

mod blocks;
mod btrfs;
mod ext4;
mod fat;
mod ntfs;
mod raw_leaf;
mod tree;
mod xfs;

/// The name of the hidden command.
pub const COMMAND: &str = "file-system-reader";
/// Address space of the reader, its program included.
pub const MEMORY_BYTES: u64 = 2 << 30;
/// Bytes of a file that are read at once. More makes no sense, less costs btrfs a walk through all extents each time.
const PIECE_BYTES: usize = 1 << 20;
/// Zeros in such units are not sent.
const UNIT_BYTES: usize = 4096;
/// So many zeros are passed over without a word.
const QUIET_BYTES: u64 = 64 << 20;

/// Answers on standard output what standard input asks, until that ends.
pub fn run() -> ExitCode {
    confine();
    // A panic is told to the client, as an error.
    std::panic::set_hook(Box::new(|_| {}));
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn confine() {
    let limit = |most| Rlimit { current: Some(most), maximum: Some(most) };
    let _ = setrlimit(Resource::As, limit(MEMORY_BYTES));
    let _ = setrlimit(Resource::Core, limit(0));
    let _ = setrlimit(Resource::Fsize, limit(0));
    let _ = setrlimit(Resource::Nofile, limit(8));
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
}

fn serve() -> io::Result<()> {
    let pipes = Rc::new(RefCell::new(Pipes::new()));
    let mut question = Vec::new();
    let mut tree = None;
    loop {
        let tag = match pipes.borrow_mut().next(&mut question) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let answered = catch_unwind(AssertUnwindSafe(|| answer(tag, &question, &pipes, &mut tree)));
        let error = match answered {
            Ok(Ok(content)) => {
                pipes.borrow_mut().say(Tag::Done, &[&content])?;
                continue;
            }
            Ok(Err(error)) => error,
            Err(panic) => {
                // Nobody knows in what state it left its structures.
                let failed = Failed::from(BrowseError::Ended { what: panicked(&*panic) });
                return say_failed(&pipes, &failed);
            }
        };
        say_failed(&pipes, &error.into())?;
    }
}

fn say_failed(pipes: &RefCell<Pipes>, failed: &Failed) -> io::Result<()> {
    // Where the panic was in the middle of a frame the client finds out.
    match pipes.try_borrow_mut() {
        Ok(mut pipes) => pipes.say(Tag::Failed, &[&failed.encode_to_vec()]),
        Err(_) => Err(wire::wrong("the pipe is in use")),
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("it panicked: {}", text.unwrap_or("without a word"))
}

fn answer(
    tag: Tag,
    question: &[u8],
    pipes: &Rc<RefCell<Pipes>>,
    tree: &mut Option<Tree>,
) -> Result<Vec<u8>, BrowseError> {
    let nonsense = || BrowseError::Start { what: "a question that makes no sense".into() };
    if tag == Tag::Open {
        let open = Open::decode(question).map_err(|_| nonsense())?;
        let kind = wire::kind_of(&open.kind).ok_or_else(nonsense)?;
        let opened = Tree::open(kind, Rc::new(blocks::blocks(pipes.clone(), open.volume_bytes)))?;
        let said = Opened { most_folders: opened.most_folders(), label: opened.label() };
        *tree = Some(opened);
        return Ok(said.encode_to_vec());
    }
    let tree = tree.as_mut().ok_or_else(nonsense)?;
    let say = |entry: &Entry| say(pipes, Tag::Item, &[&entry.encode_to_vec()]);
    match tag {
        Tag::List => tree.list(question, &mut |entry| say(entry))?,
        Tag::Look => say(&tree.look(question)?)?,
        Tag::Read => read(tree, &Wanted::decode(question).map_err(|_| nonsense())?, pipes)?,
        _ => return Err(nonsense()),
    }
    Ok(Vec::new())
}

fn say(pipes: &RefCell<Pipes>, tag: Tag, pieces: &[&[u8]]) -> Result<(), BrowseError> {
    let told = pipes.borrow_mut().say(tag, pieces);
    told.map_err(|error| BrowseError::Ended { what: error.to_string() })
}

/// Sends what isn't zeros of a part of a file; then where it ended.
fn read(tree: &mut Tree, wanted: &Wanted, pipes: &Rc<RefCell<Pipes>>) -> Result<(), BrowseError> {
    let end = wanted.offset.saturating_add(wanted.len);
    let (mut at, mut told) = (wanted.offset, wanted.offset);
    let mut buffer = vec![0; PIECE_BYTES.min(wanted.len.max(1) as usize)];
    while at < end {
        let next = tree.next_data(&wanted.path, &wanted.stream, at)?.max(at).min(end);
        if next > at {
            at = next;
            continue;
        }
        // Pieces begin at multiples of their size, as compressed extents do.
        let room = (PIECE_BYTES as u64 - at % PIECE_BYTES as u64).min(end - at) as usize;
        let room = room.min(buffer.len());
        let count = tree.read(&wanted.path, &wanted.stream, at, &mut buffer[..room])?;
        if count == 0 {
            break;
        }
        if send(pipes, at, &buffer[..count])? || at - told >= QUIET_BYTES {
            told = at + count as u64;
            say(pipes, Tag::Reached, &[&told.to_le_bytes()])?;
        }
        at += count as u64;
    }
    say(pipes, Tag::Reached, &[&at.to_le_bytes()])
}

/// Sends the parts of `bytes` that aren't zeros; true when there was one.
fn send(pipes: &RefCell<Pipes>, offset: u64, bytes: &[u8]) -> Result<bool, BrowseError> {
    /// What a frame has room for beside the offset.
    const ROOM: usize = wire::MAX_BYTES as usize / 2;
    let mut at = 0;
    let mut sent = false;
    while at < bytes.len() {
        let unit = |at: usize| &bytes[at..(at + UNIT_BYTES).min(bytes.len())];
        if is_zero(unit(at)) {
            at += UNIT_BYTES;
            continue;
        }
        let mut end = at;
        while end < bytes.len() && end - at < ROOM && !is_zero(unit(end)) {
            end += UNIT_BYTES;
        }
        let place = (offset + at as u64).to_le_bytes();
        say(pipes, Tag::Data, &[&place, &bytes[at..end.min(bytes.len())]])?;
        (at, sent) = (end, true);
    }
    Ok(sent)
}

impl Pipes {
    /// Says it at once.
    fn say(&mut self, tag: Tag, pieces: &[&[u8]]) -> io::Result<()> {
        wire::write(&mut self.output, tag, pieces)?;
        // Lists are told in many small frames: these wait for one another.
        if tag == Tag::Item { Ok(()) } else { self.output.flush() }
    }
}
