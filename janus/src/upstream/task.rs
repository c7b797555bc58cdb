//! The task that looks for one server and stays with it: connect, watch, notice the loss, again.

use std::{future::pending, pin::pin, sync::atomic::Ordering, time::Duration};

use futures::{Stream, StreamExt};
use http::uri::Authority;
use janus_proto::{
    chance,
    channel::{self, ConnectOptions, Dialer, Expect},
    clock::unix_ms,
    ids::ServerId,
    tls::Role,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    BACKUP_SERVICE, Link, RESTORE_SERVICE, STALE, Serving, Upstream, Wire,
    health::{self},
};
use crate::patience::Wait;

/// Pauses between looks for a server that isn't there.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// However often somebody asks, looks are this far apart.
const LEAST_PAUSE: Duration = Duration::from_millis(20);
/// A connection without any byte for this long, in spite of probes, is lost.
const LOST: Duration = Duration::from_secs(15);
/// The same for the control connection while the bulk connection still brings bytes.
const LOST_BESIDE_BULK: Duration = Duration::from_secs(60);
/// Deadline for connecting, and for the first word on its health.
const CONNECT: Duration = Duration::from_secs(2);

/// Streams on a connection that takes no new ones are dropped after this.
const LONGEST_DRAIN: Duration = Duration::from_secs(300);

struct Session {
    server: ServerId,
    link: Link,
    kill: CancellationToken,
    drivers: JoinSet<Result<(), hyper::Error>>,
}

