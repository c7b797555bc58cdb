//! Health of this janus: `""` while the process lives, `janus.v1.BackupService` while some server takes starts,
//! `janus.v1.RestoreService` while some server answers reads.

use std::time::Duration;

use janus_proto::health::set_all;
use tokio::time::{MissedTickBehavior, interval};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    fleet::Fleet,
    upstream::{BACKUP_SERVICE, Need, RESTORE_SERVICE},
};

/// How often readiness is looked at. It has several sources, time among them, so it is asked for rather than pushed.
const PERIOD: Duration = Duration::from_millis(200);

fn serving(is_serving: bool) -> ServingStatus {
    if is_serving { ServingStatus::Serving } else { ServingStatus::NotServing }
}

/// Keeps the reporter up to date until it is dropped.
pub(crate) async fn follow(fleet: Fleet, reporter: HealthReporter) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    reporter.set_service_status("", ServingStatus::Serving).await;
    loop {
        ticks.tick().await;
        let now = (fleet.any_ready(Need::Starts), fleet.any_ready(Need::Reads));
        // Only changes are told, or every watcher would be woken each time.
        if last != Some(now) {
            reporter.set_service_status(BACKUP_SERVICE, serving(now.0)).await;
            reporter.set_service_status(RESTORE_SERVICE, serving(now.1)).await;
            last = Some(now);
        }
    }
}

/// The end is near: nothing is served any more.
pub(crate) async fn not_serving(reporter: &HealthReporter) {
    set_all(reporter, ServingStatus::NotServing).await;
}
