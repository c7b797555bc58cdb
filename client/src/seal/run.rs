//! What a run says of its seal: opaque to servers, kept with its snapshots wherever they go.
//!
//! ```text
//! u8       version: 1
//! 8 bytes  id of the master key
//! i64      Unix milliseconds when the run began, by the machine's clock
//! u16, …   name of the machine, its length before it: keys are derived with it
//! 32 bytes a stamp for each disk: keyed BLAKE3 of all of the above, the disk's id, size and sectors, and the digest of its content
//! ```
//!
//! All numbers are little-endian. Each disk has a stamp of its own, so that a server which has taken only some disks of a run, or
//! has merged what lies between runs, still has what proves those.

use janus_proto::ids::{BlockHash, DiskId, MachineKey};

use super::{KeyId, MasterKey, disk::Derived};

const VERSION: u8 = 1;
const STAMP_BYTES: usize = 32;

/// What a stamp is of.
#[derive(Debug, Clone, Copy)]
pub struct SealedDisk<'a> {
    /// The disk.
    pub disk: &'a DiskId,
    /// Its size.
    pub size_bytes: u64,
    /// Its sectors: 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Names its content, as it was sealed.
    pub table_digest: BlockHash,
}

/// Why there is no seal in some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    Newer(u8),
    Malformed,
}

/// A run's seal, of which nothing is believed yet but what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunSeal<'a> {
    /// By which key.
    pub key: KeyId,
    /// Unix milliseconds.
    pub taken_ms: i64,
    /// Whose.
    pub machine: MachineKey,
    head: &'a [u8],
    stamps: &'a [u8],
}

impl<'a> RunSeal<'a> {
    /// Reads a seal; `None`: there is none, or none that is known here.
    pub fn look(bytes: &'a [u8]) -> Option<Self> {
        Self::parse(bytes).ok()
    }

    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Unreadable> {
        let parts = || {
            let (key, rest) = bytes.get(1..)?.split_first_chunk()?;
            let (taken_ms, rest) = rest.split_first_chunk()?;
            let (length, rest) = rest.split_first_chunk()?;
            let (name, stamps) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
            let machine = std::str::from_utf8(name).ok()?.parse().ok()?;
            let head = &bytes[..bytes.len() - stamps.len()];
            let is_whole = !stamps.is_empty() && stamps.len().is_multiple_of(STAMP_BYTES);
            let taken_ms = i64::from_le_bytes(*taken_ms);
            is_whole.then_some(Self { key: KeyId(*key), taken_ms, machine, head, stamps })
        };
        match bytes.first() {
            Some(&VERSION) => parts().ok_or(Unreadable::Malformed),
            Some(&version) if version > VERSION => Err(Unreadable::Newer(version)),
            _ => Err(Unreadable::Malformed),
        }
    }

    /// True when the owner of `key` has sealed this content in this run.
    pub fn proves(&self, key: &MasterKey, disk: &SealedDisk<'_>) -> bool {
        let stamp = blake3::Hash::from_bytes(stamp(&stamp_key(key), self.head, disk));
        // Compared in constant time.
        let mut stamps = self.stamps.chunks_exact(STAMP_BYTES);
        stamps.any(|known| blake3::Hash::from_slice(known).is_ok_and(|known| known == stamp))
    }
}

/// The seal of a run with these disks.
pub(super) fn make(
    key: &MasterKey,
    machine: &MachineKey,
    taken_ms: i64,
    disks: &[SealedDisk<'_>],
) -> Vec<u8> {
    let mut seal = vec![VERSION];
    seal.extend(key.id().0);
    seal.extend(taken_ms.to_le_bytes());
    let name = machine.as_str().as_bytes();
    // Names are shorter by far.
    seal.extend((name.len() as u16).to_le_bytes());
    seal.extend(name);
    let stamp_key = stamp_key(key);
    let stamps: Vec<_> = disks.iter().map(|disk| stamp(&stamp_key, &seal, disk)).collect();
    seal.extend(stamps.as_flattened());
    seal
}

fn stamp_key(key: &MasterKey) -> Derived {
    key.derive("janus-backup 2026-11 sealed machines: stamps of runs", &[])
}

fn stamp(key: &[u8; 32], head: &[u8], disk: &SealedDisk<'_>) -> [u8; STAMP_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in [head, disk.disk.as_str().as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&disk.size_bytes.to_le_bytes());
    hasher.update(&disk.logical_sector_bytes.to_le_bytes());
    hasher.update(&disk.table_digest.0);
    let stamp = *hasher.finalize().as_bytes();
    zeroize::Zeroize::zeroize(&mut hasher);
    stamp
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk(id: &DiskId, digest: u8) -> SealedDisk<'_> {
        let table_digest = BlockHash([digest; 32]);
        SealedDisk { disk: id, size_bytes: 1 << 20, logical_sector_bytes: 512, table_digest }
    }

    #[test]
    fn a_seal_proves_its_own_disks_and_nothing_else() {
        let (key, other) = (MasterKey::of([1; 32]), MasterKey::of([2; 32]));
        let machine: MachineKey = "alice/web1".parse().unwrap();
        let [a, b]: [DiskId; 2] = ["a", "b"].map(|name| name.parse().unwrap());
        let bytes = make(&key, &machine, 5, &[disk(&a, 1), disk(&b, 2)]);
        let seal = RunSeal::look(&bytes).unwrap();
        assert_eq!((seal.key, seal.taken_ms, &seal.machine), (key.id(), 5, &machine));
        assert!(seal.proves(&key, &disk(&a, 1)) && seal.proves(&key, &disk(&b, 2)));
        assert!(!seal.proves(&key, &disk(&a, 2)) && !seal.proves(&key, &disk(&b, 1)));
        assert!(!seal.proves(&other, &disk(&a, 1)));
        for wrong in [
            SealedDisk { size_bytes: 1 << 21, ..disk(&a, 1) },
            SealedDisk { logical_sector_bytes: 4096, ..disk(&a, 1) },
        ] {
            assert!(!seal.proves(&key, &wrong));
        }
        // The most that a run may have stays below what servers take.
        let many = vec![disk(&a, 1); 64];
        let long = format!("{}/{}", "u".repeat(63), "m".repeat(63)).parse().unwrap();
        assert!(make(&key, &long, 5, &many).len() <= 4096);
    }

    #[test]
    fn every_changed_bit_and_every_cut_shows() {
        let key = MasterKey::of([1; 32]);
        let id: DiskId = "a".parse().unwrap();
        let right = make(&key, &"alice/web1".parse().unwrap(), 5, &[disk(&id, 1)]);
        let is_proven = |bytes: &[u8]| {
            RunSeal::look(bytes)
                .is_some_and(|seal| seal.key == key.id() && seal.proves(&key, &disk(&id, 1)))
        };
        assert!(is_proven(&right));
        for bit in 0..right.len() * 8 {
            let mut wrong = right.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_proven(&wrong), "bit {bit}");
        }
        for cut in 0..right.len() {
            assert!(!is_proven(&right[..cut]), "{cut}");
        }
        assert_eq!(RunSeal::parse(&[2, 0]), Err(Unreadable::Newer(2)));
        assert_eq!(RunSeal::parse(&[0]), Err(Unreadable::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = RunSeal::parse(&bytes);
            let _ = RunSeal::parse(&[&[VERSION], &bytes[..]].concat());
        }
    }
}
