//! Single facts about the cache.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use janus_proto::{
    hash::{hash_block, zero_hash},
    ids::{DiskId, SEGMENT_BYTES},
};

use crate::cache::{
    CacheError, DiskCache, FreshReason,
    manifest::{self, FORMAT},
    tests::invariant::copy,
    tests::model::{Content, Until, World, back_up, server, table},
};

fn disk_id() -> DiskId {
    "disk".parse().unwrap()
}

fn disk(segments: u64) -> Content {
    let mut disk = Content::zeros(segments * SEGMENT_BYTES + 512);
    disk.blocks.iter_mut().enumerate().for_each(|(at, block)| *block = at as u32 % 5000);
    disk
}

#[test]
fn a_second_opener_is_told_that_it_is_busy() {
    let folder = tempfile::tempdir().unwrap();
    let first = DiskCache::open(folder.path(), &disk_id(), 4096).unwrap();
    assert!(matches!(
        DiskCache::open(folder.path(), &disk_id(), 4096),
        Err(CacheError::Busy { .. })
    ));
    drop(first);
    DiskCache::open(folder.path(), &disk_id(), 4096).unwrap();
}

#[test]
fn an_empty_cache_says_zeros_of_the_true_length() {
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path(), &disk_id(), SEGMENT_BYTES + 4096 + 512).unwrap();
    assert_eq!(cache.segment(1).unwrap(), [zero_hash(4096), zero_hash(512)]);
    assert!(cache.is_zero_segment(0));
    assert_eq!(
        cache.segment_digests().unwrap(),
        Content::zeros(SEGMENT_BYTES + 4096 + 512).digests()
    );
    assert!(matches!(cache.segment(2), Err(CacheError::PastEnd { segment: 2, .. })));
    assert!(matches!(
        cache.stage().put(1, &[(2, hash_block(b"x"))]),
        Err(CacheError::PastEnd { .. })
    ));
}

#[test]
fn generations_come_through_compaction_and_take_one_database() {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = disk(9);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    for round in 0..40u32 {
        disk.blocks
            .iter_mut()
            .skip(round as usize * 3)
            .step_by(97)
            .for_each(|block| *block = 10_000 + round);
        disk.blocks[round as usize * 20..][..10].fill(0);
        back_up(&cache, &mut world, &server(round as usize % 2), &disk, Until::Done).unwrap();
        world.check(&cache).unwrap();
    }
    let expected: Vec<_> = (0..disk.blocks.len() as u64).map(|block| disk.hash(block)).collect();
    assert_eq!(table(&cache).unwrap(), expected);
    drop(cache);
    let databases: Vec<_> = fs::read_dir(folder.path().join("disk"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("db-"))
        .collect();
    // 40 runs of two layers each (the model reads some segments twice), compacted whenever there are more than 16.
    assert_eq!(databases, ["db-6"]);
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    assert_eq!((cache.fresh_reason(), cache.cursor()), (None, b"cursor".to_vec()));
    assert_eq!(table(&cache).unwrap(), expected);
    world.check(&cache).unwrap();
}

#[test]
fn what_is_learned_without_a_server_is_lacked_by_all_and_outlives_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = disk(3);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
    let head = cache.head(&server(0));
    disk.blocks[7] = 70_000;
    disk.blocks[1030] = 0;
    let stage = cache.stage();
    for segment in 0..4 {
        stage.put_hashes(segment, &disk.segment(segment)).unwrap();
    }
    cache.learn(stage).unwrap();
    let expected: Vec<_> = (0..disk.blocks.len() as u64).map(|block| disk.hash(block)).collect();
    drop(cache);
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    assert_eq!(table(&cache).unwrap(), expected);
    assert_eq!((cache.head(&server(0)), cache.cursor()), (head, Vec::new()));
    assert_eq!(cache.servers(), [server(0)]);
    // The server lacks just these blocks.
    world.check(&cache).unwrap();
    let must = cache.must_send(&server(0));
    assert!(must.segment_bits(0)[0] == 1 << 7 && must.segment_bits(1)[0] == 1 << 6);
}

