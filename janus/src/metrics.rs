//! Figures for Prometheus, over plain HTTP on an address of their own (`metrics_listen`): made when they are asked for.

use std::{fmt, sync::atomic::Ordering, time::Duration};

use axum::{Router, http::header, response::IntoResponse, routing::get};
use janus_proto::pb::{FetchErrors, Fetching, GetRouterStatusResponse, Proof, ServerStatus};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::{
    agreement::differences,
    dashboard,
    info::Info,
    registry::Sight,
    traffic::Latencies,
    upstream::{Need, Upstream},
};

/// Of OpenMetrics 1.0, which Prometheus understands.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the figures are made of.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The servers and machines.
    pub info: Info,
    /// How long calls took.
    pub latencies: Latencies,
    /// A machine without a new backup for so long is overdue.
    pub overdue: Duration,
}

/// `/metrics`, and a page for people at `/`.
pub fn routes(figures: Figures) -> Router {
    let page_for_people = dashboard::routes(figures.clone());
    let answer = move || {
        let text = page(&figures);
        async move { ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response() }
    };
    Router::new().route("/metrics", get(answer)).merge(page_for_people)
}

/// All figures, as text.
fn page(figures: &Figures) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(figures.clone()));
    let mut page = String::new();
    // Writing to a string doesn't fail.
    let _ = text::encode(&mut page, &registry);
    page
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let encoder = &mut encoder;
        let fleet = self.info.fleet();
        let servers: Vec<(String, Upstream)> =
            fleet.distinct().into_iter().map(|upstream| (upstream.name(), upstream)).collect();
        let status = self.info.status(&Sight::all());
        self.servers(encoder, &servers, &status)?;
        errors(encoder, &servers)?;
        self.machines(encoder)?;
        self.proofs(encoder)?;
        self.alarms(encoder)?;
        self.latencies(encoder)?;
        let differing = differences(&fleet.registry().settings()).len() as f64;
        let help = "Settings that should be equal on all servers and are not";
        single(encoder, "settings_differences", help, differing)?;
        let twins = fleet.twins().len() as f64;
        let help = "Pairs of servers that report the same store: neither gets backups";
        single(encoder, "store_conflicts", help, twins)?;
        let help = "Unix time at which this janus' own certificate expires";
        let expires = seconds(status.certificate_expires_ms);
        single(encoder, "certificate_expiry_timestamp_seconds", help, expires)
    }
}

