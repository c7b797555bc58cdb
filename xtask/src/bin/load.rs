//! Load for `cargo xtask bench --proxies`: a server that takes blocks and keeps none, a byte copier that ends TLS on both
//! sides (the least that any proxy has to do), and a client that measures.

use std::{
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use janus_proto::{
    channel::{self, ConnectOptions, Expect, Target},
    listener::{self, Limits},
    metadata,
    model::MAX_MESSAGE_BYTES,
    pb::{
        self,
        backup_service_client::BackupServiceClient,
        backup_service_server::{BackupService, BackupServiceServer},
    },
    program,
    tls::Identity,
};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls::pki_types::ServerName};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming, body::Body, metadata::MetadataValue, service::Routes,
};
use tonic_health::ServingStatus;
use tower::ServiceExt;

/// Data of a message.
const MESSAGE: usize = 1 << 20;
/// What the byte copier reads at once; less and more were slower.
const COPY_BUFFER: usize = 256 << 10;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Takes blocks and keeps none
    Sink {
        #[arg(long)]
        listen: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Copies bytes between two TLS connections
    Copier {
        #[arg(long)]
        listen: String,
        #[arg(long)]
        to: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Sends blocks on some streams at once; prints MiB/s as JSON
    Bulk {
        #[command(flatten)]
        target: To,
        #[arg(long)]
        mib: usize,
        #[arg(long, default_value_t = 1)]
        streams: usize,
    },
    /// Calls for some seconds; prints the times in microseconds as JSON
    Unary {
        #[command(flatten)]
        target: To,
        #[arg(long)]
        concurrency: usize,
        #[arg(long)]
        seconds: f64,
    },
}

#[derive(Debug, Args)]
struct Keys {
    #[arg(long)]
    cert: PathBuf,
    #[arg(long)]
    key: PathBuf,
    #[arg(long)]
    ca: PathBuf,
}

impl Keys {
    fn load(&self) -> Result<Identity> {
        Ok(Identity::load(&self.cert, &self.key, &self.ca)?)
    }
}

#[derive(Debug, Args)]
struct To {
    #[arg(long)]
    url: String,
    /// The server that calls are pinned to
    #[arg(long)]
    server: String,
    #[command(flatten)]
    keys: Keys,
}

impl To {
    /// Speaks first, as HTTP/2 clients do: HAProxy says nothing before, which our own clients wait for.
    async fn connect(&self) -> Result<BackupServiceClient<Sender>> {
        let (identity, target) = (self.keys.load()?, Target::parse(&self.url)?);
        let tcp = TcpStream::connect((target.host(), target.port())).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(target.host().to_owned())?;
        let tls = TlsConnector::from(identity.client_config()).connect(name, tcp).await?;
        let builder = channel::client_builder(TokioExecutor::new());
        let (sender, connection) = builder.handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        let origin = http::Uri::try_from(&self.url)?;
        Ok(BackupServiceClient::with_origin(Sender(sender), origin))
    }

    fn request<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        let server = MetadataValue::try_from(self.server.as_str())?;
        request.metadata_mut().insert(metadata::SERVER, server);
        Ok(request)
    }
}

/// For the generated clients.
#[derive(Clone)]
struct Sender(http2::SendRequest<Body>);

impl tower::Service<http::Request<Body>> for Sender {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let stop = CancellationToken::new();
    let signals = program::follow_signals(stop.clone(), || {})?;
    let done = match Cli::parse().command {
        Command::Sink { listen, keys } => sink(&listen, keys.load()?, stop).await,
        Command::Copier { listen, to, keys } => {
            let copying = copier(&listen, &to, keys.load()?);
            stop.run_until_cancelled(copying).await.unwrap_or(Ok(()))
        }
        Command::Bulk { target, mib, streams } => bulk(&target, mib, streams).await,
        Command::Unary { target, concurrency, seconds } => {
            unary(target, concurrency, Duration::from_secs_f64(seconds)).await
        }
    };
    signals.abort();
    done
}

async fn bind(listen: &str) -> Result<TcpListener> {
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    println!("listening on https://{}", listener.local_addr()?);
    Ok(listener)
}

struct Sink;

type Answers = ReceiverStream<Result<pb::WriteBlocksResponse, Status>>;

#[tonic::async_trait]
impl BackupService for Sink {
    type WriteBlocksStream = Answers;

