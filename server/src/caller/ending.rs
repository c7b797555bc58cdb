//! An answer that ends when its caller's certificate is revoked, or has fewer rights. A peer's own connection ends at a revocation;
//! that of a janus, which speaks for many, goes on.

use std::{
    future::{Future, pending},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as _, Frame, SizeHint};
use janus_proto::error::{ErrorReason, status};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

/// What ends a call before its time.
#[derive(Debug, Clone, Default)]
pub(super) struct Ends {
    /// The caller's certificate is revoked.
    pub revoked: Option<CancellationToken>,
    /// A right of the caller, who acts for others, is taken away.
    pub lessened: Option<CancellationToken>,
}

impl Ends {
    pub fn are_never(&self) -> bool {
        self.revoked.is_none() && self.lessened.is_none()
    }

    /// Waits for one of them: what the caller is told.
    pub async fn reached(self) -> Status {
        let of = |token: Option<CancellationToken>| async move {
            match token {
                Some(token) => token.cancelled().await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = of(self.revoked) => {
                status(ErrorReason::IdentityMissing, "the certificate of this call was revoked")
            }
            () = of(self.lessened) => {
                status(ErrorReason::NotAllowed, "a right of this caller was taken away")
            }
        }
    }
}

struct Ending {
    /// `None`: over.
    body: Option<Body>,
    end: Pin<Box<dyn Future<Output = Status> + Send>>,
}

/// The same answer, until one of `ends`.
pub(super) fn ending(response: Response<Body>, ends: Ends) -> Response<Body> {
    response.map(|body| match body.is_end_stream() {
        true => body,
        false => Body::new(Ending { body: Some(body), end: Box::pin(ends.reached()) }),
    })
}

impl http_body::Body for Ending {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.body.is_some()
            && let Poll::Ready(why) = self.end.as_mut().poll(cx)
        {
            // With the body goes the work behind it.
            self.body = None;
            let mut trailers = HeaderMap::new();
            why.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
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
