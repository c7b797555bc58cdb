//! An NBD export as a disk.

use std::{
    io,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Limits, NbdError,
    connection::Connection,
    handshake::Agreed,
    uri::Uri,
    wire::{ALLOCATION, BITMAP, STATE_HOLE, STATE_ZERO},
};
use crate::source::{Stretch, medium::Medium};
use janus_proto::ranges::Ranges;

/// How far ahead holes are asked for.
const REGION_BYTES: u64 = 1 << 30;
/// Answers that a server may need to tell of as much; QEMU needs one.
const ANSWERS_PER_REGION: u64 = 64;
/// Tries of one request over new connections.
const TRIES: usize = 3;
/// Pause between two tries to connect.
const PAUSE: Duration = Duration::from_millis(200);
/// A block status says: nothing is allocated there, and it reads as zeros.
const HOLE_AND_ZERO: u32 = STATE_HOLE | STATE_ZERO;

/// An export, opened for reading.
#[derive(Debug)]
pub struct NbdMedium {
    uri: Uri,
    limits: Limits,
    agreed: Agreed,
    connection: Mutex<Arc<Connection>>,
    /// Where the server has told holes from data.
    region: Mutex<Region>,
    tells_holes: AtomicBool,
}

impl NbdMedium {
    /// Connects.
    ///
    /// # Errors
    /// When the server can't be reached, or hasn't the export.
    pub fn open(uri: Uri, limits: Limits) -> Result<Self, NbdError> {
        let connection = Connection::open(&uri, limits.patience)?;
        Ok(Self::over(connection, uri, limits))
    }

    /// The default export of the server at the other end of `socket`; when that breaks, it can't be made anew.
    ///
    /// # Errors
    /// When the server hasn't got it.
    pub fn of_socket(socket: UnixStream, limits: Limits) -> Result<Self, NbdError> {
        let uri = Uri::of_socket(PathBuf::new());
        let connection = Connection::over(socket, &uri, limits.patience)?;
        Ok(Self::over(connection, uri, limits))
    }

    fn over(connection: Connection, uri: Uri, limits: Limits) -> Self {
        let agreed = connection.agreed.clone();
        let tells_holes = agreed.contexts.iter().any(|(_, name)| name == ALLOCATION);
        Self {
            uri,
            limits,
            agreed,
            connection: Mutex::new(Arc::new(connection)),
            region: Mutex::default(),
            tells_holes: AtomicBool::new(tells_holes),
        }
    }

    /// True when the server promises that nobody writes through it.
    pub fn is_read_only(&self) -> bool {
        self.agreed.is_read_only
    }

    /// Our dirty bitmaps that the export offers.
    pub fn bitmaps(&self) -> impl Iterator<Item = &str> {
        self.agreed.contexts.iter().filter_map(|(_, name)| name.strip_prefix(BITMAP))
    }

    /// What is dirty in a bitmap that the export offers.
    ///
    /// # Errors
    /// When the server doesn't tell it of the whole disk.
    pub fn dirty(&self, bitmap: &str) -> Result<Ranges, NbdError> {
        let mut dirty = Ranges::new();
        let mut at = 0;
        let mut left = (self.agreed.size_bytes / REGION_BYTES + 1) * ANSWERS_PER_REGION;
        while at < self.agreed.size_bytes {
            if left == 0 {
                return Err(NbdError::Protocol("no end of extents".into()));
            }
            left -= 1;
            let extents = self.status(at, &format!("{BITMAP}{bitmap}"))?;
            for (range, flags) in extents {
                // Flags that nobody knows are no promise either.
                if flags != 0 {
                    dirty.push(range.clone());
                }
                at = range.end;
            }
        }
        Ok(dirty)
    }

    /// What one context says from `offset` on; never empty.
    fn status(
        &self,
        offset: u64,
        context: &str,
    ) -> Result<Vec<(std::ops::Range<u64>, u32)>, NbdError> {
        let unit = u64::from(self.agreed.min_block);
        let start = offset / unit * unit;
        let end = (start + REGION_BYTES).min(self.agreed.size_bytes);
        let (id, answer) = self.again(|connection| {
            let of = |(_, name): &&(u32, String)| name == context;
            let Some((id, _)) = connection.agreed.contexts.iter().find(of) else {
                return Err(NbdError::Refused(format!("it no longer offers {context}")));
            };
            let id = *id;
            Ok((id, connection.block_status(start, (end - start) as u32)?))
        })?;
        let extents = answer.into_iter().find(|(context, _)| *context == id).map(|(_, it)| it);
        let mut extents = extents.unwrap_or_default();
        extents.retain(|(range, _)| range.end > offset);
        if extents.is_empty() {
            return Err(NbdError::Protocol("a block status of nothing".into()));
        }
        Ok(extents)
    }

