//! How fast data gets through: takes bytes and throws them away, sends bytes that mean nothing. Both are bounded, in bytes and in
//! time, so that a caller can do no more with them than with a small restore.

use std::{pin::Pin, time::Duration};

use janus_proto::{
    pb::{
        DownloadRequest, DownloadResponse, UploadRequest, UploadResponse,
        probe_service_server::ProbeService,
    },
    probe::{MAX_PROBE_BYTES, PIECE_BYTES, noise},
};
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Time of a call.
const MOST_TIME: Duration = Duration::from_secs(10);

/// The service; see `probe.proto`.
pub struct Probe {
    server: String,
}

impl Probe {
    /// The service of the server of this name.
    pub fn new(server: String) -> Self {
        Self { server }
    }
}

#[tonic::async_trait]
impl ProbeService for Probe {
    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadResponse>, Status> {
        let mut messages = request.into_inner();
        let (end, mut bytes) = (Instant::now() + MOST_TIME, 0);
        while bytes < MAX_PROBE_BYTES {
            match tokio::time::timeout_at(end, messages.message()).await {
                Ok(Ok(Some(message))) => bytes += message.data.len() as u64,
                Ok(Ok(None)) | Err(_) => break,
                Ok(Err(status)) => return Err(status),
            }
        }
        Ok(Response::new(UploadResponse { server_id: self.server.clone(), bytes }))
    }

    type DownloadStream = Pin<Box<dyn Stream<Item = Result<DownloadResponse, Status>> + Send>>;

    async fn download(
        &self,
        request: Request<DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let wanted = match request.into_inner().bytes {
            0 => MAX_PROBE_BYTES,
            bytes => bytes.min(MAX_PROBE_BYTES),
        };
        let data = noise();
        let parts = (0..wanted).step_by(PIECE_BYTES).map(move |at| {
            let len = (wanted - at).min(PIECE_BYTES as u64) as usize;
            Ok(DownloadResponse { data: data.slice(..len) })
        });
        let end = Instant::now() + MOST_TIME;
        let in_time = tokio_stream::iter(parts).take_while(move |_| Instant::now() < end);
        Ok(Response::new(Box::pin(in_time)))
    }
}
