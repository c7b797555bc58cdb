//! An answer that ends when its caller's certificate is revoked. A peer's own connection ends then; that of a janus, which speaks
//! for many, goes on.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body as _, Frame, SizeHint};
use janus_proto::error::{ErrorReason, status};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, body::Body};

/// What the caller is told.
pub(super) fn revoked() -> Status {
    status(ErrorReason::IdentityMissing, "the certificate of this call was revoked")
}

struct Ending {
    /// `None`: over.
    body: Option<Body>,
    end: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// The same answer, until `end`.
pub(super) fn ending(response: Response<Body>, end: CancellationToken) -> Response<Body> {
    response.map(|body| match body.is_end_stream() {
        true => body,
        false => Body::new(Ending { body: Some(body), end: Box::pin(end.cancelled_owned()) }),
    })
}

impl http_body::Body for Ending {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.body.is_some() && self.end.as_mut().poll(cx).is_ready() {
            // With the body goes the work behind it.
            self.body = None;
            return Poll::Ready(Some(Err(revoked())));
        }
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}
