//! Places of bulk streams: how many uploads and downloads go on at once, in all and of one caller.
//!
//! A stream over the limit is refused at once, with a time to come back. It can't wait its turn here: its caller would
//! already send into the stream's window, and the sum of these windows is what the limit bounds. So janus holds at most
//! `max_bulk_streams` × [`STREAM_WINDOW_BYTES`](crate::channel::STREAM_WINDOW_BYTES) of bulk data, whatever
//! servers and callers do. Of a server each such stream has a thread, which are to be left for all others, too.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use crate::{
    error::{ErrorReason, status},
    shares::{Share, Shares},
    tls::Principal,
};

/// All places.
#[derive(Debug)]
pub struct Places {
    here: &'static str,
    limit: usize,
    free: Arc<Semaphore>,
    shares: Shares,
}

/// One bulk stream's place, held until both of its bodies are gone.
#[derive(Debug, Clone)]
pub struct Place {
    _held: Arc<(OwnedSemaphorePermit, Share)>,
}

impl Places {
    /// Room for `limit` streams, `each` of one caller; `here` is who has them.
    pub fn new(here: &'static str, limit: usize, each: usize) -> Self {
        Self { here, limit, free: Arc::new(Semaphore::new(limit)), shares: Shares::new(each) }
    }

    /// A place for a stream of `caller`.
    ///
    /// # Errors
    /// `TOO_MANY` when there is none.
    pub fn take(&self, caller: &Principal) -> Result<Place, Status> {
        let full = || {
            let message = format!("this {} carries {} bulk streams already", self.here, self.limit);
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
