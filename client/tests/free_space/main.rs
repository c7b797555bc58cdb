//! Free space against the file systems' own tools: what is called free is what they call free, and may hold anything.
//! Makes and mounts file systems, so it needs root.

#![allow(clippy::unwrap_used)]

mod volume;

use std::{
    fs,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use janus_client::{
    fs::{FsError, ext4, xfs},
    source::view::ReadAt,
};
use janus_proto::ranges::Ranges;
use rand::{Rng, SeedableRng, rngs::StdRng};
use volume::Volume;
use xtask::site::{Plan, Programs, Site};

/// Tells the free space of a kind of file system.
type Free = fn(&dyn ReadAt) -> Result<Ranges, FsError>;

/// Blocks that `dumpe2fs` calls free, in bytes.
fn dumpe2fs_free(volume: &Volume) -> Ranges {
    let text = volume.output("dumpe2fs");
    let field = |name| {
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value.map(|value| value.trim().parse::<u64>().unwrap())
    };
    let size = field("Block size:").unwrap();
    let mut free = Ranges::new();
    for list in text.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for span in list.split(", ").filter(|span| !span.is_empty()) {
            let (first, last) = span.split_once('-').unwrap_or((span, span));
            let block = |text: &str| text.parse::<u64>().unwrap();
            free.push(block(first) * size..(block(last) + 1) * size);
        }
    }
    // Of the last of several clusters it names the first block only.
    free.outward(field("Cluster size:").unwrap_or(size))
}

/// What `xfs_db` calls free, the groups' free lists among it, in bytes; and how much these lists hold.
fn xfs_db_free(volume: &Volume) -> (Ranges, u64) {
    let ask = |commands: &[&str]| {
        let arguments: Vec<_> = commands.iter().flat_map(|command| ["-c", command]).collect();
        volume.output_of("xfs_db", &[&["-r"], &*arguments].concat())
    };
    let field = |text: &str, name: &str| -> u64 {
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} = ")));
        value.unwrap().parse().unwrap()
    };
    let sb = ask(&["sb 0", "print blocksize agblocks agcount"]);
    let (size, group_blocks) = (field(&sb, "blocksize"), field(&sb, "agblocks"));
    let lists = (0..field(&sb, "agcount"))
        .map(|group| field(&ask(&[&format!("agf {group}"), "print flcount"]), "flcount"));
    let lists: u64 = lists.sum::<u64>() * size;
    let mut free = Ranges::new();
    for line in ask(&["freesp -d"]).lines() {
        let words: Vec<u64> = line.split_whitespace().map_while(|w| w.parse().ok()).collect();
        // A histogram follows, and a header comes first.
        let [group, block, blocks] = *words else { continue };
        let start = (group * group_blocks + block) * size;
        free.insert(start..start + blocks * size);
    }
    (free, lists)
}

#[test]
fn free_space_of_ext4_is_what_dumpe2fs_says_and_may_hold_anything() {
    for (command, mib) in [
        ("mkfs.ext4 -qF", 96),
        ("mkfs.ext4 -qF -b 4096", 400),
        ("mkfs.ext4 -qF -b 1024", 96),
        ("mkfs.ext4 -qF -O ^64bit", 96),
        ("mkfs.ext4 -qF -b 1024 -O meta_bg,^resize_inode", 96),
        ("mkfs.ext4 -qF -b 4096 -O bigalloc -C 16384", 400),
        ("mkfs.ext4 -qF -b 1024 -O ^metadata_csum,uninit_bg", 96),
        ("mkfs.ext4 -qF -b 1024 -O sparse_super2,^resize_inode,^flex_bg", 96),
        ("mkfs.ext4 -qF -b 2048 -O metadata_csum_seed -g 2048", 96),
        ("mkfs.ext3 -qF -b 1024", 64),
        ("mkfs.ext2 -qF -b 1024 -O ^sparse_super,^resize_inode", 64),
        ("mkfs.ext2 -qF -r 0", 64),
    ] {
        let volume = Volume::make(command, mib << 20);
        let empty = ext4::free(&volume.open()).unwrap();
        assert_eq!(empty, dumpe2fs_free(&volume), "{command}, empty");
        let files = volume.fill(7);
        let free = ext4::free(&volume.open()).unwrap();
        assert_eq!(free, dumpe2fs_free(&volume), "{command}");
        volume.overwrite(&free);
        volume.check("fsck.ext4", &["-fn"]);
        assert_eq!(volume.files(), files, "{command}");
        println!("{command}: {} ranges, {} MiB free", free.len(), free.total() >> 20);
    }
}

