//! A collector of OpenTelemetry over gRPC that remembers what it gets.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use futures::stream;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::Span,
};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    runtime::Runtime,
};
use tokio_rustls::TlsAcceptor;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::Connected},
};
use xtask::site::Settings;

/// A span as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub service: String,
    pub name: String,
    pub trace: String,
    pub id: String,
    /// Empty for the first of a trace.
    pub parent: String,
    /// Unix nanoseconds.
    pub begun: u64,
    pub ended: u64,
    pub fields: BTreeMap<String, String>,
    /// All of it.
    pub text: String,
}

/// Runs until it is dropped.
pub struct Collector {
    pub url: String,
    spans: Spans,
    _runtime: Runtime,
}

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Seen>>>);

impl Collector {
    /// Listens on loopback; with TLS where `keys` name a certificate.
    pub fn start(keys: Option<&Settings>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let spans = Spans::default();
        let tls = keys.map(acceptor);
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let service = TraceServiceServer::new(spans.clone());
        let incoming = stream::unfold((listener, tls), |(listener, tls)| async {
            let open = accept(&listener, tls.as_ref()).await;
            Some((Ok::<_, io::Error>(open), (listener, tls)))
        });
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        let url = match keys {
            Some(_) => format!("https://localhost:{}", address.port()),
            None => format!("http://{address}"),
        };
        Self { url, spans, _runtime: runtime }
    }

    /// What has come so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.spans.0.lock().unwrap().clone()
    }
}

/// A connection, with TLS or without.
struct Open(Box<dyn Both>);

trait Both: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Both for S {}

/// The next connection whose handshake succeeds.
async fn accept(listener: &TcpListener, tls: Option<&TlsAcceptor>) -> Open {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        match tls {
            None => return Open(Box::new(tcp)),
            Some(tls) => match tls.accept(tcp).await {
                Ok(tls) => return Open(Box::new(tls)),
                Err(_) => continue,
            },
        }
    }
}

fn acceptor(keys: &Settings) -> TlsAcceptor {
    let file = |key| keys.get(key).unwrap().as_str().unwrap().to_owned();
    let chain = CertificateDer::pem_file_iter(file("cert")).unwrap().map(Result::unwrap).collect();
    let mut config = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(file("key")).unwrap())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

impl Connected for Open {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Open {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Open {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut all = self.0.lock().unwrap();
        for of_resource in request.into_inner().resource_spans {
            let resource = of_resource.resource.unwrap_or_default();
            let service = fields(&resource.attributes).remove("service.name").unwrap_or_default();
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            all.extend(spans.map(|span| seen(&service, &span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn seen(service: &str, span: &Span) -> Seen {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Seen {
        service: service.to_owned(),
        name: span.name.clone(),
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        begun: span.start_time_unix_nano,
        ended: span.end_time_unix_nano,
        fields: fields(&span.attributes),
        text: format!("{span:?}"),
    }
}

fn fields(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Option<AnyValue>| match value.as_ref().and_then(|any| any.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|field| (field.key.clone(), text(&field.value))).collect()
}

/// The spans of one trace, each below its parent.
pub fn tree(spans: &[Seen]) -> String {
    fn below(spans: &[Seen], parent: &str, depth: usize, text: &mut String) {
        for span in spans.iter().filter(|span| span.parent == parent) {
            let line =
                format!("{:indent$}{} {}\n", "", span.service, span.name, indent = depth * 2);
            text.push_str(&line);
            below(spans, &span.id, depth + 1, text);
        }
    }
    let mut text = String::new();
    below(spans, "", 0, &mut text);
    text
}
