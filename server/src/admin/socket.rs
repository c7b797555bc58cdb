//! The admin socket of a running server: `<image_path>/.admin.sock`, for this system's root and for the server's own user; and by
//! setting `admin_socket` another one, for accounts whose groups administer machines.
//!
//! Made while the store's lock is held, so what is left of an earlier process can be replaced; removed at the end. A
//! caller that goes away stops its command.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedReadHalf},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Admin, Person, Task, delegated,
    wire::{self, MAX_ASK_BYTES, Told},
};
use crate::storage::Disk;

/// Its name in the image path.
pub const NAME: &str = ".admin.sock";
/// Commands at once; more wait.
const MAX_CALLERS: usize = 8;
/// A caller sends its request at once.
const ASK_TIME: Duration = Duration::from_secs(10);
/// A caller that doesn't read for so long is gone.
const TELL_TIME: Duration = Duration::from_secs(60);
/// Lines of progress on their way.
const QUEUE: usize = 16;
/// Length of a socket's address, with its ending zero.
const MAX_ADDRESS_BYTES: usize = 108;

/// An address that reaches the socket, with the folder it may go through: addresses are shorter than paths may be.
pub(super) fn address(image_path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    let path = image_path.join(NAME);
    if path.as_os_str().len() < MAX_ADDRESS_BYTES {
        return Ok((path, None));
    }
    let folder = File::open(image_path)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{NAME}", folder.as_raw_fd()));
    Ok((path, Some(folder)))
}

/// A socket that listens, and is removed when dropped.
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Others than root and the server's user may ask here for what is delegated to them.
    is_for_accounts: bool,
}

impl AdminSocket {
    /// Makes the socket of a store whose lock is held. Needs a tokio runtime.
    ///
    /// # Errors
    /// As the file system says.
    pub fn bind(image_path: &Path) -> io::Result<Self> {
        let path = image_path.join(NAME);
        Disk::default().remove(&path)?;
        let (address, _folder) = address(image_path)?;
        let listener = UnixListener::bind(address)?;
        // Until here others may have connected: `is_allowed` looks at who they are.
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self { listener, path, is_for_accounts: false })
    }

    /// Makes the socket for accounts whose groups administer machines, at this path. Needs a tokio runtime.
    ///
    /// # Errors
    /// As the file system says.
    pub fn bind_for_accounts(path: &Path) -> io::Result<Self> {
        Disk::default().remove(path)?;
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o666))?;
        Ok(Self { listener, path: path.to_owned(), is_for_accounts: true })
    }

    /// Answers until `shutdown`; then commands are stopped and waited for.
    pub async fn serve(self, admin: Arc<Admin>, shutdown: CancellationToken) {
        let mut callers = JoinSet::new();
        loop {
            while callers.len() >= MAX_CALLERS {
                let _ = callers.join_next().await;
            }
            let Some(accepted) = shutdown.run_until_cancelled(self.listener.accept()).await else {
                break;
            };
            match accepted {
                Ok((stream, _)) if self.is_for_accounts || is_trusted(&stream) => {
                    callers.spawn(serve_one(stream, admin.clone(), shutdown.child_token()));
                }
                Ok(_) => tracing::warn!("another user's connection to the admin socket is closed"),
                Err(error) => {
                    tracing::warn!(%error, "the admin socket can't accept");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
            while callers.try_join_next().is_some() {}
        }
        while callers.join_next().await.is_some() {}
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let _ = Disk::default().remove(&self.path);
    }
}

/// Root, or the user that this process runs as.
fn is_trusted(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

/// Who asks.
struct Peer {
    uid: u32,
    pid: Option<i32>,
    /// Root, or the server's own user.
    is_trusted: bool,
}

async fn serve_one(stream: UnixStream, admin: Arc<Admin>, cancel: CancellationToken) {
    let Ok(peer) = stream.peer_cred() else { return };
    let peer = Peer { uid: peer.uid(), pid: peer.pid(), is_trusted: is_trusted(&stream) };
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    let mut line = Vec::new();
    let mut short = (&mut reader).take(MAX_ASK_BYTES);
    let asked = short.read_until(b'\n', &mut line);
    if !matches!(timeout(ASK_TIME, asked).await, Ok(Ok(1..))) {
        return;
    }
    let (told, mut lines) = mpsc::channel(QUEUE);
    let gone = cancel.clone();
    let work = work(line, peer, admin, told, cancel);
    let tell = async {
        while let Some(told) = lines.recv().await {
            let Ok(line) = wire::line(&told) else { break };
            if !matches!(timeout(TELL_TIME, write.write_all(&line)).await, Ok(Ok(()))) {
                gone.cancel();
                break;
            }
        }
        // Whoever still has something to tell must not wait for a reader.
        lines.close();
    };
    let watch = async {
        wait_until_gone(reader).await;
        gone.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        _ = async { tokio::join!(work, tell) } => {}
        () = watch => {}
    }
}

/// Does what the line asks for; its last word is `Done` or `Failed`.
async fn work(
    line: Vec<u8>,
    peer: Peer,
    admin: Arc<Admin>,
    told: mpsc::Sender<Told>,
    cancel: CancellationToken,
) {
    let command = match wire::parse_ask(&line) {
        Ok(command) => command,
        Err(reason) => return drop(told.send(Told::Failed(reason)).await),
    };
    tracing::info!(?command, "asked by an administrator");
    let progress = told.clone();
    let done = crate::blocking(move || {
        // A full queue is no reason to keep the command waiting.
        let progress = |line| drop(progress.try_send(Told::Progress(line)));
        let person = Person::of_peer(peer.uid, peer.pid);
        if !peer.is_trusted {
            delegated::check(&admin, &command, &person)?;
        }
        let task = Task::new(&cancel, &progress).by(person);
        admin.run(command, &task)
    });
    let last = match done.await {
        Ok(Ok(answer)) => Told::Done(answer),
        Ok(Err(error)) => Told::Failed(error.to_string()),
        Err(status) => Told::Failed(status.message().to_owned()),
    };
    let _ = told.send(last).await;
}

/// A caller says nothing more: what comes is its end.
async fn wait_until_gone(mut reader: BufReader<OwnedReadHalf>) {
    let mut rest = [0; 64];
    while matches!(reader.read(&mut rest).await, Ok(1..)) {}
}
