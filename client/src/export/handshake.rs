//! The handshake, fixed newstyle, from the server's side: `doc/proto.md`, "Newstyle negotiation", "Option types".
//!
//! An option that can't be understood is refused and the next one read; a client that doesn't keep to the frame of options
//! is left. Nothing is kept of a client but one option at a time.

use std::io::{self, Write};

use super::{Export, incoming::Incoming, options, socket::Socket};
use crate::nbd::wire::{
    BITMAP, FIXED_NEWSTYLE, MAGIC, MAX_REQUEST_BYTES, NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    answer, be32, be64, can, info, option,
};

/// Longest data of an option that is looked at.
const MAX_OPTION_BYTES: u32 = 64 << 10;
/// Longer ones up to here are passed over and refused; beyond, the client is left.
const MAX_SKIPPED_BYTES: u32 = 32 << 20;
/// Contexts that one client may choose; there are no more.
const MAX_CONTEXTS: usize = 8;
/// Unit in which the disk is best read.
const PREFERRED_BYTES: u32 = 4096;

/// What was agreed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) is_structured: bool,
    /// Places of the chosen contexts among the export's: their numbers, too.
    pub(super) contexts: Vec<usize>,
}

/// Talks until the client wants to send requests; `None` when it has left. `enter` says whether there is a place for it.
pub(super) fn agree(
    incoming: &mut Incoming<'_>,
    socket: &Socket,
    export: &Export,
    enter: impl Fn() -> Entrance,
) -> io::Result<Option<Agreed>> {
    let mut out = socket;
    let flags = FIXED_NEWSTYLE | NO_ZEROES;
    out.write_all(
        &[&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat(),
    )?;
    let theirs = u32::from_be_bytes(incoming.array()?);
    if theirs & !u32::from(flags) != 0 {
        return Err(violation("flags that were not offered"));
    }
    let pads = theirs & u32::from(NO_ZEROES) == 0;
    let mut talk = Talk {
        incoming,
        out,
        export,
        enter: &enter,
        agreed: Agreed::default(),
        chosen_for: String::new(),
    };
    loop {
        match talk.option(pads)? {
            Next::Option => {}
            Next::Requests => return Ok(Some(talk.agreed)),
            Next::Left => return Ok(None),
        }
    }
}

/// Whether a client may send requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entrance {
    Open,
    Full,
    Closed,
}

enum Next {
    Option,
    Requests,
    Left,
}

fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

struct Talk<'a, 'b, E> {
    incoming: &'a mut Incoming<'b>,
    out: &'a Socket,
    export: &'a Export,
    enter: &'a E,
    agreed: Agreed,
    /// The name that the contexts were chosen with.
    chosen_for: String,
}

