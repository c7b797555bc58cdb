//! Health without TLS, on an address of its own (`health_listen`), for Kubernetes, Consul and the like.
//!
//! One port answers gRPC (`grpc.health.v1` over HTTP/2 with prior knowledge) and GET over HTTP/1.1:
//!
//! | path | 200 while | else |
//! | --- | --- | --- |
//! | `/livez` | the process lives | 503 from the drain on |
//! | `/readyz` | backups are accepted (`janus.v1.BackupService`) | 503 |
//! | `/readyz/SERVICE` | that service is served | 503; 404 when nobody knows it |
//!
//! Anybody who reaches the address can ask, so connections are few, short-lived and own little memory.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Path,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
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
use tonic::{Code, service::Routes};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tracing::{debug, warn};

use crate::listener::{OwnedTasks, accept, drain};

/// What `/readyz` asks for.
const READY: &str = "janus.v1.BackupService";
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

/// Answers until `stop`; then nothing is left of it. `health` serves `grpc.health.v1.Health`.
pub async fn serve(listener: TcpListener, health: Routes, stop: CancellationToken) {
    let routes = routes(health);
    let (tasks, kill) = (TaskTracker::new(), CancellationToken::new());
    let _kill_on_drop = kill.clone().drop_guard();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Some((tcp, address)) = accept(&listener, &stop).await {
        let Ok(place) = places.clone().try_acquire_owned() else {
            warn!(%address, limit = MAX_CONNECTIONS, "health: connection closed: too many are open");
            continue;
        };
        let executor = OwnedTasks { tasks: tasks.clone(), kill: kill.child_token() };
        let (routes, kill) = (routes.clone(), kill.clone());
        tasks.spawn(async move {
            let answering = timeout(LONGEST_CONNECTION, answer(tcp, address, routes, executor));
            let _ = kill.run_until_cancelled(answering).await;
            drop(place);
        });
    }
    // Who watches has been told; nobody else is worth waiting for.
    kill.cancel();
    drain(&tasks, &kill, Duration::ZERO).await;
}

async fn answer(tcp: TcpStream, address: SocketAddr, routes: Router, executor: OwnedTasks) {
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
        debug!(%address, error, "health: connection lost");
    }
}

fn routes(grpc: Routes) -> Router {
    let asked = grpc.clone();
    let health = move |service: String| {
        let mut client = HealthClient::new(asked.clone());
        async move {
            let answer = client.check(HealthCheckRequest { service }).await;
            let (status, text) = match answer.map(|answer| answer.get_ref().status()) {
                Ok(ServingStatus::Serving) => (StatusCode::OK, "SERVING\n"),
                Err(status) if status.code() == Code::NotFound => {
                    (StatusCode::NOT_FOUND, "no such service\n")
                }
                _ => (StatusCode::SERVICE_UNAVAILABLE, "NOT_SERVING\n"),
            };
            (status, [(header::CACHE_CONTROL, "no-store")], text).into_response()
        }
    };
    let (live, ready) = (health.clone(), health.clone());
    Router::new()
        .route_service("/grpc.health.v1.Health/{method}", grpc)
        .route("/livez", get(move || live(String::new())))
        .route("/readyz", get(move || ready(READY.to_owned())))
        .route("/readyz/{service}", get(move |Path(service): Path<String>| health(service)))
}
