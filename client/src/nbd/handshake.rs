//! The handshake of NBD, fixed newstyle: which export, how large, in which units, with which contexts.

use std::time::Instant;

use super::{NbdError, bitmap::is_ours, stream::Stream};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const LIST_META_CONTEXT: u32 = 9;
const SET_META_CONTEXT: u32 = 10;

const ACK: u32 = 1;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const ERROR: u32 = 1 << 31;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 2;

/// Longest text of an option's reply that is read.
const MAX_REPLY_BYTES: u32 = 16 << 10;
/// Replies to one option.
const MAX_REPLIES: usize = 4096;
/// Dirty bitmaps that are looked at.
const MAX_BITMAPS: usize = 16;
/// What must be taken when the server names no limits.
const DEFAULT_MAX_BLOCK: u32 = 32 << 20;

pub(super) const ALLOCATION: &str = "base:allocation";
pub(super) const BITMAP: &str = "qemu:dirty-bitmap:";

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
    let structured = talk.ask(STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_none();
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
            if be64(&head, 0) != REPLY_MAGIC || be32(&head, 8) != option {
                return Err(NbdError::Protocol("a reply to an option that was not asked".into()));
            }
            if length > MAX_REPLY_BYTES {
                return Err(NbdError::Protocol(format!("a reply to an option of {length} bytes")));
            }
            let mut text = vec![0; length as usize];
            self.stream.read(&mut text, self.until)?;
            match kind {
                ACK => return Ok(None),
                kind if kind >= ERROR => return Ok(Some(refusal(kind - ERROR, &text))),
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
        let _ = self.ask(LIST_META_CONTEXT, &queries(export, &[BITMAP.to_owned()]), list)?;
        let mut chosen: Vec<(u32, String)> = Vec::new();
        let choose = |kind: u32, data: &[u8]| {
            let (id, name) = context(kind, data)?;
            if !wanted.contains(&name) || chosen.iter().any(|(i, n)| *i == id || *n == name) {
                return Err(NbdError::Protocol(format!("a context that was not asked: {name:?}")));
            }
            chosen.push((id, name));
            Ok(())
        };
        let refused = self.ask(SET_META_CONTEXT, &queries(export, &wanted), choose)?;
        Ok(if refused.is_some() { Vec::new() } else { chosen })
    }

    fn go(&mut self, export: &str) -> Result<Agreed, NbdError> {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend(1u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        let (mut about, mut sizes) = (None, None);
        let refused = self.ask(GO, &data, |kind, data| {
            let fact = if kind == INFO && data.len() >= 2 { Some(be16(data, 0)) } else { None };
            match (fact, data.len()) {
                (Some(INFO_EXPORT), 12) => about = Some((be64(data, 2), be16(data, 10))),
                (Some(INFO_BLOCK_SIZE), 14) => sizes = Some((be32(data, 2), be32(data, 10))),
                (None | Some(INFO_EXPORT | INFO_BLOCK_SIZE), _) => {
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
        let (min_block, max_block) = units(sizes.unwrap_or((1, DEFAULT_MAX_BLOCK)))?;
        if !size_bytes.is_multiple_of(u64::from(min_block)) {
            return Err(NbdError::Refused(format!(
                "export {export:?} has {size_bytes} bytes, but can only be read in units of {min_block}"
            )));
        }
        let is_read_only = flags & HAS_FLAGS != 0 && flags & READ_ONLY != 0;
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
    Ok((min, max.min(DEFAULT_MAX_BLOCK) / min * min))
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
        Some(name) if kind == META_CONTEXT => Ok((be32(data, 0), name.to_owned())),
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

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u16::from_be_bytes(*b))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_be_bytes(*b))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_be_bytes(*b))
}
