//! `janus-client cat`.

use std::io::{self, Write};

use clap::{ArgMatches, Command};
use serde_json::json;

use super::{Context, Failure, Outcome, inside};
use crate::{
    browse::{BrowseError, Kind, place::split_stream, volume::Piece},
    fs::FileSystemKind,
};

pub(super) fn command() -> Command {
    Command::new("cat")
        .about(
            "Write a file of a snapshot to standard output; of NTFS also a stream, as FILE:STREAM",
        )
        .args(inside::arguments())
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    if context.events {
        return Err(Failure::usage("cat writes the file itself: it can't be used with --json"));
    }
    let chosen = inside::choose(matches, context).await?;
    let read = move |chosen: inside::Chosen| {
        let mut volume = chosen.volume()?;
        let (path, stream) = match volume.kind() {
            FileSystemKind::Ntfs => split_stream(&chosen.inside.path),
            _ => (chosen.inside.path.as_slice(), ""),
        };
        let entry = volume.look(path)?;
        let of_stream = entry.streams.iter().find(|one| one.name == stream);
        let size_bytes = match entry.kind() {
            _ if !entry.problem.is_empty() => {
                return Err(BrowseError::Damaged { what: entry.problem }.into());
            }
            _ if !stream.is_empty() => {
                let unknown = || BrowseError::Unknown { path: format!("stream {stream}") };
                of_stream.ok_or_else(unknown)?.size_bytes
            }
            Kind::File => entry.size_bytes,
            kind => {
                let what = format!("this is a {}, not a file", kind.name());
                return Err(BrowseError::Kind { what }.into());
            }
        };
        let mut out = Out { to: io::stdout().lock(), at: 0, closed: false };
        let read = volume.read(path, stream, 0..size_bytes, &mut |piece| out.take(piece));
        match read {
            // Who listens wants no more.
            Err(_) if out.closed => {}
            Ok(end) if end < size_bytes => {
                let what = format!("it ends at byte {end} of {size_bytes}");
                return Err(BrowseError::Damaged { what }.into());
            }
            other => drop(other?),
        }
        Ok(Outcome { json: json!({ "ok": true }), text: String::new() })
    };
    chosen.blocking(read).await
}

struct Out<W> {
    to: W,
    at: u64,
    closed: bool,
}

impl<W: Write> Out<W> {
    fn take(&mut self, piece: Piece<'_>) -> Result<(), BrowseError> {
        let written = match piece {
            Piece::Data(offset, bytes) => {
                self.zeros(offset).and_then(|()| self.to.write_all(bytes)).map(|()| bytes.len())
            }
            Piece::Zeros(end) => self.zeros(end).map(|()| 0),
        };
        let written = written.and_then(|count| self.to.flush().map(|()| count));
        let count = written.map_err(|error| {
            self.closed = error.kind() == io::ErrorKind::BrokenPipe;
            BrowseError::Read { what: format!("the file can't be written: {error}") }
        })?;
        self.at += count as u64;
        Ok(())
    }

    fn zeros(&mut self, end: u64) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        while self.at < end {
            let count = (end - self.at).min(ZEROS.len() as u64);
            self.to.write_all(&ZEROS[..count as usize])?;
            self.at += count;
        }
        Ok(())
    }
}
