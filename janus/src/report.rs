//! The Report service: servers tell what they hold. Each may speak only for the name in its own certificate. What one of them has
//! revoked is told to all.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{Stream, StreamExt, stream};
use janus_proto::{
    error::{ErrorReason, status},
    ids::ServerId,
    pb::{
        self, ReportHello, ReportRequest, ReportResponse,
        report_request::Event,
        report_service_server::{ReportService, ReportServiceServer},
    },
    tls::{Identity, Principal, Role},
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};
use tracing::{error, info, warn};

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
    /// With the revocations.
    identity: Identity,
    /// What was logged last.
    warned: Arc<Mutex<Vec<String>>>,
}

impl Reports {
    /// The service for the servers of `fleet`, and others that report.
    pub fn service(fleet: Fleet, identity: Identity) -> ReportServiceServer<Self> {
        ReportServiceServer::new(Self { fleet, identity, warned: Arc::default() })
    }

    /// Takes in what a server has revoked, or has learnt of. Blocks: signatures are checked.
    fn revoke(&self, server: &ServerId, revocations: &[pb::Revocation]) {
        let believed = self.identity.news(revocations, |error| {
            warn!(%server, %error, "revocation ignored");
        });
        if let Err(error) = self.identity.revocations().insert(believed) {
            warn!(%server, %error, "not all revocations are kept");
        }
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
    /// Highest sequence taken in.
    sequence: u64,
    changes: watch::Receiver<u64>,
    /// Revocations that are still to be told, in messages.
    untold: VecDeque<Vec<pb::Revocation>>,
}

impl Stage {
    /// The answer to one message, or what others have revoked; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Result<ReportResponse, Status>> {
        loop {
            if let Some(revocations) = self.untold.pop_front() {
                return Some(Ok(ReportResponse { sequence: self.sequence, revocations }));
            }
            let message = tokio::select! {
                biased;
                Ok(()) = self.changes.changed() => {
                    self.tell_all();
                    continue;
                }
                message = self.incoming.next() => message?,
            };
            // The connection is gone: nobody is left to be told.
            let Ok(message) = message else { return None };
            self.sequence = message.sequence;
            let answer = ReportResponse { sequence: self.sequence, ..Default::default() };
            return Some(self.take(message).await.map(|()| answer));
        }
    }

    /// Who knows them already ignores them.
    fn tell_all(&mut self) {
        self.untold = self.reports.identity.revocations().messages().into();
    }

    async fn take(&mut self, message: ReportRequest) -> Result<(), Status> {
        match (&self.slot, message.event) {
            (_, Some(Event::Hello(hello))) => {
                self.slot = Some(self.reports.open(&self.server, &hello)?);
                Ok(())
            }
            (Some(slot), mut event) => {
                if let Some(Event::Revocations(told)) = &mut event {
                    let (reports, server) = (self.reports.clone(), self.server.clone());
                    let revocations = std::mem::take(&mut told.revocations);
                    let taking = move || reports.revoke(&server, &revocations);
                    if let Err(error) = tokio::task::spawn_blocking(taking).await {
                        error!(server = %self.server, %error, "revocations were not taken in");
                    }
                }
                let may_differ = matches!(event, Some(Event::Grants(_)));
                slot.take(message.sequence, event)?;
                if may_differ {
                    self.reports.log_warnings();
                }
                Ok(())
            }
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
        let mut changes = self.identity.revocations().changes();
        // At the beginning the server hears of all.
        changes.mark_changed();
        let stage = Stage {
            reports: self.clone(),
            server,
            incoming: request.into_inner(),
            slot: None,
            sequence: 0,
            changes,
            untold: VecDeque::new(),
        };
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
