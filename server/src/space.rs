//! Free space: watched, with a reserve that new backups leave alone, and what each user may take.
//!
//! Below the reserve the server takes no new backups (NOT_SERVING for `janus.v1.BackupService`, STORE_FULL to who asks all the
//! same), goes on with open runs and with reads, and retention runs at once.

use std::{sync::Arc, time::Duration};

use janus_proto::show::amount;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    chain::store::Store,
    config::{Settings, size::Size},
    runs::Runs,
};

/// How often free space is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// For us.
    pub free_bytes: u64,
    /// Of the whole file system.
    pub total_bytes: u64,
    /// What new backups leave alone.
    pub reserve_bytes: u64,
}

impl Space {
    /// Asks the file system that holds the store. `None`: it doesn't say, which is logged.
    pub fn ask(store: &Store, reserve: Size) -> Option<Self> {
        let asked = store.space().inspect_err(|error| {
            tracing::warn!(%error, "free space of the image path can't be asked");
        });
        let (free_bytes, total_bytes) = asked.ok()?;
        Some(Self { free_bytes, total_bytes, reserve_bytes: reserve.of(total_bytes) })
    }

    /// True when no new backup should start. Who was low stays so until an eighth more than the reserve is free, so that the
    /// answer doesn't flicker.
    pub fn is_low(&self, was_low: bool) -> bool {
        let wanted = if was_low { self.reserve_bytes / 8 } else { 0 };
        self.free_bytes < self.reserve_bytes.saturating_add(wanted)
    }

    /// True when so much more can be stored above the reserve.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        self.free_bytes >= self.reserve_bytes.saturating_add(bytes)
    }

    /// What to tell who wants to store so much.
    pub fn advice_for(&self, bytes: u64) -> String {
        let missing = self.reserve_bytes.saturating_add(bytes).saturating_sub(self.free_bytes);
        format!(
            "{} are to be stored, {} of {} are free here and {} are kept in reserve (setting reserve): {} more are needed; \
             {WHAT_HELPS}",
            amount(bytes),
            amount(self.free_bytes),
            amount(self.total_bytes),
            amount(self.reserve_bytes),
            amount(missing),
        )
    }

    /// What to tell who wants to start a backup.
    pub fn advice(&self) -> String {
        format!(
            "{} of {} are free here and {} are kept in reserve (setting reserve): {} more are needed; {WHAT_HELPS}",
            amount(self.free_bytes),
            amount(self.total_bytes),
            amount(self.reserve_bytes),
            amount(self.reserve_bytes.saturating_sub(self.free_bytes)),
        )
    }
}

/// What to do about a full store.
pub const WHAT_HELPS: &str = "on the server, `janus-server retention run --now` drops what no rule keeps, `janus-server usage` \
    shows what takes the space, `janus-server delete` and `trash purge` free it";

/// The reserve of the settings, which were checked.
pub fn reserve(settings: &Settings) -> Size {
    Size::parse(&settings.reserve).unwrap_or(Size::Bytes(0))
}

/// What merges leave free: half of the reserve, or nothing once the space is low, since they are what helps then.
pub fn merge_reserve(settings: &Settings, store: &Store) -> u64 {
    match Space::ask(store, reserve(settings)) {
        Some(space) if !space.is_low(false) => space.reserve_bytes / 2,
        _ => 0,
    }
}

/// Watches the space until `shutdown` and tells when it becomes low or is so no more.
pub async fn watch(
    runs: Arc<Runs>,
    reserve: Size,
    is_low: watch::Sender<bool>,
    shutdown: CancellationToken,
) {
    loop {
        let runs = runs.clone();
        let asked = crate::blocking(move || {
            runs.store().keep_spare();
            Space::ask(runs.store(), reserve)
        });
        let asked = asked.await;
        if let Ok(Some(space)) = asked {
            is_low.send_if_modified(|is_low| {
                let was_low = std::mem::replace(is_low, space.is_low(*is_low));
                match (was_low, *is_low) {
                    (false, true) => {
                        tracing::error!(
                            advice = space.advice(),
                            "no new backups: the space is low"
                        );
                    }
                    (true, false) => tracing::info!("there is space again: backups are taken"),
                    _ => {}
                }
                was_low != *is_low
            });
        }
        if shutdown.run_until_cancelled(sleep(LOOK)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_does_not_flicker_around_the_reserve() {
        let space = |free_bytes| Space { free_bytes, total_bytes: 10_000, reserve_bytes: 800 };
        assert!(space(799).is_low(false) && !space(800).is_low(false));
        assert!(space(899).is_low(true) && !space(900).is_low(true));
        let none = Space { free_bytes: 0, total_bytes: 10_000, reserve_bytes: 0 };
        assert!(!none.is_low(false) && !none.is_low(true), "no reserve, never low");
    }

    #[test]
    fn who_is_refused_is_told_how_much_is_missing_and_what_helps() {
        let (free_bytes, reserve_bytes) = (1 << 20, 3 << 20);
        let text = Space { free_bytes, total_bytes: 1 << 30, reserve_bytes }.advice();
        assert!(text.contains("2.0 MiB more are needed"), "{text}");
        assert!(text.contains("janus-server retention run --now"), "{text}");
    }
}
