//! Chains with a file missing: what can still be read is offered, the rest is named.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{collections::BTreeMap, fs};

use chains::{Model, chain, changed};
use janus_proto::ids::SnapshotId;
use janus_server::{chain::gaps::Gap, storage::Disk};

mod chains;

const LINKS: u64 = 4;

/// What a start says of the store, by snapshot.
fn started(model: &mut Model) -> BTreeMap<SnapshotId, Gap> {
    model.reopen();
    model.runs.look_for_missing();
    let machine = model.runs.machine(&model.key).unwrap();
    let gaps = model.runs.gaps(&machine).unwrap().snapshots;
    gaps.into_iter().map(|gap| (gap.snapshot_id, gap)).collect()
}

/// Everything that has no gap is whole; what has one is told as damaged, and read as far as it says.
fn check(model: &mut Model, gaps: &BTreeMap<SnapshotId, Gap>) {
    let machine = model.runs.machine(&model.key).unwrap();
    for held in machine.snapshots() {
        let id = held.snapshot().id;
        let Some(gap) = gaps.get(&id) else {
            assert_eq!(machine.health_of(id).0, 0);
            model.check_opened(&model.open(id));
            continue;
        };
        assert!(machine.health_of(id).0 > 0, "{}", gap.describe());
        assert!(model.runs.open_snapshot(&held).is_err(), "nothing is built on it");
        let rest = model.runs.open_for_reading(&held);
        assert_eq!(rest.is_ok(), gap.is_partly_readable(), "{}", gap.describe());
    }
}

#[test]
fn each_missing_file_of_a_chain_is_named_and_costs_no_other_snapshot() {
    let whole = tempfile::tempdir().unwrap();
    let (model, runs) = chain(whole.path(), LINKS);
    for (place, run) in runs.iter().enumerate() {
        let snapshot = &run.snapshots[0];
        let manifest = format!(".runs/{:08}.json", run.sequence);
        for (kind, name) in
            [("image", &snapshot.image), ("table", &snapshot.table), ("manifest", &manifest)]
        {
            let folder = tempfile::tempdir().unwrap();
            let mut copy = model.copy(folder.path(), Disk::default());
            fs::remove_file(folder.path().join("user/machine").join(name)).unwrap();
            let gaps = started(&mut copy);
            let above = if kind == "manifest" { place + 1 } else { place };
            let expected: Vec<_> = runs[above..].iter().map(|run| run.snapshots[0].id).collect();
            println!("without the {kind} of link {place}: {} of {LINKS} whole", above.min(place));
            gaps.values().for_each(|gap| println!("  {}", gap.describe()));
            assert_eq!(gaps.len(), expected.len());
            assert!(expected.iter().all(|id| gaps.contains_key(id)));
            assert!(gaps.values().all(|gap| gap.is_partly_readable() == (kind == "image")));
            check(&mut copy, &gaps);
            // What others build on stays where a hypervisor finds it; only the head's files, which nothing names, go aside.
            let is_aside = copy.files().iter().any(|name| name.contains("set-aside"));
            assert_eq!(is_aside, gaps.is_empty());
            goes_on(&mut copy, &gaps, kind);
        }
    }
}

/// The next backup is whole, whatever is missing below, and stays so.
fn goes_on(model: &mut Model, gaps: &BTreeMap<SnapshotId, Gap>, kind: &str) {
    let newest = model.contents.values().next().unwrap().clone();
    let run = model.backup(&[("sda", changed(&newest, &[(9, 9, 77)]))]);
    let id = run.snapshots[0].id;
    assert_eq!(run.snapshots[0].parent.is_none(), !gaps.is_empty(), "{kind}");
    model.check_opened(&model.open(id));
    let again = started(model);
    assert!(!again.contains_key(&id));
    assert_eq!(&again, gaps);
}

#[test]
fn a_file_that_is_back_is_proven_by_a_check() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), LINKS);
    let image = folder.path().join("user/machine").join(&runs[1].snapshots[0].image);
    let away = folder.path().join("away");
    fs::rename(&image, &away).unwrap();
    assert_eq!(started(&mut model).len(), 3);
    fs::rename(&away, &image).unwrap();
    assert_eq!(started(&mut model).len(), 0);
    let held = model.runs.snapshot(runs[1].snapshots[0].id).unwrap();
    assert!(model.runs.open_snapshot(&held).is_err(), "not before it was looked at");
    let pace = janus_server::verify::pace::Limit::new(0, Default::default(), || false);
    let way = janus_server::verify::Way::Anew(1);
    let found = janus_server::verify::check_image(&model.runs, &held, way, &pace).unwrap();
    assert!(found.is_none());
    model.check();
}
