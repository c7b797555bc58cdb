//! Files inside of a disk's volumes, without mounting any: listed, read, and copied out.
//!
//! File systems come from whoever could write to the disk, and their readers are young. So they run in a process of their own
//! ([`reader`], this program with a hidden command), which has neither files nor network, little memory and a pipe by which
//! it asks for bytes of its one volume. What goes wrong there (a panic, an endless loop, a stack that
//! overflows, memory without end) ends that process, never this one: see [`Volume`]. What it says is still not believed:
//! names and sizes are checked here, and copies can't leave their folder ([`copy`]).

pub mod copy;
pub mod entry;
pub mod mount;
pub mod place;
pub mod reader;
pub mod volume;
mod wire;

pub use self::{
    entry::{Entry, Kind, Stream},
    place::{Inside, PlaceError},
    volume::{Bounds, Volume},
};

/// Why something inside of a volume can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrowseError {
    /// There is no such file.
    #[error("there is no {path}")]
    Unknown {
        /// Its path on the volume.
        path: String,
    },
    /// It is of another kind than what is asked of it.
    #[error("{what}")]
    Kind {
        /// What it is.
        what: String,
    },
    /// The reader doesn't know this.
    #[error("not supported: {what}")]
    Unsupported {
        /// What isn't.
        what: String,
    },
    /// The volume contradicts itself.
    #[error("the file system is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// The disk's bytes can't be had.
    #[error("{what}")]
    Read {
        /// Why.
        what: String,
    },
    /// The reader ended, or was ended since it took too much of something.
    #[error(
        "the reader of this file system was ended: {what}; the file system is damaged, or was made to do that"
    )]
    Ended {
        /// Why.
        what: String,
    },
    /// The reader can't be started.
    #[error("the reader of file systems cannot be started: {what}")]
    Start {
        /// Why.
        what: String,
    },
}

impl BrowseError {
    fn damaged(what: impl ToString) -> Self {
        Self::Damaged { what: what.to_string() }
    }

    fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }

    fn unknown(path: &[u8]) -> Self {
        Self::Unknown { path: shown(path) }
    }
}

/// A name or path for people: what a terminal would obey is written as an escape.
pub fn shown(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                c if c.is_control() || is_unseen(c) => text.extend(c.escape_default()),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Characters that turn the direction of others, or show nothing.
fn is_unseen(c: char) -> bool {
    matches!(c, '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_as_an_escape() {
        assert_eq!(shown("Grüße 日本".as_bytes()), "Grüße 日本");
        assert_eq!(shown(b"a\x1b[31mb\nc"), "a\\u{1b}[31mb\\nc");
        assert_eq!(shown("exe\u{202E}txt".as_bytes()), "exe\\u{202e}txt");
        assert_eq!(shown(b"\xff\xfea"), "\\xff\\xfea");
    }
}
