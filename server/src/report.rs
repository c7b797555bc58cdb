//! Reports to every janus: the full state first, then changes, and heartbeats with free space and certificate.
//!
//! One task for each janus, reconnecting for ever. A janus that falls behind gets the full state again on a new
//! stream; nothing is kept for one that is away.

use std::{collections::HashMap, sync::Arc, time::Duration};

use janus_proto::{
    channel::{self, ConnectOptions, Dialer, Expect, explain},
    pb::{self, report_request::Event, report_service_client::ReportServiceClient},
    tls::Identity,
};
use tokio::{
    sync::{broadcast, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{
    audit::{self, Action, Who},
    chain::Held,
    policy::Policy,
    prove::record::Standing,
    revoked::{RevokeError, Revoked},
    runs::{Change, Machine, Runs},
};

const QUEUE: usize = 16;
/// Snapshots in one message of a full state: far below the message limit.
const SNAPSHOTS_A_MESSAGE: usize = 500;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A janus that takes nothing for so long is given up and connected again.
const STUCK: Duration = Duration::from_secs(20);
/// How often free space is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// What a server says of itself.
#[derive(Clone)]
pub struct Reporter {
    /// Its runs.
    pub runs: Arc<Runs>,
    /// Its name.
    pub server: String,
    /// Its certificate.
    pub identity: Identity,
    /// What it doesn't believe any more.
    pub revoked: Arc<Revoked>,
    /// What groups may do.
    pub policy: Arc<Policy>,
    /// Its URLs.
    pub urls: Vec<String>,
    /// Settings that all servers should share.
    pub settings: pb::SharedSettings,
    /// Time after which silence is broken by a heartbeat.
    pub refresh: Duration,
}

impl Reporter {
    /// Reports to each janus of `urls`, whenever the list changes, until `shutdown`.
    pub async fn follow(
        self,
        mut urls: watch::Receiver<Vec<String>>,
        dialer: Dialer,
        shutdown: CancellationToken,
    ) {
        let mut streams = JoinSet::new();
        let mut kept: HashMap<String, AbortHandle> = HashMap::new();
        loop {
            let wanted = urls.borrow_and_update().clone();
            for (_, stream) in kept.extract_if(|url, _| !wanted.contains(url)) {
                stream.abort();
            }
            for url in wanted {
                let run = self.clone().run(url.clone(), dialer.clone(), shutdown.clone());
                kept.entry(url).or_insert_with(|| streams.spawn(run));
            }
            tokio::select! {
                biased;
                changed = urls.changed() => if changed.is_err() { break },
                () = shutdown.cancelled() => break,
            }
        }
        while streams.join_next().await.is_some() {}
    }

    /// Reports to one janus until `shutdown`.
    async fn run(self, url: String, dialer: Dialer, shutdown: CancellationToken) {
        let mut pause = FIRST_PAUSE;
        let mut said = String::new();
        for number in 1.. {
            let began = Instant::now();
            let stream = self.stream(&url, &dialer, number);
            let Some(ended) = shutdown.run_until_cancelled(stream).await else {
                return;
            };
            if began.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            // A janus that stays away is logged once.
            if ended != said {
                tracing::warn!(janus = url, reason = ended, "reports stopped; trying again");
                said = ended;
            }
            if shutdown.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One stream, the `number`th to this janus, until it breaks; says why it did.
    async fn stream(&self, url: &str, dialer: &Dialer, number: u64) -> String {
        let options = ConnectOptions::expecting(Expect::Janus);
        let channel = match channel::connect_through(url, dialer.clone(), options).await {
            Ok(connection) => connection.channel,
            Err(error) => return error.to_string(),
        };
        let changes = self.runs.subscribe();
        let (send, events) = mpsc::channel(QUEUE);
        let mut client = ReportServiceClient::new(channel);
        let feed = self.feed(number, send, changes);
        let read = async {
            let mut answers = match client.report(ReceiverStream::new(events)).await {
                Ok(answers) => answers.into_inner(),
                Err(status) => return explain(&status),
            };
            tracing::info!(janus = url, "reporting");
            loop {
                match answers.message().await {
                    Ok(Some(answer)) => self.learn(url, answer.revocations).await,
                    Ok(None) => return "janus ended the stream".to_owned(),
                    Err(status) => return explain(&status),
                }
            }
        };
        tokio::select! {
            biased;
            why = feed => why,
            why = read => why,
        }
    }

    /// Takes in what other servers have revoked.
    async fn learn(&self, url: &str, revocations: Vec<pb::Revocation>) {
        if revocations.is_empty() {
            return;
        }
        let (revoked, runs, from) = (self.revoked.clone(), self.runs.clone(), url.to_owned());
        let merge = move || {
            let news = revoked.merge(&from, &revocations)?;
            if !news.is_empty() {
                let event = audit::Event::new(Action::Revoke).noting(news.join(", "));
                runs.note(&Who::named(format!("through janus {from}")), event);
            }
            Ok::<_, RevokeError>(())
        };
        let merged = crate::blocking(merge).await;
        if let Ok(Err(error)) = merged {
            // It comes again with the next stream.
            tracing::error!(janus = url, %error, "revocations of other servers can't be kept");
        }
    }

    fn revocations(&self) -> Vec<Event> {
        let messages = self.revoked.known().messages().into_iter();
        messages.map(|revocations| Event::Revocations(pb::Revocations { revocations })).collect()
    }

    /// Who may do what beyond the own machine, in messages.
    fn grants(&self) -> Vec<Event> {
        self.policy.messages().into_iter().map(Event::Grants).collect()
    }

    /// Feeds the stream; says why it stopped.
    async fn feed(
        &self,
        number: u64,
        send: mpsc::Sender<pb::ReportRequest>,
        mut changes: broadcast::Receiver<Change>,
    ) -> String {
        let mut sequence = 0;
        let mut awaited = self.runs.awaited();
        let mut told = self.vitals().await;
        let mut due = Instant::now() + self.refresh;
        let mut events = vec![Event::Hello(self.hello(number, told.clone()))];
        events.extend(self.full_state().into_iter().map(Event::Full));
        events.push(Event::FullEnd(pb::FullEnd {}));
        let mut revoked = self.revoked.known().changes();
        events.extend(self.revocations());
        let mut granted = self.policy.changes();
        events.extend(self.grants());
        loop {
            for event in events {
                if let Err(why) = push(&send, &mut sequence, event).await {
                    return why;
                }
            }
            events = tokio::select! {
                biased;
                Ok(()) = revoked.changed() => {
                    let mut events = self.revocations();
                    // With the digest of what is known now.
                    told = self.vitals().await;
                    events.push(heartbeat(&told));
                    events
                }
                Ok(()) = awaited.changed() => {
                    told = self.vitals().await;
                    vec![heartbeat(&told)]
                }
                Ok(()) = granted.changed() => self.grants(),
                vitals = self.worth_telling(&told, due) => {
                    told = vitals;
                    due = Instant::now() + self.refresh;
                    vec![heartbeat(&told)]
                }
                change = changes.recv() => match change {
                    Ok(change) => vec![Event::Change(self.change(&change))],
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        return "janus took changes too slowly".to_owned();
                    }
                    Err(broadcast::error::RecvError::Closed) => {
                        return "the server stops".to_owned();
                    }
                },
            };
        }
    }

    /// Waits until a heartbeat is `due`, or the space has changed much since it was told, or other things can't be used.
    async fn worth_telling(&self, told: &pb::Vitals, due: Instant) -> pb::Vitals {
        loop {
            sleep_until(due.min(Instant::now() + LOOK)).await;
            let now = self.vitals().await;
            if Instant::now() >= due || has_changed_much(told, &now) {
                return now;
            }
        }
    }

    async fn vitals(&self) -> pb::Vitals {
        let (runs, revoked) = (self.runs.clone(), self.revoked.clone());
        let look = move || {
            revoked.keep();
            (runs.store().space(), runs.warnings(), runs.seeding())
        };
        let asked = crate::blocking(look).await;
        let (space, mut warnings, seeding) =
            asked.unwrap_or_else(|_| (Ok((0, 0)), Vec::new(), Vec::new()));
        warnings.extend(self.policy.problems());
        let (free_bytes, total_bytes) = space.unwrap_or_else(|error| {
            tracing::warn!(%error, "free space of the image path can't be asked");
            (0, 0)
        });
        let certificate_expires_ms = self.identity.expires().saturating_mul(1000);
        let revocations_digest = self.revoked.known().digest();
        pb::Vitals {
            free_bytes,
            total_bytes,
            certificate_expires_ms,
            warnings,
            revocations_digest,
            certificate_valid_ms: self.identity.valid_seconds().saturating_mul(1000),
            seeding: seeding.iter().map(ToString::to_string).collect(),
            fetching: self.runs.fetching().messages(),
        }
    }

    fn hello(&self, stream: u64, vitals: pb::Vitals) -> pb::ReportHello {
        pb::ReportHello {
            store_generation: self.runs.store().generation.to_string(),
            start_epoch: self.runs.store().start_epoch,
            version: env!("CARGO_PKG_VERSION").into(),
            urls: self.urls.clone(),
            settings: Some(self.settings.clone()),
            refresh_seconds: self.refresh.as_secs() as u32,
            vitals: Some(vitals),
            stream,
        }
    }

    fn full_state(&self) -> Vec<pb::StateChange> {
        let mut machines = self.runs.machines();
        // What isn't known can't be told; janus would take it for a machine that was never here.
        machines.retain(|machine| machine.faults().machine.is_none());
        let mut all: Vec<pb::StateChange> = machines
            .chunks(SNAPSHOTS_A_MESSAGE)
            .map(|some| pb::StateChange {
                machines: some.iter().map(|m| machine_report(m)).collect(),
                ..Default::default()
            })
            .collect();
        for machine in &machines {
            let snapshots: Vec<_> =
                machine.snapshots().iter().map(|held| self.snapshot(held)).collect();
            all.extend(
                snapshots
                    .chunks(SNAPSHOTS_A_MESSAGE)
                    .map(|some| pb::StateChange { snapshots: some.to_vec(), ..Default::default() }),
            );
        }
        all
    }

    fn change(&self, change: &Change) -> pb::StateChange {
        let (key, snapshots, removed) = match change {
            Change::Used(key) => (key, Vec::new(), &[][..]),
            Change::Health(key, ids) => {
                let machine = self.runs.machine(key);
                let held = ids.iter().filter_map(|id| machine.as_ref()?.snapshot(*id));
                (key, held.map(|held| self.snapshot(&held)).collect(), &[][..])
            }
            Change::Committed(run) => {
                (&run.machine, Held::all(run).map(|held| self.snapshot(&held)).collect(), &[][..])
            }
            Change::Removed(key, removed) => (key, Vec::new(), &removed[..]),
        };
        let removed_snapshots = removed.iter().map(ToString::to_string).collect();
        let machines =
            self.runs.machine(key).map(|machine| machine_report(&machine)).into_iter().collect();
        pb::StateChange { machines, snapshots, removed_snapshots }
    }

    fn snapshot(&self, held: &Held) -> pb::Snapshot {
        self.runs.to_wire(held, &self.server)
    }
}

fn heartbeat(vitals: &pb::Vitals) -> Event {
    Event::Heartbeat(pb::Heartbeat { vitals: Some(vitals.clone()) })
}

/// A tenth of the free space came or went.
fn has_changed_much(told: &pb::Vitals, now: &pb::Vitals) -> bool {
    now.free_bytes.abs_diff(told.free_bytes) > told.free_bytes / 10
        || now.certificate_expires_ms != told.certificate_expires_ms
        || now.warnings != told.warnings
        || now.seeding != told.seeding
}

fn machine_report(machine: &Machine) -> pb::MachineReport {
    pb::MachineReport {
        machine: machine.key.to_string(),
        use_counter: machine.use_counter(),
        has_chain: machine.has_chain(),
        proof: proof(machine),
        alarm: machine.alarm().unwrap_or_default(),
        never_committed: machine.use_counter() > 0 && !machine.was_committed(),
    }
}

/// What was proven of it, if anything was tried.
fn proof(machine: &Machine) -> Option<pb::Proof> {
    let Standing { proven_ms, tried_ms, failure, warnings, .. } = machine.proofs().standing();
    (tried_ms > 0).then_some(pb::Proof { proven_ms, tried_ms, failure, warnings })
}

async fn push(
    send: &mpsc::Sender<pb::ReportRequest>,
    sequence: &mut u64,
    event: Event,
) -> Result<(), String> {
    *sequence += 1;
    let request = pb::ReportRequest { sequence: *sequence, event: Some(event) };
    match timeout_at(Instant::now() + STUCK, send.send(request)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err("the stream broke".to_owned()),
        Err(_) => Err("janus takes nothing any more".to_owned()),
    }
}
