//! `janus-client status`.

use std::fmt::Write;

use janus_proto::{
    pb::{
        GetRouterStatusRequest, GetRouterStatusResponse, GetServerInfoRequest,
        GetServerInfoResponse, ServerStatus,
    },
    show,
};
use jiff::{Timestamp, tz::TimeZone};
use serde_json::{Value, json};
use tonic::Code;

use super::{Context, Failure, Outcome};
use crate::{
    config::Settings,
    link::{Address, Link, LinkError, QUICK},
    schedule::Schedule,
    state,
};

/// What this machine knows by itself comes first, and also when nobody else answers.
pub(super) async fn run(context: &Context) -> Result<Outcome, Failure> {
    let settings = context.settings.clone();
    let local = tokio::task::spawn_blocking(move || local(&settings)).await;
    let local = local.map_err(Failure::failed)?;
    match servers(context).await {
        Ok(mut servers) => {
            servers.json["local"] = local.json;
            Ok(Outcome { text: local.text + &servers.text, ..servers })
        }
        Err(failure) => Err(Failure { known: Some(Box::new(local)), ..failure }),
    }
}

/// Last success, what came after it, and when the next backup is due.
pub(super) fn local(settings: &Settings) -> Outcome {
    let stored = match state::look(&settings.cache_path) {
        Ok(stored) => stored,
        Err(error) => {
            let text = format!("{}: {error}\n", settings.cache_path.display());
            return Outcome { json: json!({ "error": text.trim_end() }), text };
        }
    };
    let schedule = Schedule::new(&settings.schedule, "").map(Schedule::without_delays).ok();
    let next = schedule.and_then(|one| one.next(Timestamp::now(), &TimeZone::system()));
    let mut text = match &stored.last_success {
        Some(last) => {
            format!("last backup of {} UTC on {}\n", show::date(last.taken_ms), last.server)
        }
        None => "no backup was made here yet\n".to_owned(),
    };
    if let Some(failing) = &stored.failing {
        let since = show::date(failing.since_ms);
        let _ = writeln!(text, "{} failed since {since} UTC: {}", failing.count, failing.error);
    }
    if let Some(open) = &stored.open {
        let _ = writeln!(
            text,
            "backup {} is open: it runs, or the next one goes on with it",
            open.backup_id
        );
    }
    if let Some(next) = next {
        let at = show::date(next.at.as_millisecond());
        let _ = writeln!(text, "next slot of the schedule {at} UTC");
    }
    let last = stored.last_success.map(|last| {
        json!({ "taken_ms": last.taken_ms, "backup_id": last.backup_id.to_string(), "server": last.server })
    });
    let failing = stored.failing.map(|failing| {
        json!({ "since_ms": failing.since_ms, "count": failing.count, "error": failing.error })
    });
    let json = json!({
        "last_backup": last,
        "failing": failing,
        "open_backup": stored.open.map(|open| Value::from(open.backup_id.to_string())),
        "next_slot_ms": next.map(|next| next.at.as_millisecond()),
    });
    Outcome { json, text }
}

async fn servers(context: &Context) -> Result<Outcome, Failure> {
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
