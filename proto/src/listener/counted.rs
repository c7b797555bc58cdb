//! An answer that counts as its caller's open call until its body is over.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::Status;

use super::stalls::Outgoing;
use crate::shares::Share;

pin_project! {
    /// A body with its caller's share; without a body: a refusal.
    pub(super) struct Counted<B> {
        #[pin]
        body: Option<B>,
        share: Option<Share>,
        outgoing: Option<Arc<Outgoing>>,
    }
}

impl<B> Counted<B> {
    /// The service's answer; `outgoing` is told of each of its pieces.
    pub fn answer(
        response: Response<B>,
        share: Option<Share>,
        outgoing: Option<Arc<Outgoing>>,
    ) -> Response<Self> {
        response.map(|body| Self { body: Some(body), share, outgoing })
    }

    /// An answer that consists of a status.
    pub fn refusal(status: Status) -> Response<Self> {
        status.into_http::<()>().map(|()| Self { body: None, share: None, outgoing: None })
    }
}

impl<B: Body<Data = Bytes>> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        let Some(body) = this.body.as_pin_mut() else { return Poll::Ready(None) };
        let outgoing = this.outgoing.as_deref();
        outgoing.inspect(|outgoing| outgoing.asked());
        let polled = body.poll_frame(cx);
        if matches!(&polled, Poll::Ready(Some(Ok(frame))) if frame.is_data()) {
            outgoing.inspect(|outgoing| outgoing.given());
        }
        polled
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }
}