#[test]
fn free_space_of_xfs_is_what_xfs_db_says_and_may_hold_anything() {
    for (command, mib) in [
        ("mkfs.xfs -qf", 320),
        ("mkfs.xfs -qf -b size=1024 -d agcount=2", 320),
        ("mkfs.xfs -qf -m crc=0,finobt=0", 320),
        ("mkfs.xfs -qf -m crc=0,finobt=0 -b size=1024", 320),
        ("mkfs.xfs -qf -s size=4096 -l su=64k", 320),
        ("mkfs.xfs -qf -m rmapbt=1,reflink=1 -l version=2,size=64m", 512),
        ("mkfs.xfs -qf -b size=1024 -m rmapbt=1 -d agsize=100m", 450),
    ] {
        let volume = Volume::make(command, mib << 20);
        let compare = |when: &str| {
            let free =
                xfs::free(&volume.open()).unwrap_or_else(|e| panic!("{command} {when}: {e}"));
            let (known, lists) = xfs_db_free(&volume);
            assert_eq!(free.subtract(&known), Ranges::new(), "{command}, {when}");
            assert_eq!(known.total() - free.total(), lists, "{command}, {when}");
            free
        };
        compare("empty");
        // Linux no longer mounts version 4.
        let is_mountable = !command.contains("crc=0");
        let files = is_mountable.then(|| volume.fill(9));
        let free = compare("filled");
        volume.overwrite(&free);
        volume.check("xfs_repair", &["-n"]);
        if let Some(files) = files {
            assert_eq!(volume.files(), files, "{command}");
        }
        println!("{command}: {} ranges, {} MiB free", free.len(), free.total() >> 20);
    }
}

#[test]
fn what_is_mounted_has_no_free_space_but_a_frozen_ext4_has() {
    let volume = Volume::make("mkfs.ext4 -qF", 64 << 20);
    let mount = volume.mount(&[]);
    fs::write(mount.path().join("file"), vec![1; 100_000]).unwrap();
    mount.sync();
    let error = ext4::free(&volume.open()).unwrap_err();
    assert!(matches!(error, FsError::NotClean { .. }), "{error}");
    mount.freeze();
    let frozen = ext4::free(&volume.open());
    mount.thaw();
    assert!(frozen.unwrap().total() > 30 << 20);

    let volume = Volume::make("mkfs.xfs -qf", 320 << 20);
    let mount = volume.mount(&[]);
    fs::write(mount.path().join("file"), vec![1; 100_000]).unwrap();
    mount.sync();
    let error = xfs::free(&volume.open()).unwrap_err();
    assert!(matches!(error, FsError::NotClean { .. }), "{error}");
    // What a crash leaves: the file system as it is now.
    let crashed = volume.copy();
    drop(mount);
    assert!(xfs::free(&volume.open()).is_ok());
    assert!(matches!(xfs::free(&crashed.open()), Err(FsError::NotClean { .. })));
}

