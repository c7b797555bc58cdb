//! The shelf against a plain model: whatever comes and goes in whatever order, fails or is damaged, what is there is right.

use std::{
    collections::BTreeMap,
    fs, io,
    sync::atomic::{AtomicU64, Ordering},
};

use janus_proto::{
    hash::{hash_block, segment_digest, table_digest, zero_hash},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_count, block_len},
    pb,
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    chain::{ranges::BlockRanges, table::SegmentBitmap},
    mirror::share,
    storage::{Op, Verdict, Watcher},
};

/// Three segments and a short block.
const SIZE: u64 = 2 * SEGMENT_BLOCKS * BLOCK_BYTES + 5 * BLOCK_BYTES + 512;

/// All hashes of a disk.
type Hashes = Vec<BlockHash>;

fn zeros() -> Hashes {
    (0..block_count(SIZE)).map(|block| zero_hash(block_len(SIZE, block))).collect()
}

fn change(hashes: &mut Hashes, blocks: &BTreeMap<u64, u8>) {
    for (block, seed) in blocks {
        if let Some(hash) = hashes.get_mut(*block as usize) {
            *hash = match seed % 4 {
                0 => zero_hash(block_len(SIZE, *block)),
                seed => hash_block(&[seed, *block as u8]),
            };
        }
    }
}

fn digests(hashes: &Hashes) -> Vec<BlockHash> {
    hashes.chunks(SEGMENT_BLOCKS as usize).map(segment_digest).collect()
}

/// The tables of the server that has it.
fn stack_of(hashes: &Hashes) -> TableStack {
    let file = crate::storage::Disk::default();
    let folder = tempfile::tempdir().unwrap();
    let file = file.open(&folder.path().join("table"), Access::CreateNew).unwrap();
    let header = TableHeader { snapshot: SnapshotId::new(), disk_bytes: SIZE };
    let mut writer = TableWriter::create(file, header).unwrap();
    let zeros = zeros();
    for (segment, of_segment) in hashes.chunks(SEGMENT_BLOCKS as usize).enumerate() {
        let (mut present, mut data) = (SegmentBitmap::default(), Vec::new());
        for (block, hash) in of_segment.iter().enumerate() {
            if *hash != zeros[segment * SEGMENT_BLOCKS as usize + block] {
                present.insert(block);
                data.push(*hash);
            }
        }
        writer.push(segment as u64, &present, &data, segment_digest(of_segment)).unwrap();
    }
    let table = Table::open(writer.finish().unwrap()).unwrap();
    TableStack::new(vec![Arc::new(table)], SIZE).unwrap()
}

fn description(number: i64, hashes: &Hashes) -> Description {
    let wire = pb::Snapshot {
        snapshot_id: SnapshotId::new().to_string(),
        server_id: "server-a".into(),
        machine: "alice/laptop".into(),
        disk_id: "sda".into(),
        committed_ms: number * 1000,
        size_bytes: SIZE,
        table_digest: table_digest(SIZE, &digests(hashes)).0.to_vec().into(),
        client_seal: vec![1, 2, 3].into(),
        reachable: true,
        ..Default::default()
    };
    Description::try_from(wire).unwrap()
}

/// Puts a table on the shelf as one that was read from its server.
fn put(shelf: &Shelf, description: &Description, hashes: &Hashes) -> Result<(), MirrorError> {
    let mut fresh = shelf.begin(description, shelf.nearest(description))?;
    let of = stack_of(hashes);
    let since = match fresh.base() {
        Some(base) => shelf.open(base)?,
        None => TableStack::new(Vec::new(), SIZE)?,
    };
    for differing in Difference::new(&of, &since, 0)? {
        fresh.push(&differing?)?;
    }
    shelf.publish(fresh)
}

/// What should be there.
type Model = BTreeMap<SnapshotId, (Description, Hashes)>;

