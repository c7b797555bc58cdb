//! A client's request, and whether it may be done: `doc/proto.md`, "Request message", "Request types", "Error values".

use std::ops::Range;

use crate::nbd::wire::{MAX_REQUEST_BYTES, REQUEST_MAGIC, be16, be32, be64, command, errno, flag};

/// Bytes of a request before its data.
pub(super) const HEAD_BYTES: usize = 28;

/// As it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    /// `None` when it isn't one: where the next begins is then unknown, too.
    pub(super) fn parse(bytes: &[u8; HEAD_BYTES]) -> Option<Self> {
        (be32(bytes, 0) == REQUEST_MAGIC).then(|| Self {
            flags: be16(bytes, 4),
            kind: be16(bytes, 6),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            len: be32(bytes, 24),
        })
    }

    /// What it is about; in the export when it can be done.
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len.into())
    }

    /// Bytes that follow it, whether or not it can be done.
    pub(super) fn data_bytes(&self) -> u32 {
        if self.kind == command::WRITE { self.len } else { 0 }
    }

    /// True when its answer brings data or extents: with structured replies it comes in chunks, also a refusal.
    pub(super) fn wants_chunks(&self) -> bool {
        matches!(self.kind, command::READ | command::BLOCK_STATUS)
    }

    /// What is to be done.
    pub(super) fn check(&self, to: &Abilities) -> Result<Command, Refused> {
        let fua = self.flags & flag::FUA != 0;
        let (command, flags) = match self.kind {
            command::READ => (Command::Read { whole: self.flags & flag::DF != 0 }, flag::DF),
            command::WRITE => (Command::Write { fua }, 0),
            command::DISCONNECT => return Ok(Command::Disconnect),
            command::FLUSH => return self.flush(to),
            command::TRIM => (Command::Trim { fua }, 0),
            command::CACHE => (Command::Cache, 0),
            command::WRITE_ZEROES => {
                let may_punch = self.flags & flag::NO_HOLE == 0;
                (Command::Zero { fua, may_punch }, flag::NO_HOLE)
            }
            command::BLOCK_STATUS => {
                (Command::Status { one: self.flags & flag::REQ_ONE != 0 }, flag::REQ_ONE)
            }
            _ => return Err(Refused(errno::INVALID, "no such command")),
        };
        if command.writes() && !to.is_writable {
            return Err(Refused(errno::PERM, "the export is read-only"));
        }
        // FUA is seen on commands that write nothing, too.
        if self.flags & !(flags | flag::FUA) != 0 || (flags & flag::DF != 0 && self.is_odd_df(to)) {
            return Err(Refused(errno::INVALID, "no such flag of this command"));
        }
        if matches!(command, Command::Status { .. }) && !to.has_contexts {
            return Err(Refused(errno::INVALID, "no context was agreed on"));
        }
        self.check_range(&command, to)?;
        Ok(command)
    }

    fn is_odd_df(&self, to: &Abilities) -> bool {
        self.flags & flag::DF != 0 && !to.is_structured
    }

    fn flush(&self, to: &Abilities) -> Result<Command, Refused> {
        match (self.flags & !flag::FUA, self.offset, self.len, to.is_writable) {
            (0, 0, 0, true) => Ok(Command::Flush),
            (0, 0, 0, false) => Err(Refused(errno::INVALID, "the export is read-only")),
            _ => Err(Refused(errno::INVALID, "a flush has no range")),
        }
    }

    fn check_range(&self, command: &Command, to: &Abilities) -> Result<(), Refused> {
        if self.len == 0 {
            return Err(Refused(errno::INVALID, "a request for nothing"));
        }
        let end = self.offset.checked_add(self.len.into());
        if end.is_none_or(|end| end > to.size_bytes) {
            let errno = match command {
                Command::Write { .. } | Command::Zero { .. } => errno::NO_SPACE,
                _ => errno::INVALID,
            };
            return Err(Refused(errno, "past the end of the export"));
        }
        let has_data = matches!(command, Command::Read { .. } | Command::Write { .. });
        if has_data && self.len > MAX_REQUEST_BYTES {
            return Err(Refused(errno::INVALID, "more than the largest block size"));
        }
        Ok(())
    }
}

