//! Serving a disk over NBD: fixed newstyle, structured replies, block status; read-only, or written into a scratch file.
//!
//! Clients are strangers: whatever they send ends in an answer of the protocol or in the end of their connection, and costs
//! no more memory and threads than [`limits`] say. Each connection has threads of its own, so that one whose requests wait
//! for the network holds up no other. Nothing here outlives [`Server::run`], but for a read of the disk that hangs.

use std::{io, path::PathBuf, sync::Arc};

use crate::source::medium::Medium;

pub mod allocation;
mod answers;
pub mod changed;
mod connection;
mod door;
mod folder;
mod handshake;
mod incoming;
mod options;
mod outgoing;
pub mod overlay;
mod places;
mod reply;
mod request;
mod room;
mod server;
mod socket;

pub use self::{
    door::{At, Door},
    folder::{Folder, for_left_behind},
    overlay::{Overlay, OverlayError},
    server::Server,
};

pub(crate) use self::server::serve_stranger;

/// What strangers may cost.
pub mod limits {
    use std::time::Duration;

    /// Clients that are served at once; more are refused.
    pub const CONNECTIONS: usize = 16;
    /// Clients in their handshake; one more ends the oldest.
    pub const HANDSHAKES: usize = 64;
    /// A handshake takes no longer.
    pub const HANDSHAKE: Duration = Duration::from_secs(10);
    /// Requests of one connection that are worked on at once; more wait in its socket.
    pub const REQUESTS: usize = 16;
    /// Bytes of one connection that are held for its requests.
    pub const REQUEST_BYTES: usize = 32 << 20;
    /// At the end answers under way have so long to be taken.
    pub const LEAVING: Duration = Duration::from_secs(5);
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Somebody serves there already.
    #[error("{place}: another program listens there; choose another --socket or --listen")]
    InUse {
        /// Path or address.
        place: String,
    },
    /// Something else has the socket's name.
    #[error("{}: exists and is no socket; choose another --socket", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// It can't listen.
    #[error("{place}: cannot listen: {source}")]
    Listen {
        /// Path or address.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// Others could reach it.
    #[error(
        "{address} is no loopback address: NBD has neither passwords nor encryption here; listen on 127.0.0.1 and use a tunnel (ssh -L)"
    )]
    NotLoopback {
        /// As asked for.
        address: std::net::SocketAddr,
    },
}

/// What is served to all clients.
#[derive(Debug)]
pub struct Export {
    /// Its bytes; with an overlay these are the overlay's.
    pub medium: Arc<dyn Medium>,
    /// Takes writes; none: read-only.
    pub overlay: Option<Arc<Overlay>>,
    /// Its name; clients may also leave it out.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// What block status can tell, by name.
    pub contexts: Vec<(String, Arc<dyn Tells>)>,
}

/// A context of block status: tells something of every part of a disk.
pub trait Tells: std::fmt::Debug + Send + Sync {
    /// The flags that hold from `offset` on, and where they end at the latest: behind `offset`, but no further than the
    /// disk. `offset` is in the disk. Blocks.
    ///
    /// # Errors
    /// When it can't be found out.
    fn tell(&self, offset: u64) -> io::Result<(u64, u32)>;
}

impl Export {
    /// A disk that is only read; block status tells its holes.
    pub fn read_only(name: &str, description: &str, medium: Arc<dyn Medium>) -> Self {
        let holes: Arc<dyn Tells> = Arc::new(allocation::Allocation(medium.clone()));
        let contexts = vec![(allocation::NAME.to_owned(), holes)];
        let (name, description) = (name.to_owned(), description.to_owned());
        Self { medium, overlay: None, name, description, contexts }
    }

    /// The same disk, written into a scratch file.
    pub fn writable(name: &str, description: &str, overlay: Arc<Overlay>) -> Self {
        let export = Self::read_only(name, description, overlay.clone());
        Self { overlay: Some(overlay), ..export }
    }

    fn size_bytes(&self) -> u64 {
        self.medium.size_bytes()
    }

    /// True when a client means this one.
    fn is_called(&self, name: &str) -> bool {
        name.is_empty() || name == self.name
    }
}

#[cfg(test)]
mod tests;
