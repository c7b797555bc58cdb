//! Asking a server for its health.

use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use tokio::time::{sleep, timeout};
use tonic::{Code, Streaming};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use super::wire::Wire;

/// Starts of runs are accepted.
pub(crate) const BACKUP_SERVICE: &str = "janus.v1.BackupService";
/// Reads are served.
pub(crate) const RESTORE_SERVICE: &str = "janus.v1.RestoreService";

/// What a server says of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Serving {
    Yes,
    No(String),
}

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

fn serving(service: &str, answer: &HealthCheckResponse) -> Serving {
    match answer.status() {
        ServingStatus::Serving => Serving::Yes,
        ServingStatus::NotServing if service == BACKUP_SERVICE => {
            Serving::No("takes no backups now".into())
        }
        ServingStatus::NotServing => Serving::No("serves no reads now".into()),
        ServingStatus::ServiceUnknown => Serving::No(format!("does not know {service}")),
        ServingStatus::Unknown => Serving::No("does not know its own health".into()),
    }
}

/// What the server says of `service`, from its first answer on and at each change, for as long as it is polled.
///
/// A server without a health service counts as serving, as gRPC's health protocol says. A watch that breaks is opened
/// again; the connection's own end is for others to notice.
pub(crate) fn watch(wire: Wire, service: &'static str) -> impl Stream<Item = Serving> + Send {
    struct Watch {
        wire: Wire,
        open: Option<Streaming<HealthCheckResponse>>,
        pause: Duration,
    }
    let first = Watch { wire, open: None, pause: Duration::ZERO };
    stream::unfold(first, move |mut watch| async move {
        if watch.open.is_none() {
            sleep(watch.pause).await;
        }
        let answer = match watch.open.take() {
            Some(open) => Ok(open),
            None => HealthClient::new(watch.wire.clone())
                .watch(request(service))
                .await
                .map(tonic::Response::into_inner),
        };
        let answer = match answer {
            Ok(mut open) => {
                let next = open.next().await;
                watch.open = Some(open);
                next.unwrap_or_else(|| Err(tonic::Status::unavailable("its health watch ended")))
            }
            Err(status) => Err(status),
        };
        let said = match answer {
            Ok(answer) => {
                watch.pause = Duration::ZERO;
                serving(service, &answer)
            }
            Err(status) => {
                watch.open = None;
                watch.pause =
                    (watch.pause * 2).clamp(Duration::from_millis(100), Duration::from_secs(5));
                match status.code() {
                    Code::Unimplemented => Serving::Yes,
                    _ => Serving::No(format!(
                        "its health watch failed: {}",
                        janus_proto::channel::explain(&status)
                    )),
                }
            }
        };
        Some((said, watch))
    })
}

/// Whether the server shows any sign of life within `limit`: an answer, or any byte on this connection.
pub(crate) async fn shows_life(wire: &Wire, limit: Duration) -> bool {
    let check = async { HealthClient::new(wire.clone()).check(request("")).await };
    match timeout(limit, check).await {
        Ok(Ok(_)) => true,
        // An error that the server itself sent is an answer; one of the connection left no bytes behind.
        Ok(Err(_)) | Err(_) => wire.pulse().silence() < limit,
    }
}
