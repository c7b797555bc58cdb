//! A connection that is kept to the limits.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::{Bucket, Grant};
use crate::channel::Stream;

/// One way: what may go, and what is waited for.
struct Way {
    bucket: Arc<Bucket>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Way {
    /// How many bytes may go of those wanted; `None`: as many as one likes.
    fn poll_grant(&mut self, wanted: usize, context: &mut Context<'_>) -> Poll<Option<usize>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            match self.bucket.grant(wanted) {
                Grant::All => return Poll::Ready(None),
                Grant::Bytes(bytes) => return Poll::Ready(Some(bytes)),
                Grant::Wait(time) => self.pause = Some(Box::pin(sleep(time))),
            }
        }
    }
}

/// A connection that is kept to the limits, each way for itself.
pub(super) struct Limited {
    stream: Stream,
    sending: Way,
    receiving: Way,
}

impl Limited {
    pub(super) fn new(stream: Stream, sending: Arc<Bucket>, receiving: Arc<Bucket>) -> Self {
        let way = |bucket| Way { bucket, pause: None };
        Self { stream, sending: way(sending), receiving: way(receiving) }
    }
}

impl AsyncRead for Limited {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let Some(bytes) = ready!(this.receiving.poll_grant(buffer.remaining(), context)) else {
            return Pin::new(&mut this.stream).poll_read(context, buffer);
        };
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(bytes));
        ready!(Pin::new(&mut this.stream).poll_read(context, &mut part))?;
        let count = part.filled().len();
        buffer.advance(count);
        this.receiving.bucket.used(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Limited {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Some(bytes) = ready!(this.sending.poll_grant(data.len(), context)) else {
            return Pin::new(&mut this.stream).poll_write(context, data);
        };
        let part = &data[..bytes.min(data.len())];
        let count = ready!(Pin::new(&mut this.stream).poll_write(context, part))?;
        this.sending.bucket.used(count);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wanted = parts.iter().map(|part| part.len()).sum();
        match ready!(self.sending.poll_grant(wanted, context)) {
            None => Pin::new(&mut self.stream).poll_write_vectored(context, parts),
            Some(_) => {
                let first = parts.iter().find(|part| !part.is_empty());
                self.poll_write(context, first.map_or(&[], |part| part))
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
