//! Where clients knock: a Unix socket that only this user may open, or a loopback address.
//!
//! A crash leaves the socket's name; whoever opens the same door next replaces it once nobody listens behind it.

use std::{
    fs::{self, File},
    io,
    net::{SocketAddr, TcpListener},
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, fchmod, flock},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use super::{ExportError, socket::Socket};
use crate::nbd::Uri;

const BACKLOG: i32 = 128;

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// A socket to make.
    Socket(PathBuf),
    /// Must be loopback; port 0: any that is free.
    Address(SocketAddr),
}

/// An open door; its socket's name goes with it.
#[derive(Debug)]
pub struct Door {
    listener: Listener,
    uri: Uri,
}

#[derive(Debug)]
enum Listener {
    Tcp(tokio::net::TcpListener),
    Unix { listener: tokio::net::UnixListener, _name: Name },
}

impl Door {
    /// Listens. Needs a tokio runtime.
    ///
    /// # Errors
    /// When somebody else does, when others could reach it, or when the system refuses.
    pub fn open(at: &At) -> Result<Self, ExportError> {
        match at {
            At::Address(address) if !address.ip().is_loopback() => {
                Err(ExportError::NotLoopback { address: *address })
            }
            At::Address(address) => Self::tcp(*address).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => ExportError::InUse { place: address.to_string() },
                _ => ExportError::Listen { place: address.to_string(), source: error },
            }),
            At::Socket(path) => Self::unix(path),
        }
    }

    fn tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let uri = Uri::of_address(listener.local_addr()?);
        Ok(Self { listener: Listener::Tcp(tokio::net::TcpListener::from_std(listener)?), uri })
    }

    fn unix(path: &Path) -> Result<Self, ExportError> {
        let place = || path.display().to_string();
        let failed = |source| ExportError::Listen { place: place(), source };
        // Two that both find a dead socket must not remove each other's new one.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = File::open(folder.unwrap_or(Path::new("."))).map_err(failed)?;
        let _ = flock(&folder, FlockOperation::LockExclusive);
        make_way(path)?;
        let listener = private_listener(path).map_err(failed)?;
        let _name = Name::of(path).map_err(failed)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
        // Relative paths would mean something else to clients in other folders.
        let whole = std::path::absolute(path).map_err(failed)?;
        Ok(Self { listener: Listener::Unix { listener, _name }, uri: Uri::of_socket(whole) })
    }

    /// How clients reach it.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The next client.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        match &self.listener {
            Listener::Tcp(tcp) => {
                let tcp = tcp.accept().await?.0.into_std()?;
                tcp.set_nonblocking(false)?;
                tcp.set_nodelay(true)?;
                Ok(Socket::Tcp(tcp))
            }
            Listener::Unix { listener, .. } => {
                let unix = listener.accept().await?.0.into_std()?;
                unix.set_nonblocking(false)?;
                Ok(Socket::Unix(unix))
            }
        }
    }
}

/// Removes a socket that nobody listens behind.
fn make_way(path: &Path) -> Result<(), ExportError> {
    let failed = |source| ExportError::Listen { place: path.display().to_string(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ExportError::NoSocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        // Its backlog may be full, or it belongs to somebody else: not ours to remove.
        _ => Err(ExportError::InUse { place: path.display().to_string() }),
    }
}

/// The name never stands there with other permissions: Linux gives it those of the socket that is bound.
fn private_listener(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// The name of our socket; removed with it, unless somebody else has it by now.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    file: (u64, u64),
}

impl Name {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: file(path)? })
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if file(&self.path).is_ok_and(|file| file == self.file) {
            // Whoever comes next replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn open(path: &Path) -> Result<Door, ExportError> {
        Door::open(&At::Socket(path.to_owned()))
    }

    #[tokio::test]
    async fn a_socket_is_its_users_alone_and_goes_with_its_door() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let door = open(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
        assert_eq!(door.uri().to_string(), format!("nbd+unix:///?socket={}", path.display()));
        drop(door);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_live_socket_is_refused_and_a_dead_one_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let door = open(&path).unwrap();
        assert!(matches!(open(&path), Err(ExportError::InUse { .. })));
        drop(door);
        // What a killed process leaves.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let door = open(&path).unwrap();
        // Somebody else has the name by now.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(door);
        assert!(path.exists());
        assert!(matches!(open(&path), Err(ExportError::NoSocket { .. })));
        let nowhere = folder.path().join("missing/x.sock");
        assert!(matches!(open(&nowhere), Err(ExportError::Listen { .. })));
    }

    #[tokio::test]
    async fn only_loopback_is_listened_on() {
        for address in ["0.0.0.0:0", "192.0.2.1:10809", "[::]:0"] {
            let at = At::Address(address.parse().unwrap());
            assert!(matches!(Door::open(&at), Err(ExportError::NotLoopback { .. })), "{address}");
        }
        let door = Door::open(&At::Address("127.0.0.1:0".parse().unwrap())).unwrap();
        let taken = door.uri().to_string().replace("nbd://", "").parse().unwrap();
        assert!(matches!(Door::open(&At::Address(taken)), Err(ExportError::InUse { .. })));
    }
}
