//! Purges of dropped runs: whatever is merged and in whatever order, all that remains reads as it was backed up.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{path::Path, sync::Arc};

use chains::{Content, Model, changed};
use janus_server::{
    chain::{
        Run,
        merge::{Intent, Pair, Way},
    },
    runs::{PurgeOptions, RunError, Wait},
    verify::{self, check_image, pace::Limit},
};
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;
use xtask::loopback::{Kind, SmallFileSystem};

mod chains;

const MIB: usize = 1 << 20;

fn options(copy: bool) -> PurgeOptions {
    PurgeOptions { now_ms: i64::MAX, reserve_bytes: 0, copy }
}

/// A store with `links` runs of one disk, each with a change of its own.
fn chain_of(folder: &Path, links: u64) -> (Model, Vec<Arc<Run>>) {
    let mut model = Model::new(folder);
    let mut content: Content = changed(&vec![0; 9 * MIB + 512], &[(0, 700, 1), (2000, 200, 1)]);
    let mut runs = vec![model.backup(&[("sda", content.clone())])];
    for link in 1..links {
        // Over each other, into blocks that no link has yet, over the disk's end, a whole payload block, zeros over data.
        let block = link % 5 * 512;
        let new = [(link * 31, 40, link + 1), (link * 100, 30, 0), (1000 + link * 77, 9, link + 1)];
        content = changed(&content, &new);
        if link % 3 == 0 {
            content = changed(&content, &[(block, 512, link + 1), (2303, 2, link + 1)]);
        }
        runs.push(model.backup(&[("sda", content.clone())]));
    }
    (model, runs)
}

#[test]
fn any_link_can_go() {
    let shared = each_link_goes(&std::env::temp_dir(), true);
    assert_eq!(shared, 0);
}

#[test]
fn as_root_any_link_can_go_by_sharing_its_childs_blocks() {
    let small = SmallFileSystem::mount_as(Kind::Xfs, 400 << 20).unwrap();
    let shared = each_link_goes(small.folder(), false);
    assert!(shared > 2 << 20, "{shared}");
}

#[test]
fn as_root_any_link_can_go_on_ext4() {
    let small = SmallFileSystem::mount_as(Kind::Ext4, 200 << 20).unwrap();
    let shared = each_link_goes(small.folder(), false);
    assert_eq!(shared, 0);
}

/// Takes each link of a chain out, in a new store for each; returns the bytes that were shared.
fn each_link_goes(place: &Path, copy: bool) -> u64 {
    let mut shared = 0;
    for gone in 0..6 {
        let folder = tempfile::tempdir_in(place).unwrap();
        let (mut model, runs) = chain_of(folder.path(), 6);
        model.trash(&runs[gone]);
        let report = model.purge_all(copy);
        shared += report.moved.shared_bytes;
        assert_eq!((report.purged, report.merged), (vec![runs[gone].backup], (gone < 5) as usize));
        model.check();
        model.assert_clean();
        model.reopen();
        model.check();
        model.assert_clean();
    }
    shared
}

#[test]
fn each_block_is_moved_once_however_many_links_go() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 8);
    let deltas: u64 = runs[1..].iter().map(|run| run.snapshots[0].image_allocated_bytes).sum();
    for run in &runs[..7] {
        model.trash(run);
    }
    let report = model.purge_all(true);
    assert_eq!((report.purged.len(), report.merged), (7, 7));
    assert!(report.moved.copied_bytes <= deltas, "{report:?}, deltas of {deltas} bytes");
    model.check();
    model.assert_clean();
    let held = model.runs.machine(&model.key).unwrap().snapshots();
    assert_eq!(held[0].snapshot().parent, None);
    assert_eq!(held[0].snapshot().data_write, runs[7].snapshots[0].data_write);
}

#[test]
fn the_newest_runs_go_without_a_merge() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 5);
    for run in &runs[2..] {
        model.trash(run);
    }
    let report = model.purge_all(true);
    assert_eq!((report.purged.len(), report.merged), (3, 0));
    model.check();
    model.assert_clean();
    model.reopen();
    // Numbers and times go on even though their owners are gone.
    let content = changed(&model.contents[&runs[1].snapshots[0].id], &[(1, 1, 9)]);
    let next = model.backup(&[("sda", content)]);
    assert_eq!(next.sequence, 6);
    assert!(next.committed_ms > runs[4].committed_ms);
    model.check();
}