impl<E: Fn() -> Entrance> Talk<'_, '_, E> {
    fn option(&mut self, pads: bool) -> io::Result<Next> {
        let head: [u8; 16] = self.incoming.array()?;
        let (kind, len) = (be32(&head, 8), be32(&head, 12));
        if be64(&head, 0) != OPTION_MAGIC {
            return Err(violation("this is no option"));
        }
        if len > MAX_OPTION_BYTES {
            if len > MAX_SKIPPED_BYTES || kind == option::EXPORT_NAME {
                return Err(violation("an option without an end"));
            }
            self.incoming.skip(len.into())?;
            return self.refuse(kind, answer::TOO_BIG, "the option is too long");
        }
        let data = self.incoming.bytes(len as usize)?;
        match kind {
            option::EXPORT_NAME => return self.export_name(&data, pads),
            option::ABORT => {
                self.reply(kind, answer::ACK, &[])?;
                return Ok(Next::Left);
            }
            option::INFO | option::GO => return self.info(kind, &data),
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                return self.refuse(kind, answer::INVALID, "this option takes no data");
            }
            option::LIST => self.list()?,
            option::STRUCTURED_REPLY => {
                self.agreed.is_structured = true;
                self.reply(kind, answer::ACK, &[])?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                return self.contexts(kind, &data);
            }
            option::STARTTLS => {
                return self.refuse(kind, answer::POLICY, "there is no TLS on a local socket");
            }
            _ => return self.refuse(kind, answer::UNSUPPORTED, "no such option"),
        }
        Ok(Next::Option)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let words = [option, kind, len].map(u32::to_be_bytes).concat();
        self.out.write_all(&[&OPTION_REPLY_MAGIC.to_be_bytes()[..], &words, data].concat())
    }

    fn refuse(&mut self, option: u32, kind: u32, words: &str) -> io::Result<Next> {
        self.reply(option, kind, words.as_bytes())?;
        Ok(Next::Option)
    }

    fn list(&mut self) -> io::Result<()> {
        let name = self.export.name.as_bytes();
        let len = u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes();
        // Behind the name: words for people.
        let data = [&len[..], name, self.export.description.as_bytes()].concat();
        self.reply(option::LIST, answer::SERVER, &data)?;
        self.reply(option::LIST, answer::ACK, &[])
    }

    /// Has no way to refuse.
    fn export_name(&mut self, data: &[u8], pads: bool) -> io::Result<Next> {
        let name = options::name(data).filter(|name| self.export.is_called(name));
        let name = name.ok_or_else(|| violation("an export that isn't here"))?;
        if (self.enter)() != Entrance::Open {
            return Ok(Next::Left);
        }
        self.keep_contexts(&name);
        let mut reply = self.export.size_bytes().to_be_bytes().to_vec();
        reply.extend(self.flags().to_be_bytes());
        reply.extend(if pads { &[0; 124][..] } else { &[] });
        self.out.write_all(&reply)?;
        Ok(Next::Requests)
    }

    fn info(&mut self, kind: u32, data: &[u8]) -> io::Result<Next> {
        let Some(asked) = options::asked(data) else {
            return self.refuse(kind, answer::INVALID, "an export's name and what to tell of it");
        };
        if !self.export.is_called(&asked.name) {
            return self.refuse(kind, answer::UNKNOWN, "there is no such export");
        }
        if kind == option::GO {
            match (self.enter)() {
                Entrance::Open => self.keep_contexts(&asked.name),
                Entrance::Full => {
                    return self.refuse(
                        kind,
                        answer::POLICY,
                        "too many clients are served already",
                    );
                }
                Entrance::Closed => {
                    return self.refuse(kind, answer::SHUTDOWN, "the server is being stopped");
                }
            }
        }
        let [size, flags] =
            [&self.export.size_bytes().to_be_bytes()[..], &self.flags().to_be_bytes()];
        self.fact(kind, info::EXPORT, &[size, flags].concat())?;
        let units = [1, PREFERRED_BYTES, MAX_REQUEST_BYTES].map(u32::to_be_bytes);
        self.fact(kind, info::BLOCK_SIZE, &units.concat())?;
        let export = self.export;
        for (fact, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if asked.facts.contains(&fact) {
                self.fact(kind, fact, text.as_bytes())?;
            }
        }
        self.reply(kind, answer::ACK, &[])?;
        Ok(if kind == option::GO { Next::Requests } else { Next::Option })
    }

    fn fact(&mut self, option: u32, fact: u16, data: &[u8]) -> io::Result<()> {
        self.reply(option, answer::INFO, &[&fact.to_be_bytes()[..], data].concat())
    }

    fn flags(&self) -> u16 {
        let all = can::HAS_FLAGS | can::MULTI_CONN | can::CACHE;
        let chunks = if self.agreed.is_structured { can::DF } else { 0 };
        let writes = match self.export.overlay {
            Some(_) => can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES,
            None => can::READ_ONLY,
        };
        all | chunks | writes
    }

    /// Contexts were chosen for an export: they hold when it is entered by the same name.
    fn keep_contexts(&mut self, name: &str) {
        if self.chosen_for != name {
            self.agreed.contexts.clear();
        }
    }

    fn contexts(&mut self, kind: u32, data: &[u8]) -> io::Result<Next> {
        let chooses = kind == option::SET_META_CONTEXT;
        if chooses {
            self.agreed.contexts.clear();
        }
        let Some(asked) = options::queries(data) else {
            return self.refuse(kind, answer::INVALID, "an export's name and names of contexts");
        };
        if chooses && !self.agreed.is_structured {
            return self.refuse(kind, answer::INVALID, "structured replies come first");
        }
        if !self.export.is_called(&asked.name) {
            return self.refuse(kind, answer::UNKNOWN, "there is no such export");
        }
        let is_wanted = |name: &str| match asked.queries.is_empty() {
            true => !chooses,
            false => asked.queries.iter().any(|query| matches(query, name, !chooses)),
        };
        let export = self.export;
        let found = export.contexts.iter().enumerate().filter(|(_, (name, _))| is_wanted(name));
        for (place, (name, _)) in found.take(MAX_CONTEXTS) {
            // In a list the numbers mean nothing.
            let id = if chooses { number(place) } else { 0 };
            let data = [&id.to_be_bytes()[..], name.as_bytes()].concat();
            self.reply(kind, answer::META_CONTEXT, &data)?;
            if chooses {
                self.agreed.contexts.push(place);
            }
        }
        self.chosen_for = asked.name;
        self.reply(kind, answer::ACK, &[])?;
        Ok(Next::Option)
    }
}

/// How a context is named in replies to a client that has chosen it.
pub(super) fn number(place: usize) -> u32 {
    u32::try_from(place + 1).unwrap_or(u32::MAX)
}

/// True when a query means a context; in lists a namespace means all that is in it.
fn matches(query: &str, name: &str, lists: bool) -> bool {
    let is_namespace = query.ends_with(':') && (query.matches(':').count() == 1 || query == BITMAP);
    query == name || (lists && is_namespace && name.starts_with(query))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_name_contexts_and_in_lists_namespaces() {
        let list = |query, name| matches(query, name, true);
        assert!(list("base:", "base:allocation") && list("base:allocation", "base:allocation"));
        assert!(list("qemu:", "qemu:dirty-bitmap:x") && list(BITMAP, "qemu:dirty-bitmap:x"));
        assert!(!list("base", "base:allocation") && !list("base:alloc", "base:allocation"));
        assert!(!list("", "base:allocation") && !list("janus:", "base:allocation"));
        assert!(!matches("base:", "base:allocation", false));
        assert!(matches("base:allocation", "base:allocation", false));
    }
}
