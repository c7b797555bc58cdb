//! How fast data gets through, both ways, for a few seconds.

use std::time::{Duration, Instant};

use janus_proto::{
    channel::Connection,
    pb::{DownloadRequest, UploadRequest, probe_service_client::ProbeServiceClient},
    probe::{MAX_PROBE_BYTES, PIECE_BYTES, noise},
    show::amount,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, transport::Channel};

use crate::link::Address;

/// How long each way is used.
const TIME: Duration = Duration::from_secs(2);
/// And how long its end is waited for: what is under way must arrive.
const END: Duration = Duration::from_secs(30);

/// Bytes for each second.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// To the server.
    pub up: f64,
    /// From it.
    pub down: f64,
}

impl Throughput {
    /// For people.
    pub fn text(&self) -> String {
        let rate = |rate: f64| format!("{}/s ({:.0} Mbit/s)", amount(rate as u64), rate / 125e3);
        format!("{} to the server, {} from it", rate(self.up), rate(self.down))
    }
}

/// Measures both ways, to the server that the connection leads to, or where janus sends the call.
pub(super) async fn measure(connection: &Connection) -> Result<Throughput, Status> {
    let client = ProbeServiceClient::new(connection.channel.clone());
    let late = |_| Status::deadline_exceeded("the data did not arrive");
    let up = tokio::time::timeout(END, upload(client.clone())).await.map_err(late)??;
    let down = tokio::time::timeout(END, download(client)).await.map_err(late)??;
    Ok(Throughput { up, down })
}

async fn upload(mut client: ProbeServiceClient<Channel>) -> Result<f64, Status> {
    let (pieces, stream) = tokio::sync::mpsc::channel(1);
    let began = Instant::now();
    let sending = async move {
        let data = noise();
        for _ in 0..MAX_PROBE_BYTES / PIECE_BYTES as u64 {
            let message = UploadRequest { data: data.clone() };
            if began.elapsed() > TIME || pieces.send(message).await.is_err() {
                return;
            }
        }
    };
    let request: Request<ReceiverStream<UploadRequest>> =
        Address::default().request(ReceiverStream::new(stream), None);
    let (answer, ()) = tokio::join!(client.upload(request), sending);
    let bytes = answer?.into_inner().bytes;
    Ok(rate(bytes, began.elapsed()))
}

async fn download(mut client: ProbeServiceClient<Channel>) -> Result<f64, Status> {
    let request = Address::default().request(DownloadRequest { bytes: MAX_PROBE_BYTES }, None);
    let began = Instant::now();
    let mut answers = client.download(request).await?.into_inner();
    let mut bytes = 0;
    // What is left when the time is over is dropped with the stream.
    while let Some(answer) = answers.message().await? {
        bytes += answer.data.len() as u64;
        if began.elapsed() > TIME {
            break;
        }
    }
    Ok(rate(bytes, began.elapsed()))
}

fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-6)
}
