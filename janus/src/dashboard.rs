//! A page for people at `/` of the metrics listener: what an administrator looks at in the morning. Read only, made when
//! it is asked for, without scripts; everything that comes from outside is escaped by the templates.

use std::time::Duration;

use axum::{
    Router,
    http::{HeaderName, header},
    response::{Html, IntoResponse},
    routing::get,
};
use janus_proto::{
    clock::unix_ms,
    pb::{GetRouterStatusResponse, MachineStatus, ServerStatus},
    show::{amount, date},
};
use maud::{DOCTYPE, Markup, html};

use crate::{
    findings::{About, Finding, Verdict, findings, has_none, name_of},
    metrics::Figures,
    registry::RunNow,
    registry::Sight,
};

const STYLE: &str = include_str!("../assets/page.css");
/// Nothing but our own style sheet is ever loaded, and nobody may frame the page.
const POLICY: &str = "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Seconds between two looks of a browser.
const REFRESH_SECONDS: u32 = 5;
/// Machines on the page; more are for `janus status`.
const MOST_MACHINES: usize = 500;

/// `/` and its style sheet.
pub(crate) fn routes(figures: Figures) -> Router {
    let page = move || {
        let page = Html(page(&figures).into_string());
        async move { (safe_headers("no-store"), page).into_response() }
    };
    let style = || async {
        let kind = [(header::CONTENT_TYPE, "text/css; charset=utf-8")];
        (safe_headers("max-age=600"), kind, STYLE).into_response()
    };
    Router::new().route("/", get(page)).route("/page.css", get(style))
}

fn safe_headers(cache: &'static str) -> [(HeaderName, &'static str); 4] {
    [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, cache),
    ]
}

fn page(figures: &Figures) -> Markup {
    let (status, runs) =
        (figures.info.status(&Sight::all()), figures.info.fleet().registry().runs());
    let facts: Vec<ServerFacts> = figures
        .info
        .fleet()
        .servers()
        .iter()
        .map(|upstream| ServerFacts {
            url: upstream.url(),
            round_trip: upstream.round_trip(),
            errors: upstream.counters().errors.counts().into_iter().collect(),
        })
        .collect();
    render(&status, &facts, &runs, figures.overdue, unix_ms())
}

/// What the status of a server doesn't say.
struct ServerFacts {
    url: String,
    round_trip: Option<Duration>,
    errors: Vec<(&'static str, u64)>,
}

fn render(
    status: &GetRouterStatusResponse,
    facts: &[ServerFacts],
    runs: &[RunNow],
    overdue: Duration,
    now_ms: i64,
) -> Markup {
    let found = findings(status, overdue, now_ms);
    let verdict = found.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    let title = format!("janus {}", status.janus_id);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="refresh" content=(REFRESH_SECONDS);
                title { (verdict) " · " (title) }
                link rel="icon" href="data:,";
                link rel="stylesheet" href="/page.css";
            }
            body {
                header {
                    h1 { (title) }
                    span class={ "pill " (colour(verdict)) } { (verdict) }
                    span.soft.small { (date(now_ms)) " UTC" }
                }
                main {
                    (warnings(&found))
                    h2 { "Running now" }
                    (running(runs))
                    h2 { "Servers" }
                    div.servers {
                        @for server in &status.servers { (server_card(server, facts, now_ms)) }
                    }
                    h2 { "Machines" }
                    (machines(status, &found, now_ms))
                }
                footer {
                    "Janus " (status.version)
                    @if status.certificate_expires_ms > 0 {
                        " · certificate until " (date(status.certificate_expires_ms))
                    }
                    " · " a href="/metrics" { "metrics" }
                    " · renewed every " (REFRESH_SECONDS) " s"
                }
            }
        }
    }
}

fn colour(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ok => "good",
        Verdict::Warning => "warn",
        Verdict::Critical => "bad",
    }
}

fn warnings(found: &[Finding]) -> Markup {
    let mut found: Vec<&Finding> = found.iter().collect();
    found.sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
    html! {
        @if !found.is_empty() {
            ul.findings {
                @for finding in found {
                    li class=(colour(finding.verdict)) { span { (finding.text) } }
                }
            }
        }
    }
}

fn running(runs: &[RunNow]) -> Markup {
    html! {
        @if runs.is_empty() {
            p.card.empty { "No backup is under way." }
        } @else {
            ul.card.rows {
                @for run in runs {
                    li {
                        span.name { (run.machine.as_ref().map_or("?", |machine| machine.as_str())) }
                        span.what { "to " (run.server) }
                        span.what { (amount(run.rate)) "/s" }
                        span.what.soft {
                            (amount(run.sent)) " sent, " (amount(run.received)) " back, for " (span(run.age))
                        }
                    }
                }
            }
        }
    }
}