impl Figures {
    fn servers(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        servers: &[(String, Upstream)],
        status: &GetRouterStatusResponse,
    ) -> Result<(), fmt::Error> {
        let gauge = |figure: &dyn Fn(&Upstream) -> Option<f64>| -> Vec<(String, ConstGauge<f64>)> {
            let of = |(name, upstream): &(String, Upstream)| {
                Some((name.clone(), ConstGauge::new(figure(upstream)?)))
            };
            servers.iter().filter_map(of).collect()
        };
        let counter = |figure: &dyn Fn(&Upstream) -> u64| -> Vec<(String, ConstCounter<u64>)> {
            let of = |(name, upstream): &(String, Upstream)| {
                (name.clone(), ConstCounter::new(figure(upstream)))
            };
            servers.iter().map(of).collect()
        };
        let told = |figure: &dyn Fn(&ServerStatus) -> Option<f64>| {
            gauge(&|upstream| {
                let url = upstream.url();
                figure(status.servers.iter().find(|line| line.url == url)?)
            })
        };
        let ready = gauge(&|upstream| {
            Some(f64::from(self.info.fleet().stand(upstream, Need::Starts).is_ok()))
        });
        by_server(encoder, "server_ready", "1 when the server takes backups", &ready)?;
        let round_trip = gauge(&|upstream| upstream.round_trip().map(|time| time.as_secs_f64()));
        let help = "Smoothed time of a round trip to the server, as probes find it";
        by_server(encoder, "server_round_trip_seconds", help, &round_trip)?;
        let age = told(&|line| Some(line.report_age_ms as f64 / 1000.0).filter(|age| *age >= 0.0));
        let help = "Time since the last message of the server's report stream; absent without one";
        by_server(encoder, "server_report_age_seconds", help, &age)?;
        let known = |line: &ServerStatus| line.total_bytes > 0;
        let free = told(&|line| known(line).then_some(line.free_bytes as f64));
        let help = "Free space below the server's image path, as it has reported last";
        by_server(encoder, "server_free_bytes", help, &free)?;
        let total = told(&|line| known(line).then_some(line.total_bytes as f64));
        let help = "Size of the file system of the server's image path";
        by_server(encoder, "server_total_bytes", help, &total)?;
        let expires =
            told(&|line| Some(seconds(line.certificate_expires_ms)).filter(|at| *at > 0.0));
        let help = "Unix time at which the server's certificate expires";
        by_server(encoder, "server_certificate_expiry_timestamp_seconds", help, &expires)?;
        let damaged = told(&|line| {
            let told = line.report_age_ms >= 0 || !line.damaged.is_empty();
            let snapshots: u64 = line.damaged.iter().map(|machine| machine.snapshots).sum();
            told.then_some(snapshots as f64)
        });
        let help = "Snapshots on the server that have lost blocks, as it has reported last";
        by_server(encoder, "server_damaged_snapshots", help, &damaged)?;
        let incomplete =
            told(&|line| (line.report_age_ms >= 0).then_some(line.incomplete_snapshots as f64));
        let help = "Snapshots on the server whose stubs aren't full, as it has reported last";
        by_server(encoder, "server_incomplete_snapshots", help, &incomplete)?;
        let starts = counter(&|upstream| upstream.counters().starts.load(Ordering::Relaxed));
        by_server(encoder, "server_starts", "Backups started there by this janus", &starts)?;
        let sent = counter(&|upstream| upstream.counters().bytes_sent.load(Ordering::Relaxed));
        by_server(encoder, "server_sent_bytes", "Bytes forwarded to the server", &sent)?;
        let received =
            counter(&|upstream| upstream.counters().bytes_received.load(Ordering::Relaxed));
        let help = "Bytes forwarded from the server";
        by_server(encoder, "server_received_bytes", help, &received)?;
        fetching(encoder, status)
    }