#[test]
fn a_run_whose_time_has_not_come_stays_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 4);
    model.runs.trash(&model.key, &[runs[1].backup], "test", 1000).unwrap();
    model.live.remove(&runs[1].snapshots[0].id);
    model.trash(&runs[0]);
    let early = PurgeOptions { now_ms: 999, ..options(true) };
    let report = model.runs.purge_due(&model.key, &early, &CancellationToken::new());
    assert_eq!((report.purged, report.waiting), (vec![runs[0].backup], vec![]));
    // The base went into it, and it can still come back.
    model.restore(&runs[1]);
    model.check();
    model.assert_clean();
}

#[test]
fn snapshots_that_are_open_go_on_while_links_below_them_change() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 6);
    let through = [2, 3, 5].map(|link: usize| model.open(runs[link].snapshots[0].id));
    for link in [0, 1, 4] {
        model.trash(&runs[link]);
    }
    model.purge_all(true);
    for opened in &through {
        model.check_opened(opened);
    }
    model.check();
    model.assert_clean();
}

#[test]
fn a_link_that_somebody_reads_waits() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 4);
    let opened = model.open(runs[1].snapshots[0].id);
    model.trash(&runs[0]);
    model.trash(&runs[1]);
    let report = model.purge(true);
    // The base goes into it under the reader's eyes; it itself must wait.
    assert_eq!(report.waiting, [(runs[1].snapshots[0].id, Wait::Opened)]);
    model.check_opened(&opened);
    model.check();
    drop(opened);
    model.purge_all(true);
    model.check();
    model.assert_clean();
}

#[test]
fn a_link_with_two_children_waits_for_one_to_go() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    model.trash(&runs[2]);
    let content = changed(&model.contents[&runs[1].snapshots[0].id], &[(9, 9, 99)]);
    let branch = model.backup(&[("sda", content)]);
    model.restore(&runs[2]);
    model.trash(&runs[1]);
    let report = model.purge(true);
    assert_eq!(report.waiting, [(runs[1].snapshots[0].id, Wait::Children(2))]);
    model.check();
    model.trash(&branch);
    model.purge_all(true);
    model.check();
    model.assert_clean();
}

#[test]
fn as_root_a_link_with_two_children_goes_into_both_where_blocks_are_shared() {
    let small = SmallFileSystem::mount_as(Kind::Xfs, 400 << 20).unwrap();
    let (mut model, runs) = chain_of(small.folder(), 3);
    model.trash(&runs[2]);
    let content = changed(&model.contents[&runs[1].snapshots[0].id], &[(9, 9, 99)]);
    model.backup(&[("sda", content)]);
    model.restore(&runs[2]);
    let opened = model.open(runs[1].snapshots[0].id);
    model.trash(&runs[1]);
    // Nobody has to wait for the reader either: its files stay as they are.
    let report = model.purge_all(false);
    assert_eq!(report.merged, 2);
    model.check_opened(&opened);
    model.check();
    model.reopen();
    model.check();
    drop(opened);
    model.assert_clean();
}

#[test]
fn an_open_run_goes_on_while_links_below_its_head_are_merged() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 4);
    let head = &model.contents[&runs[3].snapshots[0].id];
    let disks = [("sda", changed(head, &[(5, 600, 77), (1500, 20, 0)]))];
    let resized = [("sda", Arc::new([&disks[0].1[..], &vec![7; 3 * MIB]].concat()))];
    for disks in [&disks, &resized] {
        let (open, commits) = model.send(disks);
        let head = open.record().disks[0].head.unwrap();
        let refused = model.runs.trash(&model.key, &[model.run_of(head).backup], "test", 0);
        assert!(matches!(refused, Err(RunError::BuiltOn { .. })));
        let below = model.runs.machine(&model.key).unwrap().snapshots().pop().unwrap();
        model.trash(&below.run);
        model.purge_all(true);
        model.commit(&open, &commits, disks);
        model.check();
        model.assert_clean();
    }
    model.reopen();
    model.check();
}

