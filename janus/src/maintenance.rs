//! What administrators change: a server that is gone for good is forgotten.

use std::sync::Arc;

use janus_proto::{
    channel::explain,
    error::{ErrorReason, WireError, status},
    ids::ServerId,
    pb::{
        ForgetServerRequest, ForgetServerResponse,
        maintenance_service_client::MaintenanceServiceClient,
        maintenance_service_server::{MaintenanceService, MaintenanceServiceServer},
    },
    tls::{Principal, Role},
};
use tonic::{Request, Response, Status};
use tracing::info;

use crate::{
    config::Settings,
    fleet::Fleet,
    registry::ForgetRefused,
    status::{DEADLINE, connect},
};

/// `janus forget`: has the janus at `url`, or the one of these settings, forget a server.
///
/// # Errors
/// One line that says why it doesn't.
pub async fn forget(
    settings: &Settings,
    url: Option<&str>,
    server: &str,
) -> Result<ForgetServerResponse, String> {
    let channel = connect(settings, url).await?;
    let mut request = Request::new(ForgetServerRequest { server_id: server.to_owned() });
    request.set_timeout(DEADLINE);
    let answer = MaintenanceServiceClient::new(channel).forget_server(request).await;
    answer.map(Response::into_inner).map_err(|status| match janus_proto::error::reason(&status) {
        Some(_) => status.message().to_owned(),
        None => explain(&status),
    })
}

impl From<ForgetRefused> for Status {
    fn from(refused: ForgetRefused) -> Self {
        match refused {
            ForgetRefused::Unknown { .. } => {
                WireError::invalid("server_id", refused.to_string()).into()
            }
            ForgetRefused::Reports { .. } | ForgetRefused::InServerUrls { .. } => {
                status(ErrorReason::ServerInUse, refused.to_string())
            }
        }
    }
}

/// Changes this janus' memory.
#[derive(Debug, Clone)]
pub struct Maintenance {
    id: ServerId,
    fleet: Fleet,
}

impl Maintenance {
    /// The service of the janus named `id`.
    pub fn service(id: ServerId, fleet: Fleet) -> MaintenanceServiceServer<Self> {
        MaintenanceServiceServer::new(Self { id, fleet })
    }

    /// Operators, and whoever has this janus' own certificate, as on its host.
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let principal = request.extensions().get::<Arc<Principal>>();
        match principal.map(|caller| &caller.role) {
            Some(Role::Operator(_)) => Ok(()),
            Some(Role::Janus(id)) if *id == self.id => Ok(()),
            Some(other) => Err(status(
                ErrorReason::NotAllowed,
                format!("{other} may not change janus {}: an operator may", self.id),
            )),
            None => Err(status(ErrorReason::IdentityMissing, "caller has no certificate")),
        }
    }

    fn forget(&self, server: &ServerId) -> Result<ForgetServerResponse, ForgetRefused> {
        let servers = self.fleet.servers();
        if let Some(upstream) = servers.iter().find(|up| up.server().as_ref() == Some(server)) {
            let url = upstream.url();
            return Err(ForgetRefused::InServerUrls { server: server.clone(), url });
        }
        let forgotten = self.fleet.registry().forget(server)?;
        info!(%server, snapshots = forgotten.snapshots, "forgotten");
        Ok(ForgetServerResponse {
            snapshots: forgotten.snapshots as u64,
            machines: forgotten.machines as u64,
        })
    }
}

#[tonic::async_trait]
impl MaintenanceService for Maintenance {
    async fn forget_server(
        &self,
        request: Request<ForgetServerRequest>,
    ) -> Result<Response<ForgetServerResponse>, Status> {
        self.check(&request)?;
        let server: ServerId = request.into_inner().server_id.parse()?;
        Ok(Response::new(self.forget(&server)?))
    }
}
