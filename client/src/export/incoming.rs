//! What comes from a client, buffered: small requests that were sent together are read together.

use std::{
    io::{self, BufReader, Read},
    time::Instant,
};

use super::{
    request::{HEAD_BYTES, Request},
    socket::{Socket, Timed},
};

/// More than a thousand requests without data.
const BUFFER_BYTES: usize = 32 << 10;

#[derive(Debug)]
pub(super) struct Incoming<'a> {
    reader: BufReader<Timed<'a>>,
}

impl<'a> Incoming<'a> {
    /// Reading fails from `until` on.
    pub(super) fn new(socket: &'a Socket, until: Instant) -> Self {
        let timed = Timed { socket, until: Some(until) };
        Self { reader: BufReader::with_capacity(BUFFER_BYTES, timed) }
    }

    /// From now on it waits for ever.
    pub(super) fn be_patient(&mut self) -> io::Result<()> {
        let timed = self.reader.get_mut();
        timed.until = None;
        timed.socket.set_patience(None)
    }

    /// True when the next request is here already.
    pub(super) fn has_more(&self) -> bool {
        self.reader.buffer().len() >= HEAD_BYTES
    }

    pub(super) fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// As many bytes as the caller has made sure may be kept.
    pub(super) fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads bytes that nobody wants.
    pub(super) fn skip(&mut self, len: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.reader).take(len), &mut io::sink())?;
        if skipped == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// The next request.
    pub(super) fn request(&mut self) -> io::Result<Request> {
        Request::parse(&self.array()?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "this is no request"))
    }
}
