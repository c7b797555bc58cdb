//! `janus-client status`.

use janus_proto::{
    pb::{
        GetRouterStatusRequest, GetRouterStatusResponse, GetServerInfoRequest,
        GetServerInfoResponse, ServerStatus,
    },
    show,
};
use tonic::Code;

use super::{Context, Failure, Outcome};
use crate::link::{Address, Link, LinkError, QUICK};

pub(super) async fn run(context: &Context) -> Result<Outcome, Failure> {
    let link = context.connect().await?;
    let request = Address::default().request(GetRouterStatusRequest {}, Some(QUICK));
    let status = match link.info().get_router_status(request).await {
        Ok(answer) => answer.into_inner(),
        // A server was asked: it speaks for itself.
        Err(status) if status.code() == Code::Unimplemented => {
            GetRouterStatusResponse { servers: vec![own(&link).await?], ..Default::default() }
        }
        Err(status) => return Err(LinkError::call("asking for the status")(status).into()),
    };
    Ok(Outcome { json: show::router_status_json(&status), text: show::router_status(&status) })
}

async fn own(link: &Link) -> Result<ServerStatus, Failure> {
    let request = Address::default().request(GetServerInfoRequest {}, Some(QUICK));
    let answer = link
        .info()
        .get_server_info(request)
        .await
        .map_err(LinkError::call("asking for the status"))?;
    let info: GetServerInfoResponse = answer.into_inner();
    tracing::info!(server = info.server_id, version = info.version, "asked a server directly");
    let url = link.url().to_owned();
    Ok(ServerStatus {
        server_id: info.server_id,
        url,
        ready: true,
        report_age_ms: -1,
        free_bytes: info.free_bytes,
        total_bytes: info.total_bytes,
        ..ServerStatus::default()
    })
}