#[test]
fn damage_stops_a_merge_and_is_not_spread() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    let child = &runs[1].snapshots[0];
    let path = folder.path().join("user/machine").join(&child.image);
    let mut bytes = std::fs::read(&path).unwrap();
    let wanted = &model.contents[&child.id][31 * 4096..32 * 4096];
    let at = bytes.windows(4096).position(|window| window == wanted).unwrap();
    bytes[at + 17] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    model.trash(&runs[0]);
    let report = model.purge(true);
    let said = report.waiting[0].1.to_string();
    assert!(said.contains(&format!("block 31 of snapshot {} is damaged", child.id)), "{said}");
    // It is known from then on: nothing is tried in vain again, whoever looks at the trash hears why.
    let again = model.purge(true);
    assert_eq!(again.waiting, [(runs[0].snapshots[0].id, Wait::Damaged { child: child.id })]);
    model.reopen();
    let machine = model.runs.machine(&model.key).unwrap();
    let trashed = model.runs.trashed(&model.key);
    assert_eq!(model.runs.damage_above(&machine, &trashed[0]), again.waiting);
    // What can be read reads as before.
    bytes[at + 17] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    model.check();
    assert_eq!(model.purge(true).waiting, again.waiting);
    let limit = Limit::new(0, CancellationToken::new(), || false);
    let held = model.runs.snapshot(child.id).unwrap();
    check_image(&model.runs, &held, verify::Way::Anew(1), &limit).unwrap();
    model.purge_all(true);
    model.check();
}

#[test]
fn nothing_is_begun_without_space() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    model.trash(&runs[0]);
    let full = PurgeOptions { reserve_bytes: u64::MAX / 2, ..options(true) };
    let report = model.runs.purge_due(&model.key, &full, &CancellationToken::new());
    let Wait::Space { needed_bytes, .. } = report.waiting[0].1 else { panic!("{report:?}") };
    // 40 changed blocks of which the base has most, 9 new ones, and table and slack.
    assert!((1 << 20..(1 << 20) + 60 * 4096).contains(&needed_bytes), "{needed_bytes}");
    model.restore(&runs[0]);
    model.check();
    model.assert_clean();
    // A leaf needs no space.
    model.trash(&runs[2]);
    let report = model.runs.purge_due(&model.key, &full, &CancellationToken::new());
    assert_eq!((report.purged, report.waiting), (vec![runs[2].backup], vec![]));
}

#[test]
fn a_purge_that_was_stopped_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    model.trash(&runs[0]);
    let stop = CancellationToken::new();
    stop.cancel();
    let report = model.runs.purge_due(&model.key, &options(true), &stop);
    assert_eq!((report.purged, report.waiting), (vec![], vec![]));
    model.check();
    model.purge_all(true);
    model.check();
}

#[test]
fn tables_do_not_grow_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 1);
    let mut oldest = runs[0].clone();
    let mut largest = 0;
    for round in 0..30 {
        let head = model.contents[&oldest.snapshots[0].id].clone();
        let next = model.backup(&[("sda", changed(&head, &[(0, 300, round + 2)]))]);
        model.trash(&oldest);
        model.purge_all(true);
        let table = folder.path().join("user/machine").join(&next.snapshots[0].table);
        largest = largest.max(std::fs::metadata(table).unwrap().len());
        oldest = next;
    }
    model.check();
    model.assert_clean();
    // 900 blocks, twice, and once more.
    assert!(largest < 3 * 900 * 32 + 4096, "{largest}");
}

