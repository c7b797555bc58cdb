//! The Report service: servers tell what they hold. Each may speak only for the name in its own certificate.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{Stream, StreamExt, stream};
use janus_proto::{
    error::{ErrorReason, status},
    ids::ServerId,
    pb::{
        ReportHello, ReportRequest, ReportResponse,
        report_request::Event,
        report_service_server::{ReportService, ReportServiceServer},
    },
    tls::{Principal, Role},
};
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::{
    fleet::Fleet,
    registry::{ReportRefused, ReportSlot},
};

impl From<ReportRefused> for Status {
    fn from(refused: ReportRefused) -> Self {
        let reason = match refused {
            ReportRefused::Superseded { .. } | ReportRefused::OldEpoch { .. } => {
                ErrorReason::EpochSuperseded
            }
            ReportRefused::TooMany => ErrorReason::TooMany,
        };
        status(reason, refused.to_string())
    }
}

/// Takes reports into the registry.
#[derive(Debug, Clone)]
pub struct Reports {
    fleet: Fleet,
    /// What was logged last.
    warned: Arc<Mutex<Vec<String>>>,
}

impl Reports {
    /// The service for the servers of `fleet`, and others that report.
    pub fn service(fleet: Fleet) -> ReportServiceServer<Self> {
        ReportServiceServer::new(Self { fleet, warned: Arc::default() })
    }

    fn open(&self, server: &ServerId, hello: &ReportHello) -> Result<ReportSlot, Status> {
        let slot = self.fleet.registry().open_report(server, hello).inspect_err(|error| {
            warn!(%server, %error, "report stream refused");
        })?;
        info!(%server, generation = hello.store_generation, epoch = hello.start_epoch, "reports");
        self.log_warnings();
        // A server that reports is there: don't wait for the end of a pause to look for it.
        self.fleet.look_now(server);
        Ok(slot)
    }
}

impl Reports {
    /// Logs what an administrator should look at, when that has changed.
    fn log_warnings(&self) {
        let found = self.fleet.warnings();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if *warned == found {
            return;
        }
        match found.is_empty() {
            true => info!("the servers agree again"),
            false => found.iter().for_each(|warning| warn!("{warning}")),
        }
        *warned = found;
    }
}

/// The server whose certificate the caller shows.
fn reporting_server<T>(request: &Request<T>) -> Result<ServerId, Status> {
    let principal = request.extensions().get::<Arc<Principal>>();
    match principal.map(|principal| &principal.role) {
        Some(Role::Server(server)) => Ok(server.clone()),
        Some(other) => {
            Err(status(ErrorReason::NotAllowed, format!("only servers report, not {other}")))
        }
        None => Err(status(ErrorReason::IdentityMissing, "caller has no certificate")),
    }
}

struct Stage {
    reports: Reports,
    server: ServerId,
    incoming: Streaming<ReportRequest>,
    slot: Option<ReportSlot>,
}

impl Stage {
    /// Takes one message in; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Result<ReportResponse, Status>> {
        let message = match self.incoming.next().await? {
            Ok(message) => message,
            // The connection is gone: nobody is left to be told.
            Err(_) => return None,
        };
        let sequence = message.sequence;
        Some(self.take(message).map(|()| ReportResponse { sequence }))
    }

    fn take(&mut self, message: ReportRequest) -> Result<(), Status> {
        match (&self.slot, message.event) {
            (_, Some(Event::Hello(hello))) => {
                self.slot = Some(self.reports.open(&self.server, &hello)?);
                Ok(())
            }
            (Some(slot), event) => Ok(slot.take(message.sequence, event)?),
            (None, _) => Err(status(
                ErrorReason::InvalidField,
                "hello: the first message of a report must be hello",
            )),
        }
    }
}

#[tonic::async_trait]
impl ReportService for Reports {
    type ReportStream = Pin<Box<dyn Stream<Item = Result<ReportResponse, Status>> + Send>>;

    async fn report(
        &self,
        request: Request<Streaming<ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let server = reporting_server(&request)?;
        let stage =
            Stage { reports: self.clone(), server, incoming: request.into_inner(), slot: None };
        let answers = stream::unfold(Some(stage), |stage| async move {
            let mut stage = stage?;
            let answer = stage.next().await?;
            // After a refusal the stream is over, and the slot with it.
            let stage = answer.is_ok().then_some(stage);
            Some((answer, stage))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}
