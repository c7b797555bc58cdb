//! The backup server: owns images and chains.
//!
//! Blocks come in through [`backup`], are kept by [`session`] until [`runs`] commits them into [`chain`]s of
//! [`image`]s, and go out through [`restore`]. [`serve`] wires it all.

pub mod admin;
pub mod archive;
pub mod audit;
pub mod backup;
pub mod bounds;
pub mod caller;
pub mod carry;
pub mod catalog;
pub mod chain;
pub mod config;
pub mod enroll;
pub mod fetching;
pub mod fill;
pub mod fuzz;
pub mod guard;
pub mod info;
pub mod mirror;
mod pace;
mod peer;
pub mod pki;
pub mod policy;
pub mod probe;
pub mod prove;
pub mod replicate;
pub mod report;
pub mod restore;
pub mod retention;
pub mod revoked;
pub mod rights;
pub mod runs;
pub mod seed;
pub mod serve;
pub mod session;
pub mod space;
pub mod status;
pub mod tables;
pub mod verify;

pub use janus_proto::{image, storage};

use janus_proto::error::{ErrorReason, status};
use tracing::Instrument;

/// Runs work that blocks on a thread meant for it. A runtime with a single thread has no others to keep waiting: there
/// it runs in place, so that a whole-system simulation has one order of events.
///
/// # Errors
/// `STORE_FAILED` when it panicked, which is a bug.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tonic::Status> {
    if is_single_threaded() {
        return Ok(work());
    }
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.map_err(|error| {
        tracing::error!(%error, "a task failed");
        status(ErrorReason::StoreFailed, "the server failed inside; its log says more")
    })
}

/// Runs long work of low priority on a thread of its own: CPU goes to whoever serves first, and so does the disk where its scheduler
/// knows priorities, since a thread without one of its own has that of its CPU (ioprio_set(2)). Ends with the work, also when it
/// panicked, which is a bug and logged. On a runtime with a single thread see [`blocking`].
pub(crate) async fn background(work: impl FnOnce() + Send + 'static) {
    if is_single_threaded() {
        return work();
    }
    let (done, ended) = tokio::sync::oneshot::channel::<()>();
    let span = tracing::Span::current();
    let spawned = std::thread::Builder::new().name("background".into()).spawn(move || {
        // Of this thread alone, on Linux. What can't be had is no reason not to work.
        let _ = rustix::process::nice(10);
        span.in_scope(work);
        let _ = done.send(());
    });
    if spawned.is_err() || ended.await.is_err() {
        tracing::error!("work in the background failed");
    }
}

fn is_single_threaded() -> bool {
    let flavor = tokio::runtime::Handle::current().runtime_flavor();
    flavor == tokio::runtime::RuntimeFlavor::CurrentThread
}

/// Runs a task that awaits between pieces of work that block: see [`blocking`].
pub(crate) fn spawn_work<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    if is_single_threaded() {
        return tokio::spawn(work);
    }
    let runtime = tokio::runtime::Handle::current();
    let work = work.in_current_span();
    tokio::task::spawn_blocking(move || runtime.block_on(work))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::background;

    #[tokio::test(flavor = "multi_thread")]
    async fn work_in_the_background_has_low_priority_and_all_else_keeps_its_own() {
        // Of the thread that asks, on Linux.
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let (before, (told, heard)) = (nice(), mpsc::channel());
        background(move || told.send(nice()).unwrap()).await;
        assert_eq!(heard.recv().unwrap(), (before + 10).min(19));
        assert_eq!(nice(), before);
    }
}
