//! The log of a program: lines for people or JSON for programs on stderr, and its spans to a collector where one is set.

use std::io::{self, IsTerminal};

use serde::{Deserialize, Serialize};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::ParseError, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::spans::{Spans, SpansError};

/// A library whose lines for debugging have what webhooks and proxies are addressed by, passwords included. Who wants those lines names it
/// in the filter.
const TELLS_SECRETS: &str = "hyper_util";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// Each line is one JSON object.
    Json,
}

/// What a program's log is to be.
#[derive(Debug, Clone, Copy)]
pub struct LogPlan<'a> {
    /// Filter, as of `RUST_LOG`.
    pub filter: &'a str,
    /// How lines look.
    pub format: LogFormat,
    /// URL of a collector of OpenTelemetry; empty: none.
    pub otlp_endpoint: &'a str,
    /// Name of the program in its spans.
    pub service: &'static str,
}

/// Why there is no log; names the setting.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Not a filter.
    #[error("setting log: {0}")]
    Filter(#[from] ParseError),
    /// The collector can't be used like this.
    #[error("setting {0}")]
    Spans(#[from] SpansError),
}

/// Keeps the log; to be dropped at the end of the program, after its runtime.
#[derive(Debug)]
#[must_use = "dropped, it sends no more spans"]
pub struct Log(#[allow(dead_code)] Option<Spans>);

/// Starts the log on stderr, in colours only on a terminal without `NO_COLOR`. Once in a process.
///
/// # Errors
/// When a setting can't be used.
pub fn start(plan: LogPlan<'_>) -> Result<Log, LogError> {
    let mut filter = EnvFilter::builder().parse(plan.filter)?;
    if !plan.filter.contains("fuser") {
        // It warns of every request that a kernel may well be refused.
        filter = filter.add_directive("fuser=error".parse()?);
    }
    let is_talkative = ["trace", "debug"].iter().any(|level| plan.filter.contains(level));
    if is_talkative && !plan.filter.contains(TELLS_SECRETS) {
        filter = filter.add_directive(format!("{TELLS_SECRETS}=info").parse()?);
    }
    let spans = match plan.otlp_endpoint {
        "" => None,
        endpoint => Some(Spans::to(endpoint, plan.service)?),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match plan.format {
        LogFormat::Text => lines.with_ansi(is_coloured()).with_filter(filter).boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(true)
            .with_filter(filter)
            .boxed(),
    };
    let exported = spans.as_ref().map(Spans::layer);
    tracing_subscriber::registry().with(lines).with(exported).init();
    Ok(Log(spans))
}

/// See <https://no-color.org>.
fn is_coloured() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}
