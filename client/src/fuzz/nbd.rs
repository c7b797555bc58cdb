//! A server that plays bytes: messages with a head that says when they are sent.
//!
//! An input is a list of messages: flags, a length (`u16`, little-endian), the bytes. Flag 1: sent after the next request has
//! come; flag 2: the last request's cookie replaces the bytes at 8. Then the server ends its side.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    nbd::{Limits, NbdMedium, Uri},
    source::medium::Medium,
};

const AFTER_REQUEST: u8 = 1;
const WITH_COOKIE: u8 = 2;
/// A link that is silent is left soon; none is made anew once it was refused.
const LIMITS: Limits = Limits { patience: Duration::from_secs(2), reconnect: Duration::ZERO };
/// The server leaves earlier, when both wait for each other.
const SERVER_PATIENCE: Duration = Duration::from_millis(20);
/// Bytes that are read of what claims to be any size.
const MOST_BYTES: u64 = 100 << 10;
const STRETCHES: usize = 16;
const GO: u32 = 7;

/// What the server plays to whoever connects, and where.
struct Player {
    folder: std::path::PathBuf,
    script: Arc<Mutex<Vec<u8>>>,
}

/// One for the process: a thread that serves one connection after the other.
static PLAYER: LazyLock<io::Result<Player>> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("janus-fuzz-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir(&folder)?;
    let listener = UnixListener::bind(folder.join("socket"))?;
    let script = Arc::new(Mutex::new(Vec::new()));
    let played = script.clone();
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let script = played.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // A client that leaves is nothing to speak of.
            let _ = play(&socket, &script);
            let _ = socket.shutdown(Shutdown::Both);
        }
    });
    Ok(Player { folder, script })
});

/// The client with such a server.
pub fn fuzz_nbd(bytes: &[u8]) {
    let Ok(player) = &*PLAYER else { return };
    *player.script.lock().unwrap_or_else(PoisonError::into_inner) = bytes.to_vec();
    let uri = Uri::of_socket(player.folder.join("socket"));
    let Ok(medium) = NbdMedium::open(uri, LIMITS) else { return };
    let size = medium.size_bytes();
    let mut at = 0;
    for _ in 0..STRETCHES {
        let stretch = medium.stretch(at);
        assert!(stretch.end <= size && (stretch.end > at || at == size), "{at}: {stretch:?}");
        at = if stretch.end < size { stretch.end } else { 0 };
    }
    let names: Vec<String> = medium.bitmaps().map(str::to_owned).collect();
    for name in names {
        if let Ok(dirty) = medium.dirty(&name) {
            assert!(dirty.iter().all(|range| range.end <= size), "{dirty:?}");
        }
    }
    for offset in [0, size / 2, size.saturating_sub(MOST_BYTES)] {
        let mut buffer = vec![0; (size - offset).min(MOST_BYTES) as usize];
        let _ = medium.read_exact_at(&mut buffer, offset);
    }
}

fn play(mut socket: &UnixStream, script: &[u8]) -> io::Result<()> {
    socket.set_read_timeout(Some(SERVER_PATIENCE))?;
    let mut client = Client { socket, in_handshake: true };
    let mut cookie = [0; 8];
    let mut rest = script;
    while let [flags, low, high, after @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (message, later) = after.split_at(len);
        let mut message = message.to_vec();
        if flags & AFTER_REQUEST != 0 {
            cookie = client.request()?;
        }
        if flags & WITH_COOKIE != 0
            && let Some(place) = message.get_mut(8..16)
        {
            place.copy_from_slice(&cookie);
        }
        socket.write_all(&message)?;
        rest = later;
    }
    socket.shutdown(Shutdown::Write)?;
    socket.set_read_timeout(Some(LIMITS.patience))?;
    io::copy(&mut socket, &mut io::sink()).map(|_| ())
}

/// What the client says.
struct Client<'a> {
    socket: &'a UnixStream,
    in_handshake: bool,
}

