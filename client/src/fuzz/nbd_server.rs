//! Whoever connects to our own NBD server: an input is what a client sends, all at once, before it ends its side.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, LazyLock},
    time::Duration,
};

use crate::{
    export::{Export, Overlay, serve_stranger},
    nbd::wire::{
        ALLOCATION, FIXED_NEWSTYLE, NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC,
        be32, command, flag, option,
    },
    source::{Stretch, medium::Medium},
};

const SIZE: u64 = 64 << 10;
/// A server that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(8);

/// Data, and a hole in the middle.
#[derive(Debug)]
struct Disk;

impl Medium for Disk {
    fn size_bytes(&self) -> u64 {
        SIZE
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(offset + buffer.len() as u64 <= SIZE, "{offset}: {} bytes", buffer.len());
        buffer.fill(7);
        Ok(())
    }

    fn stretch(&self, offset: u64) -> Stretch {
        assert!(offset < SIZE, "{offset}");
        let end = (offset / 16_384 + 1) * 16_384;
        Stretch { end, hole: end == 32_768 }
    }
}

/// One for the process; what inputs write stays.
static EXPORT: LazyLock<Option<Export>> = LazyLock::new(|| {
    janus_proto::memory::one_heap();
    let name = format!("janus-fuzz-{}", uuid::Uuid::new_v4().simple());
    let path = std::env::temp_dir().join(name);
    let overlay = Overlay::create(Arc::new(Disk), &path).ok()?;
    // Nobody drops what is static.
    std::fs::remove_file(path).ok()?;
    Some(Export::writable("disk", "fuzzed", Arc::new(overlay)))
});

/// The server with such a client.
///
/// # Panics
/// When the server doesn't end its side, too, or says something that isn't of the protocol.
pub fn fuzz_nbd_server(bytes: &[u8]) {
    let Some(export) = &*EXPORT else { return };
    let Ok((server, client)) = UnixStream::pair() else { return };
    std::thread::scope(|scope| {
        scope.spawn(|| serve_stranger(export, server));
        scope.spawn(|| {
            // The server may leave before all is sent.
            let _ = (&client).write_all(bytes);
            let _ = client.shutdown(Shutdown::Write);
        });
        let mut said = Vec::new();
        let read =
            client.set_read_timeout(Some(PATIENCE)).and_then(|()| (&client).read_to_end(&mut said));
        let is_ended = match read {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        assert!(is_ended, "the server says no more, and doesn't leave");
        check(&said);
    });
}

/// A greeting, then replies to options as long as they are.
fn check(said: &[u8]) {
    assert!(said.starts_with(b"NBDMAGICIHAVEOPT\0\x03"), "no greeting");
    let mut rest = &said[18..];
    while rest.starts_with(&OPTION_REPLY_MAGIC.to_be_bytes()) && rest.len() >= 20 {
        let end = 20 + be32(rest, 16) as usize;
        // A client that is left in the middle of an answer may miss its end.
        rest = rest.get(end..).unwrap_or_default();
    }
}

/// Whole talks: with chunks, contexts and all requests, and an old client's.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let flags = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes();
    let contexts = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..], ALLOCATION.as_bytes()].concat();
    let go = [&[0, 0, 0, 4][..], b"disk", &[0, 2, 0, 1, 0, 3]].concat();
    let asked = [
        talk(option::LIST, &[]),
        talk(option::STARTTLS, &[]),
        talk(option::STRUCTURED_REPLY, &[]),
        talk(option::LIST_META_CONTEXT, &[0; 8]),
        talk(option::SET_META_CONTEXT, &contexts),
        talk(option::INFO, &[0; 6]),
        talk(option::GO, &go),
    ];
    let requests = [
        request(0, command::READ, 8192, 20_480),
        request(flag::DF, command::READ, 8192, 20_480),
        request(0, command::BLOCK_STATUS, 0, SIZE as u32),
        request(flag::REQ_ONE, command::BLOCK_STATUS, 4096, 512),
        [request(flag::FUA, command::WRITE, 100, 600), vec![9; 600]].concat(),
        request(0, command::TRIM, 0, 8192),
        request(flag::NO_HOLE, command::WRITE_ZEROES, 5000, 9000),
        request(0, command::CACHE, 0, 512),
        request(0, command::FLUSH, 0, 0),
        request(0, command::DISCONNECT, 0, 0),
    ];
    let new = [&flags[..], &asked.concat(), &requests.concat()].concat();
    let reads = [request(0, command::READ, 0, 4096), request(0, command::READ, 4096, 512)];
    let old = [&[0; 4][..], &talk(option::EXPORT_NAME, b""), &reads.concat()].concat();
    vec![new, old, [&flags[..], &talk(option::ABORT, &[])].concat()]
}

fn talk(option: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn request(flags: u16, kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let head = [&REQUEST_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()];
    [&head.concat()[..], &[7; 8], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}
