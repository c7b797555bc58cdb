//! Handshakes that have begun, by address: whoever holds or makes many of them, with or without a certificate, takes nobody
//! else's place.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;

/// More addresses than these are not remembered: those that may begin with a full budget go first.
const MAX_KNOWN: usize = 16 << 10;

/// What is known of each address.
#[derive(Debug, Clone)]
pub(super) struct Addresses {
    at_once: usize,
    per_second: u32,
    saved: u32,
    known: Arc<Mutex<HashMap<IpAddr, Known>>>,
}

#[derive(Debug)]
struct Known {
    unfinished: usize,
    left: f64,
    at: Instant,
}

/// Why a handshake is not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// So many are unfinished.
    TooMany,
    /// So many were begun lately.
    TooOften,
}

impl Addresses {
    /// `at_once` unfinished handshakes of each address, and `per_second` new ones, `saved` of which may come together.
    pub fn new(at_once: usize, per_second: u32, saved: u32) -> Self {
        Self { at_once, per_second, saved, known: Arc::default() }
    }

    /// A handshake of `address`, which is over when the answer is dropped.
    pub fn begin(&self, address: IpAddr) -> Result<Handshaking, Refused> {
        let (address, now) = (network(address), Instant::now());
        let mut known = self.known();
        if known.len() >= MAX_KNOWN {
            known.retain(|_, known| known.unfinished > 0 || self.left(known, now) < 1.0);
        }
        let entry = known.entry(address).or_insert(Known {
            unfinished: 0,
            left: f64::from(self.saved),
            at: now,
        });
        entry.left = self.left(entry, now);
        entry.at = now;
        if entry.unfinished >= self.at_once {
            return Err(Refused::TooMany);
        }
        if entry.left < 1.0 {
            return Err(Refused::TooOften);
        }
        entry.left -= 1.0;
        entry.unfinished += 1;
        Ok(Handshaking { addresses: self.clone(), address })
    }

    fn left(&self, known: &Known, now: Instant) -> f64 {
        let saved = (now - known.at).as_secs_f64() * f64::from(self.per_second);
        (known.left + saved).min(f64::from(self.saved))
    }

    // A panic elsewhere leaves the numbers as they are.
    fn known(&self) -> MutexGuard<'_, HashMap<IpAddr, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of IPv6 the /64, which one host has all of.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// A handshake that has begun.
#[derive(Debug)]
pub(super) struct Handshaking {
    addresses: Addresses,
    address: IpAddr,
}

impl Drop for Handshaking {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut known = self.addresses.known();
        let Some(entry) = known.get_mut(&self.address) else { return };
        entry.unfinished = entry.unfinished.saturating_sub(1);
        let is_idle = entry.unfinished == 0;
        // Nothing to remember, or the table would grow with everybody who ever came.
        if is_idle && self.addresses.left(entry, now) >= f64::from(self.addresses.saved) {
            known.remove(&self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_address_has_its_own_places_and_its_own_rate() {
        let addresses = Addresses::new(2, 10, 4);
        let (one, other): (IpAddr, IpAddr) =
            ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let held: Vec<_> = (0..2).map(|_| addresses.begin(one).unwrap()).collect();
        assert_eq!(addresses.begin(one).unwrap_err(), Refused::TooMany);
        addresses.begin(other).unwrap();
        drop(held);
        for _ in 0..2 {
            addresses.begin(one).unwrap();
        }
        assert_eq!(addresses.begin(one).unwrap_err(), Refused::TooOften);
        tokio::time::advance(Duration::from_millis(100)).await;
        addresses.begin(one).unwrap();
        assert_eq!(addresses.begin(one).unwrap_err(), Refused::TooOften);
    }

    #[tokio::test(start_paused = true)]
    async fn hosts_with_many_addresses_are_one_and_old_ones_are_forgotten() {
        let addresses = Addresses::new(1, 10, 4);
        let held = addresses.begin("2001:db8::1".parse().unwrap()).unwrap();
        let same = addresses.begin("2001:db8::ffff:1".parse().unwrap());
        assert_eq!(same.unwrap_err(), Refused::TooMany);
        let mapped = addresses.begin("::ffff:192.0.2.1".parse().unwrap()).unwrap();
        assert!(addresses.begin("192.0.2.1".parse().unwrap()).is_err());
        tokio::time::advance(Duration::from_secs(1)).await;
        drop((held, mapped));
        assert!(addresses.known().is_empty());
    }
}
