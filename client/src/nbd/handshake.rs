//! The handshake of NBD, fixed newstyle: which export, how large, in which units, with which contexts.

use std::time::Instant;

use super::{
    NbdError,
    bitmap::is_ours,
    stream::Stream,
    wire::{
        ALLOCATION, BITMAP, FIXED_NEWSTYLE, MAGIC, MAX_REQUEST_BYTES, NO_ZEROES, OPTION_MAGIC,
        OPTION_REPLY_MAGIC, answer, be16, be32, be64, can, info, option,
    },
};

/// Longest text of an option's reply that is read.
const MAX_REPLY_BYTES: u32 = 16 << 10;
/// Replies to one option.
const MAX_REPLIES: usize = 4096;
/// Dirty bitmaps that are looked at.
const MAX_BITMAPS: usize = 16;
/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreed {
    pub size_bytes: u64,
    pub is_read_only: bool,
    /// Unit of offsets and lengths, a power of two.
    pub min_block: u32,
    /// Longest request, a multiple of `min_block`.
    pub max_block: u32,
    /// Replies come in chunks; else only reads are possible.
    pub structured: bool,
    /// Contexts of block status: number and name.
    pub contexts: Vec<(u32, String)>,
}

/// Does it; afterwards requests can be sent.
pub(super) fn agree(stream: &Stream, export: &str, until: Instant) -> Result<Agreed, NbdError> {
    let greeting: [u8; 18] = stream.array(until)?;
    let [magic, option_magic] = [be64(&greeting, 0), be64(&greeting, 8)];
    let flags = be16(&greeting, 16);
    if magic != MAGIC {
        return Err(NbdError::Protocol("it does not greet as an NBD server does".into()));
    }
    if option_magic != OPTION_MAGIC || flags & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Refused(
            "it only speaks an old style of NBD; use qemu-nbd or nbdkit".into(),
        ));
    }
    stream.write(&u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;
    let mut talk = Talk { stream, until };
    let structured = talk.ask(option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_none();
    let contexts = if structured { talk.contexts(export)? } else { Vec::new() };
    let mut agreed = talk.go(export)?;
    (agreed.structured, agreed.contexts) = (structured, contexts);
    Ok(agreed)
}

struct Talk<'a> {
    stream: &'a Stream,
    until: Instant,
}

