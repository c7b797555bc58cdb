//! Damaged file systems: bytes of structures get other values, sums are made right again where they would hide that. Whatever is read then
//! ends as data or as an error, within a bound of time; nothing leaves the target. `JANUS_FUZZ_SEED` repeats a run,
//! `JANUS_FUZZ_ROUNDS` says how many rounds there are.

use std::{
    collections::BTreeSet,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use janus_client::{
    browse::{
        Bounds, BrowseError,
        copy::{Copy, CopyError, Owner, Wishes},
    },
    progress::Progress,
    source::medium::Medium,
};
use tokio_util::sync::CancellationToken;
use xtask::noise::Noise;

use crate::{
    damage::{self, Damaged, Mend},
    images::{self, Image, Plan},
};

const ROUNDS: u64 = 20;
const SOAK_ROUNDS: u64 = 3000;
const SLOWEST: Duration = Duration::from_secs(60);
const BOUNDS: Bounds = Bounds {
    silence: Duration::from_secs(10),
    unanswered_bytes: 4 << 30,
    starts: 4,
    hole_bytes: 1 << 30,
};

/// Sectors of pages that were read to copy everything, where they hold more than one byte again and again.
fn structures(image: &[u8], pages: &BTreeSet<usize>) -> Vec<usize> {
    let is_plain = |sector: &[u8]| sector.iter().all(|byte| *byte == sector[0]);
    let sectors = pages.iter().flat_map(|page| page * 8..page * 8 + 8).map(|sector| sector * 512);
    sectors.filter(|at| image.get(*at..at + 512).is_some_and(|sector| !is_plain(sector))).collect()
}

fn damage(image: &Arc<Vec<u8>>, places: &[usize], mend: Mend, noise: &mut Noise) -> Damaged {
    let mut damaged = Damaged::new(image.clone());
    for _ in 0..=noise.index(12) {
        let at = places[noise.index(places.len())] + noise.index(512);
        let old = damaged.get(at, 1)[0];
        let byte =
            [old ^ 1 << noise.index(8), [0, 0xFF, 1, 0x80][noise.index(4)], old.wrapping_add(1)];
        // A byte, or a field in either order.
        let wide = [0u64, 1, u64::MAX, 1 << 40, 1 << 31, noise.number()][noise.index(6)];
        let len = [1, 2, 4, 8][noise.index(4)];
        let at = (at / len * len).min(image.len() - 8);
        match (len, noise.index(2)) {
            (1, _) => damaged.set(at, &[byte[noise.index(3)]]),
            (_, 0) => damaged.set(at, &wide.to_le_bytes()[..len]),
            _ => damaged.set(at, &wide.to_be_bytes()[8 - len..]),
        }
        mend(&mut damaged, at);
    }
    damaged
}

/// Reads all that can be reached.
fn read_all(medium: Damaged, plan: Plan, out: &std::path::Path) -> Result<u64, CopyError> {
    let range = 0..medium.size_bytes();
    let mut volume = images::open_medium(Arc::new(medium), range, plan.kind, BOUNDS)?;
    let wishes = Wishes { recursive: true, force: false, owner: Owner::Ours };
    let stop = CancellationToken::new();
    let report = Copy::run(&mut volume, b"/", out, wishes, Progress::new(0), stop)?;
    let ended = |(_, reason): &&(String, String)| reason.contains("was ended");
    for (path, reason) in report.skipped.iter().filter(ended) {
        println!("    {path}: {reason}");
    }
    Ok(report.skipped_count)
}

fn ends_as_data_or_error(plan: Plan, mend: Mend) {
    let image = Image::filled_with(plan, |root| {
        fs::create_dir_all(root.join("folder/below")).unwrap();
        for number in 0..120 {
            let folder = ["", "folder", "folder/below"][number % 3];
            let name = format!("a file with a long name {number}");
            fs::write(root.join(folder).join(name), format!("content {number}")).unwrap();
        }
        let large = root.join("large");
        fs::write(&large, vec![b'x'; 90_000]).unwrap();
        if plan.abilities.links {
            std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
        }
    });
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let usual = if std::env::var_os("JANUS_SOAK").is_some() { SOAK_ROUNDS } else { ROUNDS };
    let rounds = number("JANUS_FUZZ_ROUNDS").unwrap_or(usual);
    let first = number("JANUS_FUZZ_SEED").unwrap_or_else(Noise::fresh_seed) >> 8;
    println!("{}: JANUS_FUZZ_SEED={}", plan.name, first << 8);
    let bytes = Arc::new(fs::read(&image.path).unwrap());
    let whole = Damaged::new(bytes.clone());
    let pages = whole.read_pages();
    let out = tempfile::tempdir_in(image.folder.path()).unwrap();
    assert_eq!(read_all(whole, plan, out.path()).unwrap(), 0, "it was not damaged yet");
    let places = structures(&bytes, &pages.lock().unwrap());
    println!("{}: {} sectors of structures", plan.name, places.len());
    let (mut whole, mut parts, mut refused, mut ended) = (0, 0, 0, 0);
    let (began, mut slowest) = (Instant::now(), Duration::ZERO);
    for seed in first..first + rounds {
        let damaged = damage(&bytes, &places, mend, &mut Noise::new(seed));
        let out = tempfile::tempdir_in(image.folder.path()).unwrap();
        fs::create_dir(out.path().join("out")).unwrap();
        let round = Instant::now();
        match read_all(damaged, plan, &out.path().join("out")) {
            Ok(0) => whole += 1,
            Ok(_) => parts += 1,
            Err(CopyError::Browse(BrowseError::Ended { what })) => {
                println!("    seed {}: {what}", seed << 8);
                ended += 1;
            }
            Err(error) => {
                assert!(!matches!(error, CopyError::Interrupted), "{error}");
                refused += 1;
            }
        }
        let took = round.elapsed();
        assert!(took < SLOWEST, "{}: JANUS_FUZZ_SEED={} took {took:?}", plan.name, seed << 8);
        slowest = slowest.max(took);
        let names: Vec<_> =
            fs::read_dir(out.path()).unwrap().map(|one| one.unwrap().file_name()).collect();
        assert_eq!(names, ["out"]);
    }
    println!(
        "{}: {rounds} rounds in {:?}: {whole} whole, {parts} in part, {refused} refused, {ended} ended; the slowest {slowest:?}",
        plan.name,
        began.elapsed()
    );
    assert!(whole + parts > 0, "nothing was ever read");
}

#[test]
fn as_root_damaged_ext4_ends_as_data_or_error() {
    let make = "mkfs.ext4 -q -F -O ^metadata_csum";
    ends_as_data_or_error(Plan { make, mib: 16, ..images::EXT4 }, damage::nothing);
}

#[test]
fn as_root_damaged_xfs_ends_as_data_or_error() {
    ends_as_data_or_error(images::XFS, damage::xfs);
}

#[test]
fn as_root_damaged_btrfs_ends_as_data_or_error() {
    ends_as_data_or_error(Plan { mib: 128, ..images::BTRFS }, damage::btrfs);
}

#[test]
fn as_root_damaged_ntfs_ends_as_data_or_error() {
    ends_as_data_or_error(Plan { mib: 16, ..images::NTFS }, damage::nothing);
}

#[test]
fn damaged_fat_ends_as_data_or_error() {
    ends_as_data_or_error(Plan { mib: 40, ..images::FAT }, damage::nothing);
    ends_as_data_or_error(Plan { mib: 16, ..images::FAT16 }, damage::nothing);
}