#[test]
fn a_stage_that_is_dropped_leaves_nothing_and_a_late_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(2);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    let late = cache.stage();
    late.put(0, &[(7, hash_block(b"late"))]).unwrap();
    back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
    let head = cache.head(&server(0)).unwrap();
    assert!(matches!(
        cache.commit(late, &server(0), head, Vec::new()),
        Err(CacheError::StaleStage)
    ));
    world.check(&cache).unwrap();
    let before = table(&cache).unwrap();
    drop(cache);
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    assert_eq!(table(&cache).unwrap(), before);
    let live = cache.shared.read();
    let mut named: Vec<_> = live.state.layers.iter().map(|placed| placed.layer.id).collect();
    named.sort_unstable();
    assert_eq!(live.engine.ids(crate::cache::engine::HASHES).unwrap(), named, "orphans are swept");
}

#[test]
fn adopting_other_content_forgets_the_cursor() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(1);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
    let head = cache.head(&server(0)).unwrap();
    assert_eq!(cache.cursor(), b"cursor");
    cache.adopt(&server(1), None, []).unwrap();
    assert_eq!(cache.cursor(), b"cursor", "nothing differed");
    cache.adopt(&server(1), None, [(0, Content::zeros(disk.size_bytes).segment(0))]).unwrap();
    assert_eq!(cache.cursor(), b"");
    // T is the other server's now: what differs must go to the first even though its head is known.
    assert_eq!(cache.head(&server(0)), Some(head));
    assert_eq!(cache.must_send(&server(0)).count(), 1023);
}

#[test]
fn an_open_sessions_content_is_not_believed_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(1);
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    cache.adopt(&server(0), None, [(0, disk.segment(0))]).unwrap();
    assert!(cache.must_send(&server(0)).is_nothing());
    drop(cache);
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    assert!(cache.must_send(&server(0)).is_everything());
    assert_eq!(cache.segment(0).unwrap(), disk.segment(0));
}

/// sled would take the file for its newest snapshot and give the database up.
#[test]
fn a_kill_while_the_database_opens_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(3);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
    let known = (cache.head(&server(0)), cache.cursor());
    drop(cache);
    let is_database = |path: &std::path::Path| path.join("conf").exists();
    let place =
        fs::read_dir(folder.path().join("disk")).unwrap().map(|entry| entry.unwrap().path());
    let databases: Vec<_> = place.filter(|path| is_database(path)).collect();
    assert_eq!(databases.len(), 1);
    fs::write(databases[0].join("snap.7FFFFFFFFFFFFFFF.generating"), b"torn").unwrap();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    assert_eq!(cache.fresh_reason(), None);
    assert_eq!((cache.head(&server(0)), cache.cursor()), known);
    assert_eq!(cache.segment_digests().unwrap(), disk.digests());
}

#[test]
fn a_newer_cache_is_moved_aside_and_only_the_last_one_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(1);
    let mut world = World::default();
    let current = folder.path().join("disk/CURRENT");
    for _ in 0..3 {
        let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
        back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
        drop(cache);
        let mut newer = manifest::parse(&fs::read(&current).unwrap()).unwrap();
        newer.format = FORMAT + 1;
        fs::write(&current, manifest::write(&newer).unwrap()).unwrap();
        let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
        assert_eq!(cache.fresh_reason(), Some(FreshReason::Newer(FORMAT + 1)));
        assert_eq!(cache.head(&server(0)), None);
        drop(cache);
        assert_eq!(aside(folder.path()), 1);
    }
    // It stays for who wants to know why, until the second backup after it.
    for left in [1, 0] {
        let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
        back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
        assert_eq!(aside(folder.path()), left);
    }
}

fn aside(folder: &Path) -> usize {
    let names = fs::read_dir(folder.join("disk")).unwrap();
    names
        .filter(|name| {
            name.as_ref().unwrap().file_name().to_string_lossy().starts_with("quarantine-")
        })
        .count()
}

/// From now on reading it is an error of its disk, as is reading the first page of our own memory.
fn make_unreadable(path: &Path) {
    fs::remove_file(path).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", path).unwrap();
    assert_eq!(fs::read(path).unwrap_err().raw_os_error(), Some(5));
}

