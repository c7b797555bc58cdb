//! An NBD server for tests: what it does right it does in all the ways it may, and its script says what it does wrong.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use janus_proto::ranges::Ranges;

pub const BITMAP: &str = "janus-0123456789abcdef0123456789abcdef";
const SIZE: usize = 100 * 1024 + 512;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// What a server does.
#[derive(Debug, Clone)]
pub struct Behaviour {
    pub content: Arc<[u8]>,
    pub holes: Ranges,
    pub dirty: Ranges,
    pub structured: bool,
    pub units: Option<(u32, u32)>,
    /// Answers requests in another order, and in pieces.
    pub shuffles: bool,
    pub script: Script,
}

/// What it does wrong.
#[derive(Debug, Clone, Copy)]
pub enum Script {
    Nothing,
    /// Ends the connection after so many bytes.
    Cut(usize),
    /// Sends nothing after so many bytes.
    Mute(usize),
    /// Sends a byte now and then.
    Drip,
    /// Offers contexts without end.
    Endless,
    /// Tells what it could say of blocks, and then doesn't.
    NoStatus,
    /// Changes the head of one message.
    Mutate {
        at: u32,
        seed: u64,
    },
}

impl Default for Behaviour {
    fn default() -> Self {
        let mut content = vec![0; SIZE];
        StdRng::seed_from_u64(1).fill(&mut content[..]);
        let holes: Ranges = [8192..20_480, 61_440..65_536].into_iter().collect();
        for hole in holes.iter() {
            content[hole.start as usize..hole.end as usize].fill(0);
        }
        let dirty = [0..4096, 40_960..81_920].into_iter().collect();
        Self {
            content: content.into(),
            holes,
            dirty,
            structured: true,
            units: None,
            shuffles: false,
            script: Script::Nothing,
        }
    }
}

struct Out<'a> {
    socket: &'a UnixStream,
    script: Script,
    structured: bool,
    sent: usize,
    messages: u32,
}

