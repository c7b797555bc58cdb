//! Doing what a request asks for, and saying what came of it.

use std::{
    io,
    ops::Range,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use janus_proto::hash;

use super::{
    Overlay, Tells,
    connection::{Connection, Job, SMALL_BYTES},
    handshake::number,
    reply::{self, HEAD_ROOM},
    request::{Command, Refused, Request},
};
use crate::nbd::wire::errno;

/// Most of one chunk of data, but where the client wants all in one.
pub(super) const PIECE_BYTES: usize = 2 << 20;
/// Most extents of one context in an answer, steps and time to find them; the client asks on from there.
const MAX_EXTENTS: usize = 4096;
const MAX_STEPS: usize = 1 << 16;
const TELLING: Duration = Duration::from_secs(1);

impl Connection<'_> {
    /// Does a request; fails when its answer can't be sent.
    pub(super) fn answer(&self, job: &Job<'_>, buffer: &mut Vec<u8>) -> io::Result<()> {
        let Job { request, command, data, gathers, .. } = job;
        let gathers = *gathers;
        let range = request.range();
        let done = match (command, &self.export.overlay) {
            (Err(refused), _) => return self.refuse(request, refused, gathers),
            (Ok(Command::Read { whole }), _) => return self.read(request, *whole, gathers, buffer),
            (Ok(Command::Status { one }), _) => return self.status(request, *one),
            (Ok(Command::Cache), _) => self.warm(request, buffer),
            (Ok(Command::Write { fua }), Some(over)) => {
                over.write(data, range.start).and_then(|()| flush_if(*fua, over))
            }
            (Ok(Command::Zero { fua, may_punch }), Some(over)) => {
                over.zero(range, *may_punch).and_then(|()| flush_if(*fua, over))
            }
            (Ok(Command::Trim { fua }), Some(over)) => {
                over.discard(range).and_then(|()| flush_if(*fua, over))
            }
            (Ok(Command::Flush), Some(over)) => over.flush(),
            (Ok(_), _) => Err(io::ErrorKind::Unsupported.into()),
        };
        match done {
            Ok(()) => self.send(gathers, &reply::simple(request.cookie, 0)),
            Err(error) => self.fail(request, &error, None),
        }
    }

    fn refuse(
        &self,
        request: &Request,
        Refused(errno, words): &Refused,
        gathers: bool,
    ) -> io::Result<()> {
        if self.to.is_structured && request.wants_chunks() {
            self.send(gathers, &reply::error(request.cookie, *errno, words, None))
        } else {
            self.send(gathers, &reply::simple(request.cookie, *errno))
        }
    }

    /// The disk could not do it.
    fn fail(&self, request: &Request, error: &io::Error, offset: Option<u64>) -> io::Result<()> {
        let (offset_here, len) = (request.offset, request.len);
        tracing::warn!(%error, offset = offset_here, len, "an NBD request failed");
        let errno = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => errno::NO_SPACE,
            io::ErrorKind::FileTooLarge => errno::NO_SPACE,
            _ => errno::IO,
        };
        if self.to.is_structured && request.wants_chunks() {
            self.send(false, &reply::error(request.cookie, errno, &error.to_string(), offset))
        } else {
            self.send(false, &reply::simple(request.cookie, errno))
        }
    }

    fn read(
        &self,
        request: &Request,
        whole: bool,
        gathers: bool,
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let sent = if self.to.is_structured && !whole && request.len > SMALL_BYTES {
            self.read_in_chunks(request, buffer)
        } else {
            self.read_whole(request, gathers, buffer)
        };
        if buffer.capacity() > HEAD_ROOM + PIECE_BYTES {
            *buffer = Vec::new();
        }
        sent
    }

    /// Into one message, since once its head is sent nothing can fail any more.
    fn read_whole(&self, request: &Request, gathers: bool, buffer: &mut Vec<u8>) -> io::Result<()> {
        let Request { cookie, offset, len, .. } = *request;
        buffer.resize(HEAD_ROOM + len as usize, 0);
        match self.fill(&mut buffer[HEAD_ROOM..], offset) {
            Err(error) => self.fail(request, &error, None),
            Ok(()) if self.to.is_structured && hash::is_zero(&buffer[HEAD_ROOM..]) => {
                self.send(gathers, &reply::hole(cookie, offset, len, true))
            }
            Ok(()) if self.to.is_structured => {
                self.send(gathers, reply::data(buffer, cookie, offset, true))
            }
            Ok(()) => self.send(gathers, reply::simple_data(buffer, cookie)),
        }
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        for (at, piece) in (offset..).step_by(PIECE_BYTES).zip(buffer.chunks_mut(PIECE_BYTES)) {
            if at > offset && self.socket.is_gone() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.export.medium.read_exact_at(piece, at)?;
        }
        Ok(())
    }

    fn read_in_chunks(&self, request: &Request, buffer: &mut Vec<u8>) -> io::Result<()> {
        let (cookie, medium) = (request.cookie, &self.export.medium);
        let Range { start: mut at, end } = request.range();
        while at < end {
            let stretch = medium.stretch(at);
            let stop = stretch.end.clamp(at + 1, end);
            if stretch.hole {
                self.send(false, &reply::hole(cookie, at, (stop - at) as u32, stop == end))?;
                at = stop;
                continue;
            }
            let stop = stop.min(at + PIECE_BYTES as u64);
            buffer.resize(HEAD_ROOM + (stop - at) as usize, 0);
            if let Err(error) = medium.read_exact_at(&mut buffer[HEAD_ROOM..], at) {
                return self.fail(request, &error, Some(at));
            }
            self.send(false, reply::data(buffer, cookie, at, stop == end))?;
            at = stop;
        }
        Ok(())
    }

    /// Reads for later.
    fn warm(&self, request: &Request, buffer: &mut Vec<u8>) -> io::Result<()> {
        let Range { start: mut at, end } = request.range();
        while at < end && !self.is_stopping.load(Ordering::Relaxed) {
            let stretch = self.export.medium.stretch(at);
            let stop = stretch.end.clamp(at + 1, end);
            if stretch.hole {
                at = stop;
                continue;
            }
            let stop = stop.min(at + PIECE_BYTES as u64);
            buffer.resize(HEAD_ROOM + (stop - at) as usize, 0);
            self.export.medium.read_exact_at(&mut buffer[HEAD_ROOM..], at)?;
            at = stop;
        }
        Ok(())
    }

    fn status(&self, request: &Request, one: bool) -> io::Result<()> {
        let range = request.range();
        let most = if one { 1 } else { MAX_EXTENTS };
        for (nth, place) in self.agreed.contexts.iter().enumerate() {
            let Some((_, context)) = self.export.contexts.get(*place) else { continue };
            match extents(context.as_ref(), range.clone(), most) {
                Ok(found) => {
                    let is_last = nth + 1 == self.agreed.contexts.len();
                    let message = reply::extents(request.cookie, number(*place), &found, is_last);
                    self.send(false, &message)?;
                }
                Err(error) => return self.fail(request, &error, None),
            }
        }
        Ok(())
    }
}

fn flush_if(fua: bool, over: &Overlay) -> io::Result<()> {
    if fua { over.flush() } else { Ok(()) }
}

/// What a context tells of a range: at least of its beginning.
fn extents(context: &dyn Tells, range: Range<u64>, most: usize) -> io::Result<Vec<(u32, u32)>> {
    let until = Instant::now() + TELLING;
    let mut found: Vec<(u32, u32)> = Vec::new();
    let mut at = range.start;
    for _ in 0..MAX_STEPS {
        let (end, flags) = match context.tell(at) {
            Ok(told) => told,
            // The client learns of it when it asks from there.
            Err(_) if !found.is_empty() => break,
            Err(error) => return Err(error),
        };
        let end = end.clamp(at + 1, range.end);
        let len = (end - at) as u32;
        let is_full = found.len() == most;
        match found.last_mut() {
            Some((known, same)) if *same == flags => *known += len,
            _ if is_full => break,
            _ => found.push((len, flags)),
        }
        at = end;
        if at >= range.end || Instant::now() >= until {
            break;
        }
    }
    Ok(found)
}
