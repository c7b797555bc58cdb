//! What this server fetches from others by itself, and how that goes: the rules of `[replicate]`, and the filling of stubs.
//!
//! Counted since this server runs; `seed status` shows it, and janus what it is told with the vitals.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use janus_proto::pb;

use crate::{carry::CarryError, runs::now_ms, seed::SeedError};

/// The name of what fills stubs; no rule has it.
pub const FILLING: &str = "";

/// How a rule, or the filling, stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Unix milliseconds at which its last turn ended; 0: there was none.
    pub ended_ms: i64,
    /// The same of one that came to its end without a failure.
    pub succeeded_ms: i64,
    /// Backups that the last turn brought.
    pub brought: u64,
    /// Data that all of them have brought.
    pub bytes: u64,
    /// Failures of all of them, by what failed.
    pub errors: BTreeMap<&'static str, u64>,
    /// The first failure of the last turn.
    pub failed: Option<String>,
}

/// What a turn has done.
#[derive(Debug, Default)]
pub struct Turn {
    /// Backups that it brought.
    pub brought: u64,
    /// Their data.
    pub bytes: u64,
    /// It was stopped before its end.
    pub is_stopped: bool,
    errors: Vec<&'static str>,
    failed: Option<String>,
}

impl Turn {
    /// One that has brought so much data.
    pub fn of(bytes: u64) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// Takes note of a failure; the first one is told.
    pub fn fail(&mut self, kind: &'static str, told: String) {
        self.errors.push(kind);
        self.failed.get_or_insert(told);
    }
}

/// All of them, by the names of the rules.
#[derive(Debug, Default)]
pub struct Fetching(Mutex<BTreeMap<String, Fetched>>);

impl Fetching {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Fetched>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a rule stands, if it had a turn.
    pub fn of(&self, rule: &str) -> Option<Fetched> {
        self.lock().get(rule).cloned()
    }

    /// Takes note of a turn that has ended.
    pub fn note(&self, rule: &str, turn: Turn) {
        let mut all = self.lock();
        let fetched = all.entry(rule.to_owned()).or_default();
        fetched.ended_ms = now_ms();
        if turn.failed.is_none() && !turn.is_stopped {
            fetched.succeeded_ms = fetched.ended_ms;
        }
        fetched.brought = turn.brought;
        fetched.bytes = fetched.bytes.saturating_add(turn.bytes);
        for kind in turn.errors {
            *fetched.errors.entry(kind).or_default() += 1;
        }
        fetched.failed = turn.failed;
    }

    /// The same for every janus.
    pub fn messages(&self) -> Vec<pb::Fetching> {
        let all = self.lock();
        let message = |(rule, fetched): (&String, &Fetched)| pb::Fetching {
            rule: rule.clone(),
            succeeded_ms: fetched.succeeded_ms,
            bytes: fetched.bytes,
            errors: fetched
                .errors
                .iter()
                .map(|(kind, count)| pb::FetchErrors { reason: (*kind).into(), count: *count })
                .collect(),
            failure: fetched.failed.clone().unwrap_or_default(),
        };
        all.iter().map(message).collect()
    }
}

/// What failed, in a word.
pub fn kind(error: &CarryError) -> &'static str {
    match error {
        CarryError::Source { passes: true, .. } => "away",
        CarryError::Seed(error) if matches!(**error, SeedError::Unreachable { .. }) => "away",
        CarryError::Source { passes: false, .. } => "source",
        CarryError::Seed(_) => "settings",
        _ => "here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_add_up_and_the_last_one_is_told() {
        let fetching = Fetching::default();
        let away = || CarryError::Source {
            server: "a".parse().unwrap(),
            reason: "is away".into(),
            passes: true,
        };
        fetching.note("a", Turn { brought: 2, bytes: 10, ..Turn::default() });
        let good = fetching.of("a").unwrap();
        assert!(good.succeeded_ms > 0 && good.succeeded_ms == good.ended_ms, "{good:?}");
        let mut failed = Turn { bytes: 5, ..Turn::default() };
        failed.fail(kind(&away()), away().to_string());
        failed.fail(kind(&CarryError::Stopped), "later".into());
        fetching.note("a", failed);
        let told = &fetching.messages()[0];
        assert_eq!((told.succeeded_ms, told.bytes), (good.succeeded_ms, 15));
        assert_eq!(told.failure, "server a: is away");
        let errors: Vec<_> =
            told.errors.iter().map(|one| (one.reason.as_str(), one.count)).collect();
        assert_eq!(errors, [("away", 1), ("here", 1)]);
        fetching.note("b", Turn { is_stopped: true, ..Turn::default() });
        let stopped = fetching.of("b").unwrap();
        assert!(stopped.ended_ms > 0 && stopped.succeeded_ms == 0, "{stopped:?}");
        fetching.note("a", Turn::default());
        assert_eq!(fetching.of("a").unwrap().failed, None);
        assert!(fetching.of(FILLING).is_none());
    }
}