/// NTFS has the same in the tests called `ntfs`.
#[test]
fn restored_without_their_free_space_volumes_pass_their_checks_and_have_all_files() {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let kinds: [(&str, u64, (&str, &str), Free); 2] = [
        ("mkfs.ext4 -qF", 96, ("fsck.ext4", "-fn"), ext4::free),
        ("mkfs.xfs -qf", 320, ("xfs_repair", "-n"), xfs::free),
    ];
    let volumes =
        kinds.map(|(command, mib, check, free)| (Volume::make(command, mib << 20), check, free));
    let disks = ["ext4", "xfs"].iter().zip(&volumes);
    let disks: Vec<_> =
        disks.map(|(name, (volume, ..))| format!("{name}={}", volume.path().display())).collect();
    let mut client = site.client("machine", &disks).unwrap();
    client.settings.set("skip_free", true);
    for seed in [7, 8] {
        // The second time much of what was free isn't, and the other way round.
        let filled = volumes.iter().map(|(volume, _, free)| {
            let (files, free) = (volume.fill(seed), free(&volume.open()).unwrap());
            volume.overwrite(&free);
            (files, free)
        });
        let filled: Vec<_> = filled.collect();
        let taken = client.backup().unwrap();
        for (disk, ((files, free), (_, (program, argument), _))) in
            taken.disks.iter().zip(filled.iter().zip(&volumes))
        {
            assert_eq!(disk.reading["zero_bytes"], free.total(), "{disk:?}");
            let restored = Volume::filled_by(|path| {
                client.restore(&disk.snapshot_id, path).unwrap();
            });
            let bytes = fs::read(restored.path()).unwrap();
            // Of a block of ours that is free in part all is kept.
            let has_data = |range: Range<u64>| {
                let (start, end) = (range.start.next_multiple_of(4096), range.end / 4096 * 4096);
                (start..end).any(|at| bytes[at as usize] != 0)
            };
            assert!(!free.iter().any(has_data), "free space of {} came along", disk.disk_id);
            restored.check(program, &[*argument]);
            assert!(restored.files() == *files, "{}", disk.disk_id);
        }
    }
}

/// A volume with some bytes changed, that counts what is read of it.
struct Mutated<'a> {
    bytes: &'a [u8],
    changes: Vec<(u64, u8)>,
    read: AtomicU64,
}

impl ReadAt for Mutated<'_> {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        buffer.copy_from_slice(&self.bytes[offset as usize..end as usize]);
        for (at, byte) in self.changes.iter().filter(|(at, _)| (offset..end).contains(at)) {
            buffer[(at - offset) as usize] = *byte;
        }
        Ok(())
    }
}

fn mutate(command: &str, mib: u64, places: &[Range<u64>], free: Free) {
    let volume = Volume::make(command, mib << 20);
    if !command.contains("crc=0") {
        volume.fill(3);
    }
    let bytes = fs::read(volume.path()).unwrap();
    let (mut refused, mut slowest) = (0, Duration::ZERO);
    for seed in 0..1500 {
        let mut chance = StdRng::seed_from_u64(seed);
        let changes = (0..chance.random_range(1..6)).map(|_| {
            let place = places[chance.random_range(0..places.len())].clone();
            let byte = [0, 1, 0x7F, 0x80, 0xFF, chance.random()][chance.random_range(0..6)];
            (chance.random_range(place), byte)
        });
        let changes = changes.collect();
        let volume = Mutated { bytes: &bytes, changes, read: AtomicU64::new(0) };
        let began = Instant::now();
        match free(&volume) {
            Ok(ranges) => assert!(ranges.iter().all(|range| range.end <= volume.len())),
            Err(_) => refused += 1,
        }
        slowest = slowest.max(began.elapsed());
        let read = volume.read.into_inner();
        assert!(read < 2 * volume.bytes.len() as u64, "seed {seed}: {read} bytes read");
        assert!(began.elapsed() < Duration::from_secs(10), "seed {seed}");
    }
    println!("{command}: {refused} of 1500 refused, the slowest took {slowest:?}");
}

#[test]
fn mutated_structures_never_panic_hang_or_reach_past_the_volume() {
    // Without sums first: mutations reach everything behind them.
    let ext = [1024..1300, 2048..4096];
    mutate("mkfs.ext4 -qF -b 1024 -O ^metadata_csum,^uninit_bg", 64, &ext, ext4::free);
    mutate(
        "mkfs.ext4 -qF -b 4096 -O bigalloc,^metadata_csum",
        64,
        &[1024..1400, 4096..4300],
        ext4::free,
    );
    mutate("mkfs.ext4 -qF -b 1024", 64, &ext, ext4::free);
    let xfs = [0..256, 512..768, 4096..8192];
    mutate("mkfs.xfs -qf -m crc=0,finobt=0", 320, &xfs, xfs::free);
    mutate("mkfs.xfs -qf", 320, &xfs, xfs::free);
}