    /// When each machine was last backed up to each server.
    fn machines(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Unix time of the machine's newest backup on the server";
        let kind = MetricType::Gauge;
        let name = "janus_machine_last_backup_timestamp_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        for ((machine, server), committed_ms) in self.info.fleet().registry().last_backups() {
            let labels = [("machine", machine.as_str()), ("server", server.as_str())];
            ConstGauge::new(seconds(committed_ms)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// When backups of each machine were last proven on each server, and whether the newest proof says that a restore would fail.
    fn proofs(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let registry = self.info.fleet().registry();
        let mut proofs = Vec::new();
        for server in registry.servers() {
            let of = registry.proofs(&server, &Sight::all()).into_iter();
            proofs.extend(of.map(|(machine, proof)| (machine, server.clone(), proof)));
        }
        proofs.sort_by(|one, other| (&one.0, &one.1).cmp(&(&other.0, &other.1)));
        let mut family = |name: &str, help: &str, figure: &dyn Fn(&Proof) -> Option<f64>| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (machine, server, proof) in &proofs {
                let Some(figure) = figure(proof) else { continue };
                let labels = [("machine", machine.as_str()), ("server", server.as_str())];
                ConstGauge::new(figure).encode(family.encode_family(&labels)?)?;
            }
            Ok(())
        };
        let name = "janus_machine_last_proven_timestamp_seconds";
        let help = "Unix time at which a backup of the machine was last proven on the server";
        family(name, help, &|proof| Some(seconds(proof.proven_ms)).filter(|at| *at > 0.0))?;
        let name = "janus_machine_proof_failed";
        let help = "1 when the newest proof found that a backup of the machine on the server can't be restored";
        family(name, help, &|proof| Some(f64::from(!proof.failure.is_empty())))
    }

    /// Machines whose backups look like an attack.
    fn alarms(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let registry = self.info.fleet().registry();
        let mut alarms = Vec::new();
        for server in registry.servers() {
            let of = registry.alarms(&server, &Sight::all()).into_iter();
            alarms.extend(of.map(|(machine, _)| (machine, server.clone())));
        }
        alarms.sort();
        let name = "janus_machine_alarm";
        let help = "1 while an alarm of the machine is open on the server: a backup changed its disk as an attack does";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (machine, server) in &alarms {
            let labels = [("machine", machine.as_str()), ("server", server.as_str())];
            ConstGauge::new(1.0).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn latencies(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Time of a call through this janus: of streams to their first answer byte, of others to their end";
        let kind = MetricType::Histogram;
        let mut family = encoder.encode_descriptor("janus_call_seconds", help, None, kind)?;
        for (class, times) in self.latencies.each() {
            times.encode(family.encode_family(&[("class", class)])?)?;
        }
        Ok(())
    }
}

/// What servers fetch from each other by themselves.
fn fetching<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    status: &'a GetRouterStatusResponse,
) -> Result<(), fmt::Error> {
    let labels = |line: &'a ServerStatus, one: &'a Fetching| {
        let rule = if one.rule.is_empty() { "[fill]" } else { one.rule.as_str() };
        [("server", line.server_id.as_str()), ("rule", rule)]
    };
    let of = |line: &'a ServerStatus| line.fetching.iter().map(move |one| (labels(line, one), one));
    let all: Vec<_> = status.servers.iter().flat_map(of).collect();
    let name = "janus_server_fetching_last_success_timestamp_seconds";
    let help = "Unix time at which a turn of the server's rule of [replicate], or of filling stubs, last ended well";
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, one) in all.iter().filter(|(_, one)| one.succeeded_ms > 0) {
        ConstGauge::new(seconds(one.succeeded_ms)).encode(family.encode_family(labels)?)?;
    }
    let kind = MetricType::Counter;
    let help = "Bytes of data that it has brought since the server's start";
    let mut family = encoder.encode_descriptor("janus_server_fetching_bytes", help, None, kind)?;
    for (labels, one) in &all {
        ConstCounter::new(one.bytes).encode(family.encode_family(labels)?)?;
    }
    let help = "Its failures since the server's start, by what failed";
    let mut family = encoder.encode_descriptor("janus_server_fetching_errors", help, None, kind)?;
    for ([server, rule], one) in &all {
        for FetchErrors { reason, count } in &one.errors {
            let labels = [*server, *rule, ("reason", reason)];
            ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

/// Calls that ended with an error, by server and reason.
fn errors(
    encoder: &mut DescriptorEncoder<'_>,
    servers: &[(String, Upstream)],
) -> Result<(), fmt::Error> {
    let help = "Calls to the server that ended with an error, by its reason, else its gRPC code";
    let kind = MetricType::Counter;
    let mut family = encoder.encode_descriptor("janus_server_errors", help, None, kind)?;
    for (server, upstream) in servers {
        for (reason, count) in upstream.counters().errors.counts() {
            let labels = [("server", server.as_str()), ("reason", reason)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn seconds(ms: i64) -> f64 {
    ms as f64 / 1000.0
}

/// One figure of this janus.
fn single(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    figure: f64,
) -> Result<(), fmt::Error> {
    let name = format!("janus_{name}");
    let one = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    ConstGauge::new(figure).encode(one)
}

/// One figure of each server.
fn by_server<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    figures: &[(String, M)],
) -> Result<(), fmt::Error> {
    let Some((_, first)) = figures.first() else { return Ok(()) };
    let name = format!("janus_{name}");
    let mut family = encoder.encode_descriptor(&name, help, None, first.metric_type())?;
    for (server, figure) in figures {
        figure.encode(family.encode_family(&[("server", server.as_str())])?)?;
    }
    Ok(())
}