/// Runs until it is dropped.
pub(super) async fn run(upstream: Upstream, dialer: Dialer, kill: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        upstream.note_look(true);
        let reason = match connect(&upstream, &dialer, kill.child_token()).await {
            Ok(session) => {
                pause = FIRST_PAUSE;
                stay(&upstream, session).await
            }
            Err(reason) => reason,
        };
        mark_down(&upstream, reason);
        sleep(LEAST_PAUSE.saturating_sub(begun.elapsed())).await;
        tokio::select! {
            biased;
            () = sleep(pause.mul_f64(chance::between(0.5..1.0))) => {}
            () = upstream.0.look.notified() => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn mark_down(upstream: &Upstream, reason: String) {
    upstream.note_look(false);
    upstream.change(|state| {
        if state.link.take().is_some() || state.looks == 0 {
            state.since_ms = unix_ms();
            warn!(server = %state.server.as_ref().map_or_else(|| upstream.url(), ToString::to_string), reason, "not reachable");
        }
        state.reason = reason;
        state.looks += 1;
    });
}

async fn connect(
    upstream: &Upstream,
    dialer: &Dialer,
    kill: CancellationToken,
) -> Result<Session, String> {
    let until_done = kill.clone().drop_guard();
    let begun = Instant::now();
    let (server, control, control_driver) = open(upstream, dialer, &kill).await?;
    let (other, bulk, bulk_driver) = open(upstream, dialer, &kill).await?;
    if other != server {
        return Err(format!(
            "{} is shared by servers {server} and {other}: give each its own URL",
            upstream.url()
        ));
    }
    upstream.note_round_trip(begun.elapsed() / 6);
    let mut drivers = JoinSet::new();
    drivers.spawn(control_driver);
    drivers.spawn(bulk_driver);
    until_done.disarm();
    Ok(Session { server, link: Link { control, bulk }, kill, drivers })
}

async fn open(
    upstream: &Upstream,
    dialer: &Dialer,
    kill: &CancellationToken,
) -> Result<(ServerId, Wire, super::wire::Driver), String> {
    let options = ConnectOptions { connect_timeout: CONNECT, expect: Expect::Server };
    let target = &upstream.0.target;
    let (stream, peer) = dialer.dial(target, &options).await.map_err(|error| error.to_string())?;
    upstream.0.certificate_expires.store(peer.expires(), Ordering::Relaxed);
    let Role::Server(server) = peer.role else { return Err(format!("{peer} is not a server")) };
    let authority: Authority =
        target.authority().parse().map_err(|_| format!("{target} is not a URL"))?;
    let (wire, driver) = Wire::open(stream, authority, kill.clone())
        .await
        .map_err(|error| channel::explain_error(&error))?;
    Ok((server, wire, driver))
}

/// Watches the session until it is lost; says why.
async fn stay(upstream: &Upstream, mut session: Session) -> String {
    let control = &session.link.control;
    let mut starts = pin!(health::watch(control.clone(), BACKUP_SERVICE));
    let mut reads = pin!(health::watch(control.clone(), RESTORE_SERVICE));
    let first = async { tokio::join!(starts.next(), reads.next()) };
    let (said_starts, said_reads) = tokio::select! {
        biased;
        first = timeout(CONNECT, first) => match first {
            Ok(said) => said,
            Err(_) => {
                session.kill.cancel();
                return "connected, but says nothing about its health".into();
            }
        },
        lost = driver_end(&mut session.drivers) => return lost,
    };
    info!(server = %session.server, url = %upstream.url(), "connected");
    upstream.change(|state| {
        state.server = Some(session.server.clone());
        state.link = Some(session.link.clone());
        state.looks += 1;
        state.reason = String::new();
        state.since_ms = unix_ms();
        state.starts = said_starts.unwrap_or(Serving::Yes);
        state.reads = said_reads.unwrap_or(Serving::Yes);
    });
    tokio::select! {
        biased;
        lost = driver_end(&mut session.drivers) => {
            tokio::spawn(end_later(session.kill.clone()));
            lost
        }
        lost = silence(upstream, &session.link) => {
            session.kill.cancel();
            lost
        }
        () = follow(starts, |said| set_starts(upstream, said)) => pending().await,
        () = follow(reads, |said| upstream.change(|state| state.reads = said)) => pending().await,
    }
}

fn set_starts(upstream: &Upstream, said: Serving) {
    let server = upstream.name();
    upstream.change(|state| {
        if state.starts == said {
            return;
        }
        match &said {
            Serving::Yes => info!(%server, "takes backups"),
            Serving::No(reason) => warn!(%server, reason, "takes no backups"),
        }
        state.since_ms = unix_ms();
        state.starts = said;
    });
}

async fn follow(watch: impl Stream<Item = Serving>, mut set: impl FnMut(Serving)) {
    let mut watch = pin!(watch);
    while let Some(said) = watch.next().await {
        set(said);
    }
}

// A server that stops lets its open calls end, for at most its own drain time.
async fn end_later(kill: CancellationToken) {
    let _kill = kill.clone().drop_guard();
    let _ = timeout(LONGEST_DRAIN, kill.cancelled()).await;
}

/// Ends when either connection does. The other is dropped with the set.
async fn driver_end(drivers: &mut JoinSet<Result<(), hyper::Error>>) -> String {
    match drivers.join_next().await {
        Some(Ok(Err(error))) => channel::explain_error(&error),
        _ => "connection lost: the server closed it".into(),
    }
}

/// Ends when the server has been silent for too long in spite of being asked.
async fn silence(upstream: &Upstream, link: &Link) -> String {
    loop {
        let quiet = link.control.pulse().silence().max(link.bulk.pulse().silence());
        sleep(STALE.saturating_sub(quiet).max(Duration::from_millis(100))).await;
        let (control, bulk) = (link.control.pulse().silence(), link.bulk.pulse().silence());
        let limit = if bulk < STALE { LOST_BESIDE_BULK } else { LOST };
        if control > limit || bulk > LOST {
            return format!("no answer for {} s", control.max(bulk).as_secs());
        }
        if control >= STALE {
            let _ = upstream.probe(link, Wait::Full).await;
        }
        if bulk >= STALE {
            health::shows_life(&link.bulk, upstream.probe_limit()).await;
        }
    }
}
