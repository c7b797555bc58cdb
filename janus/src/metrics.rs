//! Figures for Prometheus, over plain HTTP on an address of their own (`metrics_listen`): made when they are asked for.

use std::{fmt, sync::atomic::Ordering};

use axum::{Router, http::header, response::IntoResponse, routing::get};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    agreement::differences,
    fleet::Fleet,
    upstream::{Need, Upstream},
};

/// Of OpenMetrics 1.0, which Prometheus understands.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `/metrics` until `shutdown`.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve(
    listener: TcpListener,
    fleet: Fleet,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let answer = move || {
        let text = page(&fleet);
        async move { ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response() }
    };
    let routes = Router::new().route("/metrics", get(answer));
    axum::serve(listener, routes).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

/// All figures, as text.
fn page(fleet: &Fleet) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Figures(fleet.clone())));
    let mut page = String::new();
    // Writing to a string doesn't fail.
    let _ = text::encode(&mut page, &registry);
    page
}

#[derive(Debug)]
struct Figures(Fleet);

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let fleet = &self.0;
        let servers: Vec<(String, Upstream)> =
            fleet.distinct().into_iter().map(|upstream| (upstream.name(), upstream)).collect();
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
        let ready = gauge(&|upstream| Some(f64::from(upstream.stand(Need::Starts).is_ok())));
        by_server(&mut encoder, "server_ready", "1 when the server takes backups", &ready)?;
        let round_trip = gauge(&|upstream| upstream.round_trip().map(|time| time.as_secs_f64()));
        let help = "Smoothed time of a round trip to the server";
        by_server(&mut encoder, "server_round_trip_seconds", help, &round_trip)?;
        let age = gauge(&|upstream| {
            Some(fleet.registry().report_age(&upstream.server()?)?.as_secs_f64())
        });
        let help = "Time since the last message of the server's report stream; absent without one";
        by_server(&mut encoder, "server_report_age_seconds", help, &age)?;
        let starts = counter(&|upstream| upstream.counters().starts.load(Ordering::Relaxed));
        by_server(&mut encoder, "server_starts", "Backups started there by this janus", &starts)?;
        let sent = counter(&|upstream| upstream.counters().bytes_sent.load(Ordering::Relaxed));
        by_server(&mut encoder, "server_sent_bytes", "Bytes forwarded to the server", &sent)?;
        let received =
            counter(&|upstream| upstream.counters().bytes_received.load(Ordering::Relaxed));
        let help = "Bytes forwarded from the server";
        by_server(&mut encoder, "server_received_bytes", help, &received)?;
        self.machines(&mut encoder)?;
        let differing = ConstGauge::new(differences(&fleet.registry().settings()).len() as u64);
        let help = "Settings that should be equal on all servers and are not";
        let one = encoder.encode_descriptor(
            "janus_settings_differences",
            help,
            None,
            MetricType::Gauge,
        )?;
        differing.encode(one)
    }
}

impl Figures {
    /// When each machine was last backed up to each server.
    fn machines(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Unix time of the machine's newest backup on the server";
        let kind = MetricType::Gauge;
        let name = "janus_machine_last_backup_timestamp_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        for ((machine, server), committed_ms) in self.0.registry().last_backups() {
            let labels = [("machine", machine.as_str()), ("server", server.as_str())];
            ConstGauge::new(committed_ms as f64 / 1000.0).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
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
