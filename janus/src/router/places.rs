//! Places of bulk streams: how many uploads and downloads pass through at once, in all and of one caller.
//!
//! A stream over the limit is refused at once, with a time to come back. It can't wait its turn here: its caller would
//! already send into the stream's window, and the sum of these windows is what the limit bounds. So janus holds at most
//! `max_bulk_streams` × [`STREAM_WINDOW_BYTES`](janus_proto::channel::STREAM_WINDOW_BYTES) of bulk data, whatever
//! servers and callers do.

use std::sync::Arc;

use janus_proto::{
    error::{ErrorReason, status},
    shares::{Share, Shares},
    tls::Principal,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// All places.
#[derive(Debug)]
pub(crate) struct Places {
    limit: usize,
    free: Arc<Semaphore>,
    shares: Shares,
}

/// One bulk stream's place, held until both of its bodies are gone.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    _held: Arc<(OwnedSemaphorePermit, Share)>,
}

impl Places {
    /// Room for `limit` streams, `each` of one caller.
    pub fn new(limit: usize, each: usize) -> Self {
        Self { limit, free: Arc::new(Semaphore::new(limit)), shares: Shares::new(each) }
    }

    /// A place for a stream of `caller`.
    pub fn take(&self, caller: &Principal) -> Result<Place, Status> {
        let full = || {
            let message = format!("this janus carries {} bulk streams already", self.limit);
            status(ErrorReason::TooMany, message)
        };
        let own_full = || {
            let (each, name) = (self.shares.each(), caller.to_string());
            status(ErrorReason::TooMany, format!("{name} has {each} bulk streams here already"))
        };
        let share = self.shares.take(&caller.to_string().into()).ok_or_else(own_full)?;
        let permit = self.free.clone().try_acquire_owned().map_err(|_| full())?;
        Ok(Place { _held: Arc::new((permit, share)) })
    }
}