fn server_card(server: &ServerStatus, facts: &[ServerFacts], now_ms: i64) -> Markup {
    let facts = facts.iter().find(|facts| facts.url == server.url);
    let used = server.total_bytes.saturating_sub(server.free_bytes);
    let percent = (used as f64 / server.total_bytes.max(1) as f64 * 100.0).round();
    html! {
        section.card {
            div.head {
                h3 { (name_of(server)) }
                @if server.ready {
                    span.pill.good { "ready" }
                } @else {
                    span.pill.bad { "not ready" }
                }
            }
            @if !server.url.is_empty() { div.soft.small { (server.url) } }
            @if !server.reason.is_empty() { p.reason { (server.reason) } }
            @if server.total_bytes > 0 {
                svg.bar.full[percent > 95.0] viewBox="0 0 100 1" preserveAspectRatio="none" role="img"
                    aria-label={ (percent) " % used" } {
                    rect width=(percent) height="1" {}
                }
            }
            dl {
                @if server.total_bytes > 0 {
                    dt { "free" }
                    dd { (amount(server.free_bytes)) " of " (amount(server.total_bytes)) }
                }
                @for machine in &server.damaged {
                    dt { "damaged" }
                    dd.bad { (machine.machine) ": " (machine.snapshots) " snapshots" }
                }
                dt { "last proven" }
                dd title=[(server.proven_ms > 0).then(|| date(server.proven_ms))] {
                    @if server.proven_ms > 0 { (ago(server.proven_ms, now_ms)) }
                    @else { "never" }
                }
                @for one in &server.fetching {
                    dt { "fetching" @if one.rule.is_empty() { " for stubs" } @else { ", rule " (one.rule) } }
                    dd.bad[!one.failure.is_empty()] title=[Some(&one.failure).filter(|why| !why.is_empty())] {
                        (amount(one.bytes)) ", "
                        @if one.succeeded_ms > 0 { "done " (ago(one.succeeded_ms, now_ms)) }
                        @else { "not done yet" }
                        @if !one.failure.is_empty() { ", FAILED" }
                    }
                }
                @if server.since_ms > 0 {
                    dt { @if server.ready { "ready for" } @else { "not ready for" } }
                    dd { (span_ms(now_ms.saturating_sub(server.since_ms))) }
                }
                dt { "last report" }
                dd {
                    @if server.report_age_ms < 0 && server.last_report_ms > 0 {
                        (ago(server.last_report_ms, now_ms)) ": no stream"
                    } @else if server.report_age_ms < 0 { "none: no stream" }
                    @else { (span_ms(server.report_age_ms)) " ago" }
                }
                @if let Some(time) = facts.and_then(|facts| facts.round_trip) {
                    dt { "round trip" }
                    dd { (format!("{:.1} ms", time.as_secs_f64() * 1000.0)) }
                }
                @if server.certificate_expires_ms > 0 {
                    dt { "certificate" }
                    dd title=(date(server.certificate_expires_ms)) {
                        @if server.certificate_expires_ms > now_ms {
                            "for " (span_ms(server.certificate_expires_ms - now_ms))
                        } @else { "expired" }
                    }
                }
                dt { "starts" } dd { (server.starts) }
                dt { "sent" } dd { (amount(server.bytes_sent)) }
                dt { "received" } dd { (amount(server.bytes_received)) }
                @for (reason, count) in facts.map(|facts| facts.errors.as_slice()).unwrap_or_default() {
                    dt { (reason) } dd { (count) }
                }
            }
        }
    }
}

/// The overdue first, then by name.
fn machines(status: &GetRouterStatusResponse, found: &[Finding], now_ms: i64) -> Markup {
    let is_overdue = |machine: &MachineStatus| {
        let about = About::Overdue(machine.machine.clone());
        found.iter().any(|finding| finding.about == about)
    };
    let mut rows: Vec<(bool, &MachineStatus)> =
        status.machines.iter().map(|machine| (is_overdue(machine), machine)).collect();
    rows.sort_by(|one, other| (!one.0, &one.1.machine).cmp(&(!other.0, &other.1.machine)));
    let more = rows.len().saturating_sub(MOST_MACHINES);
    html! {
        @if rows.is_empty() {
            p.card.empty { "No server has reported a backup yet." }
        } @else {
            ul.card.rows {
                @for (is_overdue, machine) in rows.into_iter().take(MOST_MACHINES) {
                    (machine_row(machine, is_overdue, &status.servers, now_ms))
                }
                @if more > 0 { li.soft { "and " (more) " more: see janus status" } }
            }
        }
    }
}

fn machine_row(
    machine: &MachineStatus,
    is_overdue: bool,
    servers: &[ServerStatus],
    now_ms: i64,
) -> Markup {
    let has = |server: &ServerStatus| {
        machine.uses.iter().any(|at| at.server_id == server.server_id && at.last_backup_ms > 0)
    };
    let proofs = machine.uses.iter().filter_map(|at| at.proof.as_ref());
    let proven_ms = proofs.map(|proof| proof.proven_ms).max().unwrap_or(0);
    html! {
        li {
            span.name { (machine.machine) }
            @if has_none(machine) {
                span class={ "pill " (if is_overdue { "bad" } else { "warn" }) }
                    title={ "first start known " (date(machine.first_use_ms)) } { "never" }
            } @else {
                span class={ "pill " (if is_overdue { "bad" } else { "good" }) }
                    title=(date(machine.last_backup_ms)) {
                    (ago(machine.last_backup_ms, now_ms))
                }
            }
            @if proven_ms > 0 {
                span.soft.small title=(date(proven_ms)) { "proven " (ago(proven_ms, now_ms)) }
            }
            span.chips {
                @for at in machine.uses.iter().filter(|at| at.last_backup_ms > 0) {
                    span.chip title=(date(at.last_backup_ms)) {
                        (at.server_id) " " span.soft { (ago(at.last_backup_ms, now_ms)) }
                    }
                }
                @for server in servers.iter().filter(|server| server.ready && !has(server)) {
                    span.chip.none { (name_of(server)) " none" }
                }
            }
        }
    }
}

