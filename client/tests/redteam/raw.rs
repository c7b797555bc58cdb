//! HTTP/2 written by hand over TLS with a valid certificate: what no library would send.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use janus_proto::tls::Identity;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A TCP connection from another address than that of good clients, 127.0.0.`from`: places of handshakes are counted by address.
pub async fn tcp(to: SocketAddr, from: u8) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((std::net::Ipv4Addr::new(127, 0, 0, from), 0).into())?;
    let stream = timeout(Duration::from_secs(5), socket.connect(to)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> = values
        .iter()
        .flat_map(|(key, value)| [&key.to_be_bytes()[..], &value.to_be_bytes()[..]].concat())
        .collect();
    frame(SETTINGS, 0, 0, &payload)
}

/// Headers, each as a literal that stays out of the table.
pub fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in headers {
        bytes.push(0);
        for text in [name, value] {
            integer(&mut bytes, 7, text.len());
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// An integer of HPACK with a prefix of so many bits, whose other bits are zero.
pub fn integer(bytes: &mut Vec<u8>, bits: u32, mut value: usize) {
    let most = (1 << bits) - 1;
    if value < most {
        return bytes.push(value as u8);
    }
    bytes.push(most as u8);
    value -= most;
    while value >= 128 {
        bytes.push((value % 128) as u8 | 128);
        value /= 128;
    }
    bytes.push(value as u8);
}

/// Headers of a gRPC call.
pub fn call(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let usual = [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "127.0.0.1"),
        (":path", path),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ];
    block(&[&usual[..], more].concat())
}

/// A message as gRPC frames it.
pub fn message(bytes: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend((bytes.len() as u32).to_be_bytes());
    framed.extend(bytes);
    framed
}

/// What came back.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// Frames of each kind.
    pub frames: [u64; 10],
    /// Code of a GOAWAY.
    pub goaway: Option<u32>,
    /// Codes of streams that were reset, the last ones.
    pub resets: Vec<u32>,
    /// When the connection ended.
    pub ended: Option<Instant>,
    /// Bytes of DATA.
    pub data: u64,
}

/// A connection of an attacker; what comes back is read all the time and counted.
pub struct Raw {
    write: WriteHalf<TlsStream<TcpStream>>,
    seen: Arc<Mutex<Seen>>,
    pongs: tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Raw {
    /// TLS with the attacker's certificate; nothing of HTTP/2 is sent yet.
    pub async fn connect(to: SocketAddr, identity: &Identity) -> io::Result<Self> {
        let connector = TlsConnector::from(identity.client_config());
        let name = "127.0.0.1".try_into().unwrap();
        let stream = tcp(to, 66).await?;
        let tls = timeout(Duration::from_secs(5), connector.connect(name, stream)).await??;
        let (read, write) = tokio::io::split(tls);
        let seen = Arc::default();
        let (pong, pongs) = tokio::sync::mpsc::unbounded_channel();
        let reading = follow(read, Arc::clone(&seen), pong);
        let reader = tokio::spawn(reading);
        Ok(Self { write, seen, pongs, reader })
    }

    /// The same with preface and settings.
    pub async fn greeted(
        to: SocketAddr,
        identity: &Identity,
        values: &[(u16, u32)],
    ) -> io::Result<Self> {
        let mut raw = Self::connect(to, identity).await?;
        raw.send(&[PREFACE, &settings(values)].concat()).await?;
        Ok(raw)
    }

    /// Sends bytes as they are; an error when the other end has gone or takes nothing for ten seconds.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        while let Ok(pong) = self.pongs.try_recv() {
            self.write.write_all(&pong).await?;
        }
        let sending = async {
            self.write.write_all(bytes).await?;
            self.write.flush().await
        };
        timeout(Duration::from_secs(10), sending).await?
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Sends what `batch` makes, its number given, until the time is over or the other end has enough. A little longer where it
    /// takes nothing at the end.
    pub async fn flood(
        &mut self,
        time: Duration,
        mut batch: impl FnMut(u32) -> Vec<u8>,
    ) -> Flooded {
        let begun = Instant::now();
        let (mut batches, mut frames, mut bytes) = (0, 0, 0);
        while begun.elapsed() < time && self.seen().ended.is_none() {
            let made = batch(batches);
            let left = time.saturating_sub(begun.elapsed()) + Duration::from_millis(400);
            if !matches!(timeout(left, self.send(&made)).await, Ok(Ok(()))) {
                break;
            }
            batches += 1;
            frames += count(&made);
            bytes += made.len() as u64;
        }
        Flooded { frames, bytes, time: begun.elapsed() }
    }

    /// Waits until the other end has closed; false when it hasn't within `time`. Pings are answered meanwhile.
    pub async fn closed_within(&mut self, time: Duration) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < time {
            if self.seen().ended.is_some() {
                return true;
            }
            let _ = self.send(&[]).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.seen().ended.is_some()
    }
}

/// How much a flood was.
#[derive(Debug, Clone, Copy)]
pub struct Flooded {
    pub frames: u64,
    pub bytes: u64,
    pub time: Duration,
}

/// Frames of what was made.
fn count(mut bytes: &[u8]) -> u64 {
    let mut frames = 0;
    while let [a, b, c, ..] = bytes {
        let len = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        bytes = bytes.get(9 + len..).unwrap_or_default();
        frames += 1;
    }
    frames
}

async fn follow(
    mut read: ReadHalf<TlsStream<TcpStream>>,
    seen: Arc<Mutex<Seen>>,
    pong: tokio::sync::mpsc::UnboundedSender<Vec<u8>>,
) {
    let mut payload = vec![0; 1 << 20];
    loop {
        let mut head = [0; 9];
        let read_head = read.read_exact(&mut head).await;
        let [a, b, c, kind, flags, ..] = head;
        let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        let whole = match (read_head, payload.get_mut(..len)) {
            (Ok(_), Some(payload)) => read.read_exact(payload).await.is_ok(),
            _ => false,
        };
        let mut seen = seen.lock().unwrap();
        if !whole {
            seen.ended = Some(Instant::now());
            return;
        }
        if let Some(count) = seen.frames.get_mut(usize::from(kind)) {
            *count += 1;
        }
        let number = |at: usize| {
            payload[..len].get(at..at + 4).map(|four| u32::from_be_bytes(four.try_into().unwrap()))
        };
        match kind {
            DATA => seen.data += len as u64,
            GOAWAY => seen.goaway = number(4),
            RST_STREAM => {
                let code = number(0).unwrap_or(u32::MAX);
                seen.resets.push(code);
                seen.resets.truncate(2000);
            }
            PING if flags & 1 == 0 => {
                let _ = pong.send(frame(PING, 1, 0, &payload[..len]));
            }
            _ => {}
        }
    }
}
