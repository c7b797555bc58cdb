//! `grpc.health.v1.Health`, the same in server and janus: that of tonic-health, but a Watch of an unknown service answers
//! SERVICE_UNKNOWN and stays open, as the protocol asks, where tonic-health refuses the call.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt, once, pending};
use tonic::{Code, Request, Response, Status};
use tonic_health::{
    ServingStatus,
    pb::{
        HealthCheckRequest, HealthCheckResponse,
        health_check_response::ServingStatus as WireStatus,
        health_server::{Health, HealthServer},
    },
    server::{HealthReporter, HealthService},
};

/// Names under which server and janus are asked: the process lives, backups are accepted, reads are served.
pub const SERVICES: [&str; 3] = ["", "janus.v1.BackupService", "janus.v1.RestoreService"];

/// The service, and who tells it; all of [`SERVICES`] are NOT_SERVING until it does.
pub async fn health() -> (HealthReporter, HealthServer<AllNames>) {
    let reporter = HealthReporter::new();
    set_all(&reporter, ServingStatus::NotServing).await;
    let service = HealthService::from_health_reporter(reporter.clone());
    (reporter, HealthServer::new(AllNames(service)))
}

/// The same status for all of [`SERVICES`].
pub async fn set_all(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

/// Knows what to say of services that nobody knows.
#[derive(Debug)]
pub struct AllNames(HealthService);

type Statuses = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Health for AllNames {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.0.check(request).await
    }

    type WatchStream = Statuses;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Statuses>, Status> {
        match self.0.watch(request).await {
            Ok(statuses) => Ok(statuses.map(|stream| Box::pin(stream) as Statuses)),
            // The services of a process don't change, so there is nothing more to say.
            Err(status) if status.code() == Code::NotFound => {
                let unknown = HealthCheckResponse { status: WireStatus::ServiceUnknown.into() };
                Ok(Response::new(Box::pin(once(Ok(unknown)).chain(pending()))))
            }
            Err(status) => Err(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.into() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_of_an_unknown_service_says_so_and_stays_open() {
        let reporter = HealthReporter::new();
        let health = AllNames(HealthService::from_health_reporter(reporter));
        assert_eq!(health.check(asking("nobody")).await.unwrap_err().code(), Code::NotFound);
        let mut watch = health.watch(asking("nobody")).await.unwrap().into_inner();
        let first = watch.next().await.unwrap().unwrap();
        assert_eq!(first.status(), WireStatus::ServiceUnknown);
        let hour = std::time::Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, watch.next()).await.is_err(), "it ended");
    }

    #[tokio::test]
    async fn services_do_not_serve_before_they_are_said_to() {
        let (reporter, _service) = health().await;
        let health = HealthService::from_health_reporter(reporter);
        for service in SERVICES {
            let answer = health.check(asking(service)).await.unwrap();
            assert_eq!(answer.get_ref().status(), WireStatus::NotServing, "{service}");
        }
    }
}
