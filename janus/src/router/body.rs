//! Bodies on their way through: counted, never decoded, never copied.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use janus_proto::{
    error::{ErrorReason, status},
    places::Place,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body};

use super::broken;
use crate::{
    registry::{Meter, RunCall},
    traffic::Stopwatch,
    upstream::Counters,
};

/// Largest request that is kept for another attempt: the largest message of the contract, with its gRPC prefix.
const MAX_KEPT_BYTES: usize = (2 << 20) + 5;
/// All kept requests together.
const KEPT_BUDGET_BYTES: usize = 16 << 20;
/// A caller that has begun a small request must get it done in this time.
const KEEP_DEADLINE: Duration = Duration::from_secs(30);

/// Memory for requests that are kept.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Budget {
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(KEPT_BUDGET_BYTES)))
    }

    /// Reads a whole request. The permit is its share of the budget.
    pub async fn keep(&self, body: Body) -> Result<(Bytes, OwnedSemaphorePermit), Status> {
        let late = |_| {
            Status::deadline_exceeded(format!(
                "no whole request within {} s",
                KEEP_DEADLINE.as_secs()
            ))
        };
        timeout(KEEP_DEADLINE, self.read(body)).await.map_err(late)?
    }

    async fn read(&self, mut body: Body) -> Result<(Bytes, OwnedSemaphorePermit), Status> {
        let mut permit = self.share(0)?;
        let mut kept = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            if kept.len() + data.len() > MAX_KEPT_BYTES {
                return Err(status(ErrorReason::InvalidField, "message is larger than 2 MiB"));
            }
            permit.merge(self.share(data.len())?);
            kept.extend_from_slice(&data);
        }
        Ok((kept.freeze(), permit))
    }

    // Waiting here could wait for itself: many requests that each hold a part of the budget. So: all or nothing.
    fn share(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Status> {
        let full =
            |_| status(ErrorReason::TooMany, "this janus handles too many large requests at once");
        self.0
            .clone()
            .try_acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX))
            .map_err(full)
    }
}

/// A request's body on its way to a server.
pub(crate) struct Upload {
    pub body: Body,
    pub counters: Arc<Counters>,
    pub _place: Option<Place>,
    pub meter: Option<Arc<Meter>>,
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            self.counters.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
            if let Some(meter) = &self.meter {
                meter.sent(bytes);
            }
        }
        Poll::Ready(frame)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// An answer's body on its way to the caller. When the server is lost in the middle, the caller gets a status that says
/// so instead of a bare reset.
pub(crate) struct Download {
    pub body: Incoming,
    pub counters: Arc<Counters>,
    /// Name of the server, for the status.
    pub server: String,
    pub is_over: bool,
    pub stopwatch: Stopwatch,
    /// The call's run counts as running for as long.
    pub run: Option<RunCall>,
    pub _place: Option<Place>,
}

impl http_body::Body for Download {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                self.is_over = true;
                trailers(&broken(&self.server, &error))
            }
            None => {
                self.stopwatch.end();
                return Poll::Ready(None);
            }
        };
        match frame.data_ref() {
            Some(data) => {
                self.counters.bytes_received.fetch_add(data.len() as u64, Ordering::Relaxed);
                if let Some(run) = &self.run {
                    run.meter().received(data.len());
                }
                self.stopwatch.data();
            }
            None => {
                frame.trailers_ref().inspect(|trailers| self.counters.errors.note(trailers));
                self.stopwatch.end();
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn size_hint(&self) -> SizeHint {
        // Not the body's own: it may end earlier, with a status.
        SizeHint::default()
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }
}

/// A local stream that would go on for ever, ended by the drain.
pub(crate) struct UntilDrain {
    pub body: Body,
    pub drain: Pin<Box<WaitForCancellationFutureOwned>>,
    pub is_over: bool,
}

impl http_body::Body for UntilDrain {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        // The stream first: what it still has to say, such as NOT_SERVING, goes out.
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        ready!(self.drain.as_mut().poll(cx));
        self.is_over = true;
        Poll::Ready(Some(Ok(trailers(&status(
            ErrorReason::Draining,
            "this janus is shutting down",
        )))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }
}

fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        trailers.insert("grpc-status", http::HeaderValue::from_static("14"));
    }
    Frame::trailers(trailers)
}
