//! Proofs by themselves: a backup so often, in quiet hours, by a thread of low priority.
//!
//! When the last one was is known from the records, so a restart proves nothing anew. Outside of the hours, and while clients
//! write, reading pauses; what a restart interrupts is begun again, perhaps with another backup.

use std::{sync::Arc, time::Duration};

use janus_proto::grants::Which;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{ProveError, Prover, Target, boot::Wish, record::Proof};
use crate::{
    background,
    config::{ConfigError, Prove, replicate::Hours},
    runs::{Runs, now_ms},
    verify::pace::{Limit, seldom},
};

/// How often the clock is looked at.
const LOOK: Duration = Duration::from_secs(60);

/// What a server proves by itself.
pub struct Schedule {
    runs: Arc<Runs>,
    settings: Prove,
    machines: Vec<Which>,
    /// Which of them are started.
    starts: Vec<Which>,
    hours: Hours,
    every: Duration,
}

impl Schedule {
    /// As the settings say; `None`: nothing.
    ///
    /// # Errors
    /// When they make no sense.
    pub fn of(settings: &Prove, runs: Arc<Runs>) -> Result<Option<Self>, ConfigError> {
        let invalid = |reason| ConfigError::Invalid { key: "prove", reason };
        if settings.every_seconds == 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            runs,
            machines: settings.machines().map_err(invalid)?,
            starts: settings.boot().map_err(invalid)?,
            hours: settings.hours().map_err(invalid)?,
            every: Duration::from_secs(settings.every_seconds),
            settings: settings.clone(),
        }))
    }

    /// Proves until `shutdown`.
    pub async fn follow(self, shutdown: CancellationToken) {
        let schedule = Arc::new(self);
        while !shutdown.is_cancelled() {
            if schedule.is_due() {
                let (schedule, stop) = (schedule.clone(), shutdown.clone());
                background(move || schedule.once(stop)).await;
            }
            shutdown.run_until_cancelled(sleep(LOOK.min(schedule.every))).await;
        }
    }

    /// The last proof of all is long enough ago, by a clock that may have been set back.
    fn is_due(&self) -> bool {
        let (now, machines) = (now_ms(), self.runs.machines());
        let tried = machines.iter().map(|machine| machine.proofs().standing().tried_ms);
        let last = tried.filter(|tried| *tried <= now).max().unwrap_or(0);
        let every = i64::try_from(self.every.as_millis()).unwrap_or(i64::MAX);
        now.saturating_sub(last) >= every && self.hours.left(now).is_some()
    }

    /// Blocks.
    fn once(self: &Arc<Self>, stop: CancellationToken) {
        let mut machines = self.runs.machines();
        machines.retain(|machine| self.machines.iter().any(|which| which.takes(&machine.key)));
        let Some(target) = Target::choose(&machines, None) else { return };
        let (rate, waits) = (u64::from(self.settings.mib_per_second) << 20, self.waits());
        let starts = self.starts.iter().any(|which| which.takes(&target.run.machine));
        let prover = Prover {
            runs: &self.runs,
            files_bytes: self.settings.files_mib.saturating_mul(1 << 20),
            boot: starts.then(|| Wish::of(&self.settings)),
            pace: Arc::new(Limit::new(rate, stop.clone(), waits)),
            stop,
            tell: &|line| tracing::debug!(line, "proving"),
        };
        let machine = &target.run.machine;
        match prover.prove(&target) {
            Ok(proof) => {
                told(machine.as_str(), &proof);
                if let Err(error) = self.runs.note_proof(machine, proof) {
                    tracing::error!(%error, %machine, "a proof can't be kept: it is known until this server ends");
                }
            }
            Err(ProveError::Stopped) => {}
            Err(error) => tracing::warn!(%error, %machine, "a backup is not proven"),
        }
    }

    /// Whether to wait now: a client writes, or the hours are over.
    fn waits(self: &Arc<Self>) -> impl Fn() -> bool + Send + Sync + use<> {
        let schedule = self.clone();
        seldom(move || schedule.runs.is_busy() || schedule.hours.left(now_ms()).is_none())
    }
}

/// For the log.
fn told(machine: &str, proof: &Proof) {
    let (backup, seconds) = (proof.backup, (proof.ended_ms - proof.began_ms) / 1000);
    let bytes: u64 = proof.disks.iter().map(|disk| disk.read_bytes).sum();
    for line in proof.disks.iter().flat_map(|disk| disk.warnings.all()) {
        tracing::warn!(machine, %backup, line, "a proof found something to look at");
    }
    match proof.failure() {
        None => tracing::info!(machine, %backup, bytes, seconds, "backup proven"),
        Some(failure) => {
            tracing::error!(machine, %backup, failure, "a backup can't be restored as it was: `janus-server prove status` says more");
        }
    }
}
