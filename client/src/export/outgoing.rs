//! Answers on their way to a client. Those of small requests that came together go together.

use std::{
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use super::socket::Socket;

/// Most that is gathered.
const MOST_BYTES: usize = 128 << 10;

#[derive(Debug)]
pub(super) struct Outgoing<'a> {
    socket: &'a Socket,
    gathered: Mutex<Vec<u8>>,
}

impl<'a> Outgoing<'a> {
    pub(super) fn new(socket: &'a Socket) -> Self {
        Self { socket, gathered: Mutex::default() }
    }

    /// Sends a message, after those that were gathered. With `gathers` it may stay until the next one or
    /// [`Outgoing::flush`].
    pub(super) fn send(&self, message: &[u8], gathers: bool) -> io::Result<()> {
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        let mut socket = self.socket;
        let is_small = gathered.len() + message.len() <= MOST_BYTES;
        if !gathers && gathered.is_empty() {
            return socket.write_all(message);
        }
        if is_small {
            gathered.extend_from_slice(message);
            if gathers {
                return Ok(());
            }
        }
        let sent = socket.write_all(&gathered);
        gathered.clear();
        if is_small { sent } else { sent.and_then(|()| socket.write_all(message)) }
    }

    /// Sends what was gathered.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        if gathered.is_empty() {
            return Ok(());
        }
        let mut socket = self.socket;
        let sent = socket.write_all(&gathered);
        gathered.clear();
        sent
    }
}
