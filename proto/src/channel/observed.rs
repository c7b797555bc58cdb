//! A connection that somebody listens to: its reads and writes are seen, and may be held back. All else passes through.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Who listens.
pub trait Observer: Unpin {
    /// Whether there may be a read now. HTTP/2 always waits for one, so it is woken by what this waits for, too.
    fn before(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// What a read has brought; nothing at the end of the connection.
    fn heard(&mut self, _: &[u8]) {}

    /// Whether there may be a write of so many bytes now.
    fn before_write(&mut self, _: usize, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    /// There was a write.
    fn wrote(&mut self) {}
}

/// A connection, observed.
#[derive(Debug)]
pub struct Observed<S, O> {
    stream: S,
    observer: O,
}

impl<S, O> Observed<S, O> {
    /// Lets `observer` listen to `stream`.
    pub fn new(stream: S, observer: O) -> Self {
        Self { stream, observer }
    }
}

impl<S: AsyncRead + Unpin, O: Observer> AsyncRead for Observed<S, O> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.observer.before(cx))?;
        let before = buf.filled().len();
        let done = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        self.observer.heard(buf.filled().get(before..).unwrap_or_default());
        Poll::Ready(done)
    }
}

// Vectored writes are passed on: without them HTTP/2 copies every frame.
impl<S: AsyncWrite + Unpin, O: Observer> AsyncWrite for Observed<S, O> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.observer.before_write(bytes.len(), cx));
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        self.observer.wrote();
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.observer.before_write(slices.iter().map(|slice| slice.len()).sum(), cx));
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices));
        self.observer.wrote();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
