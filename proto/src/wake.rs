//! Waking hosts up: magic packets of Wake-on-LAN.
//!
//! A packet is a wish: nobody acknowledges it, and a host that is on ignores it.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use tokio::net::UdpSocket;

/// The port that is customary, "discard".
const PORT: u16 = 9;
/// Packets of one call: some may be lost.
const COPIES: usize = 2;

/// Not a host to wake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no host to wake; write 00:11:22:33:44:55, or 00:11:22:33:44:55@192.168.1.255 with its network's broadcast address"
)]
pub struct WakeError(pub String);

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = WakeError;

    fn from_str(text: &str) -> Result<Self, WakeError> {
        let byte = |part: &str| {
            let is_hex = part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
            is_hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split([':', '-']).map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        // Neither nobody nor everybody, nor a group.
        let bytes = bytes.filter(|bytes| bytes[0] & 1 == 0 && *bytes != [0; 6]);
        bytes.map(Self).ok_or_else(|| WakeError(text.to_owned()))
    }
}

/// Where packets go: all of the network by default.
///
/// # Errors
/// When it is neither an address nor an address with a port.
pub fn place(text: &str) -> Result<SocketAddr, WakeError> {
    let address = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let place = address.map(|address| SocketAddr::new(address, PORT));
    place.or_else(|_| text.parse()).map_err(|_| WakeError(text.to_owned()))
}

/// The address of everybody on the link of the default route.
pub const EVERYBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::BROADCAST), PORT);

/// A host to wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sleeper {
    /// Its hardware address.
    pub mac: Mac,
    /// Where the packet goes, so that the host gets it though it has no address now.
    pub to: SocketAddr,
}

impl FromStr for Sleeper {
    type Err = WakeError;

    fn from_str(text: &str) -> Result<Self, WakeError> {
        let bad = |_| WakeError(text.to_owned());
        match text.split_once('@') {
            None => Ok(Self { mac: text.parse().map_err(bad)?, to: EVERYBODY }),
            Some((mac, to)) => {
                Ok(Self { mac: mac.parse().map_err(bad)?, to: place(to).map_err(bad)? })
            }
        }
    }
}

/// Six bytes of ones, and the address sixteen times.
fn magic_packet(mac: Mac) -> Vec<u8> {
    let mut packet = vec![0xff; 6];
    packet.extend(std::iter::repeat_n(mac.0, 16).flatten());
    packet
}

/// Sends the packets.
///
/// # Errors
/// As the system says: no network, or an address that can't be reached.
pub async fn wake(sleeper: &Sleeper) -> io::Result<()> {
    let from: IpAddr = match sleeper.to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((from, 0)).await?;
    if sleeper.to.is_ipv4() {
        socket.set_broadcast(true)?;
    }
    for _ in 0..COPIES {
        socket.send_to(&magic_packet(sleeper.mac), sleeper.to).await?;
    }
    Ok(())
}

/// The same, and says in the log what came of it.
pub async fn wake_and_tell(sleeper: &Sleeper) {
    let Sleeper { mac, to } = sleeper;
    match wake(sleeper).await {
        Ok(()) => tracing::info!(%mac, %to, "sent a magic packet"),
        Err(error) => {
            tracing::warn!(%mac, %to, %error, "can't send a magic packet; name the broadcast address of the servers' network: MAC@ADDRESS");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_hardware_addresses_with_a_broadcast_address() {
        let parse = |text: &str| text.parse::<Sleeper>();
        let plain = parse("00:11:22:aA:44:55").unwrap();
        assert_eq!((plain.mac.to_string().as_str(), plain.to), ("00:11:22:aa:44:55", EVERYBODY));
        assert_eq!(
            parse("00-11-22-33-44-55@10.0.0.255").unwrap().to,
            "10.0.0.255:9".parse().unwrap()
        );
        assert_eq!(parse("00:11:22:33:44:55@10.0.0.255:7").unwrap().to.port(), 7);
        assert_eq!(parse("00:11:22:33:44:55@[ff02::1]:7").unwrap().to.port(), 7);
        for bad in [
            "",
            "00:11:22:33:44",
            "00:11:22:33:44:5",
            "00:11:22:33:44:55:66",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "00:11:22:33:44:+5",
            "00:11:22:33:44:55@",
            "00:11:22:33:44:55@host",
        ] {
            assert!(parse(bad).unwrap_err().to_string().contains(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_magic_packet_arrives() {
        let listener = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let mac: Mac = "00:11:22:33:44:55".parse().unwrap();
        wake(&Sleeper { mac, to }).await.unwrap();
        let mut packet = [0; 200];
        let length = listener.recv(&mut packet).await.unwrap();
        assert_eq!(length, 102);
        assert_eq!(packet[..6], [0xff; 6]);
        assert!(packet[6..102].chunks(6).all(|part| part == mac.0));
    }
}
