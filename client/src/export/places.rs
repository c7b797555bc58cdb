//! Who is connected: places are bounded, so that half handshakes of some don't keep others out.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{handshake::Entrance, limits, socket::Socket};

#[derive(Debug, Default)]
pub(super) struct Places {
    is_stopping: AtomicBool,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    talking: BTreeMap<u64, Arc<Socket>>,
    served: BTreeMap<u64, Arc<Socket>>,
}

impl Places {
    /// Set once all is to end.
    pub(super) fn is_stopping(&self) -> &AtomicBool {
        &self.is_stopping
    }

    /// A client has come. Where too many are in their handshake, the oldest of them is left: a client that
    /// means to be served needs milliseconds.
    pub(super) fn arrive(&self, socket: Arc<Socket>) -> u64 {
        let mut clients = self.clients();
        if clients.talking.len() >= limits::HANDSHAKES
            && let Some((_, oldest)) = clients.talking.pop_first()
        {
            oldest.end();
        }
        let id = clients.next;
        clients.next += 1;
        clients.talking.insert(id, socket);
        id
    }

    /// Its handshake is at its end.
    pub(super) fn enter(&self, id: u64) -> Entrance {
        let mut clients = self.clients();
        if self.is_stopping.load(Ordering::Relaxed) {
            return Entrance::Closed;
        }
        if clients.served.len() >= limits::CONNECTIONS {
            return Entrance::Full;
        }
        match clients.talking.remove(&id) {
            Some(socket) => {
                clients.served.insert(id, socket);
                Entrance::Open
            }
            None => Entrance::Closed,
        }
    }

    pub(super) fn leave(&self, id: u64) {
        let mut clients = self.clients();
        clients.talking.remove(&id);
        clients.served.remove(&id);
    }

    /// From now on requests are refused; those under way are answered.
    pub(super) fn close(&self) {
        let clients = self.clients();
        self.is_stopping.store(true, Ordering::Relaxed);
        clients.talking.values().for_each(|socket| socket.end());
        clients.served.values().for_each(|socket| socket.end_requests());
    }

    /// Ends also those that don't take their answers.
    pub(super) fn end(&self) {
        self.clients().served.values().for_each(|socket| socket.end());
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
