//! A store is damaged in many places, one after another: what is lost is found, nothing wrong is restored, and the next
//! backup heals the newest snapshot.

mod faults;
mod places;
mod scene;

use std::{collections::BTreeMap, fs};

use janus_proto::ids::SEGMENT_BLOCKS;

use self::{
    places::{Place, places},
    scene::{BLOCK, Scene},
};

/// Places tried in the files of one kind.
const PLACES: usize = 8;

/// What became of the damaged places, by kind of place and outcome.
type Outcomes = BTreeMap<(&'static str, &'static str), usize>;

#[test]
fn whatever_is_damaged_is_found_and_the_next_backup_heals_the_newest_snapshot() {
    let made = Scene::with_three_backups();
    let places = places(&made, PLACES);
    let mut outcomes = Outcomes::new();
    for place in &places {
        let outcome = damage_and_heal(&made, place);
        *outcomes.entry((place.kind, outcome)).or_default() += 1;
    }
    eprintln!("{} places damaged:", places.len());
    for ((kind, outcome), count) in &outcomes {
        eprintln!("{count:5} {kind}: {outcome}");
    }
    let lost = |kind| outcomes.get(&(kind, "blocks lost")).copied().unwrap_or(0);
    assert!(lost("data of the base") >= PLACES, "{outcomes:?}");
    // Newer deltas may hold what a snapshot lacks of an older one.
    assert!(lost("block of the base") >= PLACES / 2, "{outcomes:?}");
}

fn damage_and_heal(made: &Scene, place: &Place) -> &'static str {
    let folder = made.copy();
    place.damage(folder.path());
    let mut scene = made.reopened(folder);
    scene.verify();
    let outcome = compare(&scene, place);
    scene.change(7);
    scene.backup();
    let newest = scene.newest();
    let restored = scene.restore(&newest).unwrap_or_else(|error| panic!("{place:?}: {error}"));
    assert!(restored.lost.is_empty(), "{place:?}: {:?}", restored.lost);
    assert!(restored.bytes == scene.content_of(&newest), "{place:?}");
    scene.verify();
    assert_eq!(scene.damaged_blocks(&newest), 0, "{place:?}");
    outcome
}

/// Restores all that is listed: nothing is wrong, and what is lost was found.
fn compare(scene: &Scene, place: &Place) -> &'static str {
    let mut outcome = "harmless";
    for held in scene.snapshots() {
        let found = scene.damaged_blocks(&held);
        let restored = match scene.restore(&held) {
            Ok(restored) => restored,
            Err(error) => {
                assert!(found > 0, "{place:?}: {error}");
                outcome = "a snapshot can't be opened";
                continue;
            }
        };
        let expected = scene.content_of(&held);
        assert_eq!(restored.bytes.len(), expected.len());
        for (block, (one, other)) in
            (0..).zip(restored.bytes.chunks(BLOCK).zip(expected.chunks(BLOCK)))
        {
            assert!(
                one == other || restored.lost.contains(block),
                "{place:?}: block {block} is wrong"
            );
        }
        assert!(
            restored.lost.blocks() <= found,
            "{place:?}: {:?} lost, {found} found",
            restored.lost
        );
        if place.is_one_block {
            assert!(restored.lost.blocks() <= 1, "{place:?}: {:?}", restored.lost);
            assert_eq!(restored.lost.blocks(), found, "{place:?}");
        }
        match (found, restored.lost.is_empty()) {
            (_, false) => outcome = "blocks lost",
            (1.., true) if outcome == "harmless" => outcome = "found, nothing lost for a restore",
            _ => {}
        }
    }
    if scene.snapshots().len() < 3 {
        outcome = "a snapshot is not listed any more";
    }
    outcome
}

#[test]
fn a_whole_store_is_proven_once_for_all_its_snapshots() {
    let scene = Scene::with_three_backups();
    let read = scene.verify();
    let data: u64 = scene.data_bytes();
    assert!(read >= data && read < data + (12 << 20), "{read} bytes read, {data} of data");
    assert!(scene.snapshots().iter().all(|held| scene.wire(held).verified_ms > 0));
    assert!(scene.scrub_next().is_none());
    let scene = scene.restarted();
    assert!(scene.snapshots().iter().all(|held| scene.wire(held).verified_ms > 0), "it is kept");
    let health = scene.folder().join(".health.json");
    fs::write(&health, "nonsense").unwrap();
    let scene = scene.restarted();
    assert!(scene.snapshots().iter().all(|held| scene.wire(held).verified_ms == 0));
    assert!(scene.scrub_next().is_some());
}

#[test]
fn a_stopped_check_goes_on_where_it_was() {
    let scene = Scene::with_three_backups();
    let first = scene.scrub_some(1);
    let scene = scene.restarted();
    let rest = scene.scrub_some(u64::MAX);
    assert!(first > 0 && rest < scene.data_bytes() + (8 << 20) - first, "{first} + {rest}");
    assert!(scene.wire(&scene.snapshots()[2]).verified_ms > 0);
}

#[test]
fn damage_that_others_meet_during_a_check_outlives_it() {
    let made = Scene::with_three_backups();
    let scene = made.reopened(made.copy());
    assert!(scene.scrub_some(1) > 0);
    // Some of them where the check has been.
    for place in places(&made, 8).iter().filter(|place| place.kind == "data of the base") {
        place.damage(scene.root());
    }
    let newest = scene.newest();
    let lost = scene.meet_damage(&newest);
    assert!(lost.iter().any(|range| range.start < SEGMENT_BLOCKS), "{lost:?}");
    let met = scene.damaged_blocks(&newest);
    scene.scrub_some(u64::MAX);
    assert_eq!(scene.damaged_blocks(&newest), met);
    assert_eq!(met, lost.blocks());
}

#[test]
fn a_resized_disk_gets_its_lost_blocks_from_the_client() {
    let made = Scene::with_three_backups();
    let place =
        places(&made, 1).into_iter().find(|place| place.kind == "data of the base").unwrap();
    let folder = made.copy();
    place.damage(folder.path());
    // Nobody has looked: the copy of the old head finds it, and the run after that brings it.
    let mut scene = made.reopened(folder);
    scene.resize(1 << 20);
    scene.backup();
    let newest = scene.newest();
    assert!(newest.snapshot().parent.is_none());
    let restored = scene.restore(&newest).unwrap();
    assert!(restored.lost.is_empty() && restored.bytes == scene.content_of(&newest));
}