#[test]
fn a_crash_at_any_step_leaves_all_that_remains_readable() {
    // Steps that are done before the crash: none, the merged files, the intent, the switch, the child's manifest.
    for steps in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let (mut model, runs) = chain_of(folder.path(), 4);
        model.trash(&runs[1]);
        let machine = folder.path().join("user/machine");
        let (link, child) = (&runs[1].snapshots[0], &runs[2].snapshots[0]);
        let storage = model.runs.store().storage();
        let pair = Pair { storage, folder: &machine, link, child };
        if steps > 0 {
            let (switch, _) = pair.prepare(Way::InPlace, &|| false).unwrap();
            let intent = Intent::switch(link.clone(), switch, false);
            model.check();
            let store = model.runs.store();
            if steps > 1 {
                store.save_intent(&model.key, &intent).unwrap();
                model.check();
            }
            if steps > 2 {
                store.switch(&model.key, &intent, None).unwrap();
            }
            if steps > 3 {
                let mut run = Run::clone(&runs[2]);
                run.snapshots[0] = intent.switching().unwrap().merged.clone();
                store.switch(&model.key, &intent, Some((&run, false))).unwrap();
            }
        }
        model.reopen();
        model.check();
        model.purge_all(true);
        model.check();
        model.assert_clean();
    }
}

#[derive(Debug, Clone)]
enum Op {
    Backup { changes: Vec<(u64, u64, u64)>, resize: Option<u64> },
    Drop(usize),
    Restore(usize),
    Purge,
    Open(usize),
    Close,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let length = prop_oneof![Just(1u64), 1..20u64, Just(512), 300..900u64];
    let changes = prop::collection::vec((0..1400u64, length, 0..5u64), 1..5);
    let op = prop_oneof![
        6 => (changes, prop::option::weighted(0.1, 1000..1500u64))
            .prop_map(|(changes, resize)| Op::Backup { changes, resize }),
        4 => any::<usize>().prop_map(Op::Drop),
        1 => any::<usize>().prop_map(Op::Restore),
        3 => Just(Op::Purge),
        2 => any::<usize>().prop_map(Op::Open),
        1 => Just(Op::Close),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 4..24)
}

/// Plays `ops` on a store in `folder`; says how many links were merged.
fn play(folder: &Path, ops: &[Op], copy: bool) -> usize {
    let mut model = Model::new(folder);
    let mut content: Content = Arc::new(vec![0; 1200 * 4096 + 512]);
    let (mut opened, mut dropped, mut merged) = (Vec::new(), Vec::new(), 0);
    for op in ops {
        let live = model.runs.machine(&model.key).map(|m| m.snapshots()).unwrap_or_default();
        match op {
            Op::Backup { changes, resize } => {
                let mut bytes = content.to_vec();
                bytes.resize(resize.map_or(bytes.len(), |blocks| blocks as usize * 4096), 3);
                content = changed(&bytes, changes);
                model.backup(&[("sda", content.clone()), ("sdb", Arc::new(bytes))]);
            }
            Op::Drop(which) if !live.is_empty() => {
                let run = live[which % live.len()].run.clone();
                model.trash(&run);
                dropped.push(run);
            }
            Op::Restore(which) if !dropped.is_empty() => {
                let run = dropped.swap_remove(which % dropped.len());
                model.restore(&run);
            }
            Op::Purge => {
                dropped.clear();
                let report = model.purge(copy);
                for (_, wait) in &report.waiting {
                    assert!(matches!(wait, Wait::Children(_) | Wait::Opened), "{wait}");
                }
                merged += report.merged;
            }
            Op::Open(which) if !live.is_empty() => {
                opened.push(model.open(live[which % live.len()].snapshot().id));
            }
            Op::Close => opened.clear(),
            Op::Reopen => {
                opened.clear();
                model.reopen();
            }
            _ => {}
        }
        model.check();
        for opened in &opened {
            model.check_opened(opened);
        }
    }
    opened.clear();
    model.reopen();
    model.check();
    merged
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_dropped_and_purged_the_rest_reads_as_the_model(ops in ops()) {
        let folder = tempfile::tempdir().unwrap();
        play(folder.path(), &ops, true);
    }
}

#[test]
fn as_root_whatever_is_dropped_and_purged_the_rest_reads_as_the_model_on_xfs() {
    let small = SmallFileSystem::mount_as(Kind::Xfs, 1 << 30).unwrap();
    let config = ProptestConfig { cases: 16, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let played = runner.run(&ops(), |ops| {
        let folder = tempfile::tempdir_in(small.folder()).unwrap();
        play(folder.path(), &ops, false);
        Ok(())
    });
    played.unwrap();
}
