//! Who this server is and how it stands.

use std::sync::Arc;

use janus_proto::{
    error::{ErrorReason, status},
    pb::{self, server_info_service_server::ServerInfoService},
    revoked::Revocations,
};
use tonic::{Request, Response, Status};

use crate::{
    backup::ENCODINGS,
    blocking,
    runs::{Runs, now_ms},
};

/// The service; see `info.proto`.
pub struct Info {
    runs: Arc<Runs>,
    server: String,
    revocations: Revocations,
}

impl Info {
    /// A service over the runs of the server of this name.
    pub fn new(runs: Arc<Runs>, server: String, revocations: Revocations) -> Self {
        Self { runs, server, revocations }
    }
}

#[tonic::async_trait]
impl ServerInfoService for Info {
    async fn get_server_info(
        &self,
        _: Request<pb::GetServerInfoRequest>,
    ) -> Result<Response<pb::GetServerInfoResponse>, Status> {
        let runs = self.runs.clone();
        let space = blocking(move || runs.store().space()).await?;
        let (free_bytes, total_bytes) =
            space.map_err(|e| status(ErrorReason::StoreFailed, format!("image path: {e}")))?;
        Ok(Response::new(pb::GetServerInfoResponse {
            server_id: self.server.clone(),
            role: "server".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            store_generation: self.runs.store().generation.to_string(),
            encodings: ENCODINGS.map(i32::from).to_vec(),
            free_bytes,
            total_bytes,
            now_ms: now_ms(),
            features: Vec::new(),
            revocations: self.revocations.of_peers(),
        }))
    }

    async fn get_router_status(
        &self,
        _: Request<pb::GetRouterStatusRequest>,
    ) -> Result<Response<pb::GetRouterStatusResponse>, Status> {
        Err(Status::unimplemented("this is a server: ask a janus"))
    }

    async fn wake_servers(
        &self,
        _: Request<pb::WakeServersRequest>,
    ) -> Result<Response<pb::WakeServersResponse>, Status> {
        Err(Status::unimplemented("this is a server: ask a janus"))
    }
}
