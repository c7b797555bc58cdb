//! What clients write in their options: `doc/proto.md`, "Option types". Any bytes are read; most are refused.

use crate::nbd::wire::{MAX_STRING_BYTES, be16, be32};

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) name: String,
    /// Facts that the client wants to know.
    pub(super) facts: Vec<u16>,
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Queries {
    pub(super) name: String,
    pub(super) queries: Vec<String>,
}

/// A name alone, as in `NBD_OPT_EXPORT_NAME`.
pub(super) fn name(data: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(data).ok()?;
    (data.len() <= MAX_STRING_BYTES && !text.contains('\0')).then(|| text.to_owned())
}

pub(super) fn asked(data: &[u8]) -> Option<Asked> {
    let (name, rest) = string(data)?;
    let (count, facts) = rest.split_at_checked(2)?;
    if facts.len() != usize::from(be16(count, 0)) * 2 {
        return None;
    }
    let facts = facts.chunks_exact(2).map(|fact| be16(fact, 0)).collect();
    Some(Asked { name, facts })
}

pub(super) fn queries(data: &[u8]) -> Option<Queries> {
    let (name, rest) = string(data)?;
    let (count, mut rest) = rest.split_at_checked(4)?;
    let count = be32(count, 0) as usize;
    // Each has a length at least.
    if count > rest.len() / 4 {
        return None;
    }
    let mut queries = Vec::with_capacity(count);
    for _ in 0..count {
        let (query, after) = string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some(Queries { name, queries })
}

/// A length and as many bytes.
fn string(data: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = data.split_at_checked(4)?;
    let (text, rest) = rest.split_at_checked(be32(length, 0) as usize)?;
    Some((name(text)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(text: &str, into: &mut Vec<u8>) {
        into.extend((text.len() as u32).to_be_bytes());
        into.extend(text.as_bytes());
    }

    proptest! {
        #[test]
        fn what_is_written_by_the_rules_is_read(
            text in "[^\0]{0,40}",
            facts in prop::collection::vec(any::<u16>(), 0..9),
            list in prop::collection::vec("[^\0]{0,20}", 0..9),
        ) {
            let mut data = Vec::new();
            write(&text, &mut data);
            let mut query = data.clone();
            data.extend((facts.len() as u16).to_be_bytes());
            facts.iter().for_each(|fact| data.extend(fact.to_be_bytes()));
            prop_assert_eq!(asked(&data), Some(Asked { name: text.clone(), facts }));
            query.extend((list.len() as u32).to_be_bytes());
            list.iter().for_each(|text| write(text, &mut query));
            prop_assert_eq!(queries(&query), Some(Queries { name: text, queries: list }));
            for cut in 0..query.len() {
                prop_assert_eq!(queries(&query[..cut]), None);
            }
            for cut in 0..data.len() {
                prop_assert_eq!(asked(&data[..cut]), None);
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(data in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (name(&data), asked(&data), queries(&data));
        }
    }

    #[test]
    fn lengths_that_promise_more_than_there_is_are_refused() {
        let huge = [u32::MAX.to_be_bytes(), [0; 4]].concat();
        assert_eq!((asked(&huge), queries(&huge)), (None, None));
        // Four thousand million queries in no bytes.
        assert_eq!(queries(&[[0; 4], u32::MAX.to_be_bytes()].concat()), None);
        assert_eq!(name(&vec![b'x'; MAX_STRING_BYTES + 1]), None);
        assert_eq!((name(b"a\0b"), name(b"\xff")), (None, None));
    }
}
