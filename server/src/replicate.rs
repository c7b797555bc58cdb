//! Catching up, by choice: the newest backups of chosen machines come here from another server, in quiet hours.
//!
//! Each rule is a seeding ([`crate::seed`]) that is repeated: only what the chains here lack travels, and each stays a chain of its
//! own. What a rule's hours end in the middle of is gone on with in the next ones.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use janus_proto::{
    bandwidth::{self, Window, Zone},
    channel::Dialer,
    grants::Which,
    ids::ServerId,
};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    background,
    carry::CarryError,
    config::{ConfigError, Replicate, replicate::Hours},
    fetching::{Turn, kind},
    runs::{Runs, now_ms},
    seed::{Event, Seeder},
};

/// How often the clock is looked at outside of a rule's hours.
const LOOK: Duration = Duration::from_secs(60);

/// What a server needs to follow its rules.
#[derive(Clone)]
pub struct Replication {
    /// Its runs.
    pub runs: Arc<Runs>,
    /// Its name.
    pub own: ServerId,
    /// Makes connections.
    pub dialer: Dialer,
    /// Where janus is.
    pub janus_urls: watch::Receiver<Vec<String>>,
}

/// A rule, checked.
struct Rule {
    name: String,
    from: String,
    which: Vec<Which>,
    hours: Hours,
    limits: Vec<Window>,
    every: Duration,
    /// What was said last: a server that stays away is logged once.
    said: Mutex<String>,
}

impl Rule {
    fn new(name: &str, rule: &Replicate) -> Result<Self, String> {
        Ok(Self {
            name: name.to_owned(),
            from: if rule.from.is_empty() { name.to_owned() } else { rule.from.clone() },
            which: rule.which()?,
            hours: rule.hours()?,
            limits: rule.limits()?,
            every: Duration::from_secs(rule.every_seconds),
            said: Mutex::default(),
        })
    }
}

impl Replication {
    /// Follows a rule until `shutdown`.
    ///
    /// # Errors
    /// When the rule is none.
    pub fn follow(
        self,
        name: &str,
        rule: &Replicate,
        shutdown: CancellationToken,
    ) -> Result<impl Future<Output = ()> + Send + 'static, ConfigError> {
        let invalid = |reason| ConfigError::Invalid { key: "replicate", reason };
        let rule = Arc::new(Rule::new(name, rule).map_err(invalid)?);
        Ok(async move {
            while !shutdown.is_cancelled() {
                let pause = match rule.hours.left(now_ms()) {
                    Some(left) => {
                        self.within(&rule, left, &shutdown).await;
                        rule.every
                    }
                    None => LOOK,
                };
                shutdown.run_until_cancelled(sleep(pause)).await;
            }
        })
    }

    /// Once, but no longer than its hours last.
    async fn within(&self, rule: &Arc<Rule>, left: Duration, shutdown: &CancellationToken) {
        let stop = shutdown.child_token();
        let (replication, rule, stopped) = (self.clone(), rule.clone(), stop.clone());
        let mut work = std::pin::pin!(background(move || replication.once(&rule, &stopped)));
        tokio::select! {
            biased;
            () = &mut work => return,
            () = sleep(left) => stop.cancel(),
        }
        work.await;
    }

    /// Blocks.
    fn once(&self, rule: &Rule, stop: &CancellationToken) {
        let janus_urls = self.janus_urls.borrow().clone();
        let dialer = bandwidth::limited(self.dialer.clone(), &rule.limits, Zone::Utc);
        let connected = Seeder::connect(&rule.from, (&self.own, &dialer), &janus_urls, stop);
        let mut turn = Turn::default();
        let done = connected.and_then(|seeder| self.seed(&seeder, &rule.which, &mut turn, stop));
        let failed = match done {
            Ok(()) => String::new(),
            Err(CarryError::Stopped) => {
                turn.is_stopped = true;
                String::new()
            }
            Err(error) => {
                turn.fail(kind(&error), error.to_string());
                error.to_string()
            }
        };
        self.runs.fetching().note(&rule.name, turn);
        let mut said = rule.said.lock().unwrap_or_else(PoisonError::into_inner);
        if !failed.is_empty() && *said != failed {
            tracing::warn!(
                from = rule.from,
                error = failed,
                "nothing is replicated from there now"
            );
        }
        *said = failed;
    }

    fn seed(
        &self,
        seeder: &Seeder,
        which: &[Which],
        turn: &mut Turn,
        stop: &CancellationToken,
    ) -> Result<(), CarryError> {
        let from = seeder.server();
        for (machine, which) in seeder.machines(which)? {
            let mut tell = |event: Event<'_>| match event {
                Event::Seeded(imported) if !imported.was_here => {
                    let (backup_id, bytes) = (imported.run.backup, imported.written_bytes);
                    tracing::info!(%from, %machine, %backup_id, bytes, "replicated");
                    turn.brought += 1;
                    turn.bytes = turn.bytes.saturating_add(bytes);
                }
                Event::Failed(error) => {
                    tracing::warn!(%from, %machine, %error, "a backup is not replicated");
                    turn.fail(kind(error), format!("{machine}: {error}"));
                }
                Event::Seeded(_) | Event::Here(..) | Event::PassedOver(_) => {}
            };
            let hear = |_, _| !stop.is_cancelled();
            match seeder.seed(&self.runs, &machine, which, &hear, &mut tell) {
                Ok(()) => {}
                Err(CarryError::Stopped) => return Err(CarryError::Stopped),
                // The others come all the same.
                Err(error) => {
                    tracing::warn!(%from, %machine, %error, "a machine is not replicated");
                    turn.fail(kind(&error), format!("{machine}: {error}"));
                }
            }
        }
        Ok(())
    }
}
