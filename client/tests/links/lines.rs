//! Lines cut in every way.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use xtask::site::Cut::{Down, Drop, Reject};

use crate::scene::{
    Fault, Fault::Line, Fault::Slow, Fault::Way, MIB, NORTH, OFFICE, Phase, SOUTH, Scene, case,
    run_case,
};

#[test]
fn as_root_an_upload_whose_site_falls_silent() {
    case(NORTH, Phase::Upload, &[Line(NORTH, Drop)]);
}

#[test]
fn as_root_a_commit_whose_site_falls_silent() {
    case(NORTH, Phase::Commit, &[Line(NORTH, Drop)]);
}

#[test]
fn as_root_a_restore_whose_site_falls_silent() {
    case(NORTH, Phase::Restore, &[Line(NORTH, Drop)]);
}

#[test]
fn as_root_an_upload_whose_line_goes_down() {
    case(SOUTH, Phase::Upload, &[Line(SOUTH, Down)]);
}

#[test]
fn as_root_a_commit_whose_line_goes_down() {
    case(SOUTH, Phase::Commit, &[Line(SOUTH, Down)]);
}

#[test]
fn as_root_a_restore_whose_line_goes_down() {
    case(SOUTH, Phase::Restore, &[Line(SOUTH, Down)]);
}

#[test]
fn as_root_an_upload_whose_site_is_rejected() {
    case(SOUTH, Phase::Upload, &[Line(SOUTH, Reject)]);
}

#[test]
fn as_root_a_commit_whose_site_is_rejected() {
    case(SOUTH, Phase::Commit, &[Line(SOUTH, Reject)]);
}

#[test]
fn as_root_a_restore_whose_site_is_rejected() {
    case(SOUTH, Phase::Restore, &[Line(SOUTH, Reject)]);
}

#[test]
fn as_root_an_upload_to_a_site_that_its_janus_loses_goes_on_through_the_other() {
    case(SOUTH, Phase::Upload, &[Way(NORTH, SOUTH, Drop)]);
}

#[test]
fn as_root_a_commit_on_a_site_that_its_janus_loses_is_asked_after_through_the_other() {
    case(SOUTH, Phase::Commit, &[Way(NORTH, SOUTH, Reject)]);
}

#[test]
fn as_root_a_restore_from_a_site_that_its_janus_loses_goes_on_through_the_other() {
    case(SOUTH, Phase::Restore, &[Way(NORTH, SOUTH, Drop)]);
}

#[test]
fn as_root_an_upload_of_a_machine_that_loses_its_janus_goes_on_through_the_other() {
    case(NORTH, Phase::Upload, &[Way(OFFICE, NORTH, Drop)]);
}

#[test]
fn as_root_a_commit_of_a_machine_that_loses_its_janus_is_asked_after_through_the_other() {
    case(NORTH, Phase::Commit, &[Way(OFFICE, NORTH, Reject)]);
}

#[test]
fn as_root_a_restore_of_a_machine_that_loses_its_janus_goes_on_through_the_other() {
    case(NORTH, Phase::Restore, &[Way(OFFICE, NORTH, Drop)]);
}

#[test]
fn as_root_two_ways_of_three_are_cut() {
    case(NORTH, Phase::Upload, &[Way(OFFICE, NORTH, Reject), Way(NORTH, SOUTH, Drop)]);
}

#[test]
fn as_root_the_other_two_ways_of_three_are_cut() {
    case(SOUTH, Phase::Upload, &[Way(OFFICE, SOUTH, Drop), Way(NORTH, SOUTH, Reject)]);
}

#[test]
fn as_root_a_commit_while_two_ways_of_three_are_cut() {
    case(NORTH, Phase::Commit, &[Way(OFFICE, NORTH, Drop), Way(NORTH, SOUTH, Reject)]);
}

#[test]
fn as_root_an_upload_moves_from_a_lost_site_to_a_slow_one() {
    case(SOUTH, Phase::Upload, &[Slow(NORTH), Line(SOUTH, Drop)]);
}

#[test]
fn as_root_a_machine_cut_off_in_an_upload_loses_nothing() {
    case(NORTH, Phase::Upload, &[Line(OFFICE, Drop)]);
}

/// Backups that fail meanwhile, as there is nobody to take them, don't cost what the server has already.
#[test]
fn as_root_a_machine_cut_off_in_an_upload_goes_on_with_it_later() {
    let mut scene = Scene::new();
    scene.change(16);
    let upload = scene.uploading();
    scene.sites.network().cut(OFFICE, Down).unwrap();
    assert_eq!(upload.wait().unwrap().code, Some(3));
    for _ in 0..2 {
        assert_eq!(scene.client.failure(&["backup"]).unwrap().exit_code, 3);
    }
    scene.sites.network().heal().unwrap();
    let backup = scene.client.backup().unwrap();
    assert!(backup.resumed && backup.disks[0].sent_bytes < 15 * MIB, "{backup:?}");
    scene.check_restore(&backup.disks[0].snapshot_id);
}

#[test]
fn as_root_a_machine_cut_off_in_a_commit_loses_nothing() {
    case(SOUTH, Phase::Commit, &[Line(OFFICE, Down)]);
}

#[test]
fn as_root_a_machine_cut_off_in_a_restore_leaves_nothing_half() {
    case(SOUTH, Phase::Restore, &[Line(OFFICE, Down)]);
}

/// Every choice of each, all together.
fn every(choices: &[Vec<Option<Fault>>]) -> Vec<Vec<Fault>> {
    choices.iter().fold(vec![Vec::new()], |cases, choice| {
        let with = |case: &Vec<Fault>, fault: &Option<Fault>| {
            case.iter().copied().chain(*fault).collect::<Vec<_>>()
        };
        cases.iter().flat_map(|case| choice.iter().map(move |fault| with(case, fault))).collect()
    })
}

/// All ways open, silent or rejected, with every choice of slow lines, and all lines up, silent, rejected or down; each
/// in uploads at both sites. It takes about an hour.
#[test]
fn as_root_every_combination_in_the_soak() {
    if std::env::var_os("JANUS_SOAK").is_none() {
        return;
    }
    let way = |one, other| vec![None, Some(Way(one, other, Drop)), Some(Way(one, other, Reject))];
    let slow = |place| vec![None, Some(Slow(place))];
    let line = |place| {
        let cut = |how| Some(Line(place, how));
        vec![None, cut(Drop), cut(Reject), cut(Down)]
    };
    let mut cases = every(&[
        way(NORTH, SOUTH),
        way(OFFICE, NORTH),
        way(OFFICE, SOUTH),
        slow(NORTH),
        slow(SOUTH),
        slow(OFFICE),
    ]);
    cases.extend(every(&[line(NORTH), line(SOUTH), line(OFFICE)]));
    assert_eq!(cases.len(), 27 * 8 + 64);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let mut scene = Scene::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(faults) = cases.get(number / 2) else { return };
                    run_case(&mut scene, [NORTH, SOUTH][number % 2], Phase::Upload, faults);
                }
            });
        }
    });
}