fn assert_is(shelf: &Shelf, model: &Model) {
    let kept: Vec<SnapshotId> = shelf.all().iter().map(|kept| kept.description.id).collect();
    assert_eq!(kept.iter().collect::<BTreeSet<_>>(), model.keys().collect::<BTreeSet<_>>());
    for (id, (description, hashes)) in model {
        assert_eq!(shelf.get(*id).unwrap().description, *description);
        let stack = shelf.open(*id).unwrap();
        assert_reads_as(&stack, hashes);
        shelf.check(*id, &|| false).unwrap();
    }
}

fn assert_reads_as(stack: &TableStack, hashes: &Hashes) {
    assert_eq!(stack.segment_digests().unwrap(), digests(hashes));
    assert_eq!(stack.digests_in(1..9), digests(hashes)[1..]);
    let zeros = zeros();
    for (segment, expected) in hashes.chunks(SEGMENT_BLOCKS as usize).enumerate() {
        assert_eq!(stack.segment(segment as u64).unwrap(), expected);
        let first = segment * SEGMENT_BLOCKS as usize;
        let content = expected.iter().zip(&zeros[first..]).filter(|(hash, zero)| hash != zero);
        let content = content.count() as u64;
        assert!(stack.content_blocks(segment as u64).is_none_or(|blocks| blocks == content));
    }
}

/// Files below the image path.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

/// A change of what is there: one comes at some time with some blocks changed, or one of those that are there goes.
#[derive(Debug, Clone)]
enum Step {
    Comes(i64, BTreeMap<u64, u8>),
    Goes(prop::sample::Index),
    IsReadAgain,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let blocks = prop::collection::btree_map(0..block_count(SIZE), any::<u8>(), 0..40);
    let step = prop_oneof![
        4 => (0..100i64, blocks).prop_map(|(at, blocks)| Step::Comes(at, blocks)),
        3 => any::<prop::sample::Index>().prop_map(Step::Goes),
        1 => Just(Step::IsReadAgain),
    ];
    prop::collection::vec(step, 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_and_goes_the_rest_stays_what_it_is(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let mut shelf = Shelf::new(Disk::default(), folder.path());
        let (mut model, mut hashes) = (Model::new(), zeros());
        for step in steps {
            match step {
                Step::Comes(at, blocks) => {
                    change(&mut hashes, &blocks);
                    let description = description(at, &hashes);
                    put(&shelf, &description, &hashes).unwrap();
                    model.insert(description.id, (description, hashes.clone()));
                }
                Step::Goes(index) if !model.is_empty() => {
                    let id = *model.keys().nth(index.index(model.len())).unwrap();
                    shelf.remove(id).unwrap();
                    model.remove(&id);
                }
                Step::Goes(_) => {}
                Step::IsReadAgain => {
                    shelf = Shelf::new(Disk::default(), folder.path());
                    shelf.load();
                }
            }
            assert_is(&shelf, &model);
            assert_eq!(files(folder.path()).len(), model.len() * 2);
        }
        let whole = shelf.all().iter().filter(|kept| kept.base.is_none()).count();
        prop_assert!(whole <= 1, "all others are differences");
        prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), usize::from(whole > 0));
    }

    #[test]
    fn a_share_is_what_a_comparison_of_all_blocks_says(
        changes in prop::collection::vec(
            prop::collection::btree_map(0..block_count(SIZE), any::<u8>(), 0..300), 1..5),
        lost in prop::collection::vec(0..block_count(SIZE), 0..9),
    ) {
        let (mut hashes, mut disks) = (zeros(), Vec::new());
        for blocks in &changes {
            change(&mut hashes, blocks);
            disks.push(hashes.clone());
        }
        let wanted = disks.swap_remove(changes.len() / 2);
        let own: Vec<_> = disks.iter().enumerate().map(|(number, disk)| {
            let mut ranges = BlockRanges::default();
            let lost = if number == 0 { lost.as_slice() } else { &[] };
            lost.iter().for_each(|block| ranges.insert(*block..block + 1));
            (SnapshotId::new(), stack_of(disk), ranges)
        }).collect();
        // Once as a whole table, once as a difference.
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(Disk::default(), folder.path());
        let base = zeros();
        let described = description(1, &base);
        put(&shelf, &described, &base).unwrap();
        let over = description(2, &wanted);
        put(&shelf, &over, &wanted).unwrap();
        let (zeros, mut content, mut held) = (zeros(), 0, 0);
        for (block, hash) in wanted.iter().enumerate().filter(|(block, hash)| **hash != zeros[*block]) {
            let bytes = block_len(SIZE, block as u64) as u64;
            let has = own.iter().zip(&disks).any(|((_, _, lost), disk)| {
                disk[block] == *hash && !lost.contains(block as u64)
            });
            content += bytes;
            held += if has { bytes } else { 0 };
        }
        for table in [stack_of(&wanted), shelf.open(over.id).unwrap()] {
            let share = share::count(&table, &own, &|| false).unwrap().unwrap();
            prop_assert_eq!((share.content_bytes, share.held_bytes), (content, held));
            // Those that are named are enough.
            let named: Vec<_> = own.iter().filter(|(id, ..)| share.of.contains(id)).cloned().collect();
            let again = share::count(&table, &named, &|| false).unwrap().unwrap();
            prop_assert_eq!(again, share);
        }
        prop_assert!(share::count(&stack_of(&wanted), &own, &|| true).unwrap().is_none());
    }
}

