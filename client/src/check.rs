//! Whether each URL of the settings is good for a backup: found, reached, of our group, of a version and a clock that fit, with
//! space, and how fast. Nothing is stored on any server.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::future::join_all;
use janus_proto::{
    channel::{self, ConnectError, ConnectOptions, Connection, Dialer},
    clock::unix_ms,
    pb::{
        GetRouterStatusRequest, GetServerInfoRequest, GetServerInfoResponse, ServerStatus,
        server_info_service_client::ServerInfoServiceClient,
    },
    show::{amount, date, of_named},
    tls::Role,
};
use tonic::Code;

use crate::link::{Address, LinkError, QUICK};

pub mod neighbours;
mod throughput;

pub use throughput::Throughput;

/// A certificate that expires in less than this is worth a warning, as `janus status --check` has it.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 86_400);
/// Clocks that are further apart are worth a warning: times of snapshots then mislead.
const APART_MS: i64 = 30_000;
/// So many servers behind one janus are looked for on local links.
const MAX_SEEN: usize = 64;
/// A file system with less of it free is worth a warning, in percent.
const LITTLE_FREE: u64 = 5;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// As it should be.
    Ok,
    /// Not asked: something before has failed, or the other end doesn't know how.
    Skipped,
    /// A backup works.
    Warning,
    /// No backup by this URL.
    Failed,
}

impl State {
    /// As it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// One thing that was checked.
#[derive(Debug, Clone)]
pub struct Row {
    /// What.
    pub check: &'static str,
    /// How it stands.
    pub state: State,
    /// One line; of a failed one with the way out.
    pub text: String,
}

/// A URL that was checked.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The URL.
    pub url: String,
    /// Who answered.
    pub peer: Option<Role>,
    /// What was checked, in order.
    pub rows: Vec<Row>,
    /// Bytes for each second, to the server and back.
    pub throughput: Option<Throughput>,
    /// Hardware address of its host, where that is on a local link.
    pub mac: Option<String>,
    /// Those of the servers behind a janus, by their names, where these are on a local link.
    pub behind: BTreeMap<String, String>,
}

impl Checked {
    fn new(url: &str) -> Self {
        let (rows, behind) = (Vec::new(), BTreeMap::new());
        Self { url: url.to_owned(), peer: None, rows, throughput: None, mac: None, behind }
    }

    fn add(&mut self, check: &'static str, state: State, text: impl Into<String>) {
        self.rows.push(Row { check, state, text: text.into() });
    }

    /// The worst of it.
    pub fn worst(&self) -> State {
        self.rows.iter().map(|row| row.state).max().unwrap_or(State::Failed)
    }
}

/// Checks a URL.
pub async fn check(url: &str, dialer: &Dialer) -> Checked {
    let mut checked = Checked::new(url);
    let began = Instant::now();
    let options = ConnectOptions::default();
    match channel::connect_through(url, dialer.clone(), options).await {
        Err(error) => {
            let check = stage(&error);
            // Through a proxy it is the proxy that looks the name up.
            if check != "name" && !matches!(error, ConnectError::Proxy { .. }) {
                checked.add("name", State::Ok, "has an address");
            }
            checked.add(check, State::Failed, error.to_string());
        }
        Ok(connection) => {
            checked.add("name", State::Ok, "has an address");
            let ms = began.elapsed().as_millis();
            checked.add("connection", State::Ok, format!("made in {ms} ms"));
            checked.mac = neighbours::of(url).await;
            connected(&mut checked, &connection).await;
        }
    }
    checked
}

/// What a failure to connect is about.
fn stage(error: &ConnectError) -> &'static str {
    match error {
        ConnectError::Url { .. } | ConnectError::NameNotFound { .. } => "name",
        ConnectError::TimedOut { what, .. } if what.contains("name service") => "name",
        ConnectError::NoTls { .. }
        | ConnectError::WrongName { .. }
        | ConnectError::PeerCertificate { .. }
        | ConnectError::OurCertificate { .. } => "certificate",
        ConnectError::WrongPeer { .. } => "group and role",
        _ => "connection",
    }
}

async fn connected(checked: &mut Checked, connection: &Connection) {
    let peer = &connection.peer;
    let (state, text) = expiry(peer.validity(), unix_ms());
    checked.add("certificate", state, text);
    checked.add("group and role", State::Ok, format!("{} of group {}", peer.role, peer.group));
    checked.peer = Some(peer.role.clone());
    let mut client = ServerInfoServiceClient::new(connection.channel.clone());
    let asked = unix_ms();
    let request = Address::default().request(GetServerInfoRequest {}, Some(QUICK));
    match client.get_server_info(request).await {
        Ok(answer) => {
            // It was told on the way back or on the way there: half of the round trip is the best guess.
            let clock = i64::midpoint(asked, unix_ms());
            about(checked, &answer.into_inner(), clock);
        }
        Err(status) => {
            let error = LinkError::call("asking who it is")(status);
            return checked.add("answer", State::Failed, error.to_string());
        }
    }
    if matches!(peer.role, Role::Janus(_)) {
        servers(checked, &mut client).await;
    }
    match throughput::measure(connection).await {
        Ok(found) => {
            checked.add("throughput", State::Ok, found.text());
            checked.throughput = Some(found);
        }
        Err(status) if status.code() == Code::Unimplemented => {
            let text = "not measured: the server is older than this client; update it";
            checked.add("throughput", State::Skipped, text);
        }
        Err(status) => {
            let error = LinkError::call("sending data to see how fast it goes")(status);
            checked.add("throughput", State::Failed, error.to_string());
        }
    }
}

