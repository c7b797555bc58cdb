//! `janus status`: asks a running janus how it stands, for people and for monitoring.

use std::time::Duration;

use janus_proto::{
    channel::{self, ConnectOptions, Expect},
    clock::unix_ms,
    pb::{
        GetRouterStatusRequest, GetRouterStatusResponse,
        server_info_service_client::ServerInfoServiceClient,
    },
    tls::Identity,
};
use tonic::{Request, transport::Channel};

pub use crate::findings::Verdict;
use crate::{
    config::Settings,
    findings::{About, findings},
};

/// Deadline of the call.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
/// Findings on the line of a check.
const MOST_SAID: usize = 10;

/// Asks the janus at `url`, or the one of these settings.
///
/// # Errors
/// One line that says why it can't be asked.
pub async fn ask(
    settings: &Settings,
    url: Option<&str>,
) -> Result<GetRouterStatusResponse, String> {
    let channel = connect(settings, url).await?;
    let mut request = Request::new(GetRouterStatusRequest {});
    request.set_timeout(DEADLINE);
    let answer = ServerInfoServiceClient::new(channel).get_router_status(request).await;
    answer.map(tonic::Response::into_inner).map_err(|status| channel::explain(&status))
}

/// Connects to the janus at `url`, or the one of these settings, with its own certificate.
pub(crate) async fn connect(settings: &Settings, url: Option<&str>) -> Result<Channel, String> {
    let url = url.map_or_else(|| own_url(&settings.listen), |url| Ok(url.to_owned()))?;
    let identity = Identity::load_with(&settings.cert, &settings.key, &settings.ca, &settings.pki)
        .map_err(|error| error.to_string())?;
    let options = ConnectOptions::expecting(Expect::Janus);
    let connection = channel::connect(&url, &identity, options).await;
    connection.map(|connection| connection.channel).map_err(|error| error.to_string())
}

fn own_url(listen: &str) -> Result<String, String> {
    let everywhere = listen.starts_with("0.0.0.0:") || listen.starts_with("[::]:");
    match everywhere {
        true => Err(format!(
            "janus listens on {listen}: name it by --url https://HOST:PORT, with a host of its certificate"
        )),
        false => Ok(format!("https://{listen}")),
    }
}

/// The verdict and one line for a monitoring system. A machine is overdue when its newest backup is older than `overdue`.
pub fn check(status: &GetRouterStatusResponse, overdue: Duration) -> (Verdict, String) {
    check_at(status, overdue, unix_ms())
}

fn check_at(status: &GetRouterStatusResponse, overdue: Duration, now_ms: i64) -> (Verdict, String) {
    let mut found = findings(status, overdue, now_ms);
    let verdict = found.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    // The worst first: monitoring systems show the beginning of the line.
    found.sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
    let late = found.iter().filter(|finding| matches!(finding.about, About::Overdue(_))).count();
    let more = found.len().saturating_sub(MOST_SAID);
    let mut said: Vec<String> =
        found.into_iter().take(MOST_SAID).map(|finding| finding.text).collect();
    if more > 0 {
        said.push(format!("and {more} more: see `janus status`"));
    }
    let (servers, machines) = (status.servers.len(), status.machines.len());
    if said.is_empty() {
        said.push(format!("{servers} servers take backups, {machines} machines have theirs"));
    }
    // A bar begins the figures.
    let text = said.join("; ").replace('|', "/");
    let ready = status.servers.iter().filter(|server| server.ready).count();
    let figures = format!("servers={servers} ready={ready} machines={machines} overdue={late}");
    (verdict, format!("JANUS {verdict} - {text} | {figures}"))
}

#[cfg(test)]
mod tests {
    use janus_proto::pb::{MachineStatus, MachineUse, ServerStatus};

    use super::*;

    const HOUR: i64 = 3_600_000;
    const DAY: Duration = Duration::from_secs(26 * 3600);

    fn server(name: &str, reason: &str) -> ServerStatus {
        let (server_id, reason) = (name.to_owned(), reason.to_owned());
        ServerStatus { ready: reason.is_empty(), server_id, reason, ..Default::default() }
    }

    fn machine(name: &str, hours_ago: i64) -> MachineStatus {
        let last_backup_ms = 1000 * HOUR - hours_ago * HOUR;
        let at = |server: &str| MachineUse {
            server_id: server.into(),
            last_backup_ms,
            ..Default::default()
        };
        let uses = vec![at("a"), at("b")];
        MachineStatus { machine: name.into(), last_backup_ms, uses, ..Default::default() }
    }

    fn line(servers: Vec<ServerStatus>, machines: Vec<MachineStatus>) -> (Verdict, String) {
        let status = GetRouterStatusResponse { servers, machines, ..Default::default() };
        check_at(&status, DAY, 1000 * HOUR)
    }

    #[test]
    fn the_worst_decides_and_each_is_named() {
        let (verdict, text) =
            line(vec![server("a", ""), server("b", "")], vec![machine("u/m", 25)]);
        assert_eq!(verdict, Verdict::Ok);
        assert_eq!(
            text,
            "JANUS OK - 2 servers take backups, 1 machines have theirs | servers=2 ready=2 machines=1 overdue=0"
        );
        let (verdict, text) = line(vec![server("a", ""), server("b", "x | y")], vec![]);
        assert_eq!(verdict, Verdict::Warning);
        assert_eq!(text, "JANUS WARNING - b: x / y | servers=2 ready=1 machines=0 overdue=0");
        let (verdict, text) =
            line(vec![server("a", "")], vec![machine("u/m", 27), machine("u/n", 1)]);
        assert_eq!(verdict, Verdict::Critical);
        assert!(text.contains("u/m has no backup since ") && !text.contains("u/n"), "{text}");
        let (verdict, _) = line(vec![server("a", "down")], vec![]);
        assert_eq!(verdict, Verdict::Critical, "no server");
        let silent = ServerStatus { report_age_ms: -1, ..server("a", "") };
        assert_eq!(line(vec![silent], vec![]).0, Verdict::Warning);
    }

    #[test]
    fn an_address_for_all_interfaces_is_no_url() {
        assert_eq!(own_url("127.0.0.1:7420").unwrap(), "https://127.0.0.1:7420");
        assert!(own_url("0.0.0.0:7420").unwrap_err().contains("--url"));
        assert!(own_url("[::]:7420").is_err());
    }
}