/// Fails every operation from one on, as a killed process does none any more.
struct Ends {
    left: AtomicU64,
}

impl Watcher for Ends {
    fn before(&self, _: &Op<'_>) -> io::Result<Verdict> {
        let left =
            self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map(|_| Verdict::Go).map_err(|_| io::Error::other("the end"))
    }
}

/// Three tables that are built on each other, and one more that is to come.
fn filled() -> (TempDir, Model, (Description, Hashes)) {
    let folder = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(Disk::default(), folder.path());
    let (mut model, mut hashes) = (Model::new(), zeros());
    // The newest first; the last one hangs on the oldest.
    for at in [9, 5, 7] {
        let blocks = (0..50).map(|block| (block * 41 + at, at as u8 + block as u8)).collect();
        change(&mut hashes, &blocks);
        let description = description(at as i64, &hashes);
        put(&shelf, &description, &hashes).unwrap();
        model.insert(description.id, (description, hashes.clone()));
    }
    change(&mut hashes, &BTreeMap::from([(1, 3), (1500, 2)]));
    let more = (description(6, &hashes), hashes);
    (folder, model, more)
}

/// Does something that ends at each of its operations in turn; afterwards all must be there but the one that was to go.
fn ends_everywhere(
    what: impl Fn(&Shelf, &Model, &(Description, Hashes)) -> Result<(), MirrorError>,
    removed: Option<i64>,
) {
    for end in 0.. {
        let (folder, model, more) = filled();
        let disk = Disk::watched(Arc::new(Ends { left: AtomicU64::new(u64::MAX) }));
        let shelf = Shelf::new(disk, folder.path());
        shelf.load();
        let ends = Arc::new(Ends { left: AtomicU64::new(end) });
        let shelf = Shelf { storage: Disk::watched(ends), ..shelf };
        let done = what(&shelf, &model, &more);
        let again = Shelf::new(Disk::default(), folder.path());
        again.load();
        let (mut expected, mut left) = (Model::new(), 0);
        for (id, one) in &model {
            let is_there = again.get(*id).is_some();
            let may_go = removed == Some(one.0.wire.committed_ms);
            assert!(
                is_there || may_go,
                "{} is gone after operation {end}",
                one.0.wire.committed_ms
            );
            if is_there {
                expected.insert(*id, one.clone());
                left += u64::from(may_go);
            }
        }
        if again.get(more.0.id).is_some() {
            expected.insert(more.0.id, more);
        }
        assert_is(&again, &expected);
        assert_eq!(files(folder.path()).len(), expected.len() * 2, "after operation {end}");
        if done.is_ok() {
            assert_eq!(left, 0);
            assert!(end > 1, "it takes some operations");
            return;
        }
    }
}