fn ago(ms: i64, now_ms: i64) -> String {
    match now_ms.saturating_sub(ms) {
        // Clocks of servers may differ from ours.
        ..1000 => "just now".into(),
        age => format!("{} ago", span_ms(age)),
    }
}

fn span_ms(ms: i64) -> String {
    span(Duration::from_millis(u64::try_from(ms).unwrap_or(0)))
}

/// A time as people say it, in one unit, or two while the first is small.
fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::pb::{Fetching, MachineUse};

    use super::*;

    #[test]
    fn what_comes_from_outside_is_escaped() {
        let evil = "<script>alert('x')</script>\"&";
        let server = ServerStatus {
            server_id: evil.into(),
            url: evil.into(),
            reason: evil.into(),
            ready: false,
            ..Default::default()
        };
        let at = MachineUse {
            server_id: evil.into(),
            use_counter: 1,
            last_backup_ms: 1,
            alarm: evil.into(),
            ..Default::default()
        };
        let machine = MachineStatus {
            machine: evil.into(),
            last_backup_ms: 1,
            uses: vec![at],
            ..Default::default()
        };
        let status = GetRouterStatusResponse {
            janus_id: evil.into(),
            servers: vec![server],
            machines: vec![machine],
            warnings: vec![evil.into()],
            ..Default::default()
        };
        let page = render(&status, &[], &[], Duration::from_secs(60), 1000).into_string();
        assert!(!page.contains("<script") && !page.contains("'x')</"), "{page}");
        assert!(page.matches("&lt;script&gt;").count() > 6, "{page}");
    }

    #[test]
    fn the_overdue_come_first() {
        let machine = |name: &str, last_backup_ms| MachineStatus {
            machine: name.into(),
            last_backup_ms,
            ..Default::default()
        };
        let machines = vec![machine("u/a", 100_000), machine("u/z", 1)];
        let status = GetRouterStatusResponse { machines, ..Default::default() };
        let page = render(&status, &[], &[], Duration::from_secs(60), 101_000).into_string();
        let place = |name: &str| page.rfind(&format!(">{name}<")).unwrap();
        assert!(place("u/z") < place("u/a"), "{page}");
    }

    #[test]
    fn what_was_proven_is_told_of_servers_and_machines() {
        let server = |name: &str, proven_ms| ServerStatus {
            server_id: name.into(),
            proven_ms,
            ..Default::default()
        };
        let proof = Some(janus_proto::pb::Proof { proven_ms: 61_000, ..Default::default() });
        let uses = vec![MachineUse { proof, ..Default::default() }, MachineUse::default()];
        let machines = vec![MachineStatus { machine: "u/a".into(), uses, ..Default::default() }];
        let servers = vec![server("a", 1000), server("b", 0)];
        let status = GetRouterStatusResponse { servers, machines, ..Default::default() };
        let page = render(&status, &[], &[], Duration::from_secs(60), 121_000).into_string();
        let places = ["last proven</dt>", ">2 min ago<", ">never<", ">proven 1 min ago<"];
        let at: Vec<usize> = places.iter().filter_map(|text| page.find(text)).collect();
        assert!(at.len() == places.len() && at.is_sorted(), "{page}");
    }

    #[test]
    fn what_servers_fetch_from_each_other_is_told() {
        let failure = "<i>away</i>".to_owned();
        let fetching = vec![
            Fetching { succeeded_ms: 61_000, bytes: 3 << 20, ..Default::default() },
            Fetching { rule: "north".into(), failure, ..Default::default() },
        ];
        let server = ServerStatus { server_id: "a".into(), fetching, ..Default::default() };
        let status = GetRouterStatusResponse { servers: vec![server], ..Default::default() };
        let page = render(&status, &[], &[], Duration::from_secs(60), 121_000).into_string();
        for text in ["fetching for stubs</dt>", ">3.0 MiB, done 1 min ago<", ", rule north</dt>"] {
            assert!(page.contains(text), "{text}: {page}");
        }
        assert!(page.contains("not done yet, FAILED") && !page.contains("<i>"), "{page}");
    }

    #[test]
    fn times_are_for_people() {
        let of = |seconds| span(Duration::from_secs(seconds));
        assert_eq!([of(59), of(60), of(7200), of(200_000)], ["59 s", "1 min", "2 h", "2 days"]);
        assert_eq!((ago(5000, 0), ago(0, 60_000)), ("just now".into(), "1 min ago".into()));
    }
}