#[test]
fn what_the_disk_cannot_read_any_more_costs_time_only() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(1);
    let mut world = World::default();
    let place = folder.path().join("disk");
    let open = || DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    back_up(&open(), &mut world, &server(0), &disk, Until::Done).unwrap();
    assert_eq!(DiskCache::peek_cursor(folder.path(), &disk_id()).unwrap(), b"cursor");

    let is_cursor = |path: &PathBuf| path.to_string_lossy().contains("/cursor-");
    let mut all = fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path());
    make_unreadable(&all.find(is_cursor).unwrap());
    assert_eq!(DiskCache::peek_cursor(folder.path(), &disk_id()).unwrap(), b"");
    let cache = open();
    assert_eq!((cache.fresh_reason(), cache.cursor()), (None, Vec::new()));
    assert_eq!(cache.segment_digests().unwrap(), disk.digests());
    back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
    drop(cache);
    assert_eq!(open().cursor(), b"cursor");

    make_unreadable(&place.join("CURRENT"));
    assert_eq!(DiskCache::peek_cursor(folder.path(), &disk_id()).unwrap(), b"");
    let cache = open();
    let reason = cache.fresh_reason();
    assert!(
        matches!(&reason, Some(FreshReason::Damaged(what)) if what.contains("os error 5")),
        "{reason:?}"
    );
    assert_eq!((cache.head(&server(0)), aside(folder.path())), (None, 1));
    back_up(&cache, &mut world, &server(0), &disk, Until::Done).unwrap();
    drop(cache);
    let cache = open();
    assert_eq!(cache.fresh_reason(), None);
    world.check(&cache).unwrap();
}

#[test]
fn what_a_system_without_memory_refuses_is_no_failure_of_a_backup() {
    let error = |kind: io::ErrorKind| CacheError::Io { path: "db".into(), source: kind.into() };
    assert!(error(io::ErrorKind::OutOfMemory).is_no_room());
    assert!(error(io::ErrorKind::WouldBlock).is_no_room());
    assert!(!error(io::ErrorKind::PermissionDenied).is_no_room());
}

#[test]
fn an_unusable_folder_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk"), b"a file").unwrap();
    let error = DiskCache::open(folder.path(), &disk_id(), 4096).err().unwrap();
    assert!(
        matches!(error, CacheError::Io { .. }) && error.to_string().contains("disk"),
        "{error}"
    );
}

#[test]
fn damage_anywhere_in_the_database_is_found_or_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = disk(6);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    for round in 0..3u32 {
        disk.blocks.iter_mut().step_by(50).for_each(|block| *block = 20_000 + round);
        back_up(&cache, &mut world, &server(round as usize % 2), &disk, Until::Done).unwrap();
    }
    drop(cache);
    let (place, expected) = (folder.path().join("disk"), disk.digests());
    let kept = folder.path().join("kept");
    copy(&place, &kept);
    let good = fs::read(kept.join("db-1/db")).unwrap();
    let used = good.iter().rposition(|byte| *byte != 0).unwrap();
    let (mut found, rounds) = (0, 40);
    for round in 0..rounds {
        let at = used * round / rounds;
        let mut bad = good.clone();
        match round % 3 {
            // The control: a copy as it is.
            _ if round == 0 => {}
            0 => bad[at] ^= 1 << (round % 8),
            1 => bad[at / 4096 * 4096..][..4096].fill(0),
            _ => bad.truncate(at),
        }
        copy(&kept, &place);
        fs::write(place.join("db-1/db"), bad).unwrap();
        let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
        match (cache.fresh_reason(), cache.segment_digests()) {
            (Some(reason), _) if round == 0 => panic!("the control: {reason}"),
            (Some(FreshReason::Damaged(_)), Ok(digests)) => {
                assert_eq!(digests, Content::zeros(disk.size_bytes).digests());
                assert_eq!(cache.head(&server(0)), None);
                found += 1;
            }
            (None, Ok(digests)) => assert_eq!(digests, expected, "round {round}"),
            (None, Err(error @ CacheError::Damaged { .. })) => {
                cache.reset(&error).unwrap();
                assert!(cache.must_send(&server(0)).is_everything());
                found += 1;
            }
            (reason, result) => panic!("round {round}: {reason:?}, {:?}", result.err()),
        }
    }
    println!("{found} of {rounds} damages noticed, the others harmless");
    assert!(found > rounds / 4);
}

#[test]
fn threads_read_and_stage_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(40);
    let mut world = World::default();
    let cache = DiskCache::open(folder.path(), &disk_id(), disk.size_bytes).unwrap();
    let stage = cache.stage();
    let next = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let segment = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if segment > 40 {
                        break;
                    }
                    stage.put_hashes(segment, &disk.segment(segment)).unwrap();
                }
            });
        }
    });
    let head = world.commit(&server(0), disk.clone());
    cache.commit(stage, &server(0), head, Vec::new()).unwrap();
    assert_eq!(cache.segment_digests().unwrap(), disk.digests());
}
