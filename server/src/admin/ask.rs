//! The other end: brings a command to whoever holds the store, or opens it and does the command here.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use janus_proto::error::WireError;
use tokio_util::sync::CancellationToken;

use super::{
    Admin, AdminError, Answer, Command, Person, Task, socket,
    wire::{self, MAX_TOLD_BYTES, Told},
};
use crate::{
    audit::Audit,
    chain::store::{Store, StoreError, relocate::MoveError},
    config::Settings,
    policy::file::PolicyError,
    runs::{Limits, Runs},
};

/// A server that starts holds the lock before it has a socket; so does another command while no server runs.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(50);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Files of a store must stay readable for its server.
    #[error("{} belongs to user id {owner}, this command runs as {own}: run it as that user while the server doesn't run", path.display())]
    OtherUser {
        /// The image path.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who we are.
        own: u32,
    },
    /// The socket can't be used.
    #[error("cannot ask the server at {}: {source}", path.display())]
    Socket {
        /// The image path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nothing to show.
    #[error(
        "setting policy is empty: there are no groups; --file PATH shows a policy before a server uses it"
    )]
    NoPolicy,
    /// The policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A name that can't be one.
    #[error(transparent)]
    Name(#[from] WireError),
    /// The answer broke off.
    #[error("the server ended before it answered; what it did is whole: run the command again")]
    Lost,
    /// The server says why.
    #[error("{0}")]
    Failed(String),
    /// Without a server.
    #[error(transparent)]
    Here(#[from] AdminError),
    /// Without a server.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Without a server.
    #[error(transparent)]
    Move(#[from] MoveError),
}

/// Has a command done. Blocks; lines of progress go to `progress`.
///
/// # Errors
/// As [`AskError`] says.
pub fn ask(
    settings: &Settings,
    command: Command,
    progress: &dyn Fn(String),
) -> Result<Answer, AskError> {
    let began = Instant::now();
    loop {
        if let Some(stream) = connect(settings)? {
            return over_socket(stream, command, progress);
        }
        match open(settings) {
            Err(AskError::Store(StoreError::Locked { .. })) if began.elapsed() < PATIENCE => {
                thread::sleep(PAUSE);
            }
            Err(error) => return Err(error),
            Ok(admin) => {
                let cancel = CancellationToken::new();
                cancel_on_interrupt(&cancel);
                let task = Task::new(&cancel, progress).by(Person::own());
                return Ok(admin.run(command, &task)?);
            }
        }
    }
}

/// The server's socket; `None`: no server runs.
fn connect(settings: &Settings) -> Result<Option<UnixStream>, AskError> {
    let Settings { image_path, admin_socket, .. } = settings;
    let absent = |error: &io::Error| {
        matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    };
    let connected =
        socket::address(image_path).and_then(|(address, _folder)| UnixStream::connect(address));
    let connected = match connected {
        // Not everybody may go there.
        Err(error)
            if error.kind() == io::ErrorKind::PermissionDenied
                && !admin_socket.as_os_str().is_empty() =>
        {
            UnixStream::connect(admin_socket)
        }
        other => other,
    };
    match connected {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if absent(&error) => Ok(None),
        Err(source) => Err(AskError::Socket { path: image_path.to_owned(), source }),
    }
}

fn over_socket(
    mut stream: UnixStream,
    command: Command,
    progress: &dyn Fn(String),
) -> Result<Answer, AskError> {
    let line = wire::ask_line(command).map_err(|_| AskError::Lost)?;
    stream.write_all(&line).map_err(|_| AskError::Lost)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(MAX_TOLD_BYTES).read_until(b'\n', &mut line);
        if read.is_err() || line.last() != Some(&b'\n') {
            return Err(AskError::Lost);
        }
        match serde_json::from_slice(&line).map_err(|_| AskError::Lost)? {
            Told::Progress(line) => progress(line),
            Told::Done(answer) => return Ok(answer),
            Told::Failed(reason) => return Err(AskError::Failed(reason)),
        }
    }
}

/// Looks whether files that this command makes will be the server's too. `witness` is something of the store below `path`.
pub(super) fn check_owner(path: &Path, witness: &str) -> Result<(), AskError> {
    let Ok(file) = fs::metadata(path.join(witness)) else {
        return Err(StoreError::NoStore { path: path.to_owned() }.into());
    };
    let (owner, own) = (file.uid(), rustix::process::geteuid().as_raw());
    if owner != own {
        return Err(AskError::OtherUser { path: path.to_owned(), owner, own });
    }
    Ok(())
}

/// The first Ctrl-C or SIGTERM stops a command where it leaves nothing half, the second one at once. Where signals can't be
/// had, the first one does that, and what is left is as after a kill.
fn cancel_on_interrupt(cancel: &CancellationToken) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    let cancel = cancel.clone();
    // It ends with the process, which has nothing to do after the command.
    thread::spawn(move || {
        let watch = async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            for code in [None, Some(130)] {
                tokio::select! {
                    biased;
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                cancel.cancel();
                if let Some(code) = code {
                    std::process::exit(code);
                }
            }
            io::Result::Ok(())
        };
        if let Err(error) = runtime.block_on(watch) {
            tracing::warn!(%error, "signals can't be heard");
        }
    });
}

/// Opens the store as a server would, and takes its lock.
fn open(settings: &Settings) -> Result<Admin, AskError> {
    let path = &settings.image_path;
    check_owner(path, ".store.json")?;
    let (store, machines) = Store::open(path, settings.separate_folders_by_user)?;
    let lease = Duration::from_secs(settings.lease_seconds);
    let runs = Runs::new(store, machines, lease)
        .with_new_chains(settings.new_chains())
        .with_limits(Limits::of(settings));
    let audit = Audit::new(runs.store().storage().clone(), &settings.audit_folder());
    let runs = runs.with_audit(audit).locking(settings.retention.lock_days);
    Ok(Admin::new(Arc::new(runs), settings.clone()))
}
