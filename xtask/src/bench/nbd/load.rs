//! The least NBD client that can read 4 KiB blocks, many at a time, with simple replies.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use anyhow::{Result, ensure};

const BLOCK: u32 = 4096;
const REPLY_BYTES: usize = 16;

pub(super) struct Load {
    socket: UnixStream,
    answer: Vec<u8>,
}

impl Load {
    /// Enters the default export.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting)?;
        ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "no NBD server");
        // Fixed newstyle without padding; NBD_OPT_EXPORT_NAME with an empty name.
        socket.write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 0]].concat())?;
        socket.read_exact(&mut [0; 10])?;
        Ok(Self { socket, answer: vec![0; REPLY_BYTES + BLOCK as usize] })
    }

    /// Asks for a block.
    pub(super) fn ask(&mut self, offset: u64) -> Result<()> {
        self.ask_for(offset, BLOCK)
    }

    fn ask_for(&mut self, offset: u64, len: u32) -> Result<()> {
        let mut request = [0; 28];
        request[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
        request[8..16].copy_from_slice(&offset.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..].copy_from_slice(&len.to_be_bytes());
        Ok(self.socket.write_all(&request)?)
    }

    /// Waits for any answer.
    pub(super) fn take(&mut self) -> Result<()> {
        self.socket.read_exact(&mut self.answer)?;
        ensure!(self.answer[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "an error");
        Ok(())
    }
}

/// Reads `0..end` in order.
pub(super) fn read_all(path: &Path, end: u64) -> Result<()> {
    let mut load = Load::connect(path)?;
    let step = 1 << 20;
    load.answer.resize(REPLY_BYTES + step as usize, 0);
    for offset in (0..end).step_by(step as usize) {
        load.ask_for(offset, step)?;
        load.take()?;
    }
    Ok(())
}
