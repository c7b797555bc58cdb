//! Takes clients in until told to stop.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    Door, Export, connection::Connection, handshake::agree, incoming::Incoming, limits,
    places::Places, socket::Socket,
};

/// Threads of clients; those that were left may take a moment to end.
const MAX_THREADS: usize = 2 * (limits::CONNECTIONS + limits::HANDSHAKES);
/// Pause after a client could not be taken in: files may be free again then.
const PAUSE: Duration = Duration::from_millis(100);

/// An export behind a door.
#[derive(Debug)]
pub struct Server {
    /// What is served.
    pub export: Arc<Export>,
    /// Where.
    pub door: Door,
}

impl Server {
    /// Serves until `stop`. Then the door goes, requests under way are answered, new ones are refused, and clients that don't
    /// take their answers are left.
    pub async fn run(self, stop: &CancellationToken) {
        let Self { export, door } = self;
        let places = Arc::new(Places::default());
        let mut clients = JoinSet::new();
        loop {
            let has_room = clients.len() < MAX_THREADS;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(_) = clients.join_next() => {}
                client = door.accept(), if has_room => match client {
                    Ok(socket) => {
                        let (export, places) = (export.clone(), places.clone());
                        clients.spawn_blocking(move || serve(&export, &places, socket));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "an NBD client could not be taken in");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
            }
        }
        drop(door);
        places.close();
        let left = timeout(limits::LEAVING, gone(&mut clients)).await;
        if left.is_err() {
            places.end();
            // Who then still works waits for a disk that hangs.
            let _ = timeout(Duration::from_secs(1), gone(&mut clients)).await;
        }
    }
}

async fn gone(clients: &mut JoinSet<()>) {
    while clients.join_next().await.is_some() {}
}

/// A client that has come by itself, for fuzzers.
pub(crate) fn serve_stranger(export: &Export, socket: UnixStream) {
    serve(export, &Places::default(), Socket::Unix(socket));
}

/// One client from its arrival to its end.
fn serve(export: &Export, places: &Places, socket: Socket) {
    let socket = Arc::new(socket);
    let place = Place { places, id: places.arrive(socket.clone()) };
    if let Err(error) = talk(export, &place, &socket) {
        tracing::debug!(%error, "an NBD client is left");
    }
    socket.end();
}

fn talk(export: &Export, place: &Place<'_>, socket: &Socket) -> io::Result<()> {
    socket.set_patience(Some(limits::HANDSHAKE))?;
    let mut incoming = Incoming::new(socket, Instant::now() + limits::HANDSHAKE);
    let entered = || place.places.enter(place.id);
    let Some(agreed) = agree(&mut incoming, socket, export, entered)? else { return Ok(()) };
    incoming.be_patient()?;
    Connection::new(export, socket, incoming, agreed, place.places.is_stopping()).serve();
    Ok(())
}

/// A client's place, until it is gone.
struct Place<'a> {
    places: &'a Places,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.places.leave(self.id);
    }
}
