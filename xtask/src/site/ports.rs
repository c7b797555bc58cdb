//! Ports for programs that are about to start.

use std::{
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, bail};

use crate::noise::Noise;

/// Ports that are free now, and that no other call gets until this process has ended: a server that is down finds its port
/// free when it starts again, whatever runs beside. They lie below the range that outgoing connections take theirs from
/// (Linux: 32768 and up): a port of that range can be taken, or even connect to itself, while its server is down.
///
/// # Errors
/// When none is found.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    let mut noise = Noise::new(Noise::fresh_seed());
    let mut held = Vec::new();
    for _ in 0..10_000 {
        let port = 20_000 + noise.below(12_000) as u16;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port))
            && reserve(port)?
        {
            held.push((port, listener));
        }
        if held.len() == count {
            return Ok(held.into_iter().map(|(port, _)| port).collect());
        }
    }
    bail!("no free ports between 20000 and 32000")
}

/// Takes a port for this process, by a name that the kernel gives to one process at a time; false when it is taken.
fn reserve(port: u16) -> Result<bool> {
    static TAKEN: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    let name = SocketAddr::from_abstract_name(format!("janus-test-port-{port}"))?;
    match UnixListener::bind_addr(&name) {
        Ok(taken) => {
            TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(taken);
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(false),
        Err(error) => Err(error).context("reserve a port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once_though_nothing_listens() {
        let [port] = free_ports(1).unwrap()[..] else { panic!("not one port") };
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok());
        assert!(!reserve(port).unwrap());
    }
}