impl Out<'_> {
    /// Sends one message: a head, which may be mutated, and data, which a client can't check.
    fn send(&mut self, head: &[u8], data: &[u8]) -> io::Result<()> {
        let mut head = head.to_vec();
        let number = self.messages;
        self.messages += 1;
        if let Script::Mutate { at, seed } = self.script
            && at == number
        {
            let mut random = StdRng::seed_from_u64(seed);
            // Without chunks nothing tells that data begin somewhere else, before the next reply does.
            let may_shift = self.structured || data.is_empty();
            match random.random_range(0..8) {
                1 | 2 | 5 if !may_shift => return Ok(()),
                0 => return Ok(()),
                1 => self.bytes(&head.clone())?,
                2 => head.truncate(random.random_range(0..head.len())),
                3 => return Err(io::ErrorKind::BrokenPipe.into()),
                4 => {
                    let at = random.random_range(0..head.len());
                    head[at] = if random.random() { 0 } else { 0xff };
                }
                5 => {
                    let at = random.random_range(0..head.len());
                    head.insert(at, random.random());
                }
                _ => {
                    let at = random.random_range(0..head.len());
                    head[at] ^= 1 << random.random_range(0..8);
                }
            }
        }
        self.bytes(&head)?;
        self.bytes(data)
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        let left = |limit: usize| limit.saturating_sub(self.sent).min(bytes.len());
        match self.script {
            Script::Cut(limit) if left(limit) < bytes.len() => {
                self.socket.write_all(&bytes[..left(limit)])?;
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Script::Mute(limit) => self.socket.write_all(&bytes[..left(limit)])?,
            Script::Drip => {
                for byte in bytes {
                    self.socket.write_all(&[*byte])?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            _ => self.socket.write_all(bytes)?,
        }
        self.sent += bytes.len();
        Ok(())
    }

    fn option(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut head = REPLY_MAGIC.to_be_bytes().to_vec();
        head.extend(option.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend((data.len() as u32).to_be_bytes());
        head.extend(data);
        self.send(&head, &[])
    }

    fn chunk(
        &mut self,
        last: bool,
        kind: u16,
        cookie: u64,
        head: &[u8],
        data: &[u8],
    ) -> io::Result<()> {
        let mut all = 0x668e_33efu32.to_be_bytes().to_vec();
        all.extend(u16::from(last).to_be_bytes());
        all.extend(kind.to_be_bytes());
        all.extend(cookie.to_be_bytes());
        all.extend(((head.len() + data.len()) as u32).to_be_bytes());
        all.extend(head);
        self.send(&all, data)
    }
}

/// Serves one connection.
pub fn serve(socket: &UnixStream, behaviour: &Behaviour) -> io::Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut out = Out {
        socket,
        script: behaviour.script,
        structured: behaviour.structured,
        sent: 0,
        messages: 0,
    };
    out.send(b"NBDMAGICIHAVEOPT\0\x03", &[])?;
    let _flags: [u8; 4] = take(socket)?;
    while !option(socket, &mut out, behaviour)? {}
    let mut waiting = Vec::new();
    loop {
        waiting.push(take::<28>(socket)?);
        // Several requests are answered last first.
        socket.set_nonblocking(behaviour.shuffles)?;
        while behaviour.shuffles && waiting.len() < 4 {
            let mut first = [0; 1];
            match (&mut &*socket).read(&mut first) {
                Ok(1) => {
                    socket.set_nonblocking(false)?;
                    let rest: [u8; 27] = take(socket)?;
                    let mut request = [0; 28];
                    request[0] = first[0];
                    request[1..].copy_from_slice(&rest);
                    waiting.push(request);
                    socket.set_nonblocking(true)?;
                }
                Ok(_) => return Ok(()),
                Err(_) => break,
            }
        }
        socket.set_nonblocking(false)?;
        while let Some(request) = waiting.pop() {
            answer(&request, &mut out, behaviour)?;
        }
    }
}

/// Answers an option; true when requests follow.
fn option(socket: &UnixStream, out: &mut Out<'_>, behaviour: &Behaviour) -> io::Result<bool> {
    let head: [u8; 16] = take(socket)?;
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let (option, length) = (number(8), number(12));
    let mut data = vec![0; length as usize];
    (&mut &*socket).read_exact(&mut data)?;
    let allocation = [&7u32.to_be_bytes()[..], b"base:allocation"].concat();
    let bitmap = [&9u32.to_be_bytes()[..], b"qemu:dirty-bitmap:", BITMAP.as_bytes()].concat();
    match option {
        8 if behaviour.structured => out.option(option, 1, &[])?,
        9 => {
            if let Script::Endless = behaviour.script {
                loop {
                    out.option(option, 4, &bitmap)?;
                }
            }
            out.option(option, 4, &bitmap)?;
            out.option(option, 4, b"\0\0\0\x01qemu:dirty-bitmap:of-others")?;
            out.option(option, 1, &[])?;
        }
        10 => {
            out.option(option, 4, &allocation)?;
            out.option(option, 4, &bitmap)?;
            out.option(option, 1, &[])?;
        }
        7 => {
            let mut about = 0u16.to_be_bytes().to_vec();
            about.extend((behaviour.content.len() as u64).to_be_bytes());
            about.extend(3u16.to_be_bytes());
            out.option(option, 3, &about)?;
            if let Some((min, max)) = behaviour.units {
                let mut units = 3u16.to_be_bytes().to_vec();
                [min, min, max].iter().for_each(|unit| units.extend(unit.to_be_bytes()));
                out.option(option, 3, &units)?;
            }
            out.option(option, 1, &[])?;
            return Ok(true);
        }
        _ => out.option(option, (1 << 31) + 1, b"no")?,
    }
    Ok(false)
}

fn answer(request: &[u8; 28], out: &mut Out<'_>, behaviour: &Behaviour) -> io::Result<()> {
    let command = u16::from_be_bytes(request[6..8].try_into().unwrap());
    let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
    let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
    let length = u32::from_be_bytes(request[24..28].try_into().unwrap());
    let end = offset + u64::from(length);
    let (min, max) = behaviour.units.unwrap_or((1, 32 << 20));
    let fits = offset.is_multiple_of(min.into()) && length.is_multiple_of(min);
    let is_within = end <= behaviour.content.len() as u64 && length > 0;
    if !fits || !is_within || (length > max && command == 0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match command {
        0 if behaviour.structured => data(cookie, offset..end, out, behaviour),
        0 => {
            let mut head = 0x6744_6698u32.to_be_bytes().to_vec();
            head.extend(0u32.to_be_bytes());
            head.extend(cookie.to_be_bytes());
            out.send(&head, &behaviour.content[offset as usize..end as usize])
        }
        7 if matches!(out.script, Script::NoStatus) => {
            out.chunk(true, (1 << 15) + 1, cookie, &[0, 0, 0, 5, 0, 0], &[])
        }
        7 => {
            out.chunk(false, 5, cookie, &extents(7, &behaviour.holes, 3, offset..end), &[])?;
            out.chunk(true, 5, cookie, &extents(9, &behaviour.dirty, 1, offset..end), &[])
        }
        _ => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Data in pieces, holes as holes.
fn data(
    cookie: u64,
    range: std::ops::Range<u64>,
    out: &mut Out<'_>,
    behaviour: &Behaviour,
) -> io::Result<()> {
    let asked = Ranges::from(range);
    for hole in asked.intersect(&behaviour.holes).iter() {
        let mut head = hole.start.to_be_bytes().to_vec();
        head.extend(((hole.end - hole.start) as u32).to_be_bytes());
        out.chunk(false, 2, cookie, &head, &[])?;
    }
    for piece in asked.subtract(&behaviour.holes).iter() {
        let content = &behaviour.content[piece.start as usize..piece.end as usize];
        out.chunk(false, 1, cookie, &piece.start.to_be_bytes(), content)?;
    }
    out.chunk(true, 0, cookie, &[], &[])
}

fn extents(context: u32, set: &Ranges, flags: u32, asked: std::ops::Range<u64>) -> Vec<u8> {
    let mut bytes = context.to_be_bytes().to_vec();
    let within = set.intersect(&Ranges::from(asked.clone()));
    let mut at = asked.start;
    let mut extent = |to: u64, flags: u32| {
        if to > at {
            bytes.extend(((to - at) as u32).to_be_bytes());
            bytes.extend(flags.to_be_bytes());
            at = to;
        }
    };
    for range in within.iter() {
        // Also a hole of which nobody says that it reads as zeros.
        extent(range.start, u32::from(flags == 3));
        extent(range.end, flags);
    }
    extent(asked.end, 0);
    bytes
}

fn take<const N: usize>(socket: &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    (&mut &*socket).read_exact(&mut bytes)?;
    Ok(bytes)
}
