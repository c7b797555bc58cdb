//! A TCP relay that counts every byte of both directions: what TLS, HTTP/2 and gRPC add is in it.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// The relay; its threads end with the process.
pub struct Meter {
    port: u16,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    /// Before `https://127.0.0.1:PORT`.
    pub fn before(url: &str) -> Self {
        let to = url.trim_start_matches("https://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let bytes = Arc::new(AtomicU64::new(0));
        let count = bytes.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&to) else { continue };
                for (from, into) in [(&client, &server), (&server, &client)] {
                    let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    let count = count.clone();
                    thread::spawn(move || relay(from, into, &count));
                }
            }
        });
        Self { port, bytes }
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Bytes both ways since the last time.
    pub fn take(&self) -> u64 {
        self.bytes.swap(0, Ordering::Relaxed)
    }
}

fn relay(mut from: TcpStream, mut into: TcpStream, count: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(length) = from.read(&mut buffer) {
        count.fetch_add(length as u64, Ordering::Relaxed);
        if length == 0 || into.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = into.shutdown(Shutdown::Write);
}