#[test]
fn a_crash_at_any_moment_leaves_each_table_old_or_new() {
    ends_everywhere(|shelf, _, (description, hashes)| put(shelf, description, hashes), None);
    for removed in [9000, 7000, 5000] {
        let remove = |shelf: &Shelf, model: &Model, _: &(Description, Hashes)| {
            let (id, _) =
                model.iter().find(|(_, (one, _))| one.wire.committed_ms == removed).unwrap();
            shelf.remove(*id)
        };
        ends_everywhere(remove, Some(removed));
    }
}

#[test]
fn what_is_not_the_table_it_says_is_refused() {
    let (folder, model, (described, hashes)) = filled();
    let shelf = Shelf::new(Disk::default(), folder.path());
    shelf.load();
    let of = stack_of(&hashes);
    let nothing = TableStack::new(Vec::new(), SIZE).unwrap();
    let all: Vec<Differing> =
        Difference::new(&of, &nothing, 0).unwrap().collect::<Result<_, _>>().unwrap();
    let begin = || shelf.begin(&described, None).unwrap();
    // A segment is missing, or twice.
    let mut fresh = begin();
    fresh.push(&all[0]).unwrap();
    fresh.push(&all[0]).unwrap_err();
    assert!(matches!(shelf.publish(fresh), Err(MirrorError::Foreign { .. })));
    // Another hash, another digest, one more block, one that is on no disk, one that doesn't differ.
    let wrong = |wrong: fn(&mut Differing)| {
        let mut one = all[0].clone();
        wrong(&mut one);
        let mut fresh = begin();
        let refused = fresh.push(&one).unwrap_err();
        assert!(matches!(refused, MirrorError::Table(_)), "{refused}");
        shelf.discard(fresh);
    };
    wrong(|one| one.hashes[0] = BlockHash([9; 32]));
    wrong(|one| one.digest = BlockHash([9; 32]));
    wrong(|one| one.present.0[3] = u64::MAX);
    wrong(|one| one.segment = 2);
    wrong(|one| one.segment = u64::MAX);
    wrong(|one| {
        let free = (0..1024).find(|block| !one.present.contains(*block)).unwrap();
        one.present.insert(free);
        let at = one.present.blocks().position(|block| block == free).unwrap();
        one.hashes.insert(at, zero_hash(4096));
    });
    // Of another disk it is no difference.
    let wire = pb::Snapshot { disk_id: "sdb".into(), ..described.wire.clone() };
    let of_other = Description::try_from(wire).unwrap();
    assert_eq!(shelf.nearest(&of_other), None);
    let (base, _) = model.first_key_value().unwrap();
    assert!(shelf.begin(&of_other, Some(*base)).is_err());
    assert_is(&shelf, &model);
    assert_eq!(files(folder.path()).len(), model.len() * 2);
}

/// The one that all others are built on, with its files: table and record.
fn root(shelf: &Shelf) -> (SnapshotId, [PathBuf; 2]) {
    let root = shelf.all().into_iter().find(|kept| kept.base.is_none()).unwrap();
    let table = shelf.folder(&root.description).join(root.record().table());
    (root.description.id, [table, shelf.record_path(&root.description)])
}

#[test]
fn what_is_built_on_a_damaged_table_goes_with_it() {
    let (folder, model, _) = filled();
    let shelf = Shelf::new(Disk::default(), folder.path());
    shelf.load();
    assert_is(&shelf, &model);
    let (id, [path, _]) = root(&shelf);
    let mut bytes = fs::read(&path).unwrap();
    bytes[300] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(shelf.check(id, &|| false).unwrap_err().is_damage());
    shelf.remove_all(id).unwrap();
    assert_is(&shelf, &Model::new());
    assert!(files(folder.path()).is_empty());
    // A file that is gone takes those along that are built on it, and nothing is left behind.
    for file in 0..2 {
        let (folder, ..) = filled();
        let shelf = Shelf::new(Disk::default(), folder.path());
        shelf.load();
        fs::remove_file(&root(&shelf).1[file]).unwrap();
        shelf.load();
        assert!(shelf.all().is_empty() && files(folder.path()).is_empty());
    }
}
