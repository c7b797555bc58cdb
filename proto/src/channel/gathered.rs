//! A connection whose small writes wait until the tasks that are ready have run: what those have to send goes along.
//!
//! HTTP/2 writes a call's headers as soon as it has them, its message a task later, and of many calls each by itself. Every one of
//! these was a TLS record, a call of the system and a wake of the peer: half of what a small call costs a router.

use std::task::{Context, Poll};

use super::{Observed, Observer};

/// Writes of so many bytes are worth their cost alone: a TLS record.
const LARGE_BYTES: usize = 16 << 10;

/// A connection that gathers small writes.
pub type Gathered<S> = Observed<S, Gathering>;

/// Lets the tasks that are ready run before a small write, once.
#[derive(Debug, Default)]
pub struct Gathering {
    /// The others had their turn since the last write.
    has_waited: bool,
}

/// Gathers what is written to `stream`.
pub fn gathered<S>(stream: S) -> Gathered<S> {
    Observed::new(stream, Gathering::default())
}

impl Observer for Gathering {
    fn before_write(&mut self, bytes: usize, cx: &mut Context<'_>) -> Poll<()> {
        if self.has_waited || bytes >= LARGE_BYTES {
            return Poll::Ready(());
        }
        self.has_waited = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn wrote(&mut self) {
        self.has_waited = false;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use http_body_util::{BodyExt as _, Full};
    use hyper::{
        Request, Response,
        body::{Bytes, Incoming},
        client::conn::http2 as client,
        server::conn::http2 as server,
    };
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::io::{AsyncWrite as _, duplex};

    use super::*;

    const CALLS: usize = 8;

    struct Counting(Arc<AtomicUsize>);

    impl Observer for Counting {
        fn wrote(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
        Ok(Response::new(Full::new(request.into_body().collect().await?.to_bytes())))
    }

    /// How often a client writes for some calls at once, each with a body of `bytes`.
    async fn writes(bytes: usize) -> usize {
        let (near, far) = duplex(1 << 20);
        let counter = Arc::<AtomicUsize>::default();
        let serving = server::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(far), hyper::service::service_fn(echo));
        tokio::spawn(serving);
        let near = gathered(Observed::new(near, Counting(Arc::clone(&counter))));
        let client = client::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(near));
        let (sender, connection) = client.await.unwrap();
        tokio::spawn(connection);
        let call = |mut sender: client::SendRequest<Full<Bytes>>| async move {
            let body = Full::new(Bytes::from(vec![7; bytes]));
            let answer = sender.send_request(Request::post("http://x/").body(body).unwrap());
            let answer = answer.await.unwrap().into_body().collect().await.unwrap().to_bytes();
            assert!(answer.len() == bytes && answer.iter().all(|byte| *byte == 7));
        };
        call(sender.clone()).await;
        counter.store(0, Ordering::Relaxed);
        let calls: Vec<_> = (0..CALLS).map(|_| tokio::spawn(call(sender.clone()))).collect();
        for call in calls {
            call.await.unwrap();
        }
        counter.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn calls_that_are_ready_together_are_written_together() {
        let small = writes(64).await;
        assert!(small <= 3, "{CALLS} calls took {small} writes");
        writes(100_000).await;
    }

    #[tokio::test]
    async fn only_small_writes_wait_and_once() {
        let (near, _far) = duplex(1 << 20);
        let mut stream = gathered(near);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut write = |bytes: usize| Pin::new(&mut stream).poll_write(&mut cx, &vec![1; bytes]);
        assert!(write(LARGE_BYTES).is_ready());
        for _ in 0..2 {
            assert!(write(10).is_pending());
            assert!(write(10).is_ready());
        }
    }
}
