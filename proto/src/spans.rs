//! Spans of calls and runs, sent to a collector of OpenTelemetry (OTLP over gRPC) where one is set.
//!
//! Nothing here delays or fails a call: what has ended goes into a bounded queue, a thread of its own sends it, and what
//! finds the queue full is lost. A collector that can't be reached is told of once in the log, and once more when it is
//! back. At the end of the program the queue is sent for at most [`FLUSH`]. Headers for the collector, such as a token, come
//! from the variable `OTEL_EXPORTER_OTLP_HEADERS`, as everywhere.

mod collector;

use std::{
    cell::Cell,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry::trace::{SpanId, SpanKind, TraceId, TracerProvider};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, IdGenerator, RandomIdGenerator, SdkTracerProvider,
        SpanData, SpanExporter,
    },
};
use tokio::runtime::{Handle, Runtime};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};

/// Longest time that the end of a program waits for its last spans to be sent.
pub const FLUSH: Duration = Duration::from_secs(2);
/// Ended spans that wait to be sent; each takes about 1 KiB.
const QUEUE: usize = 2048;
/// Deadline of sending one batch.
const EXPORT_DEADLINE: Duration = Duration::from_secs(5);
/// Oldest spans in the queue.
const PAUSE: Duration = Duration::from_secs(2);

/// A collector that can't be used like this.
#[derive(Debug, thiserror::Error)]
#[error("otlp_endpoint: {0}")]
pub struct SpansError(String);

/// Checks the setting `otlp_endpoint`; empty means none.
///
/// # Errors
/// When it is not the URL of a collector.
pub fn check_endpoint(endpoint: &str) -> Result<(), SpansError> {
    let wrong = || SpansError(format!("{endpoint:?} is not a URL: write http://HOST:4317"));
    if endpoint.is_empty() {
        return Ok(());
    }
    let uri: http::Uri = endpoint.parse().map_err(|_| wrong())?;
    let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
    if is_http && uri.host().is_some_and(|host| !host.is_empty()) { Ok(()) } else { Err(wrong()) }
}

/// Sends spans until it is dropped, which sends the last ones. To be dropped outside of any async code.
#[derive(Debug)]
pub struct Spans {
    provider: SdkTracerProvider,
    /// Has the connection to the collector; apart from the program's own, so that neither holds up the other.
    runtime: Option<Runtime>,
}

impl Spans {
    /// Spans of `service`, to the collector at `endpoint`. It isn't connected to before the first span has ended.
    ///
    /// # Errors
    /// When the endpoint is not a URL, or the system refuses a thread.
    pub fn to(endpoint: &str, service: &'static str) -> Result<Self, SpansError> {
        let failed = |error: &dyn fmt::Display| SpansError(error.to_string());
        check_endpoint(endpoint)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("spans")
            .enable_all()
            .build()
            .map_err(|error| failed(&error))?;
        let exporter = {
            let _entered = runtime.enter();
            let channel = collector::channel(endpoint, EXPORT_DEADLINE).map_err(SpansError)?;
            let builder = opentelemetry_otlp::SpanExporter::builder().with_tonic();
            let builder = builder.with_channel(channel).with_timeout(EXPORT_DEADLINE);
            builder.build().map_err(|error| failed(&error))?
        };
        let exporter = Told {
            exporter: Arc::new(exporter),
            endpoint: endpoint.to_owned(),
            runtime: runtime.handle().clone(),
            is_lost: AtomicBool::new(false),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_scheduled_delay(PAUSE)
            .build();
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(opentelemetry::KeyValue::new(
                "service.version",
                env!("CARGO_PKG_VERSION"),
            ))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_id_generator(Ids::default())
            .with_resource(resource)
            .build();
        Ok(Self { provider, runtime: Some(runtime) })
    }

    /// What makes spans of ours into spans of OpenTelemetry.
    pub fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("janus"))
            .with_location(false)
            .with_target(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(filter_fn(is_ours))
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        // What could not be sent in time is lost, as the module says.
        let _ = self.provider.shutdown_with_timeout(FLUSH);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Only our own: spans of the connection to the collector would never come to an end.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("janus") && *metadata.level() <= Level::INFO
}

/// Sends on the runtime that has the connection, and tells when the collector is lost and when it is back.
struct Told {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    endpoint: String,
    runtime: Handle,
    is_lost: AtomicBool,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Told({})", self.endpoint)
    }
}

impl SpanExporter for Told {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        let exporter = self.exporter.clone();
        batch.iter_mut().for_each(dress);
        let sending = self.runtime.spawn(async move { exporter.export(batch).await });
        let sent = sending
            .await
            .unwrap_or_else(|_| Err(OTelSdkError::InternalFailure("ended meanwhile".into())));
        let was_lost = self.is_lost.swap(sent.is_err(), Ordering::Relaxed);
        match &sent {
            Err(error) if !was_lost => {
                tracing::warn!(endpoint = self.endpoint, %error, "spans can't be sent and are lost, until the collector answers");
            }
            Ok(()) if was_lost => tracing::info!(endpoint = self.endpoint, "spans are sent again"),
            _ => {}
        }
        sent
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

/// Calls are named as the conventions for RPC have it. The log has short names, and no room for kinds.
fn dress(span: &mut SpanData) {
    let method = span.attributes.iter().find(|attribute| attribute.key.as_str() == "method");
    if let Some(method) = method.map(|attribute| attribute.value.to_string()) {
        span.name = method.trim_start_matches('/').to_owned().into();
        span.span_kind = SpanKind::Server;
    }
    span.attributes.retain(|attribute| !matches!(attribute.key.as_str(), "method" | "trace_id"));
}

thread_local! {
    /// Id of the next trace that this thread begins.
    static NEXT_TRACE: Cell<Option<u128>> = const { Cell::new(None) };
}

/// Whatever span `begin` begins without a parent belongs to `trace`, so that it has the id that stands in the log.
pub(crate) fn in_trace<T>(trace: u128, begin: impl FnOnce() -> T) -> T {
    NEXT_TRACE.set(Some(trace));
    let begun = begin();
    NEXT_TRACE.set(None);
    begun
}

#[derive(Debug, Default)]
struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        NEXT_TRACE.take().map_or_else(|| self.0.new_trace_id(), TraceId::from)
    }

    fn new_span_id(&self) -> SpanId {
        self.0.new_span_id()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_are_endpoints() {
        for good in ["", "http://collector:4317", "https://[::1]:4317/"] {
            check_endpoint(good).unwrap();
        }
        for wrong in ["collector:4317", "grpc://collector:4317", "http://", "collector"] {
            let error = check_endpoint(wrong).unwrap_err().to_string();
            assert!(error.starts_with("otlp_endpoint: "), "{error}");
        }
    }

    #[test]
    fn a_collector_that_never_answers_holds_up_no_end() {
        // Nobody accepts here.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let spans = Spans::to(&endpoint, "test").unwrap();
        let begun = std::time::Instant::now();
        {
            use opentelemetry::trace::Tracer;
            let tracer = spans.provider.tracer("test");
            (0..2 * QUEUE).for_each(|_| drop(tracer.start("span")));
        }
        let queued = begun.elapsed();
        drop(spans);
        let ended = begun.elapsed();
        assert!(queued < Duration::from_secs(1), "{queued:?} for a full queue");
        assert!(ended < queued + FLUSH + Duration::from_millis(500), "{ended:?} at the end");
    }
}