    async fn write_blocks(
        &self,
        request: Request<Streaming<pb::WriteBlocksRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut blocks = request.into_inner();
        let (send, answers) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut received_block = 0;
            let answer = loop {
                match blocks.message().await {
                    Ok(Some(_)) => received_block += 1,
                    Ok(None) => {
                        break Ok(pb::WriteBlocksResponse { received_block, ..Default::default() });
                    }
                    Err(status) => break Err(status),
                }
            };
            let _ = send.send(answer).await;
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn get_backup(
        &self,
        _: Request<pb::GetBackupRequest>,
    ) -> Result<Response<pb::GetBackupResponse>, Status> {
        Ok(Response::new(pb::GetBackupResponse::default()))
    }

    async fn start_backup(
        &self,
        _: Request<pb::StartBackupRequest>,
    ) -> Result<Response<pb::StartBackupResponse>, Status> {
        Err(Status::unimplemented("this server keeps nothing"))
    }

    async fn commit_backup(
        &self,
        _: Request<pb::CommitBackupRequest>,
    ) -> Result<Response<pb::CommitBackupResponse>, Status> {
        Err(Status::unimplemented("this server keeps nothing"))
    }

    async fn abort_backup(
        &self,
        _: Request<pb::AbortBackupRequest>,
    ) -> Result<Response<pb::AbortBackupResponse>, Status> {
        Err(Status::unimplemented("this server keeps nothing"))
    }
}

async fn sink(listen: &str, identity: Identity, stop: CancellationToken) -> Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    for service in ["", "janus.v1.BackupService", "janus.v1.RestoreService"] {
        health.set_service_status(service, ServingStatus::Serving).await;
    }
    let service = BackupServiceServer::new(Sink).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let routes = Routes::new(health_service).add_service(service).prepare();
    let routes = routes.map_request(|request: http::Request<_>| request.map(Body::new));
    // nginx takes a connection for each call that is open.
    let limits = Limits { max_connections_per_caller: 1024, ..Limits::default() };
    listener::serve(bind(listen).await?, identity, routes, limits, stop).await;
    Ok(())
}

async fn copier(listen: &str, to: &str, identity: Identity) -> Result<()> {
    let (listener, target) = (bind(listen).await?, Target::parse(to)?);
    let acceptor = TlsAcceptor::from(identity.server_config());
    let options = ConnectOptions::expecting(Expect::Server);
    let mut connections = JoinSet::new();
    loop {
        let (near, _) = listener.accept().await?;
        near.set_nodelay(true)?;
        let (acceptor, target, identity, options) =
            (acceptor.clone(), target.clone(), identity.clone(), options.clone());
        connections.spawn(async move {
            let mut near = acceptor.accept(near).await?;
            let (mut far, _) = channel::connect_tls(&target, &identity, &options).await?;
            copy_bidirectional_with_sizes(&mut near, &mut far, COPY_BUFFER, COPY_BUFFER).await?;
            anyhow::Ok(())
        });
    }
}

/// Bytes that don't pack, so that nobody can.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..MESSAGE / 8).flat_map(|_| word()).collect()
}

async fn bulk(target: &To, mib: usize, streams: usize) -> Result<()> {
    let client = target.connect().await?;
    let batch = pb::BlockBatch { data: noise().into(), ..Default::default() };
    let message = pb::WriteBlocksRequest { batch: Some(batch), ..Default::default() };
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for _ in 0..streams {
        let (send, messages) = tokio::sync::mpsc::channel(4);
        let (message, count) = (message.clone(), mib / streams);
        running.spawn(async move {
            for _ in 0..count {
                send.send(message.clone()).await.context("the stream ended early")?;
            }
            anyhow::Ok(0)
        });
        let request = target.request(ReceiverStream::new(messages))?;
        let mut client = client.clone();
        running.spawn(async move {
            let mut answers = client.write_blocks(request).await?.into_inner();
            let mut received = 0;
            while let Some(answer) = answers.message().await? {
                received = answer.received_block;
            }
            Ok(received)
        });
    }
    let mut received = 0;
    while let Some(ended) = running.join_next().await {
        received += ended??;
    }
    let (sent, seconds) = ((mib / streams * streams) as u64, begun.elapsed().as_secs_f64());
    if received != sent {
        bail!("{received} of {sent} messages arrived");
    }
    let answer = serde_json::json!({
        "mib": sent, "seconds": seconds, "mib_per_second": sent as f64 / seconds,
    });
    println!("{answer}");
    Ok(())
}

async fn unary(target: To, concurrency: usize, length: Duration) -> Result<()> {
    let (client, target) = (target.connect().await?, Arc::new(target));
    let until = Instant::now() + length;
    let mut running = JoinSet::new();
    for _ in 0..concurrency {
        let (mut client, target) = (client.clone(), target.clone());
        running.spawn(async move {
            let mut times = Vec::new();
            while Instant::now() < until {
                let begun = Instant::now();
                client.get_backup(target.request(pb::GetBackupRequest::default())?).await?;
                times.push(begun.elapsed().as_micros() as u64);
            }
            anyhow::Ok(times)
        });
    }
    let mut times = Vec::new();
    while let Some(ended) = running.join_next().await {
        times.extend(ended??);
    }
    times.sort_unstable();
    let part = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    if times.is_empty() {
        bail!("no call was answered");
    }
    let answer = serde_json::json!({
        "calls": times.len(), "p50_us": part(0.5), "p99_us": part(0.99),
        "calls_per_second": times.len() as f64 / length.as_secs_f64(),
    });
    println!("{answer}");
    Ok(())
}
