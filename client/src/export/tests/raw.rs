//! An NBD client that sends what it is told to, also what no client may send.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;

#[derive(Debug)]
pub struct Raw {
    pub socket: UnixStream,
}

/// A reply to an option.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub option: u32,
    pub kind: u32,
    pub data: Vec<u8>,
}

impl Raw {
    /// Connects, and reads the greeting.
    pub fn greeted(path: &Path) -> Self {
        let mut raw = Self::connect(path);
        assert_eq!(&raw.take(16).unwrap(), b"NBDMAGICIHAVEOPT");
        raw.take(2).unwrap();
        raw
    }

    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket }
    }

    /// In the transmission phase, as soon as there is a place.
    pub fn ready(path: &Path, structured: bool) -> Self {
        for _ in 0..400 {
            let mut raw = Self::greeted(path);
            raw.send(&3u32.to_be_bytes());
            if structured {
                assert_eq!(raw.ask(8, &[]).kind, 1);
            }
            raw.option(7, &[0; 6]);
            let mut kind = 3;
            while kind == 3 {
                kind = raw.reply().unwrap().kind;
            }
            if kind == 1 {
                return raw;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("there is no place");
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// True when the server has ended the connection.
    pub fn is_ended(&mut self) -> bool {
        match self.socket.read(&mut [0; 4096]) {
            Ok(0) => true,
            Ok(_) => self.is_ended(),
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        self.option_of(option, data.len() as u32, data);
    }

    pub fn option_of(&mut self, option: u32, len: u32, data: &[u8]) {
        let head = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat();
        self.send(&head);
    }

    pub fn reply(&mut self) -> io::Result<Reply> {
        let head = self.take(20)?;
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        let data = self.take(number(16) as usize)?;
        Ok(Reply { option: number(8), kind: number(12), data })
    }

    /// An option with one reply.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> Reply {
        self.option(option, data);
        let reply = self.reply().unwrap();
        assert_eq!(reply.option, option);
        reply
    }

    pub fn request(&mut self, kind: u16, cookie: u64, offset: u64, len: u32) {
        self.request_with(0, kind, cookie, offset, len);
    }

    pub fn request_with(&mut self, flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) {
        let head = [
            &0x2560_9513u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &len.to_be_bytes(),
        ];
        self.send(&head.concat());
    }

    /// Error and cookie of a simple reply.
    pub fn simple(&mut self) -> (u32, u64) {
        let head = self.take(16).unwrap();
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        let errno = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (errno, u64::from_be_bytes(head[8..].try_into().unwrap()))
    }

    /// Flags, type, cookie and body of a chunk.
    pub fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        let head = self.take(20).unwrap();
        assert_eq!(head[..4], 0x668e_33efu32.to_be_bytes());
        let [flags, kind] = [4, 6].map(|at| u16::from_be_bytes([head[at], head[at + 1]]));
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        (flags, kind, cookie, self.take(len as usize).unwrap())
    }
}

/// An export's name and names of contexts, as options have them.
pub fn queries(export: &str, names: &[&str]) -> Vec<u8> {
    let string = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    let mut data = string(export);
    data.extend((names.len() as u32).to_be_bytes());
    names.iter().for_each(|name| data.extend(string(name)));
    data
}
