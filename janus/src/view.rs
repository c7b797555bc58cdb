//! The view file (`view_file`): what this janus knows of its servers, for its next start. A server that is down then is
//! still listed, with its snapshots.
//!
//! A convenience: losing the file costs what its servers tell again as soon as they report. It is replaced as a whole by
//! write, sync, rename. Format: [`MAGIC`], BLAKE3-256 of the rest, then the protobuf of [`View`].

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use prost::Message;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{fleet::Fleet, registry::Remembered};

const MAGIC: &[u8; 8] = b"JANUSVW1";
const SUM_BYTES: usize = 32;
/// A longer file isn't read: 64 servers with their most snapshots take less.
const MAX_BYTES: u64 = 1 << 30;
/// How often changes are written.
const PERIOD: Duration = Duration::from_secs(5);

#[derive(Clone, PartialEq, prost::Message)]
struct View {
    #[prost(message, repeated, tag = "1")]
    servers: Vec<Remembered>,
}

/// Why a view file isn't used.
#[derive(Debug, thiserror::Error)]
enum ViewError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is damaged")]
    Damaged,
    #[error("it is of another version of janus, or no view file")]
    Version,
    #[error("it has more than {MAX_BYTES} bytes")]
    TooLong,
}

/// Reads what a former janus knew. A file that can't be used is said in the log, and replaced later.
pub(crate) fn load(path: &Path) -> Vec<Remembered> {
    match read(path) {
        Ok(servers) => {
            info!(file = %path.display(), servers = servers.len(), "view file read");
            servers
        }
        Err(ViewError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            warn!(file = %path.display(), %error, "the view file is not used: servers that are down are not listed yet");
            Vec::new()
        }
    }
}

fn read(path: &Path) -> Result<Vec<Remembered>, ViewError> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ViewError::TooLong);
    }
    let rest = bytes.strip_prefix(MAGIC).ok_or(ViewError::Version)?;
    let (sum, view) = rest.split_at_checked(SUM_BYTES).ok_or(ViewError::Damaged)?;
    if blake3::hash(view).as_bytes() != sum {
        return Err(ViewError::Damaged);
    }
    Ok(View::decode(view).map_err(|_| ViewError::Damaged)?.servers)
}

fn write(path: &Path, servers: Vec<Remembered>) -> io::Result<()> {
    let view = View { servers }.encode_to_vec();
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    // Names of machines are nobody else's business.
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
    for part in [&MAGIC[..], blake3::hash(&view).as_bytes(), &view] {
        file.write_all(part)?;
    }
    file.sync_all()?;
    fs::rename(partial, path)
}

/// Writes the file whenever something has changed, until `stop`, and then once more.
pub(crate) async fn keep(path: PathBuf, fleet: Fleet, stop: CancellationToken) {
    let (mut saved, mut said) = (0, String::new());
    loop {
        let is_last = stop.run_until_cancelled(sleep(PERIOD)).await.is_none();
        let revision = fleet.registry().revision();
        if revision != saved {
            let (file, servers) = (path.clone(), fleet.remembered());
            let written = tokio::task::spawn_blocking(move || write(&file, servers)).await;
            match written.map_err(io::Error::other).and_then(|written| written) {
                Ok(()) => (saved, said) = (revision, String::new()),
                Err(error) if error.to_string() == said => {}
                Err(error) => {
                    error!(file = %path.display(), %error, "the view file can't be written");
                    said = error.to_string();
                }
            }
        }
        if is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("view");
        assert_eq!(load(&path), []);
        let server = Remembered { server: "a".into(), heard_ms: 7, ..Default::default() };
        write(&path, vec![server.clone()]).unwrap();
        assert_eq!(load(&path), [server]);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(read(&path).is_err(), "byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(read(&path).is_err(), "cut at {at}");
        }
    }
}