    /// Does a request, over a new connection where the old one is broken.
    fn again<T>(
        &self,
        mut request: impl FnMut(&Connection) -> Result<T, NbdError>,
    ) -> Result<T, NbdError> {
        let mut tries = 1;
        loop {
            match self.connected().and_then(|connection| request(&connection)) {
                Err(error) if error.is_of_link() && tries < TRIES => {
                    tracing::warn!(export = %self.uri, %error, "connecting again");
                    tries += 1;
                }
                done => return done,
            }
        }
    }

    fn connected(&self) -> Result<Arc<Connection>, NbdError> {
        let mut connection = lock(&self.connection);
        if !connection.is_broken() {
            return Ok(connection.clone());
        }
        let until = Instant::now() + self.limits.reconnect;
        let new = loop {
            match Connection::open(&self.uri, self.limits.patience) {
                Err(error) if error.is_of_link() && Instant::now() + PAUSE < until => {
                    std::thread::sleep(PAUSE);
                }
                opened => break opened?,
            }
        };
        let (old, agreed) = (self.agreed.size_bytes, &new.agreed);
        if agreed.size_bytes != old {
            return Err(NbdError::Changed { old, new: agreed.size_bytes });
        }
        if self.agreed.is_read_only && !agreed.is_read_only {
            return Err(NbdError::Refused("the export has become writable".into()));
        }
        *connection = Arc::new(new);
        Ok(connection.clone())
    }

    /// The known stretch that `offset` is in; asks the server when there is none.
    fn told(&self, offset: u64) -> Result<Stretch, NbdError> {
        let mut region = lock(&self.region);
        if let Some(stretch) = region.find(offset) {
            return Ok(stretch);
        }
        let extents = self.status(offset, ALLOCATION)?;
        *region = Region { start: offset, stretches: Vec::new() };
        for (range, flags) in extents {
            region.push(range.end, flags & HOLE_AND_ZERO == HOLE_AND_ZERO);
        }
        region.find(offset).ok_or_else(|| NbdError::Protocol("a block status of nothing".into()))
    }
}

impl Medium for NbdMedium {
    fn size_bytes(&self) -> u64 {
        self.agreed.size_bytes
    }

    fn sector_bytes(&self) -> u32 {
        // The protocol doesn't tell the sectors of the disk.
        512
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let size = self.agreed.size_bytes;
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            // Pieces end where requests of full length end: so one that is made larger to whole units is still short enough.
            let most = u64::from(self.agreed.max_block);
            let len = (most - at % most).min(rest.len() as u64);
            let (piece, after) = rest.split_at_mut(len as usize);
            self.again(|connection| read_piece(connection, piece, at)).map_err(io::Error::other)?;
            (rest, at) = (after, at + len);
        }
        Ok(())
    }

    fn stretch(&self, offset: u64) -> Stretch {
        let all = Stretch { end: self.agreed.size_bytes, hole: false };
        if offset >= all.end || !self.tells_holes.load(Ordering::Relaxed) {
            return all;
        }
        self.told(offset).unwrap_or_else(|error| {
            tracing::warn!(export = %self.uri, %error, "holes are read like data from now on");
            self.tells_holes.store(false, Ordering::Relaxed);
            all
        })
    }
}

/// What the server has told of a part of the export.
#[derive(Debug, Default)]
struct Region {
    start: u64,
    stretches: Vec<Stretch>,
}

impl Region {
    fn push(&mut self, end: u64, hole: bool) {
        match self.stretches.last_mut() {
            Some(last) if last.hole == hole => last.end = end,
            _ => self.stretches.push(Stretch { end, hole }),
        }
    }

    fn find(&self, offset: u64) -> Option<Stretch> {
        let at = self.stretches.partition_point(|stretch| stretch.end <= offset);
        self.stretches.get(at).filter(|_| offset >= self.start).copied()
    }
}

/// Reads one request's worth. What doesn't fit the server's units is read with what is around it.
fn read_piece(connection: &Connection, piece: &mut [u8], offset: u64) -> Result<(), NbdError> {
    let unit = u64::from(connection.agreed.min_block);
    let end = offset + piece.len() as u64;
    if offset.is_multiple_of(unit) && end.is_multiple_of(unit) {
        return connection.read(piece, offset);
    }
    let start = offset / unit * unit;
    let mut around = vec![0; (end.next_multiple_of(unit) - start) as usize];
    connection.read(&mut around, start)?;
    let from = (offset - start) as usize;
    piece.copy_from_slice(&around[from..from + piece.len()]);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
