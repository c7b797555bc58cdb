//! Requests that come in time: whoever begins a message ends it, and begins the next one, before a limit. Without it a caller
//! that sends a byte now and then keeps a call, its place and what it holds for ever; HTTP/2's pings only show that the peer lives.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body};

/// Whether a message is packed, and its length.
const PREFIX_BYTES: usize = 5;
/// So long after the time nobody looks who was waiting.
const UNASKED: Duration = Duration::from_secs(1);

/// Where in the messages of a request the next byte belongs.
#[derive(Debug, Default)]
struct Messages {
    /// Bytes of the message that are still to come.
    rest: usize,
    prefix: [u8; PREFIX_BYTES],
    have: usize,
}

impl Messages {
    /// Takes a piece of the request: whether a message ended in it.
    fn take(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        loop {
            let taken = self.rest.min(bytes.len());
            self.rest -= taken;
            bytes = &bytes[taken..];
            if self.rest == 0 && self.have == PREFIX_BYTES {
                (ended, self.have) = (true, 0);
            }
            if bytes.is_empty() {
                return ended;
            }
            let taken = (PREFIX_BYTES - self.have).min(bytes.len());
            self.prefix[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == PREFIX_BYTES {
                let [_, len @ ..] = self.prefix;
                self.rest = u32::from_be_bytes(len) as usize;
            }
        }
    }
}

fn too_late(limit: Duration) -> Status {
    let seconds = limit.as_secs();
    Status::deadline_exceeded(format!("no whole message came within {seconds} s (stall_seconds)"))
}

pin_project! {
    /// A request's body that fails with DEADLINE_EXCEEDED when a message doesn't come in time.
    pub struct Punctual {
        #[pin]
        body: Body,
        limit: Duration,
        messages: Messages,
        #[pin]
        late: Option<Sleep>,
        is_over: bool,
    }
}

impl Punctual {
    /// `body`, each of whose messages must have come within `limit` of the one before.
    pub fn new(body: Body, limit: Duration) -> Self {
        Self { body, limit, messages: Messages::default(), late: None, is_over: false }
    }
}

impl http_body::Body for Punctual {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut this = self.project();
        if *this.is_over {
            return Poll::Ready(None);
        }
        let Poll::Ready(frame) = this.body.poll_frame(cx) else {
            if this.late.is_none() {
                this.late.set(Some(sleep(*this.limit)));
            }
            if this.late.as_pin_mut().is_none_or(|late| late.poll(cx).is_pending()) {
                return Poll::Pending;
            }
            *this.is_over = true;
            return Poll::Ready(Some(Err(too_late(*this.limit))));
        };
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            let ended = this.messages.take(data);
            let late = this.late.as_ref().as_pin_ref().filter(|late| late.is_elapsed());
            // Whoever waits for the message is woken when its time is over. Who looks later than that didn't wait: it was us who didn't
            // ask. A drop that comes just then is no excuse.
            let was_asked = late.is_none_or(|late| late.deadline().elapsed() < UNASKED);
            if ended || !was_asked {
                this.late.set(None);
            } else if late.is_some() {
                *this.is_over = true;
                return Poll::Ready(Some(Err(too_late(*this.limit))));
            }
        }
        Poll::Ready(frame)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body_util::{BodyExt, StreamBody};
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn message(len: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((len as u32).to_be_bytes());
        bytes.resize(PREFIX_BYTES + len, 7);
        bytes
    }

    /// The pieces, each after a pause; then nothing more, for ever.
    fn body(pieces: Vec<(Duration, Vec<u8>)>) -> Pin<Box<Punctual>> {
        let frames = stream::unfold(pieces.into_iter(), async |mut pieces| {
            let Some((pause, piece)) = pieces.next() else { return std::future::pending().await };
            sleep(pause).await;
            Some((Ok::<_, Status>(Frame::data(Bytes::from(piece))), pieces))
        });
        Box::pin(Punctual::new(Body::new(StreamBody::new(frames)), LIMIT))
    }

    /// Seconds until it failed, and the bytes before.
    async fn read(mut body: Pin<Box<Punctual>>) -> (u64, usize) {
        let (begun, mut bytes) = (Instant::now(), 0);
        loop {
            match body.frame().await.unwrap() {
                Ok(frame) => bytes += frame.data_ref().unwrap().len(),
                Err(status) => {
                    assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
                    assert!(body.frame().await.is_none());
                    return (begun.elapsed().as_secs(), bytes);
                }
            }
        }
    }

    #[test]
    fn messages_are_told_apart_however_they_are_cut() {
        let sent = [message(0), message(1), message(1000), message(0)].concat();
        for piece in [1, 2, 5, 6, 7, 100, sent.len()] {
            let mut messages = Messages::default();
            let ends: Vec<usize> = sent
                .chunks(piece)
                .enumerate()
                .filter_map(|(n, bytes)| messages.take(bytes).then_some(n))
                .collect();
            let mut expected: Vec<usize> = [5, 11, 1016, 1021].map(|end| (end - 1) / piece).into();
            expected.dedup();
            assert_eq!(ends, expected, "pieces of {piece}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slow_messages_pass_and_drops_do_not() {
        let second = Duration::from_secs(1);
        let whole = (0..20).map(|_| (9 * second, message(3))).collect();
        assert_eq!(read(body(whole)).await, (190, 160));
        let drops = message(1000).into_iter().map(|byte| (second, vec![byte])).collect();
        let (seconds, bytes) = read(body(drops)).await;
        // From the first drop on, which isn't waited for without a clock.
        assert!(
            (10..=11).contains(&seconds) && bytes < 12,
            "a byte each second: {seconds} s, {bytes}"
        );
        assert_eq!(read(body(Vec::new())).await, (10, 0), "one that never comes");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_asked_is_not_late() {
        let sent = message(100);
        let (begin, end) = sent.split_at(50);
        let mut body =
            body(vec![(Duration::from_secs(1), begin.to_vec()), (Duration::ZERO, end.to_vec())]);
        body.frame().await.unwrap().unwrap();
        sleep(LIMIT * 3).await;
        body.frame().await.unwrap().unwrap();
        assert!(body.frame().await.unwrap().is_err());
    }
}
