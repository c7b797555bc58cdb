//! A store that is moved: to the last byte, whatever fails on the way.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use chains::{
    Model, changed,
    faults::{Fault, Spoiler},
    unlocked,
};
use janus_server::{
    chain::store::{
        Store, StoreError,
        relocate::{MoveError, Moved, relocate},
    },
    image::Format,
    storage::Disk,
};

mod chains;

/// Places beside each other, the first with a store.
fn scene() -> (tempfile::TempDir, PathBuf, PathBuf, Model) {
    scene_in(tempfile::tempdir().unwrap(), 3)
}

fn scene_in(folder: tempfile::TempDir, links: u64) -> (tempfile::TempDir, PathBuf, PathBuf, Model) {
    let [from, to] = ["old", "new"].map(|name| folder.path().join(name));
    fs::create_dir(&from).unwrap();
    let mut model = Model::new(&from);
    let mut content = changed(&vec![0; (24 << 20) + 512], &[(0, 300, 1), (5000, 20, 2)]);
    for link in 0..links {
        content = changed(&content, &[(link * 700, 40, link + 3)]);
        model.backup(&[("sda", content.clone())]);
    }
    model.close();
    (folder, from, to, model)
}

fn moved(storage: &Disk, from: &Path, to: &Path) -> Result<Moved, MoveError> {
    let is_locked =
        |error: &MoveError| matches!(error, MoveError::Store(StoreError::Locked { .. }));
    unlocked(|| relocate(storage, from, to, &|_, _, _| ()), is_locked)
}

/// Opens the store at its new place and compares all snapshots.
fn check(model: &mut Model, to: &Path) {
    model.folder = to.to_owned();
    model.reopen();
    model.check();
    model.close();
}

/// Changes that a move of such a store makes.
fn operations(model: &mut Model) -> u64 {
    let folder = tempfile::tempdir_in(model.folder.parent().unwrap()).unwrap();
    let count = Spoiler::new(Fault::Kill, 0);
    let [from, to] = ["counted", "counted.to"].map(|name| folder.path().join(name));
    fs::create_dir(&from).unwrap();
    let mut copied = model.copy(&from, Disk::default());
    copied.close();
    count.arm(true);
    moved(&count.disk(), &from, &to).unwrap();
    check(&mut copied, &to);
    count.seen()
}

/// Bytes that files below a folder take.
fn allocated(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| match path.is_dir() {
            true => allocated(&path),
            false => fs::metadata(path).unwrap().blocks() * 512,
        })
        .sum()
}

#[test]
fn all_is_at_the_new_place_and_the_old_one_is_no_store_any_more() {
    let (_folder, from, to, mut model) = scene();
    let before = allocated(&from);
    let done = moved(&Disk::default(), &from, &to).unwrap();
    assert!(done.files >= 10 && done.found_files == 0, "{done:?}");
    assert!(allocated(&to) < before + (1 << 20), "holes stay holes");
    let refused = Store::open(&from, true);
    assert!(matches!(refused, Err(StoreError::Moved { to: named, .. }) if named == to));
    let again = moved(&Disk::default(), &from, &to).unwrap();
    assert_eq!(again, Moved::default(), "it is there");
    let elsewhere = moved(&Disk::default(), &from, &to.with_file_name("other"));
    assert!(matches!(elsewhere, Err(MoveError::Store(StoreError::Moved { .. }))));
    check(&mut model, &to);
}

#[test]
fn a_new_place_that_vanished_is_no_success() {
    let (_folder, from, to, mut model) = scene();
    let storage = Disk::default();
    moved(&storage, &from, &to).unwrap();
    let away = to.with_extension("away");
    fs::rename(&to, &away).unwrap();
    let error = moved(&storage, &from, &to).unwrap_err();
    assert!(matches!(error, MoveError::Vanished { .. }), "{error}");
    assert!(!to.exists(), "nothing is made there: {error}");
    fs::rename(&away, &to).unwrap();
    moved(&storage, &from, &to).unwrap();
    check(&mut model, &to);
}

#[test]
fn what_is_no_place_for_it_is_refused() {
    let (folder, from, to, mut model) = scene();
    let refused = |to: &Path| moved(&Disk::default(), &from, to).unwrap_err();
    assert!(matches!(refused(&from.join("user")), MoveError::Nested { .. }));
    assert!(matches!(refused(&from), MoveError::Nested { .. }));
    assert!(matches!(refused(folder.path()), MoveError::Nested { .. }));
    fs::create_dir(&to).unwrap();
    fs::write(to.join("mine"), "mine").unwrap();
    assert!(matches!(refused(&to), MoveError::Occupied { .. }));
    assert_eq!(fs::read(to.join("mine")).unwrap(), b"mine");
    let nothing = moved(&Disk::default(), &to, &from.with_file_name("third"));
    assert!(matches!(nothing, Err(MoveError::Store(StoreError::NoStore { .. }))));
    model.reopen();
    let locked = relocate(&Disk::default(), &from, &from.with_file_name("third"), &|_, _, _| ());
    assert!(matches!(locked, Err(MoveError::Store(StoreError::Locked { .. }))));
    model.check();
}

