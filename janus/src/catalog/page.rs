//! Merged pages: entries of several servers in one order, and a token that holds every server's position.
//!
//! A position is the last entry handed out, the same for all servers, and for each server the token of the page of its
//! own where reading goes on. Entries up to the last one are left out again, so a server may be read from memory on one
//! page and live on the next, and entries that come or go in between shift nothing.

use std::{collections::BTreeMap, fmt::Debug};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use janus_proto::{
    error::{ErrorReason, status},
    ids::ServerId,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tonic::Status;

/// Entries of a page when the caller doesn't say.
const DEFAULT_PAGE: usize = 100;
/// Most entries of a page: with the largest seals, a page stays below the message limit of 2 MiB.
const MAX_PAGE: usize = 400;

/// Something listed.
pub(super) trait Entry: Clone + Send + 'static {
    /// Place in the list, ascending, unique but for entries that are to be joined.
    type Key: Ord + Clone + Debug + Serialize + DeserializeOwned + Send + Sync;
    fn key(&self) -> Self::Key;
    /// Servers may list these two in either order.
    fn ties(&self, _other: &Self) -> bool {
        false
    }
    /// Joins what another server says of the same thing.
    fn join(&mut self, other: Self);
}

/// Where reading goes on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position<K> {
    /// What is listed; a token fits no other list.
    pub list: String,
    /// Last entry handed out.
    pub after: Option<K>,
    /// Token of each server's page in which reading goes on.
    pub pages: BTreeMap<ServerId, String>,
}

impl<K: Serialize + DeserializeOwned> Position<K> {
    pub fn read(list: String, token: &str) -> Result<Self, Status> {
        if token.is_empty() {
            return Ok(Self { list, after: None, pages: BTreeMap::new() });
        }
        let wrong = || status(ErrorReason::InvalidField, "page_token: is not one of this list");
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).map_err(|_| wrong())?;
        let position: Self = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
        if position.list == list { Ok(position) } else { Err(wrong()) }
    }

    pub fn token(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }
}

/// Entries that a page has, from what the caller asked.
pub(super) fn page_size(asked: u32) -> usize {
    match usize::try_from(asked).unwrap_or(MAX_PAGE) {
        0 => DEFAULT_PAGE,
        size => size.min(MAX_PAGE),
    }
}

/// What one server has to give for this page: enough entries after the position, or all that are left.
#[derive(Debug, Clone)]
pub(super) struct Part<E> {
    pub server: ServerId,
    /// Each with the token of the page it came from.
    pub entries: Vec<(E, String)>,
    /// Nothing follows the entries.
    pub is_complete: bool,
}

impl<E: Entry> Part<E> {
    /// Whether no entry that is still to come can belong before the first `size`.
    pub fn is_enough(&self, size: usize) -> bool {
        let (Some((border, _)), Some((last, _))) =
            (self.entries.get(size - 1), self.entries.last())
        else {
            return self.is_complete;
        };
        self.is_complete || (self.entries.len() > size && !border.ties(last))
    }
}

/// Joins the parts into a page of at most `size` entries; the position is where the next one starts, if there is more.
///
/// Each part has at least `size` entries or all that are left, so the `size` first of all are among them.
pub(super) fn merge<E: Entry>(
    parts: Vec<Part<E>>,
    size: usize,
    mut position: Position<E::Key>,
) -> (Vec<E>, Option<Position<E::Key>>) {
    let mut merged: BTreeMap<E::Key, E> = BTreeMap::new();
    for (entry, _) in parts.iter().flat_map(|part| &part.entries) {
        match merged.entry(entry.key()) {
            std::collections::btree_map::Entry::Vacant(free) => drop(free.insert(entry.clone())),
            std::collections::btree_map::Entry::Occupied(mut taken) => {
                taken.get_mut().join(entry.clone())
            }
        }
    }
    let is_all = merged.len() <= size && parts.iter().all(|part| part.is_complete);
    let page: Vec<(E::Key, E)> = merged.into_iter().take(size).collect();
    let Some((last, _)) = page.last().filter(|_| !is_all) else {
        return (page.into_iter().map(|(_, entry)| entry).collect(), None);
    };
    for part in &parts {
        let used = part.entries.iter().rfind(|(entry, _)| entry.key() <= *last);
        if let Some((_, token)) = used {
            position.pages.insert(part.server.clone(), token.clone());
        }
    }
    position.after = Some(last.clone());
    (page.into_iter().map(|(_, entry)| entry).collect(), Some(position))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Entry for (u32, u32) {
        type Key = u32;
        fn key(&self) -> u32 {
            self.0
        }
        fn join(&mut self, other: Self) {
            self.1 += other.1;
        }
    }

    /// A server's list in pages of 3; the token is the index of the page's first entry.
    fn part(
        server: usize,
        list: &[u32],
        position: &Position<u32>,
        size: usize,
        from_memory: bool,
    ) -> Part<(u32, u32)> {
        let server: ServerId = format!("s{server}").parse().unwrap();
        let start = match position.pages.get(&server) {
            Some(token) if !from_memory => token.parse().unwrap_or(0),
            _ => 0,
        };
        let mut entries = Vec::new();
        for (index, &key) in list.iter().enumerate().skip(start) {
            let token = if from_memory { String::new() } else { (index / 3 * 3).to_string() };
            if position.after.is_none_or(|after| key > after) {
                entries.push(((key, 1), token));
            }
        }
        let is_complete = entries.len() <= size;
        entries.truncate(size);
        Part { server, entries, is_complete }
    }

    proptest! {
        #[test]
        fn pages_hold_everything_once_in_order(
            lists in prop::collection::vec(prop::collection::btree_set(0..60u32, 0..30), 1..4),
            size in 1..9usize,
            memory in prop::collection::vec(any::<bool>(), 100),
        ) {
            let lists: Vec<Vec<u32>> = lists.into_iter().map(|set| set.into_iter().collect()).collect();
            let mut expected: BTreeMap<u32, u32> = BTreeMap::new();
            for key in lists.iter().flatten() {
                *expected.entry(*key).or_default() += 1;
            }
            let (mut seen, mut token, mut turn) = (Vec::new(), String::new(), 0);
            loop {
                let position = Position::read("list".into(), &token).unwrap();
                let parts = lists.iter().enumerate().map(|(server, list)| {
                    turn += 1;
                    part(server, list, &position, size, memory[turn % memory.len()])
                }).collect();
                let (page, next) = merge(parts, size, position);
                prop_assert!(page.len() <= size);
                seen.extend(page);
                let Some(next) = next else { break };
                token = next.token();
            }
            prop_assert_eq!(seen, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_token_of_another_list_is_refused() {
        let token =
            Position { list: "disks u/m".into(), after: Some(7), pages: BTreeMap::new() }.token();
        assert!(Position::<u32>::read("disks u/m".into(), &token).is_ok());
        for (list, token) in
            [("disks u/n", token.as_str()), ("disks u/m", "rubbish"), ("disks u/m", "AAAA")]
        {
            let refused = Position::<u32>::read(list.into(), token).unwrap_err();
            assert_eq!(janus_proto::error::reason(&refused), Some(ErrorReason::InvalidField));
        }
    }
}
