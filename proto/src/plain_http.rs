//! HTTP without TLS for whoever reaches the address: connections are few, short-lived and own little memory, so that nobody
//! who holds many of them takes file descriptors or memory from backups.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::listener::{OwnedTasks, accept, drain};

/// More are closed at once.
const MAX_CONNECTIONS: usize = 128;
/// Calls at once on one connection: some watches.
const MAX_CALLS: u32 = 16;
/// Receive window of a stream and of a connection; a question is a few bytes.
const WINDOW_BYTES: u32 = 64 << 10;
/// From the TCP accept, or the last answer, to a whole request.
const ASK_TIME: Duration = Duration::from_secs(10);
/// Whoever watches for longer has to connect again.
const LONGEST_CONNECTION: Duration = Duration::from_secs(3600);

/// Answers until `stop`; then nothing is left of it. `what` names it in the log.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    what: &'static str,
    stop: CancellationToken,
) {
    let (tasks, kill) = (TaskTracker::new(), CancellationToken::new());
    let _kill_on_drop = kill.clone().drop_guard();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Some((tcp, address)) = accept(&listener, &stop).await {
        let Ok(place) = places.clone().try_acquire_owned() else {
            warn!(what, %address, limit = MAX_CONNECTIONS, "connection closed: too many are open");
            continue;
        };
        let executor = OwnedTasks {
            tasks: tasks.clone(),
            kill: kill.child_token(),
            stall: LONGEST_CONNECTION,
        };
        let (routes, kill) = (routes.clone(), kill.clone());
        tasks.spawn(async move {
            let answering =
                timeout(LONGEST_CONNECTION, answer(tcp, address, routes, what, executor));
            let _ = kill.run_until_cancelled(answering).await;
            drop(place);
        });
    }
    kill.cancel();
    drain(&tasks, &kill, Duration::ZERO).await;
}

async fn answer(
    tcp: TcpStream,
    address: SocketAddr,
    routes: Router,
    what: &'static str,
    executor: OwnedTasks,
) {
    let _end_streams = executor.kill.clone().drop_guard();
    // A port scan, or somebody who holds connections.
    if !matches!(timeout(ASK_TIME, tcp.peek(&mut [0])).await, Ok(Ok(1))) {
        return;
    }
    let mut builder = auto::Builder::new(executor);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(ASK_TIME);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_CALLS)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = TowerToHyperService::new(routes);
    if let Err(error) = builder.serve_connection(TokioIo::new(tcp), service).await {
        debug!(what, %address, error, "connection lost");
    }
}