fn expiry((from, expires): (i64, i64), now_ms: i64) -> (State, String) {
    let at = date(expires.saturating_mul(1000));
    // Those that are short are renewed when half of that is over.
    let sixth = expires.saturating_sub(from).saturating_mul(1000) / 6;
    let enough = sixth.min(EXPIRES_SOON.as_millis() as i64);
    let soon = expires.saturating_mul(1000) < now_ms.saturating_add(enough);
    match soon {
        true => (
            State::Warning,
            format!("expires on {at}; issue a new one with `janus-server pki issue`"),
        ),
        false => (State::Ok, format!("valid until {at}")),
    }
}

fn about(checked: &mut Checked, info: &GetServerInfoResponse, now_ms: i64) {
    let ours = env!("CARGO_PKG_VERSION");
    match is_neighbour(ours, &info.version) {
        true => checked.add("version", State::Ok, info.version.clone()),
        false => {
            let text = format!(
                "{} is not next to our {ours}: only neighbouring versions are sure to work; update the older one",
                info.version
            );
            checked.add("version", State::Warning, text);
        }
    }
    let apart = info.now_ms - now_ms;
    let seconds = apart as f64 / 1000.0;
    match apart.abs() > APART_MS {
        true => {
            let text =
                format!("{seconds:+.0} s from ours; set both by NTP: times of backups mislead");
            checked.add("clock", State::Warning, text);
        }
        false => checked.add("clock", State::Ok, format!("{seconds:+.1} s from ours")),
    }
    if info.total_bytes > 0 {
        let (state, text) = space(info.free_bytes, info.total_bytes);
        checked.add("space", state, text);
    }
}

/// Equal, or one minor version apart. Before 1.0 so, too.
fn is_neighbour(ours: &str, theirs: &str) -> bool {
    let parts = |version: &str| {
        let mut parts = version.split('.').map(|part| part.parse::<i64>().ok());
        Some((parts.next()??, parts.next()??))
    };
    match (parts(ours), parts(theirs)) {
        (Some(ours), Some(theirs)) => ours.0 == theirs.0 && (ours.1 - theirs.1).abs() <= 1,
        _ => false,
    }
}

fn space(free: u64, total: u64) -> (State, String) {
    let share = free.saturating_mul(100) / total.max(1);
    let text = format!("{} of {} free", amount(free), amount(total));
    match share < LITTLE_FREE {
        true => {
            (State::Warning, format!("only {text}; see `janus-server usage` and retention there"))
        }
        false => (State::Ok, text),
    }
}

/// The servers behind a janus.
async fn servers(
    checked: &mut Checked,
    client: &mut ServerInfoServiceClient<tonic::transport::Channel>,
) {
    let request = Address::default().request(GetRouterStatusRequest {}, Some(QUICK));
    let servers = match client.get_router_status(request).await {
        Ok(answer) => answer.into_inner().servers,
        Err(status) => {
            let error = LinkError::call("asking for its servers")(status);
            return checked.add("servers", State::Failed, error.to_string());
        }
    };
    let ready = servers.iter().filter(|server| server.ready).count();
    let state = match ready {
        0 => State::Failed,
        ready if ready < servers.len() => State::Warning,
        _ => State::Ok,
    };
    let mut text = format!("{ready} of {} take backups", servers.len());
    for away in servers.iter().filter(|server| !server.ready) {
        text += &format!("; {} doesn't: {}", name(away), of_named(name(away), &away.reason));
    }
    checked.add("servers", state, text);
    for server in servers.iter().filter(|server| server.total_bytes > 0) {
        let (state, text) = space(server.free_bytes, server.total_bytes);
        checked.add("space", state, format!("{}: {text}", name(server)));
    }
    let seen = servers.iter().take(MAX_SEEN).map(|server| async move {
        let mac = neighbours::reached(&server.url).await?;
        Some((name(server).to_owned(), mac))
    });
    checked.behind = join_all(seen).await.into_iter().flatten().collect();
}

fn name(server: &ServerStatus) -> &str {
    if server.server_id.is_empty() { &server.url } else { &server.server_id }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(info: &GetServerInfoResponse, check: &str) -> Row {
        let mut checked = Checked::new("");
        about(&mut checked, info, 1_000_000);
        checked.rows.into_iter().find(|row| row.check == check).unwrap()
    }

    #[test]
    fn what_is_unfit_is_a_warning_with_the_way_out() {
        let good = GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            now_ms: 1_000_200,
            free_bytes: 50 << 30,
            total_bytes: 100 << 30,
            ..Default::default()
        };
        for check in ["version", "clock", "space"] {
            assert_eq!(row(&good, check).state, State::Ok, "{check}");
        }
        let bad = GetServerInfoResponse {
            version: "7.0.0".into(),
            now_ms: 1_000_000 - 3_600_000,
            free_bytes: 1 << 30,
            ..good
        };
        for (check, way_out) in [("version", "update"), ("clock", "NTP"), ("space", "usage")] {
            let row = row(&bad, check);
            println!("{}", row.text);
            assert!(row.state == State::Warning && row.text.contains(way_out), "{row:?}");
        }
        assert_eq!(expiry((-1_000 * 86_400, 30 * 86_400), 0).0, State::Ok);
        assert_eq!(expiry((-1_000 * 86_400, 13 * 86_400), 0).0, State::Warning);
    }

    #[test]
    fn versions_are_neighbours_by_their_minor_number() {
        for (theirs, is_so) in
            [("0.1.0", true), ("0.2.7", true), ("0.3.0", false), ("1.1.0", false), ("new", false)]
        {
            assert_eq!(is_neighbour("0.1.5", theirs), is_so, "{theirs}");
        }
    }
}
