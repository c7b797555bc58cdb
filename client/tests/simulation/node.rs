//! Who is in the simulated network.

use std::fmt;

/// A place in the network. The order is that of the links' table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    Server(usize),
    Janus(usize),
    Machine(usize),
    /// Who administers.
    Operator,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(n) => write!(f, "server-{n}"),
            Self::Janus(n) => write!(f, "janus-{n}"),
            Self::Machine(n) => write!(f, "machine-{n}"),
            Self::Operator => f.write_str("operator"),
        }
    }
}

impl Node {
    /// The server or janus of this host name.
    pub fn of(host: &str) -> Option<Self> {
        let (kind, number) = host.rsplit_once('-')?;
        let number = number.parse().ok()?;
        match kind {
            "server" => Some(Self::Server(number)),
            "janus" => Some(Self::Janus(number)),
            _ => None,
        }
    }
}
