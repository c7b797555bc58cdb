//! One client after its handshake: requests in, answers out, several at once and in any order.
//!
//! Its threads take turns in reading requests. Whoever has read one that may have to wait for the disk lets the next thread
//! read and works on it; what needs no waiting is answered at once, without waking anybody. Threads are started when all others
//! are busy, at most [`limits::REQUESTS`]. A client that violates the frame of requests is left after the answers
//! that are under way: where its next request would begin nobody knows.

use std::{
    io,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{Builder, Scope},
};

use super::{
    Export,
    answers::PIECE_BYTES,
    handshake::Agreed,
    incoming::Incoming,
    limits,
    outgoing::Outgoing,
    request::{Abilities, Command, Refused, Request},
    room::{Held, Room},
    socket::Socket,
};
use crate::nbd::wire::{MAX_REQUEST_BYTES, errno};

/// What is no longer is answered at once, when it needs no waiting.
pub(super) const SMALL_BYTES: u32 = 64 << 10;
/// Stack of a thread: nothing here is deep.
const STACK_BYTES: usize = 512 << 10;

pub(super) struct Connection<'a> {
    pub(super) export: &'a Export,
    pub(super) socket: &'a Socket,
    pub(super) agreed: Agreed,
    pub(super) to: Abilities,
    pub(super) is_stopping: &'a AtomicBool,
    /// `None` when the client has ended.
    incoming: Mutex<Option<Incoming<'a>>>,
    outgoing: Outgoing<'a>,
    room: Room,
    threads: AtomicUsize,
    /// Threads that wait for their turn to read.
    idle: AtomicUsize,
}

/// A request, and what has come with it.
pub(super) struct Job<'a> {
    pub(super) request: Request,
    pub(super) command: Result<Command, Refused>,
    pub(super) data: Vec<u8>,
    /// Its answer may wait for those of the requests behind it.
    pub(super) gathers: bool,
    _held: Held<'a>,
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        export: &'a Export,
        socket: &'a Socket,
        incoming: Incoming<'a>,
        agreed: Agreed,
        is_stopping: &'a AtomicBool,
    ) -> Self {
        let to = Abilities {
            size_bytes: export.size_bytes(),
            is_writable: export.overlay.is_some(),
            is_structured: agreed.is_structured,
            has_contexts: !agreed.contexts.is_empty(),
        };
        Self {
            export,
            socket,
            agreed,
            to,
            is_stopping,
            incoming: Mutex::new(Some(incoming)),
            outgoing: Outgoing::new(socket),
            room: Room::new(limits::REQUEST_BYTES),
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
        }
    }

    /// Serves until the client leaves or is left.
    pub(super) fn serve(&self) {
        std::thread::scope(|scope| self.work(scope));
        self.socket.end();
    }

    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let mut buffer = Vec::new();
        while let Some(job) = self.next(&mut buffer) {
            self.call_another(scope);
            // A client that left so much behind must not keep its place until all of it is read.
            if self.socket.is_gone() || self.answer(&job, &mut buffer).is_err() {
                // Whoever reads finds the end then.
                self.socket.end();
            }
        }
    }

    /// Makes sure that somebody reads on.
    fn call_another<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let is_needed = self.idle.load(Ordering::Relaxed) == 0;
        if !is_needed || self.threads.fetch_add(1, Ordering::Relaxed) >= limits::REQUESTS {
            if is_needed {
                self.threads.fetch_sub(1, Ordering::Relaxed);
            }
            return;
        }
        let builder = Builder::new().name("nbd request".into()).stack_size(STACK_BYTES);
        if let Err(error) = builder.spawn_scoped(scope, move || self.work(scope)) {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "requests are answered one after the other");
        }
    }

    /// Reads requests and answers those that need no waiting, up to one that may need some.
    fn next(&self, buffer: &mut Vec<u8>) -> Option<Job<'_>> {
        self.idle.fetch_add(1, Ordering::Relaxed);
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::Relaxed);
        let ended = loop {
            let Some(reading) = &mut *incoming else { return None };
            let job = match self.receive(reading) {
                Ok(Some(job)) => job,
                Ok(None) => break None,
                Err(error) => break Some(error),
            };
            if !self.needs_no_waiting(&job) {
                // Here requests are in the client's order; those who work on them are not.
                if let Ok(Command::Read { .. }) = job.command {
                    let Range { start, end } = job.request.range();
                    self.export.medium.expect(start..end.min(start + PIECE_BYTES as u64));
                }
                // What was gathered doesn't wait for it.
                if self.outgoing.flush().is_err() {
                    self.socket.end();
                }
                return Some(job);
            }
            // Before the next wait for the client all has to be on its way.
            let job = Job { gathers: reading.has_more(), ..job };
            if let Err(error) = self.answer(&job, buffer) {
                break Some(error);
            }
        };
        *incoming = None;
        // The client may have gone.
        let _ = self.outgoing.flush();
        if let Some(error) = ended.filter(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
            tracing::debug!(%error, "an NBD client is left");
        }
        None
    }

    /// The next request with its data; `None` at the client's end.
    fn receive(&self, incoming: &mut Incoming<'_>) -> io::Result<Option<Job<'_>>> {
        let request = incoming.request()?;
        let mut command = request.check(&self.to);
        if command == Ok(Command::Disconnect) {
            return Ok(None);
        }
        if self.is_stopping.load(Ordering::Relaxed) {
            command = Err(Refused(errno::SHUTDOWN, "the server is being stopped"));
        }
        let data_bytes = request.data_bytes();
        if data_bytes > MAX_REQUEST_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write without an end"));
        }
        if data_bytes > 0 {
            self.outgoing.flush()?;
        }
        let held = self.room.take(self.cost(&request, &command));
        let mut data = Vec::new();
        match command {
            Ok(_) => data = incoming.bytes(data_bytes as usize)?,
            Err(_) => incoming.skip(data_bytes.into())?,
        }
        Ok(Some(Job { request, command, data, gathers: false, _held: held }))
    }

    /// Bytes held for a request at most.
    fn cost(&self, request: &Request, command: &Result<Command, Refused>) -> usize {
        let len = request.len as usize;
        match command {
            Ok(Command::Read { whole }) if *whole || !self.to.is_structured => len,
            Ok(Command::Write { .. }) => len,
            _ => len.min(PIECE_BYTES),
        }
    }

    fn needs_no_waiting(&self, job: &Job<'_>) -> bool {
        let request = &job.request;
        match job.command {
            Err(_) => true,
            Ok(Command::Read { .. }) => {
                request.len <= SMALL_BYTES && self.export.medium.is_near(request.range())
            }
            _ => false,
        }
    }

    pub(super) fn send(&self, gathers: bool, message: &[u8]) -> io::Result<()> {
        self.outgoing.send(message, gathers)
    }
}
