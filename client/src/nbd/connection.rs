//! One connection: many requests at once, each waited for by its own thread.
//!
//! Whoever waits while nobody reads, reads for all: a chunk goes to the request that its cookie names, and the reader
//! stops when its own request is answered. The first thing that goes wrong ends the connection for all of them.

use std::{
    collections::HashMap,
    os::unix::net::UnixStream,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    NbdError,
    handshake::{Agreed, agree},
    pending::{Extents, Pending},
    stream::Stream,
    uri::Uri,
    wire::{REQUEST_MAGIC, SIMPLE_MAGIC, STRUCTURED_MAGIC, be16, be32, be64, command},
};

/// Buffers kept for later requests.
const SPARE_BUFFERS: usize = 8;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) agreed: Agreed,
    stream: Stream,
    patience: Duration,
    /// Held while a request is written.
    writing: Mutex<()>,
    shared: Mutex<Shared>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Shared {
    pending: HashMap<u64, Pending>,
    answered: HashMap<u64, Pending>,
    next_cookie: u64,
    /// Some thread reads.
    is_read: bool,
    broken: Option<NbdError>,
    spare: Vec<Vec<u8>>,
}

impl Connection {
    /// Connects and agrees on an export.
    pub(super) fn open(uri: &Uri, patience: Duration) -> Result<Self, NbdError> {
        Self::agree(Stream::connect(&uri.place, patience)?, uri, patience)
    }

    /// The same where the connection is there already.
    pub(super) fn over(
        socket: UnixStream,
        uri: &Uri,
        patience: Duration,
    ) -> Result<Self, NbdError> {
        Self::agree(Stream::over(socket, patience)?, uri, patience)
    }

    fn agree(stream: Stream, uri: &Uri, patience: Duration) -> Result<Self, NbdError> {
        let agreed = agree(&stream, &uri.export, Instant::now() + patience)?;
        // A stray reply of some other connection must not fit.
        let next_cookie = uuid::Uuid::new_v4().as_u64_pair().1;
        let shared = Mutex::new(Shared { next_cookie, ..Shared::default() });
        let (writing, moved) = (Mutex::new(()), Condvar::new());
        Ok(Self { agreed, stream, patience, writing, shared, moved })
    }

    /// True when no request can be answered any more.
    pub(super) fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    /// Fills `buffer`; range and length fit the server's units and limits.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), NbdError> {
        let mut room = self.lock().spare.pop().unwrap_or_default();
        room.resize(buffer.len(), 0);
        let mut answered = self.ask(command::READ, Pending::read(offset, room))?;
        let data = answered.take_data()?;
        buffer.copy_from_slice(&data);
        let mut shared = self.lock();
        if shared.spare.len() < SPARE_BUFFERS {
            shared.spare.push(data);
        }
        Ok(())
    }

    /// What the agreed contexts tell of a range, or of its beginning.
    pub(super) fn block_status(&self, offset: u64, len: u32) -> Result<Extents, NbdError> {
        let contexts = self.agreed.contexts.iter().map(|(id, _)| *id).collect();
        let mut answered = self.ask(
            command::BLOCK_STATUS,
            Pending::status(offset, len, self.agreed.size_bytes, contexts),
        )?;
        answered.take_extents()
    }

    fn ask(&self, command: u16, pending: Pending) -> Result<Pending, NbdError> {
        let until = Instant::now() + self.patience;
        let (offset, len) = (pending.offset(), pending.len());
        let cookie = {
            let mut shared = self.lock();
            if let Some(error) = &shared.broken {
                return Err(error.copy());
            }
            let cookie = shared.next_cookie;
            shared.next_cookie = cookie.wrapping_add(1);
            shared.pending.insert(cookie, pending);
            cookie
        };
        let written = {
            let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            self.stream.write(&request(command, cookie, offset, len))
        };
        match written.and_then(|()| self.wait(cookie, until)) {
            Ok(answered) => Ok(answered),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn wait(&self, cookie: u64, until: Instant) -> Result<Pending, NbdError> {
        let mut shared = self.lock();
        loop {
            if let Some(answered) = shared.answered.remove(&cookie) {
                return Ok(answered);
            }
            if let Some(error) = &shared.broken {
                return Err(error.copy());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NbdError::Silent);
            }
            if shared.is_read {
                let waited = self.moved.wait_timeout(shared, left);
                shared = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            shared.is_read = true;
            drop(shared);
            let read = self.chunk(until);
            shared = self.lock();
            shared.is_read = false;
            self.moved.notify_all();
            read?;
        }
    }

    /// Reads one chunk or simple reply, whosever it is.
    fn chunk(&self, until: Instant) -> Result<(), NbdError> {
        let head: [u8; 16] = self.stream.array(until)?;
        let (cookie, structured) = match be32(&head, 0) {
            SIMPLE_MAGIC if !self.agreed.structured => (be64(&head, 8), false),
            STRUCTURED_MAGIC if self.agreed.structured => (be64(&head, 8), true),
            magic => {
                return Err(NbdError::Protocol(format!("a reply that begins with {magic:#x}")));
            }
        };
        let unknown = || NbdError::Protocol("a reply to a request that was not made".into());
        let mut pending = self.lock().pending.remove(&cookie).ok_or_else(unknown)?;
        let is_last = if structured {
            let length = u32::from_be_bytes(self.stream.array(until)?);
            let (flags, kind) = (be16(&head, 4), be16(&head, 6));
            pending.take_chunk(flags, kind, length, &self.stream, until)?
        } else {
            pending.take_simple(be32(&head, 4), &self.stream, until)?;
            true
        };
        let mut shared = self.lock();
        if is_last {
            shared.answered.insert(cookie, pending);
        } else {
            shared.pending.insert(cookie, pending);
        }
        Ok(())
    }

    /// The end of the connection; returns the first reason.
    fn fail(&self, error: NbdError) -> NbdError {
        self.stream.end();
        let first = self.lock().broken.get_or_insert(error).copy();
        self.moved.notify_all();
        first
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request without flags.
fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
    request.extend(0u16.to_be_bytes());
    request.extend(command.to_be_bytes());
    request.extend(cookie.to_be_bytes());
    request.extend(offset.to_be_bytes());
    request.extend(len.to_be_bytes());
    request
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.is_broken() {
            // Politeness only.
            let _ = self.stream.write(&request(command::DISCONNECT, 0, 0, 0));
        }
        self.stream.end();
    }
}
