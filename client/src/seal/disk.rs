//! A disk's own key, and its blocks.

use std::{fmt, sync::Arc};

use janus_proto::{
    hash::is_zero,
    ids::{BLOCK_BYTES, DiskId, MachineKey},
};
use zeroize::Zeroizing;

use super::{
    KeyId, MasterKey, SealError, SealedDisk, run,
    xts::{KEY_BYTES, Xts},
};

const SECTOR_BYTES: u64 = 512;

/// Seals for one machine: its master key, and the name that keys of its disks are derived with.
#[derive(Debug, Clone)]
pub struct Sealer {
    master: Arc<MasterKey>,
    machine: MachineKey,
}

impl Sealer {
    /// Seals for `machine`.
    pub fn new(master: Arc<MasterKey>, machine: MachineKey) -> Self {
        Self { master, machine }
    }

    /// Its key.
    pub fn key(&self) -> KeyId {
        self.master.id()
    }

    /// What seals and opens the blocks of a disk.
    ///
    /// # Errors
    /// When it isn't made of whole sectors.
    pub fn disk(&self, disk: &DiskId, size_bytes: u64) -> Result<DiskSeal, SealError> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(SealError::Size { disk: disk.clone(), size_bytes });
        }
        let names = [self.machine.as_str().as_bytes(), disk.as_str().as_bytes()];
        let [data, tweak, kind] = [
            "janus-backup 2026-11 sealed disks: XTS data key",
            "janus-backup 2026-11 sealed disks: XTS tweak key",
            "janus-backup 2026-11 sealed disks: kind of content",
        ]
        .map(|context| self.master.derive(context, &names));
        let kind = hex::encode(kind.first_chunk::<8>().unwrap_or(&[0; 8]));
        Ok(DiskSeal { xts: Xts::new(&data, &tweak), kind, sealer: self.clone() })
    }

    /// The seal of a run of which this is the content. `taken_ms` are Unix milliseconds.
    pub fn run(&self, taken_ms: i64, disks: &[SealedDisk<'_>]) -> Vec<u8> {
        run::make(&self.master, &self.machine, taken_ms, disks)
    }
}

/// Seals and opens the blocks of one disk. May be used by several threads at once.
///
/// A block's tweak is its number on the disk. Blocks of zeros stay zeros in both directions: where zeros are is no secret, and a
/// disk that is mostly empty stays cheap. (That some other block would become zeros has a chance of less than 2^-4096.)
pub struct DiskSeal {
    xts: Xts,
    kind: String,
    sealer: Sealer,
}

impl fmt::Debug for DiskSeal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskSeal").field("key", &self.sealer.key()).finish_non_exhaustive()
    }
}

impl DiskSeal {
    /// Seals whole blocks, the last one of the disk being as short as it is, from the byte `offset` of the disk on.
    pub fn seal(&self, offset: u64, bytes: &mut [u8]) {
        each(offset, bytes, |block, bytes| self.xts.encrypt(block, bytes));
    }

    /// Opens them.
    pub fn open(&self, offset: u64, bytes: &mut [u8]) {
        each(offset, bytes, |block, bytes| self.xts.decrypt(block, bytes));
    }

    /// Tells apart what hashes are of: the same for the same key, machine and disk only.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Who seals.
    pub fn sealer(&self) -> &Sealer {
        &self.sealer
    }
}

fn each(offset: u64, bytes: &mut [u8], work: impl Fn(u64, &mut [u8])) {
    debug_assert!(offset.is_multiple_of(BLOCK_BYTES));
    for (block, bytes) in (offset / BLOCK_BYTES..).zip(bytes.chunks_mut(BLOCK_BYTES as usize)) {
        if !is_zero(bytes) {
            work(block, bytes);
        }
    }
}

const _: () = assert!(KEY_BYTES == 32, "a derived key is the key of a cipher");

/// A derived key.
pub(super) type Derived = Zeroizing<[u8; KEY_BYTES]>;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealer(key: u8, machine: &str) -> Sealer {
        Sealer::new(Arc::new(MasterKey::of([key; 32])), machine.parse().unwrap())
    }

    fn disk(key: u8, machine: &str, disk: &str) -> DiskSeal {
        sealer(key, machine).disk(&disk.parse().unwrap(), 1 << 30).unwrap()
    }

    fn sealed(seal: &DiskSeal, offset: u64, clear: &[u8]) -> Vec<u8> {
        let mut bytes = clear.to_vec();
        seal.seal(offset, &mut bytes);
        bytes
    }

    #[test]
    fn each_key_machine_disk_and_place_gives_another_content() {
        let clear = [7; 4096];
        let mut all = vec![
            sealed(&disk(1, "a/b", "c"), 0, &clear),
            sealed(&disk(2, "a/b", "c"), 0, &clear),
            sealed(&disk(1, "a/bb", "c"), 0, &clear),
            sealed(&disk(1, "a/b", "bc"), 0, &clear),
            sealed(&disk(1, "a/b", "c"), 4096, &clear),
        ];
        all.push(clear.to_vec());
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_ne!(disk(1, "a/b", "c").kind(), disk(1, "a/b", "d").kind());
        assert_eq!(disk(1, "a/b", "c").kind(), disk(1, "a/b", "c").kind());
    }

    #[test]
    fn nothing_that_is_printed_holds_a_key() {
        let seal = disk(0xAB, "a/b", "c");
        let printed = format!("{seal:?} {:?}", seal.sealer());
        assert!(printed.contains(&seal.sealer().key().to_string()), "{printed}");
        assert!(!printed.to_lowercase().contains("abab") && !printed.contains("171"), "{printed}");
    }

    #[test]
    fn disks_without_whole_sectors_are_refused() {
        for size in [0, 15, 511, 4095, 4096 + 100] {
            let refused = sealer(1, "a/b").disk(&"c".parse().unwrap(), size);
            assert!(matches!(refused, Err(SealError::Size { .. })), "{size}");
        }
    }

    proptest! {
        /// However a read is cut at blocks, and whatever of it is zeros.
        #[test]
        fn what_was_sealed_in_pieces_is_opened_as_one(
            first in 0..5000u64,
            blocks in prop::collection::vec(0..4u8, 1..20),
            short in 1..=8usize,
            cut in any::<prop::sample::Index>(),
        ) {
            let seal = disk(9, "a/b", "c");
            let mut clear: Vec<u8> = Vec::new();
            for (at, kind) in blocks.iter().enumerate() {
                clear.extend(std::iter::repeat_n(*kind * (at as u8 + 1), 4096));
            }
            clear.truncate(clear.len() - 4096 + short * 512);
            let mut pieces = clear.clone();
            let middle = cut.index(blocks.len()) * 4096;
            let (one, two) = pieces.split_at_mut(middle);
            seal.seal(first * 4096, one);
            seal.seal(first * 4096 + middle as u64, two);
            prop_assert_eq!(&pieces, &sealed(&seal, first * 4096, &clear));
            for (sealed, clear) in pieces.chunks(4096).zip(clear.chunks(4096)) {
                prop_assert_eq!(is_zero(sealed), is_zero(clear));
                prop_assert!(is_zero(clear) || sealed != clear);
            }
            seal.open(first * 4096, &mut pieces);
            prop_assert_eq!(pieces, clear);
        }
    }
}