/// What this client can ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Abilities {
    pub(super) size_bytes: u64,
    pub(super) is_writable: bool,
    pub(super) is_structured: bool,
    pub(super) has_contexts: bool,
}

/// A request that can be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// `whole`: in one chunk.
    Read {
        whole: bool,
    },
    Write {
        fua: bool,
    },
    Disconnect,
    Flush,
    Trim {
        fua: bool,
    },
    Cache,
    Zero {
        fua: bool,
        may_punch: bool,
    },
    /// `one`: of the first extent.
    Status {
        one: bool,
    },
}

impl Command {
    fn writes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::Zero { .. })
    }
}

/// Why not: the error, and words for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused(pub(super) u32, pub(super) &'static str);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Abilities = Abilities {
        size_bytes: 1 << 33,
        is_writable: true,
        is_structured: true,
        has_contexts: true,
    };

    fn ask(kind: u16, flags: u16, offset: u64, len: u32) -> Request {
        Request { flags, kind, cookie: 7, offset, len }
    }

    #[test]
    fn errors_are_those_that_the_protocol_names() {
        let readonly = Abilities { is_writable: false, ..ALL };
        let errno = |request: Request, to: &Abilities| request.check(to).unwrap_err().0;
        for kind in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(errno(ask(kind, 0, 0, 512), &readonly), errno::PERM, "{kind}");
            assert!(ask(kind, flag::FUA, 0, 512).check(&ALL).is_ok(), "{kind}");
        }
        let end = ALL.size_bytes;
        for (kind, expected) in [
            (command::READ, errno::INVALID),
            (command::WRITE, errno::NO_SPACE),
            (command::WRITE_ZEROES, errno::NO_SPACE),
            (command::TRIM, errno::INVALID),
            (command::BLOCK_STATUS, errno::INVALID),
        ] {
            assert_eq!(errno(ask(kind, 0, end - 511, 512), &ALL), expected, "{kind}");
            assert_eq!(errno(ask(kind, 0, u64::MAX, 512), &ALL), expected, "{kind}");
            assert_eq!(errno(ask(kind, 0, 0, 0), &ALL), errno::INVALID, "{kind}");
            assert!(ask(kind, 0, end - 512, 512).check(&ALL).is_ok(), "{kind}");
        }
        for kind in [8, 9, u16::MAX] {
            assert_eq!(errno(ask(kind, 0, 0, 512), &ALL), errno::INVALID);
        }
        assert_eq!(errno(ask(command::READ, flag::REQ_ONE, 0, 512), &ALL), errno::INVALID);
        assert_eq!(errno(ask(command::FLUSH, 0, 1, 0), &ALL), errno::INVALID);
        let plain = Abilities { is_structured: false, has_contexts: false, ..ALL };
        assert_eq!(errno(ask(command::READ, flag::DF, 0, 512), &plain), errno::INVALID);
        assert_eq!(errno(ask(command::BLOCK_STATUS, 0, 0, 512), &plain), errno::INVALID);
    }

    #[test]
    fn four_gib_can_be_asked_about_but_not_read() {
        let huge = |kind| ask(kind, 0, 0, u32::MAX).check(&ALL);
        assert_eq!(
            huge(command::READ),
            Err(Refused(errno::INVALID, "more than the largest block size"))
        );
        assert_eq!(huge(command::BLOCK_STATUS), Ok(Command::Status { one: false }));
        assert_eq!(huge(command::WRITE_ZEROES), Ok(Command::Zero { fua: false, may_punch: true }));
    }

    proptest! {
        #[test]
        fn what_may_be_done_is_in_the_export(
            flags in 0u16..32,
            kind in 0u16..10,
            offset in prop_oneof![any::<u64>(), 0u64..1 << 20],
            len in prop_oneof![any::<u32>(), 0u32..1 << 16],
            size_bytes in 0u64..1 << 21,
            is_writable: bool,
        ) {
            let to = Abilities { size_bytes, is_writable, ..ALL };
            match ask(kind, flags, offset, len).check(&to) {
                Ok(Command::Disconnect | Command::Flush) => {}
                Ok(command) => {
                    prop_assert!(len > 0 && offset + u64::from(len) <= size_bytes);
                    prop_assert!(is_writable || !command.writes());
                }
                Err(Refused(errno, words)) => prop_assert!(errno != 0 && !words.is_empty()),
            }
        }
    }
}