#[test]
fn a_move_goes_on_where_it_was_killed_and_takes_in_what_changed_meanwhile() {
    let (_folder, from, to, mut model) = scene();
    let operations = operations(&mut model);
    let killed = Spoiler::new(Fault::Kill, operations * 2 / 3);
    killed.arm(true);
    moved(&killed.disk(), &from, &to).unwrap_err();
    let unfinished = Store::open(&to, true);
    assert!(matches!(unfinished, Err(StoreError::Moving { .. })), "{unfinished:?}");
    // The old place is the store until all is there: a run comes, another goes.
    model.reopen();
    let newest = *model.live.last().unwrap();
    let content = changed(&model.contents[&newest].clone(), &[(9, 3, 77)]);
    model.backup(&[("sda", content)]);
    let oldest = model.run_of(*model.live.first().unwrap());
    model.trash(&oldest);
    model.purge_all(true);
    model.close();
    let done = moved(&Disk::default(), &from, &to).unwrap();
    assert!(done.found_files > 0, "{done:?}");
    check(&mut model, &to);
    model.reopen();
    model.assert_clean();
}

/// The image that a merge makes has the name of the child's, may be as long, and the time of a VHD is what its id says.
#[test]
fn an_image_that_only_looks_like_what_was_copied_before_is_copied_again() {
    let folder = tempfile::tempdir().unwrap();
    let [from, to] = ["old", "new"].map(|name| folder.path().join(name));
    fs::create_dir(&from).unwrap();
    let mut model = Model::of(Format::Vhd, &from);
    // Link and child have blocks in the same payload block.
    let mut content = changed(&vec![0; 8 << 20], &[(0, 300, 1)]);
    let mut runs = Vec::new();
    for link in 0..3 {
        content = changed(&content, &[(link * 50, 40, link + 2)]);
        runs.push(model.backup(&[("sda", content.clone())]));
    }
    model.close();
    let image = |place: &Path| place.join("user/machine").join(&runs[2].snapshots[0].image);
    let has_copied_it = |at: &u64| {
        let _ = fs::remove_dir_all(&to);
        let killed = Spoiler::new(Fault::Kill, *at);
        killed.arm(true);
        moved(&killed.disk(), &from, &to).unwrap_err();
        image(&to).exists()
    };
    (1..).step_by(3).find(has_copied_it);
    model.reopen();
    model.trash(&runs[1]);
    assert_eq!(model.purge_all(true).merged, 1);
    model.close();
    let [ours, copied] = [&from, &to].map(|place| fs::metadata(image(place)).unwrap());
    assert_eq!(ours.len(), copied.len());
    assert_eq!(ours.modified().unwrap(), copied.modified().unwrap());
    let done = moved(&Disk::default(), &from, &to).unwrap();
    assert!(done.found_files > 0, "{done:?}");
    check(&mut model, &to);
}

#[test]
fn the_store_is_at_one_place_whatever_fails_on_the_way() {
    // Thousands of syncs: in memory they cost nothing.
    let (folder, from, _, mut model) = scene_in(tempfile::tempdir_in("/dev/shm").unwrap(), 2);
    let operations = operations(&mut model);
    let copy = |name: &str| {
        let place = folder.path().join(name);
        fs::create_dir_all(&place).unwrap();
        let mut copied = model.copy(&place, Disk::default());
        copied.close();
        copied
    };
    let faults = [Fault::Torn, Fault::Error(libc::ENOSPC)];
    let mut tried = 0;
    for fault in faults {
        for at in 1..=operations {
            let name = format!("{fault:?}-{at}");
            let mut copied = copy(&name);
            let (from, to) = (copied.folder.clone(), folder.path().join(format!("{name}.to")));
            let spoiler = Spoiler::new(fault, at);
            spoiler.arm(true);
            let failed = moved(&spoiler.disk(), &from, &to);
            assert!(failed.is_err(), "{name}: {failed:?}");
            let opened = [&from, &to].map(|place| is_store(place));
            assert_ne!(opened, [true, true], "{name}");
            let done = moved(&Disk::default(), &from, &to);
            assert!(done.is_ok(), "{name}: {done:?}");
            check(&mut copied, &to);
            tried += 1;
            fs::remove_dir_all(&from).unwrap();
            fs::remove_dir_all(&to).unwrap();
        }
    }
    println!("a move failed in {tried} ways, at {operations} operations");
    model.folder = from;
    model.reopen();
    model.check();
}

/// Whether a server would open this place with what is in it.
fn is_store(place: &Path) -> bool {
    let has_file = place.join(".store.json").exists();
    has_file && !place.join(".moved.json").exists() && !place.join(".moving.json").exists()
}

#[test]
fn a_copy_that_reads_differently_is_made_again() {
    let (_folder, from, to, mut model) = scene();
    // In the middle of a file, wherever that is.
    let operations = operations(&mut model);
    let kill = |at| {
        let killed = Spoiler::new(Fault::Kill, at);
        killed.arm(true);
        moved(&killed.disk(), &from, &to).unwrap_err();
        find(&to, ".moving")
    };
    let partial = (operations / 4..operations).find_map(kill).expect("a file is on its way");
    // What was copied of the file that was not whole is garbage now, and longer.
    fs::write(&partial, vec![7; 5 << 20]).unwrap();
    moved(&Disk::default(), &from, &to).unwrap();
    check(&mut model, &to);
}

fn find(folder: &Path, end: &str) -> Option<PathBuf> {
    let mut entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.find_map(|path| match path.is_dir() {
        true => find(&path, end),
        false => path.to_string_lossy().ends_with(end).then_some(path),
    })
}
