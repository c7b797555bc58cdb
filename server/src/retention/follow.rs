//! Retention by itself: after each commit, once a day, and when space is short.

use std::{sync::Arc, time::Duration};

use janus_proto::ids::MachineKey;
use time::Time;
use tokio::{
    sync::{broadcast, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::Retention;
use crate::{
    background,
    runs::{Change, Machine, now_ms},
};

/// How often the clock is looked at.
const LOOK: Duration = Duration::from_secs(60);
const DAY_MS: i64 = 86_400_000;

/// Follows the commits of a server until `shutdown`; what runs then stops soon. `at` is a time of day (UTC) for all
/// machines, which are also looked at soon after the start and whenever `is_low` becomes true.
pub async fn follow(
    retention: Arc<Retention>,
    at: Option<Time>,
    mut is_low: watch::Receiver<bool>,
    shutdown: CancellationToken,
) {
    let mut changes = retention.runs.subscribe();
    let mut last_day = None;
    // It may be low from the start.
    is_low.mark_changed();
    loop {
        let due = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            change = changes.recv() => match change {
                Ok(Change::Committed(run)) => Some(run.machine.clone()),
                Ok(_) => continue,
                Err(broadcast::error::RecvError::Lagged(_)) => None,
                Err(broadcast::error::RecvError::Closed) => return,
            },
            changed = is_low.changed() => match changed {
                Ok(()) if *is_low.borrow_and_update() => None,
                Ok(()) => continue,
                Err(_) => return,
            },
            () = sleep(LOOK) => {
                let day = at.map(|at| day(now_ms(), at));
                if day == last_day {
                    continue;
                }
                last_day = day;
                None
            }
        };
        let (retention, stop) = (retention.clone(), shutdown.clone());
        background(move || look_after(&retention, due.as_ref(), &stop)).await;
    }
}

/// Number of the day, if days began at `at`.
fn day(now_ms: i64, at: Time) -> i64 {
    let (hour, minute, _) = at.as_hms();
    let since_midnight = (i64::from(hour) * 60 + i64::from(minute)) * 60_000;
    now_ms.saturating_sub(since_midnight).div_euclid(DAY_MS)
}

/// Carries the plan of one machine or of all out, and purges what is due. What fails is logged and tried again next time.
fn look_after(retention: &Retention, only: Option<&MachineKey>, stop: &CancellationToken) {
    retention.runs.store().give_spare();
    let machines = match only {
        Some(key) => retention.runs.machine(key).into_iter().collect(),
        None => retention.runs.machines(),
    };
    for machine in machines {
        if stop.is_cancelled() {
            return;
        }
        look_after_machine(retention, &machine, stop);
    }
}

fn look_after_machine(retention: &Retention, machine: &Machine, stop: &CancellationToken) {
    let key = &machine.key;
    let (carried, report) = retention.thin(machine, false, stop, &|_| ());
    match carried {
        Ok(carried) => {
            if let Some(reason) = &carried.plan.stop {
                tracing::warn!(machine = %key, %reason, "retention waits: see `janus-server retention plan`");
            }
            if !carried.dropped.is_empty() {
                tracing::info!(machine = %key, runs = carried.dropped.len(), "retention dropped runs");
            }
            if let Some((_, reason)) = carried.waiting.first().filter(|_| carried.lacks_room) {
                tracing::warn!(machine = %key, reason, "retention keeps what no rule does: merging has no room");
            }
        }
        Err(error) => tracing::error!(machine = %key, %error, "retention drops nothing"),
    }
    if !report.purged.is_empty() {
        tracing::info!(machine = %key, runs = report.purged.len(), "dropped runs were purged");
    }
    for (snapshot, reason) in report.waiting {
        tracing::debug!(machine = %key, snapshot_id = %snapshot, %reason, "a purge waits");
    }
}

#[cfg(test)]
mod tests {
    use time::macros::{datetime, time};

    use super::*;

    #[test]
    fn a_day_begins_at_the_time_of_the_settings() {
        let ms = |at: time::OffsetDateTime| at.unix_timestamp() * 1000;
        let at = time!(03:00);
        let (before, after) = (datetime!(2026-11-25 02:59:59 UTC), datetime!(2026-11-25 03:00 UTC));
        assert_eq!(day(ms(before), at) + 1, day(ms(after), at));
        assert_eq!(day(ms(datetime!(2026-11-25 23:00 UTC)), at), day(ms(after), at));
    }
}
