//! Answers that nobody takes. A caller may hold the window of a stream closed for ever, and its connection alive by answering
//! pings: the answer, the thread that makes it, and what that has open would wait with it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tracing::warn;

tokio::task_local! {
    /// The answer that goes out in this task.
    static OUTGOING: Arc<Outgoing>;
}

/// Whether a piece of an answer waits for the caller.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    waits: AtomicBool,
    pieces: AtomicU64,
}

impl Outgoing {
    /// Of the task that runs now, if it is one of a stream.
    pub fn of_task() -> Option<Arc<Self>> {
        OUTGOING.try_with(Arc::clone).ok()
    }

    /// HTTP/2 asks for the next piece, since there is room for it.
    pub fn asked(&self) {
        self.waits.store(false, Ordering::Relaxed);
    }

    /// HTTP/2 has a piece that may have to wait for room.
    pub fn given(&self) {
        self.waits.store(true, Ordering::Relaxed);
        self.pieces.fetch_add(1, Ordering::Relaxed);
    }

    fn waiting(&self) -> Option<u64> {
        self.waits.load(Ordering::Relaxed).then(|| self.pieces.load(Ordering::Relaxed))
    }
}

pin_project! {
    /// A stream's task, which ends when one piece of its answer has waited for the caller for too long.
    pub(crate) struct InTime<F> {
        #[pin]
        task: F,
        outgoing: Arc<Outgoing>,
        limit: Duration,
        piece: u64,
        #[pin]
        late: Option<Sleep>,
    }
}

/// Runs a stream's task; no piece of its answer may wait longer than `limit`.
pub(crate) fn in_time<F: Future>(
    task: F,
    limit: Duration,
) -> impl Future<Output = Option<F::Output>> {
    let outgoing = Arc::new(Outgoing::default());
    let watched = InTime { task, outgoing: outgoing.clone(), limit, piece: 0, late: None };
    OUTGOING.scope(outgoing, watched)
}

impl<F: Future> Future for InTime<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Poll::Ready(done) = this.task.poll(cx) {
            return Poll::Ready(Some(done));
        }
        // The task was polled just now: it is woken when there is room.
        let Some(piece) = this.outgoing.waiting() else {
            this.late.set(None);
            return Poll::Pending;
        };
        if this.late.is_none() || *this.piece != piece {
            *this.piece = piece;
            this.late.set(Some(sleep(*this.limit)));
        }
        if this.late.as_pin_mut().is_none_or(|late| late.poll(cx).is_pending()) {
            return Poll::Pending;
        }
        warn!(limit = ?this.limit, "an answer is given up: the caller takes nothing of it");
        Poll::Ready(None)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn only_a_piece_that_waits_ends_the_task() {
        let begun = Instant::now();
        let patient = in_time(
            async {
                let outgoing = Outgoing::of_task().unwrap();
                // Slowly made, slowly taken.
                for _ in 0..3 {
                    outgoing.asked();
                    sleep(LIMIT * 5).await;
                    outgoing.given();
                    sleep(LIMIT / 2).await;
                }
                outgoing.asked();
            },
            LIMIT,
        );
        assert_eq!(patient.await, Some(()));
        let stalled = in_time(
            async {
                Outgoing::of_task().unwrap().given();
                std::future::pending::<()>().await;
            },
            LIMIT,
        );
        let before = begun.elapsed();
        assert_eq!(stalled.await, None);
        assert_eq!((begun.elapsed() - before).as_secs(), LIMIT.as_secs());
        assert!(Outgoing::of_task().is_none());
    }
}
