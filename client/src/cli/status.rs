//! `janus-client status`.

use std::fmt::Write;

use janus_proto::pb::{
    GetRouterStatusRequest, GetRouterStatusResponse, GetServerInfoRequest, GetServerInfoResponse,
    ServerStatus,
};
use serde_json::{Value, json};
use tonic::Code;

use super::{Context, Failure, Outcome, amount, date};
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
    let servers: Vec<Value> = status.servers.iter().map(server_json).collect();
    let json = json!({ "ok": true, "janus": status.janus_id, "servers": servers, "warnings": status.warnings });
    Ok(Outcome { json, text: text(&status) })
}

async fn own(link: &Link) -> Result<ServerStatus, Failure> {
    let request = Address::default().request(GetServerInfoRequest {}, Some(QUICK));
    let answer = link
        .info()
        .get_server_info(request)
        .await
        .map_err(LinkError::call("asking for the status"))?;
    let info: GetServerInfoResponse = answer.into_inner();
    tracing::info!(
        server = info.server_id,
        version = info.version,
        free = amount(info.free_bytes),
        "asked a server directly"
    );
    let url = link.url().to_owned();
    Ok(ServerStatus {
        server_id: info.server_id,
        url,
        ready: true,
        report_age_ms: -1,
        ..ServerStatus::default()
    })
}

fn server_json(s: &ServerStatus) -> Value {
    json!({
        "server": s.server_id,
        "url": s.url,
        "ready": s.ready,
        "reason": Some(&s.reason).filter(|reason| !reason.is_empty()),
        "since_ms": s.since_ms,
        "report_age_ms": s.report_age_ms,
        "starts": s.starts,
        "bytes_sent": s.bytes_sent,
        "bytes_received": s.bytes_received,
        "settings": s.settings.as_ref().map(|told| json!({
            "image_path": told.image_path,
            "prefer_vhdx": told.prefer_vhdx,
            "separate_folders_by_user": told.separate_folders_by_user,
        })),
    })
}

fn text(status: &GetRouterStatusResponse) -> String {
    let mut text = String::new();
    if !status.janus_id.is_empty() {
        let _ = writeln!(text, "janus {}", status.janus_id);
    }
    for s in &status.servers {
        let state = if s.ready { "ready".to_owned() } else { format!("not ready: {}", s.reason) };
        let since =
            if s.since_ms > 0 { format!(" since {}", date(s.since_ms)) } else { String::new() };
        let name = if s.server_id.is_empty() { "?" } else { &s.server_id };
        let report = match s.report_age_ms {
            -1 => "no report stream".to_owned(),
            age => format!("last report {:.0} s ago", age as f64 / 1000.0),
        };
        let _ = writeln!(
            text,
            "{name}  {}  {state}{since}; {report}; {} starts, {} to it, {} from it",
            s.url,
            s.starts,
            amount(s.bytes_sent),
            amount(s.bytes_received),
        );
    }
    for warning in &status.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}
