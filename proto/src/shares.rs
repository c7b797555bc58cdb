//! Places that each caller has a number of, so that no caller takes them all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A number of places for each caller; cheap to clone, and all clones count together.
#[derive(Debug, Clone)]
pub struct Shares {
    each: usize,
    taken: Arc<Mutex<HashMap<Arc<str>, usize>>>,
}

impl Shares {
    /// `each` places for every caller.
    pub fn new(each: usize) -> Self {
        Self { each, taken: Arc::default() }
    }

    /// Places of one caller.
    pub fn each(&self) -> usize {
        self.each
    }

    /// A place for `caller` until the share is dropped; `None` when it has all that it may have.
    pub fn take(&self, caller: &Arc<str>) -> Option<Share> {
        let mut taken = self.taken();
        let count = taken.entry(caller.clone()).or_default();
        if *count >= self.each {
            return None;
        }
        *count += 1;
        Some(Share { shares: self.clone(), caller: caller.clone() })
    }

    // A panic elsewhere leaves the numbers as they are.
    fn taken(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One place that is taken.
#[derive(Debug)]
pub struct Share {
    shares: Shares,
    caller: Arc<str>,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.taken();
        match taken.get_mut(&self.caller) {
            Some(count) if *count > 1 => *count -= 1,
            // Callers without a place are forgotten, or the table would grow with everybody who ever called.
            _ => drop(taken.remove(&self.caller)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_leaves_the_others_their_places() {
        let shares = Shares::new(2);
        let (web, db) = (Arc::from("web"), Arc::from("db"));
        let first = shares.take(&web).unwrap();
        let _second = shares.take(&web).unwrap();
        assert!(shares.take(&web).is_none());
        assert!(shares.take(&db).is_some());
        drop(first);
        assert!(shares.take(&web).is_some());
    }

    #[test]
    fn callers_without_a_place_are_forgotten() {
        let shares = Shares::new(2);
        let held: Vec<_> = (0..10).map(|n| shares.take(&n.to_string().into()).unwrap()).collect();
        drop(held);
        assert!(shares.taken().is_empty());
    }
}
