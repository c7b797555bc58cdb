//! What a caller may send beside data: frames that cost us work, in a rate, with something saved up for busy moments.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;

/// Frames without data in a second, of one caller; see `frames.rs` for what each costs.
pub(super) const FRAMES_PER_SECOND: u64 = 20_000;
/// What a caller may have saved up.
pub(super) const FRAMES_SAVED: u64 = 100_000;
/// Nobody waits longer for one read: our pings must be answered in time.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Between two lines in the log about one caller.
const QUIET: Duration = Duration::from_secs(60);

/// One caller's budget.
#[derive(Debug)]
pub(super) struct Budget {
    caller: Arc<str>,
    account: Mutex<Account>,
}

#[derive(Debug)]
struct Account {
    /// Below zero: spent, but not saved yet.
    left: f64,
    at: Instant,
    told: Option<Instant>,
}

impl Budget {
    fn new(caller: Arc<str>) -> Self {
        let account = Account { left: FRAMES_SAVED as f64, at: Instant::now(), told: None };
        Self { caller, account: Mutex::new(account) }
    }

    /// Pays for frames: how long to wait before more are read, if the budget is spent.
    pub fn pay(&self, cost: u64) -> Option<Duration> {
        // A panic elsewhere leaves the numbers as they are.
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let saved = (now - account.at).as_secs_f64() * FRAMES_PER_SECOND as f64;
        account.at = now;
        account.left = (account.left + saved).min(FRAMES_SAVED as f64) - cost as f64;
        if account.left >= 0.0 {
            return None;
        }
        if account.told.is_none_or(|told| now - told >= QUIET) {
            account.told = Some(now);
            warn!(
                caller = &*self.caller,
                limit = FRAMES_PER_SECOND,
                "sends more frames without data in a second than a caller may: it is read more slowly"
            );
        }
        let pause = Duration::from_secs_f64(-account.left / FRAMES_PER_SECOND as f64);
        // What isn't waited for isn't owed either, or many connections would owe for each other for ever.
        if pause > LONGEST_PAUSE {
            account.left = -(LONGEST_PAUSE.as_secs_f64() * FRAMES_PER_SECOND as f64);
        }
        Some(pause.min(LONGEST_PAUSE))
    }
}

/// The budgets of all callers that are connected; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Budgets(Arc<Mutex<HashMap<Arc<str>, Weak<Budget>>>>);

impl Budgets {
    /// The budget that all connections of `caller` share.
    pub fn of(&self, caller: &Arc<str>) -> Arc<Budget> {
        let mut known = self.known();
        if let Some(budget) = known.get(caller).and_then(Weak::upgrade) {
            return budget;
        }
        // Those of callers that are gone. A caller that comes back at once has a new one: its connections cost it a handshake.
        known.retain(|_, budget| budget.strong_count() > 0);
        let budget = Arc::new(Budget::new(caller.clone()));
        known.insert(caller.clone(), Arc::downgrade(&budget));
        budget
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Arc<str>, Weak<Budget>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_saved_up_is_free_and_then_the_rate_counts() {
        let budgets = Budgets::default();
        let (web, db) = (Arc::from("web"), Arc::from("db"));
        let (first, second) = (budgets.of(&web), budgets.of(&web));
        assert_eq!(first.pay(FRAMES_SAVED), None);
        let pause = second.pay(FRAMES_PER_SECOND / 2).expect("connections share a budget");
        assert_eq!(pause, Duration::from_millis(500));
        assert_eq!(budgets.of(&db).pay(1), None, "others have theirs");
        tokio::time::advance(pause + Duration::from_millis(1)).await;
        assert_eq!(first.pay(1), None);
        assert_eq!(first.pay(u64::from(u32::MAX)), Some(LONGEST_PAUSE));
        tokio::time::advance(LONGEST_PAUSE * 2).await;
        assert_eq!(first.pay(1), None);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_are_gone_are_forgotten() {
        let budgets = Budgets::default();
        for n in 0..100 {
            drop(budgets.of(&n.to_string().into()));
        }
        assert_eq!(budgets.known().len(), 1);
    }
}
