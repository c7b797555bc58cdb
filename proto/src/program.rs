//! What every program does with its process: being asked to stop or to read its settings again.

use std::{
    future::Future,
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use rustix::{
    fs::Mode,
    process::{
        DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit, umask,
    },
};

use crate::{show::date, tls::Identity};

/// How often it is looked whether certificates were replaced.
const LOOK: Duration = Duration::from_secs(10);

/// Listens for SIGTERM and SIGINT from now on; the future ends at the first of them. Needs a tokio runtime.
///
/// # Errors
/// When the system refuses to tell of signals.
pub fn stop_signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Writes an answer to standard output. False when it can't be written, which standard error then says; a reader that has gone
/// is no failure.
pub fn print(text: &str) -> bool {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("the answer can't be written: {error}");
            false
        }
        _ => true,
    }
}

/// Allows this process as many open files as the system lets it: of each chain that is read, every link's files are open, and
/// systemd and shells start with 1024.
pub fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Keeps what is in this process's memory there: keys come into no core dump.
///
/// What can't be had is no reason not to work: the units of the packages ask systemd for the same.
pub fn forbid_core_dumps() {
    let limit = getrlimit(Resource::Core);
    // Of one byte, not of none: a program that takes core dumps through a pipe would get one in spite of a limit of 0.
    let most = Some(limit.maximum.map_or(1, |most| most.min(1)));
    let _ = setrlimit(Resource::Core, Rlimit { current: most, maximum: most });
}

/// The same, and other processes of the same user can't look into this one either (`ptrace`, `/proc/PID/mem`).
pub fn keep_memory_private() {
    forbid_core_dumps();
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Files that this process makes from now on are for its user alone.
pub fn keep_files_private() {
    forbid_files(Mode::RWXG | Mode::RWXO);
}

/// The same, but its group may read them: hypervisors open images, and are put into the server's group for that.
pub fn keep_files_in_group() {
    forbid_files(Mode::WGRP | Mode::RWXO);
}

fn forbid_files(more: Mode) {
    // Setting it is the only way to ask for it.
    let before = umask(more);
    umask(before | more);
}

/// Reads certificate, key and CA again, and says in the log what came of it. Blocks on the file system.
pub fn reload_identity(identity: &Identity) {
    match identity.reload() {
        Ok(()) => tell_read(identity),
        Err(error) => tracing::error!(%error, "the old certificates stay in use"),
    }
}

fn tell_read(identity: &Identity) {
    let until = date(identity.expires().saturating_mul(1000));
    tracing::info!(until, "certificate, key and CA were read again");
}

/// Reads certificate, key and CA again whenever one of the files has changed, as an agent that renews them does, until `shutdown`.
pub async fn follow_files(identity: Identity, shutdown: CancellationToken) {
    let (mut last, mut is_told) = (String::new(), false);
    while shutdown.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let reading = identity.clone();
        let read = tokio::task::spawn_blocking(move || reading.reload_if_changed()).await;
        match read {
            Ok(Ok(true)) => tell_read(&identity),
            Ok(Ok(false)) => {}
            // The files are written one after the other: what is wrong is wrong when it still is at the next look.
            Ok(Err(error)) if last != error.to_string() => {
                (last, is_told) = (error.to_string(), false);
                continue;
            }
            Ok(Err(error)) if !is_told => {
                tracing::error!(%error, "the old certificates stay in use");
                is_told = true;
                continue;
            }
            Ok(Err(_)) => continue,
            Err(error) => tracing::error!(%error, "certificates can't be read again"),
        }
        last.clear();
    }
}

/// Follows the signals of a program that serves: `shutdown` is cancelled at SIGTERM or SIGINT, and `reload` runs at each
/// SIGHUP on a thread that may block. The task is to be aborted when the program has ended. Needs a tokio runtime.
///
/// # Errors
/// When the system refuses to tell of signals.
pub fn follow_signals(
    shutdown: CancellationToken,
    reload: impl Fn() + Send + Sync + 'static,
) -> io::Result<JoinHandle<()>> {
    let stop = stop_signal()?;
    let reloads = hangups(reload)?;
    let stopping = async move {
        stop.await;
        tracing::info!("stopping: calls in progress may end");
        shutdown.cancel();
    };
    Ok(tokio::spawn(async move {
        tokio::join!(stopping, reloads);
    }))
}

/// Follows SIGHUP alone, as [`follow_signals`] does.
///
/// # Errors
/// When the system refuses to tell of signals.
pub fn follow_hangups(reload: impl Fn() + Send + Sync + 'static) -> io::Result<JoinHandle<()>> {
    Ok(tokio::spawn(hangups(reload)?))
}

fn hangups(
    reload: impl Fn() + Send + Sync + 'static,
) -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut hangup = signal(SignalKind::hangup())?;
    let reload = Arc::new(reload);
    Ok(async move {
        while hangup.recv().await.is_some() {
            let reload = reload.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || reload()).await {
                tracing::error!(%error, "what was changed is not in use");
            }
        }
    })
}