impl Talk<'_> {
    /// Sends an option; `take` gets type and data of each reply before the last. `Some`: the server's words of refusal.
    fn ask(
        &mut self,
        option: u32,
        data: &[u8],
        mut take: impl FnMut(u32, &[u8]) -> Result<(), NbdError>,
    ) -> Result<Option<String>, NbdError> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.stream.write(&message)?;
        for _ in 0..MAX_REPLIES {
            let head: [u8; 20] = self.stream.array(self.until)?;
            let (kind, length) = (be32(&head, 12), be32(&head, 16));
            if be64(&head, 0) != OPTION_REPLY_MAGIC || be32(&head, 8) != option {
                return Err(NbdError::Protocol("a reply to an option that was not asked".into()));
            }
            if length > MAX_REPLY_BYTES {
                return Err(NbdError::Protocol(format!("a reply to an option of {length} bytes")));
            }
            let mut text = vec![0; length as usize];
            self.stream.read(&mut text, self.until)?;
            match kind {
                answer::ACK => return Ok(None),
                kind if kind >= answer::ERROR => {
                    return Ok(Some(refusal(kind - answer::ERROR, &text)));
                }
                kind => take(kind, &text)?,
            }
        }
        Err(NbdError::Protocol("no end of replies to one option".into()))
    }

    /// Chooses what block status shall tell: holes, and all dirty bitmaps that may be ours.
    fn contexts(&mut self, export: &str) -> Result<Vec<(u32, String)>, NbdError> {
        let mut wanted = vec![ALLOCATION.to_owned()];
        let list = |kind: u32, data: &[u8]| {
            let (_, name) = context(kind, data)?;
            if name.strip_prefix(BITMAP).is_some_and(is_ours)
                && wanted.len() <= MAX_BITMAPS
                && !wanted.contains(&name)
            {
                wanted.push(name);
            }
            Ok(())
        };
        // A server that lists nothing has no bitmaps, or none that can be had.
        let _ =
            self.ask(option::LIST_META_CONTEXT, &queries(export, &[BITMAP.to_owned()]), list)?;
        let mut chosen: Vec<(u32, String)> = Vec::new();
        let choose = |kind: u32, data: &[u8]| {
            let (id, name) = context(kind, data)?;
            if !wanted.contains(&name) || chosen.iter().any(|(i, n)| *i == id || *n == name) {
                return Err(NbdError::Protocol(format!("a context that was not asked: {name:?}")));
            }
            chosen.push((id, name));
            Ok(())
        };
        let refused = self.ask(option::SET_META_CONTEXT, &queries(export, &wanted), choose)?;
        Ok(if refused.is_some() { Vec::new() } else { chosen })
    }

    fn go(&mut self, export: &str) -> Result<Agreed, NbdError> {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        let (mut about, mut sizes) = (None, None);
        let refused = self.ask(option::GO, &data, |kind, data| {
            let fact =
                if kind == answer::INFO && data.len() >= 2 { Some(be16(data, 0)) } else { None };
            match (fact, data.len()) {
                (Some(info::EXPORT), 12) => about = Some((be64(data, 2), be16(data, 10))),
                (Some(info::BLOCK_SIZE), 14) => sizes = Some((be32(data, 2), be32(data, 10))),
                (None | Some(info::EXPORT | info::BLOCK_SIZE), _) => {
                    return Err(NbdError::Protocol("facts of a wrong length".into()));
                }
                _ => {}
            }
            Ok(())
        })?;
        if let Some(words) = refused {
            return Err(NbdError::Refused(format!("export {export:?}: {words}")));
        }
        let (size_bytes, flags) =
            about.ok_or_else(|| NbdError::Protocol("it does not tell the export's size".into()))?;
        if size_bytes > i64::MAX as u64 {
            return Err(NbdError::Protocol(format!("an export of {size_bytes} bytes")));
        }
        let (min_block, max_block) = units(sizes.unwrap_or((1, MAX_REQUEST_BYTES)))?;
        if !size_bytes.is_multiple_of(u64::from(min_block)) {
            return Err(NbdError::Refused(format!(
                "export {export:?} has {size_bytes} bytes, but can only be read in units of {min_block}"
            )));
        }
        let is_read_only = flags & can::HAS_FLAGS != 0 && flags & can::READ_ONLY != 0;
        Ok(Agreed {
            size_bytes,
            is_read_only,
            min_block,
            max_block,
            structured: false,
            contexts: Vec::new(),
        })
    }
}

/// Least and largest request, within what the protocol allows.
fn units((min, max): (u32, u32)) -> Result<(u32, u32), NbdError> {
    if !min.is_power_of_two() || min > 1 << 16 || max < min {
        return Err(NbdError::Protocol(format!("block sizes of {min} to {max} bytes")));
    }
    Ok((min, max.min(MAX_REQUEST_BYTES) / min * min))
}

fn queries(export: &str, names: &[String]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend((names.len() as u32).to_be_bytes());
    for name in names {
        data.extend((name.len() as u32).to_be_bytes());
        data.extend(name.as_bytes());
    }
    data
}

fn context(kind: u32, data: &[u8]) -> Result<(u32, String), NbdError> {
    let name = data.get(4..).and_then(|name| std::str::from_utf8(name).ok());
    match name {
        Some(name) if kind == answer::META_CONTEXT => Ok((be32(data, 0), name.to_owned())),
        _ => Err(NbdError::Protocol("a context without a name".into())),
    }
}

/// Why an option was refused, for people.
fn refusal(code: u32, text: &[u8]) -> String {
    let reason = match code {
        1 => "not supported",
        2 => "forbidden",
        3 => "invalid",
        5 => "TLS is required, which isn't supported; use a Unix socket or a tunnel",
        6 => "there is no such export",
        7 => "the server is shutting down",
        _ => "refused",
    };
    let words = String::from_utf8_lossy(text);
    let words: String = words.chars().filter(|c| !c.is_control()).take(200).collect();
    if words.is_empty() { reason.to_owned() } else { format!("{reason} ({words})") }
}
