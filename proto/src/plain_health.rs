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
//! Anybody who reaches the address can ask: see [`plain_http`].

use axum::{
    Router,
    extract::Path,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Code, service::Routes};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::plain_http;

/// What `/readyz` asks for.
const READY: &str = "janus.v1.BackupService";
/// Answers until `stop`; then nothing is left of it. `health` serves `grpc.health.v1.Health`.
pub async fn serve(listener: TcpListener, health: Routes, stop: CancellationToken) {
    // Who watches has been told; nobody else is worth waiting for.
    plain_http::serve(listener, routes(health), "health", stop).await;
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
