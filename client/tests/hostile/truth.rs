//! Under-reads: a volume whose structures were damaged calls nothing free, and nothing unchanged, that isn't so without the damage.
//!
//! The truth is what the same code says of the undamaged image, which `tests/free_space` and `tests/ntfs` compare with the file
//! systems' own tools. `JANUS_FUZZ_SEED` and `JANUS_FUZZ_ROUNDS` as in `xtask::hostile`.

use std::{collections::BTreeMap, io, ops::Range};

use janus_client::{
    fs::{FileSystemKind, free},
    fuzz::{Sparse, encode},
    journal::{Journal, ntfs_usn::NtfsUsn},
    source::view::ReadAt,
};
use janus_proto::ranges::Ranges;
use xtask::noise::Noise;

use super::{images, targets};

const ROUNDS: u64 = 4000;
const SOAK_ROUNDS: u64 = 200_000;

/// An image, and other bytes in some places of it.
struct Damaged<'a> {
    image: &'a [u8],
    bytes: BTreeMap<u64, u8>,
}

impl ReadAt for Damaged<'_> {
    fn len(&self) -> u64 {
        self.image.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.copy_from_slice(&self.image[offset as usize..end as usize]);
        for (at, byte) in self.bytes.range(offset..end) {
            buffer[(at - offset) as usize] = *byte;
        }
        Ok(())
    }
}

/// Stretches that `run` reads of an image.
fn structures(image: &[u8], run: impl Fn(&dyn ReadAt)) -> Vec<Range<u64>> {
    let read = Sparse::decode(&encode(image, run)).places();
    let read: Ranges = read.into_iter().map(|at| at..at + 512).collect();
    assert!(!read.is_empty());
    read.iter().collect()
}

/// 1 to 8 bytes of structures get another value. Of NTFS it is one structure each time: `$Bitmap` and the files' clusters are
/// the only witnesses against each other.
fn damage<'a>(
    image: &'a [u8],
    structures: &[Range<u64>],
    is_ntfs: bool,
    chance: &mut Noise,
) -> Damaged<'a> {
    let mut bytes = BTreeMap::new();
    let one = chance.index(structures.len());
    for _ in 0..=chance.index(8) {
        // Short ones have their share: a log is long.
        let place = &structures[if is_ntfs { one } else { chance.index(structures.len()) }];
        let at = place.start + chance.index((place.end - place.start) as usize) as u64;
        let old = image[at as usize];
        let new = match chance.index(4) {
            0 => old ^ 1 << chance.index(8),
            1 => [0, 0xFF, 1, 0x80][chance.index(4)],
            _ => chance.number() as u8,
        };
        bytes.insert(at, new);
    }
    Damaged { image, bytes }
}

/// Plays rounds; `round` says whether the damage was refused.
fn play(name: &str, mut round: impl FnMut(&mut Noise) -> bool) {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let usual = if std::env::var_os("JANUS_SOAK").is_some() { SOAK_ROUNDS } else { ROUNDS };
    let rounds = number("JANUS_FUZZ_ROUNDS").unwrap_or(usual);
    let first = number("JANUS_FUZZ_SEED");
    let first = first.unwrap_or_else(|| u64::from(std::process::id()) << 32);
    println!("{name}: JANUS_FUZZ_SEED={first}");
    let refused = (first..first + rounds).filter(|seed| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| round(&mut Noise::new(*seed))))
            .unwrap_or_else(|_| panic!("{name}: JANUS_FUZZ_SEED={seed} JANUS_FUZZ_ROUNDS=1"))
    });
    println!("{name}: {} of {rounds} refused, the others true", refused.count());
}

fn free_is_free(command: &str, image: &[u8], kind: FileSystemKind) {
    let truth = free(kind, &Damaged { image, bytes: BTreeMap::new() }).unwrap().unwrap();
    assert!(truth.total() > 1 << 20, "{command}: {truth:?}");
    let places = structures(image, |volume| drop(free(kind, volume)));
    play(command, |chance| {
        let damaged = damage(image, &places, kind == FileSystemKind::Ntfs, chance);
        let Ok(Some(told)) = free(kind, &damaged) else { return true };
        let wrong = told.subtract(&truth);
        assert!(wrong.is_empty(), "{wrong:?} is in use; damaged: {:?}", damaged.bytes);
        false
    });
}

#[test]
fn as_root_what_damaged_ext4_calls_free_is_free() {
    // Without checksums of its bitmaps two wrong bits may cancel out: see `fs::ext4`.
    for (command, mib) in images::EXT4.iter().filter(|(c, _)| c.contains("-O metadata_csum")) {
        free_is_free(command, &images::filled(command, *mib), FileSystemKind::Ext4);
    }
}

#[test]
fn as_root_what_damaged_xfs_calls_free_is_free() {
    for (command, mib) in images::XFS {
        free_is_free(command, &images::filled(command, mib), FileSystemKind::Xfs);
    }
}

#[test]
fn what_damaged_ntfs_calls_free_is_free() {
    free_is_free("mkntfs", &images::ntfs().after, FileSystemKind::Ntfs);
}

#[test]
fn what_a_damaged_ntfs_volume_promises_is_unchanged() {
    let images::Ntfs { before, cursor, after } = images::ntfs();
    let unused = free(FileSystemKind::Ntfs, &Damaged { image: &after, bytes: BTreeMap::new() });
    let unused = unused.unwrap().unwrap();
    let differs = |(number, _): &(u64, _)| {
        let at = *number as usize * 512;
        before[at..at + 512] != after[at..at + 512]
    };
    let changed: Ranges = (0..after.len() as u64 / 512)
        .map(|number| (number, ()))
        .filter(differs)
        .map(|(number, ())| number * 512..(number + 1) * 512)
        .collect();
    // All but the journal's records: these have neither a sum nor a second witness, see `journal::ntfs_usn`.
    let places = structures(&after, |volume| drop(free(FileSystemKind::Ntfs, volume)));
    let all = Ranges::from(0..after.len() as u64);
    let mut promised_bytes = 0;
    play("journal", |chance| {
        let damaged = damage(&after, &places, true, chance);
        let Ok(told) = NtfsUsn::new(&damaged).changes(Some(&cursor)).changes else { return true };
        let free_and_used = told.free.subtract(&unused);
        assert!(free_and_used.is_empty(), "{free_and_used:?} is in use; {:?}", damaged.bytes);
        let promised = all.subtract(&told.changed).subtract(&told.free);
        let wrong = promised.intersect(&changed);
        assert!(wrong.is_empty(), "{wrong:?} has changed; damaged: {:?}", damaged.bytes);
        // The damage is a change, too.
        assert!(damaged.bytes.keys().all(|at| !promised.contains(*at)), "{:?}", damaged.bytes);
        promised_bytes += promised.total();
        false
    });
    assert!(promised_bytes > 0, "nothing was ever promised");
}

#[test]
fn committed_volumes_are_still_valid() {
    let kinds = [
        ("ext4", FileSystemKind::Ext4),
        ("xfs", FileSystemKind::Xfs),
        ("ntfs", FileSystemKind::Ntfs),
    ];
    for (name, kind) in kinds {
        let target = targets().into_iter().find(|target| target.name == name).unwrap();
        for input in xtask::hostile::inputs(env!("CARGO_MANIFEST_DIR"), &target) {
            let volume = Sparse::decode(&input);
            let free = free(kind, &volume).unwrap().unwrap();
            assert!(free.total() > 1 << 20, "{name}: {free:?}");
            if kind == FileSystemKind::Ntfs {
                assert!(NtfsUsn::new(&volume).changes(None).next.is_some());
            }
        }
    }
}
