//! Since when servers that are reached don't list what they are asked for: they fail, are late, or refuse somebody.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Troubles remembered; beyond that one is as old as the list that meets it.
const MOST: usize = 1000;

/// What doesn't go well.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Trouble {
    /// The server at this URL answers no list.
    Fails(String),
    /// The server at this URL refuses lists of this caller.
    Refuses(String, String),
}

/// See the module; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Troubles(Arc<Mutex<HashMap<Trouble, i64>>>);

impl Troubles {
    /// Unix milliseconds since when it lasts, which is now if it didn't.
    pub fn since(&self, trouble: Trouble, now_ms: i64) -> i64 {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST && !known.contains_key(&trouble) {
            return now_ms;
        }
        *known.entry(trouble).or_insert(now_ms)
    }

    /// It is over, if it was there.
    pub fn over(&self, trouble: &Trouble) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(trouble);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_as_old_as_its_first_list_until_it_is_over() {
        let (troubles, fails) = (Troubles::default(), Trouble::Fails("u".into()));
        assert_eq!(troubles.since(fails.clone(), 1), 1);
        assert_eq!(troubles.since(fails.clone(), 2), 1);
        assert_eq!(troubles.since(Trouble::Refuses("u".into(), "carol".into()), 3), 3);
        troubles.over(&fails);
        assert_eq!(troubles.since(fails, 4), 4);
        for number in 0..2 * MOST {
            troubles.since(Trouble::Fails(number.to_string()), 5);
        }
        assert_eq!(troubles.0.lock().unwrap().len(), MOST);
    }
}
