//! Where an NBD export is: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH` (the NBD project's `uri.md`).

use std::{fmt, net::SocketAddr, os::unix::ffi::OsStrExt, path::PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::wire::MAX_STRING_BYTES;

/// Port that IANA gave NBD.
const PORT: u16 = 10_809;
/// What a path keeps as it is.
const PATH: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

/// An export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// How its server is reached.
    pub place: Place,
    /// Its name; the default export has an empty one.
    pub export: String,
    text: String,
}

/// A server's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Over TCP.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// True when `text` is meant to be an NBD URI, also one that isn't understood.
pub fn is_uri(text: &str) -> bool {
    text.split_once(':').is_some_and(|(scheme, rest)| {
        rest.starts_with("//")
            && (scheme == "nbd"
                || scheme == "nbds"
                || scheme.starts_with("nbd+")
                || scheme.starts_with("nbds+"))
    })
}

impl Uri {
    /// Reads it.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("it is no URI")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export)?;
        if export.len() > MAX_STRING_BYTES {
            return Err(format!("the export's name is longer than {MAX_STRING_BYTES} bytes"));
        }
        let place = match scheme {
            "nbd" if query.is_empty() => tcp(authority)?,
            "nbd" => return Err("nbd:// takes no parameters".into()),
            "nbd+unix" => unix(authority, query)?,
            "nbds" | "nbds+unix" => {
                return Err("TLS to an NBD server isn't supported; use a Unix socket, or nbd:// through a tunnel (ssh -L)".into());
            }
            _ => return Err(format!("{scheme}:// is neither nbd:// nor nbd+unix://")),
        };
        Ok(Self { place, export, text: text.to_owned() })
    }

    /// The default export of the server behind a Unix socket.
    pub fn of_socket(path: PathBuf) -> Self {
        let encoded = percent_encode(path.as_os_str().as_bytes(), PATH);
        let text = format!("nbd+unix:///?socket={encoded}");
        Self { place: Place::Unix(path), export: String::new(), text }
    }

    /// The default export of the server at an address.
    pub fn of_address(address: SocketAddr) -> Self {
        let place = Place::Tcp { host: address.ip().to_string(), port: address.port() };
        Self { place, export: String::new(), text: format!("nbd://{address}") }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn tcp(authority: &str) -> Result<Place, String> {
    if authority.contains('@') {
        return Err("NBD without TLS knows no user".into());
    }
    // The address of an IPv6 host stands in brackets and contains colons.
    let bracket = authority.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match authority.get(bracket..).and_then(|rest| rest.find(':')) {
        Some(at) => (&authority[..bracket + at], &authority[bracket + at + 1..]),
        None => (authority, ""),
    };
    let port = match port {
        "" => PORT,
        port => port.parse().map_err(|_| format!("{port:?} is no port"))?,
    };
    let host = decode(host.trim_start_matches('[').trim_end_matches(']'))?;
    if host.is_empty() {
        return Err(
            "the host is missing; a local server is nbd://localhost or nbd+unix:///?socket=PATH"
                .into(),
        );
    }
    Ok(Place::Tcp { host, port })
}

fn unix(authority: &str, query: &str) -> Result<Place, String> {
    if !authority.is_empty() {
        return Err("nbd+unix:// takes no host: write nbd+unix:///EXPORT?socket=PATH".into());
    }
    match query.split_once('=') {
        Some(("socket", path)) if !path.is_empty() && !path.contains('&') => {
            Ok(Place::Unix(decode(path)?.into()))
        }
        _ => Err("it needs exactly one parameter: ?socket=PATH".into()),
    }
}

fn decode(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(Into::into).map_err(|_| format!("{text:?} is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> (Place, String) {
        let uri = Uri::parse(text).unwrap();
        assert_eq!(uri.to_string(), text);
        (uri.place, uri.export)
    }

    fn tcp(host: &str, port: u16) -> Place {
        Place::Tcp { host: host.into(), port }
    }

    #[test]
    fn hosts_ports_and_exports() {
        assert_eq!(place("nbd://host"), (tcp("host", 10_809), String::new()));
        assert_eq!(place("nbd://host:1/a%20b/c"), (tcp("host", 1), "a b/c".into()));
        assert_eq!(place("nbd://[::1]:7/"), (tcp("::1", 7), String::new()));
        assert_eq!(place("nbd://[fe80::2]/x"), (tcp("fe80::2", 10_809), "x".into()));
        assert_eq!(
            place("nbd+unix:///vda?socket=/run/vm=1.sock"),
            (Place::Unix("/run/vm=1.sock".into()), "vda".into())
        );
    }

    #[test]
    fn written_ones_are_read_back() {
        for path in ["/run/x.sock", "/a b/ü&?=%.sock"] {
            let text = Uri::of_socket(path.into()).to_string();
            assert_eq!(place(&text), (Place::Unix(path.into()), String::new()));
        }
        for address in ["127.0.0.1:10809", "[::1]:7"] {
            let uri = Uri::of_address(address.parse().unwrap());
            assert_eq!(place(&uri.to_string()).0, uri.place);
        }
    }

    #[test]
    fn what_is_not_supported_says_so() {
        for (text, part) in [
            ("nbds://host/x", "TLS"),
            ("nbds+unix:///?socket=/x", "TLS"),
            ("nbd+vsock:///", "neither"),
            ("nbd://host?tls=1", "parameters"),
            ("nbd:///x", "host is missing"),
            ("nbd://u@host/x", "user"),
            ("nbd://host:x/", "port"),
            ("nbd+unix:///", "socket=PATH"),
            ("nbd+unix:///?socket=/a&socket=/b", "socket=PATH"),
            ("nbd+unix://host/?socket=/a", "no host"),
            ("nbd://host/%ff", "UTF-8"),
        ] {
            assert!(is_uri(text), "{text}");
            let reason = Uri::parse(text).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
        assert!(!is_uri("/dev/nbd0") && !is_uri("/x/nbd://y") && !is_uri("qcow2:/x"));
    }
}
