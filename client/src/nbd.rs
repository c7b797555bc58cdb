//! Reading NBD exports: fixed newstyle, structured replies, block status.
//!
//! What a server says is checked before it is used: whatever it sends, or doesn't, ends in its data or in an error that
//! says what to do, within [`Limits`]. A link that breaks is made anew; the export must then still be the same size.

use std::{io, time::Duration};

pub mod bitmap;
mod connection;
mod handshake;
pub mod medium;
mod pending;
mod stream;
pub mod uri;
pub(crate) mod wire;

pub use self::{medium::NbdMedium, uri::Uri};

/// How long servers are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connecting, and each answer.
    pub patience: Duration,
    /// Making a broken link anew, in all.
    pub reconnect: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { patience: Duration::from_secs(60), reconnect: Duration::from_secs(30) }
    }
}

/// Why an export can't be read.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// There is no connection.
    #[error("cannot connect: {0}; is its server running, and may this user connect?")]
    Connect(io::Error),
    /// It broke.
    #[error("the connection to its server broke: {0}; is the server still running?")]
    Link(io::Error),
    /// No answer in time.
    #[error("its server does not answer; is the storage behind it stuck?")]
    Silent,
    /// The server does what no server may.
    #[error(
        "its server does not keep to the NBD protocol: {0}; serve the disk with qemu-nbd or nbdkit instead"
    )]
    Protocol(String),
    /// The server doesn't want to.
    #[error("its server refuses: {0}")]
    Refused(String),
    /// The server could not do this one request.
    #[error("its server reports error {0} ({text})", text = errno_text(*.0))]
    Failed(u32),
    /// After a new connection the export was another one.
    #[error(
        "the export had {old} bytes and has {new} since its server was reached again; back up again"
    )]
    Changed {
        /// Size at first, in bytes.
        old: u64,
        /// Size now.
        new: u64,
    },
}

impl NbdError {
    fn link(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Link(error),
        }
    }

    /// The same for another thread.
    fn copy(&self) -> Self {
        let io = |error: &io::Error| io::Error::new(error.kind(), error.to_string());
        match self {
            Self::Connect(error) => Self::Connect(io(error)),
            Self::Link(error) => Self::Link(io(error)),
            Self::Silent => Self::Silent,
            Self::Protocol(what) => Self::Protocol(what.clone()),
            Self::Refused(what) => Self::Refused(what.clone()),
            Self::Failed(errno) => Self::Failed(*errno),
            Self::Changed { old, new } => Self::Changed { old: *old, new: *new },
        }
    }

    /// True when a new connection may do better.
    fn is_of_link(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Link(_) | Self::Silent)
    }
}

/// NBD has its own numbers, which are those of Linux.
fn errno_text(errno: u32) -> String {
    i32::try_from(errno)
        .map_or_else(|_| "unknown".into(), |errno| io::Error::from_raw_os_error(errno).to_string())
}

#[cfg(test)]
mod tests;
