//! A client's socket. Reading and writing block; [`Socket::end`] wakes whoever does.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Bounds each single wait; `None`: for ever.
    pub(super) fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.set_read_patience(patience)?;
        match self {
            Self::Tcp(tcp) => tcp.set_write_timeout(patience),
            Self::Unix(unix) => unix.set_write_timeout(patience),
        }
    }

    fn set_read_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.set_read_timeout(patience),
            Self::Unix(unix) => unix.set_read_timeout(patience),
        }
    }

    /// No more requests: what has arrived can still be read, and answers still go out.
    pub(super) fn end_requests(&self) {
        self.shutdown(Shutdown::Read);
    }

    /// The end in both directions.
    pub(super) fn end(&self) {
        self.shutdown(Shutdown::Both);
    }

    /// True when nobody will take an answer: the client has closed it, not only ended its side. TCP can't tell.
    pub(super) fn is_gone(&self) -> bool {
        let mut waited = match self {
            Self::Tcp(tcp) => [PollFd::new(tcp, PollFlags::empty())],
            Self::Unix(unix) => [PollFd::new(unix, PollFlags::empty())],
        };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = poll(&mut waited, Some(&now));
        polled.is_ok() && waited[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    fn shutdown(&self, how: Shutdown) {
        // The client may have gone already.
        let _ = match self {
            Self::Tcp(tcp) => tcp.shutdown(how),
            Self::Unix(unix) => unix.shutdown(how),
        };
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(tcp) => (&mut &*tcp).read(buffer),
            Socket::Unix(unix) => (&mut &*unix).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(tcp) => (&mut &*tcp).write(bytes),
            Socket::Unix(unix) => (&mut &*unix).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads until a time has come: a client that sends one byte now and then gets no more of it.
#[derive(Debug)]
pub(super) struct Timed<'a> {
    pub(super) socket: &'a Socket,
    pub(super) until: Option<Instant>,
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_patience(Some(left))?;
        }
        (&mut self.socket).read(buffer)
    }
}