impl Client<'_> {
    /// Waits for a request; returns its cookie.
    fn request(&mut self) -> io::Result<[u8; 8]> {
        if std::mem::take(&mut self.in_handshake) {
            self.take::<4>()?;
            while self.option()? != GO {}
        }
        let request: [u8; 28] = self.take()?;
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&request[8..16]);
        Ok(cookie)
    }

    fn option(&mut self) -> io::Result<u32> {
        let head: [u8; 16] = self.take()?;
        let number =
            |at: usize| head[at..at + 4].iter().fold(0, |all, byte| all << 8 | u32::from(*byte));
        io::copy(&mut self.socket.take(number(12).into()), &mut io::sink())?;
        Ok(number(8))
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        let mut socket = self.socket;
        socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// A whole talk: an export of 8 KiB with holes and a bitmap, with chunks and without.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let bitmap = b"\0\0\0\x09qemu:dirty-bitmap:janus-0123456789abcdef0123456789abcdef".as_slice();
    let about = [&[0, 0][..], &8192u64.to_be_bytes(), &[0, 3]].concat();
    let units = [&[0, 3][..], &[0, 0, 0, 1], &[0, 0, 16, 0], &[2, 0, 0, 0]].concat();
    let greeting = message(0, b"NBDMAGICIHAVEOPT\0\x03");
    let go = [option(7, 3, &about), option(7, 3, &units), option(7, 1, &[])].concat();
    let lists = [option(9, 4, bitmap), option(9, 1, &[])].concat();
    let chosen =
        [option(10, 4, b"\0\0\0\x07base:allocation"), option(10, 4, bitmap), option(10, 1, &[])];
    let extents = |first: bool, last: bool, context: u8, flags: u8| {
        let body =
            [&[0, 0, 0, context][..], &[0, 0, 16, 0, 0, 0, 0, flags], &[0, 0, 16, 0, 0, 0, 0, 0]];
        chunk(first, last, 5, &body.concat())
    };
    let status = [extents(true, false, 7, 3), extents(false, true, 9, 1)].concat();
    let hole = [&0u64.to_be_bytes()[..], &[0, 0, 16, 0]].concat();
    let data = [&4096u64.to_be_bytes()[..], &[7; 4096]].concat();
    let half = chunk(true, true, 1, &data);
    let read = [chunk(true, false, 2, &hole), chunk(false, true, 1, &data)].concat();
    let structured = [option(8, 1, &[]), lists, chosen.concat(), go.clone()].concat();
    let chunks =
        [greeting.clone(), structured, status.clone(), status, read.clone(), half, read].concat();
    let plain = |len: usize| {
        let reply = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &[0; 8], &vec![9; len]].concat();
        message(AFTER_REQUEST | WITH_COOKIE, &reply)
    };
    let no = option(8, (1 << 31) + 1, b"no");
    let simple = [greeting, no, go, plain(8192), plain(4096), plain(8192)].concat();
    vec![chunks, simple]
}

fn message(flags: u8, bytes: &[u8]) -> Vec<u8> {
    [&[flags][..], &(bytes.len() as u16).to_le_bytes(), bytes].concat()
}

fn option(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [0x0003_e889u32, 0x0455_65a9, option, kind, data.len() as u32];
    let head: Vec<u8> = head.iter().flat_map(|word| word.to_be_bytes()).collect();
    message(0, &[&head, data].concat())
}

/// A chunk; the first of an answer waits for its request. Later ones have no cookie of their own: the player knows it.
fn chunk(first: bool, last: bool, kind: u16, body: &[u8]) -> Vec<u8> {
    let head = [
        &0x668e_33efu32.to_be_bytes()[..],
        &u16::from(last).to_be_bytes(),
        &kind.to_be_bytes(),
        &[0; 8],
        &(body.len() as u32).to_be_bytes(),
        body,
    ];
    message(if first { AFTER_REQUEST | WITH_COOKIE } else { WITH_COOKIE }, &head.concat())
}
