//! The work: pieces that sources take as they come to it, give back when they fail, and that are given up when no source
//! is left that could bring them.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::part::Piece;

/// Pieces that wait for a source.
const WAITING: usize = 4;
/// Those that wait for a lost one: until it is given up nothing more than that is looked for.
const STUCK: usize = 32;

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<Piece>,
    hopeless: VecDeque<Piece>,
    working: usize,
    /// Sources that work, or may again, by their numbers.
    sources: u64,
    /// No more pieces come.
    is_complete: bool,
}

impl Queue {
    /// For so many sources.
    pub(super) fn new(sources: usize) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            hopeless: VecDeque::new(),
            working: 0,
            sources: (1 << sources) - 1,
            is_complete: false,
        };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Adds work as soon as there is room for it.
    pub(super) async fn add(&self, piece: Piece) {
        let mut piece = Some(piece);
        self.wait(|state| {
            if state.is_full() {
                return None;
            }
            state.put(piece.take()?);
            Some(())
        })
        .await;
    }

    /// Nothing more is added.
    pub(super) fn complete(&self) {
        self.lock().is_complete = true;
        self.changed.notify_waiters();
    }

    /// The next piece for a source; `None` when there will be none for it.
    pub(super) async fn take(&self, source: usize) -> Option<Piece> {
        self.wait(|state| {
            if !state.has(source) {
                return Some(None);
            }
            let at = state.waiting.iter().position(|piece| piece.is_for(source));
            if let Some(piece) = at.and_then(|at| state.waiting.remove(at)) {
                state.working += 1;
                return Some(Some(piece));
            }
            state.is_over().then_some(None)
        })
        .await
    }

    /// The next piece that nobody can bring; `None` when all is done.
    pub(super) async fn take_hopeless(&self) -> Option<Piece> {
        self.wait(|state| match state.hopeless.pop_front() {
            Some(piece) => {
                state.working += 1;
                Some(Some(piece))
            }
            None => state.is_over().then_some(None),
        })
        .await
    }

    /// A piece that was taken is done.
    pub(super) fn done(&self) {
        self.lock().working -= 1;
        self.changed.notify_waiters();
    }

    /// A piece that was taken isn't done yet.
    pub(super) fn give_back(&self, piece: Piece) {
        let mut state = self.lock();
        state.working -= 1;
        state.put(piece);
        drop(state);
        self.changed.notify_waiters();
    }

    /// A source brings nothing any more.
    pub(super) fn retire(&self, source: usize) {
        let mut state = self.lock();
        state.sources &= !(1 << source);
        for piece in std::mem::take(&mut state.waiting) {
            state.put(piece);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits until a source has nothing to do any more.
    pub(super) async fn ended(&self, source: usize) {
        self.wait(|state| (state.is_over() || !state.has(source)).then_some(())).await;
    }

    /// True when a source may still bring something.
    pub(super) fn is_source(&self, source: usize) -> bool {
        self.lock().has(source)
    }

    async fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Whatever happens from here on wakes it.
            changed.as_mut().enable();
            let found = ready(&mut self.lock());
            if let Some(found) = found {
                self.changed.notify_waiters();
                return found;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn has(&self, source: usize) -> bool {
        self.sources >> source & 1 == 1
    }

    fn put(&mut self, piece: Piece) {
        if !piece.has_hope(self.sources) {
            self.hopeless.push_back(piece);
        } else {
            self.waiting.push_back(piece);
        }
    }

    /// Pieces that some source has had already wait apart, so that they don't keep others from working.
    fn is_full(&self) -> bool {
        let fresh = self.waiting.iter().filter(|piece| piece.is_fresh()).count();
        fresh >= WAITING || self.waiting.len() >= STUCK || self.hopeless.len() >= WAITING
    }

    fn is_over(&self) -> bool {
        self.is_complete && self.waiting.is_empty() && self.hopeless.is_empty() && self.working == 0
    }
}

#[cfg(test)]
mod tests {
    use super::{super::part::Part, *};

    fn piece(segment: u64) -> Piece {
        Piece::new(vec![Part::zeros(1 << 40, segment)])
    }

    fn segment(piece: Option<Piece>) -> Option<u64> {
        piece.map(|piece| piece.parts[0].segment)
    }

    #[tokio::test]
    async fn what_one_source_gives_back_another_takes() {
        let queue = Queue::new(2);
        queue.add(piece(1)).await;
        queue.add(piece(2)).await;
        queue.complete();
        let mut first = queue.take(0).await.unwrap();
        first.note_tried(0);
        queue.give_back(first);
        let second = queue.take(0).await;
        assert_eq!(segment(second), Some(2));
        queue.done();
        // It waits for the other source, so this one may end only when that is done.
        let other = async {
            let rest = queue.take(1).await;
            assert_eq!(segment(rest), Some(1));
            queue.done();
        };
        let (one, ()) = tokio::join!(queue.take(0), other);
        assert!(one.is_none() && queue.take(1).await.is_none());
        assert!(queue.take_hopeless().await.is_none());
    }

    #[tokio::test]
    async fn a_piece_is_given_up_with_its_last_source() {
        let queue = Queue::new(2);
        queue.add(piece(1)).await;
        let mut taken = queue.take(1).await.unwrap();
        taken.note_tried(1);
        queue.give_back(taken);
        queue.retire(0);
        assert!(queue.is_source(1) && !queue.is_source(0));
        assert_eq!(segment(queue.take_hopeless().await), Some(1));
        queue.done();
        queue.retire(1);
        queue.add(piece(2)).await;
        assert_eq!(segment(queue.take_hopeless().await), Some(2));
        queue.done();
        queue.complete();
        assert!(queue.take_hopeless().await.is_none());
    }

    #[tokio::test]
    async fn a_source_that_was_given_up_takes_nothing_that_another_may_bring() {
        let queue = Queue::new(2);
        queue.add(piece(1)).await;
        let taken = queue.take(0).await.unwrap();
        queue.give_back(taken);
        queue.retire(0);
        assert!(queue.take(0).await.is_none());
        assert_eq!(segment(queue.take(1).await), Some(1));
    }

    #[tokio::test]
    async fn only_so_much_waits() {
        let queue = Queue::new(1);
        for segment in 0..WAITING as u64 {
            queue.add(piece(segment)).await;
        }
        let full = tokio::time::timeout(std::time::Duration::from_millis(20), queue.add(piece(99)));
        assert!(full.await.is_err());
    }
}
