//! A socket to an NBD server: every wait on it ends.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{NbdError, uri::Place};

/// Pause before a server that has no place for a connection is asked again.
const PAUSE: Duration = Duration::from_millis(20);

/// The socket; both directions may be used at once, each by one thread.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects within `patience`, which from then on bounds every single wait for the server.
    pub(super) fn connect(place: &Place, patience: Duration) -> Result<Self, NbdError> {
        let stream = match place {
            Place::Tcp { host, port } => tcp(host, *port, patience).map(Self::Tcp),
            Place::Unix(path) => unix(path, patience).map(Self::Unix),
        };
        let stream = stream.map_err(NbdError::Connect)?;
        stream.set_patience(patience).map_err(NbdError::Connect)?;
        Ok(stream)
    }

    /// A connection that was made by somebody else.
    pub(super) fn over(socket: UnixStream, patience: Duration) -> Result<Self, NbdError> {
        let stream = Self::Unix(socket);
        stream.set_patience(patience).map_err(NbdError::Connect)?;
        Ok(stream)
    }

    fn set_patience(&self, patience: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => {
                tcp.set_nodelay(true)?;
                tcp.set_read_timeout(Some(patience))?;
                tcp.set_write_timeout(Some(patience))
            }
            Self::Unix(unix) => {
                unix.set_read_timeout(Some(patience))?;
                unix.set_write_timeout(Some(patience))
            }
        }
    }

    /// Fills `buffer`; fails when that isn't done at `until`.
    pub(super) fn read(&self, buffer: &mut [u8], until: Instant) -> Result<(), NbdError> {
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            let read = match self {
                Self::Tcp(tcp) => (&mut &*tcp).read(rest),
                Self::Unix(unix) => (&mut &*unix).read(rest),
            };
            match read {
                Ok(0) => return Err(NbdError::Link(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(NbdError::link(error)),
            }
            // A server that drips bytes is no better than a silent one.
            if done < buffer.len() && Instant::now() >= until {
                return Err(NbdError::Silent);
            }
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&self, until: Instant) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.read(&mut bytes, until)?;
        Ok(bytes)
    }

    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), NbdError> {
        let written = match self {
            Self::Tcp(tcp) => (&mut &*tcp).write_all(bytes),
            Self::Unix(unix) => (&mut &*unix).write_all(bytes),
        };
        written.map_err(NbdError::link)
    }

    /// Ends it for all threads that wait on it.
    pub(super) fn end(&self) {
        // It may be broken already.
        let _ = match self {
            Self::Tcp(tcp) => tcp.shutdown(Shutdown::Both),
            Self::Unix(unix) => unix.shutdown(Shutdown::Both),
        };
    }
}

fn tcp(host: &str, port: u16, patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A plain connect waits without an end for a server that serves others first.
fn unix(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let until = Instant::now() + patience;
    loop {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
}
