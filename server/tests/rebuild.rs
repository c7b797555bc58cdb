//! A catalog from the folders alone: after copies by hand, losses, and other layouts.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::fs;

use chains::{
    Model, chain, changed,
    faults::{Fault, Spoiler},
};
use janus_server::{
    chain::store::{
        StoreError,
        rebuild::{self, Rebuilt, Step},
    },
    storage::Disk,
    verify::{Way, check_image, pace::Limit},
};
use tokio_util::sync::CancellationToken;

mod chains;

fn unlocked<T>(work: impl Fn() -> Result<T, StoreError>) -> T {
    chains::unlocked(work, |error| matches!(error, StoreError::Locked { .. })).unwrap()
}

/// Rebuilds the model's store, says what was done, and opens it again.
fn rebuilt(model: &mut Model) -> rebuild::Plan {
    model.close();
    let Rebuilt { plan, .. } = unlocked(|| rebuild::rebuild(&Disk::default(), &model.folder, true));
    for step in &plan.steps {
        println!("  {}", step.describe(&model.folder));
    }
    model.reopen();
    plan
}

fn machine(model: &Model) -> std::path::PathBuf {
    model.folder.join("user/machine")
}

#[test]
fn a_whole_store_only_gets_a_new_generation() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, _) = chain(folder.path(), 3);
    let (files, generation) = (model.files(), model.runs.store().generation);
    let plan = rebuilt(&mut model);
    assert_eq!(plan.steps, [Step::Renew(folder.path().into())]);
    assert_ne!(model.runs.store().generation, generation);
    assert_eq!(
        model.runs.store().start_epoch,
        2,
        "starts are counted anew: the rebuild's, and this one"
    );
    assert_eq!(model.files(), files);
    model.check();
}

#[test]
fn folders_that_were_copied_without_the_stores_own_files_are_a_store_again() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), 3);
    let counter = model.runs.machine(&model.key).unwrap().use_counter();
    model.close();
    fs::remove_file(folder.path().join(".store.json")).unwrap();
    fs::remove_file(machine(&model).join(".machine.json")).unwrap();
    // The other layout.
    fs::rename(machine(&model), folder.path().join("user@machine")).unwrap();
    let plan = rebuilt(&mut model);
    assert_eq!(plan.steps.len(), 3, "{:?}", plan.steps);
    model.check();
    // Manifests have the counters of their starts.
    assert_eq!((counter, model.runs.machine(&model.key).unwrap().use_counter()), (3, 3));
    let content = model.contents[&runs[2].snapshots[0].id].clone();
    let next = model.backup(&[("sda", changed(&content, &[(5, 5, 55)]))]);
    assert_eq!((next.snapshots[0].parent, next.sequence), (Some(runs[2].snapshots[0].id), 4));
    model.check();
}

#[test]
fn files_that_were_set_aside_come_back_when_a_manifest_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), 3);
    let manifest = machine(&model).join(".runs/00000003.json");
    let away = folder.path().join("away");
    fs::rename(&manifest, &away).unwrap();
    model.reopen();
    let head = &runs[2].snapshots[0];
    assert!(!machine(&model).join(&head.image).exists(), "nothing named it");
    fs::rename(&away, &manifest).unwrap();
    rebuilt(&mut model);
    model.check();
    // A file of the same name that is another one stays where it is.
    let (image, aside) = (machine(&model).join(&head.image), machine(&model).join("sda/set-aside"));
    fs::remove_file(&image).unwrap();
    let other = aside.join(image.file_name().unwrap());
    fs::copy(machine(&model).join(&runs[0].snapshots[0].image), &other).unwrap();
    let plan = rebuilt(&mut model);
    assert_eq!(plan.unread.len(), 1, "{:?}", plan.unread);
    assert!(other.exists() && !image.exists());
}

#[test]
fn equal_names_that_nothing_names_are_all_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, _) = chain(folder.path(), 3);
    let disk = machine(&model).join("sda");
    for content in ["one", "two"] {
        fs::write(disk.join("stray.vhdx"), content).unwrap();
        model.reopen();
    }
    let aside = fs::read_dir(disk.join("set-aside")).unwrap();
    let mut contents: Vec<_> =
        aside.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    contents.sort_unstable();
    assert_eq!(contents, ["one", "two"]);
}

#[test]
fn a_manifest_that_can_be_read_again_counts_again_and_one_that_cannot_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, _) = chain(folder.path(), 3);
    let manifest = machine(&model).join(".runs/00000002.json");
    let bytes = fs::read(&manifest).unwrap();
    fs::write(&manifest, b"{").unwrap();
    model.reopen();
    let damaged = fs::read_dir(manifest.parent().unwrap()).unwrap().map(|one| one.unwrap().path());
    let damaged = damaged.into_iter().find(|path| path.extension().unwrap() == "damaged").unwrap();
    let plan = rebuilt(&mut model);
    assert_eq!(plan.unread.len(), 1, "{:?}", plan.unread);
    assert_eq!(plan.unread[0].0, damaged);
    fs::write(&damaged, bytes).unwrap();
    let plan = rebuilt(&mut model);
    assert_eq!(plan.unread, []);
    assert!(manifest.exists() && !damaged.exists());
    model.check();
}

#[test]
fn images_whose_manifests_are_gone_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, _) = chain(folder.path(), 3);
    model.close();
    for sequence in [2, 3] {
        fs::remove_file(machine(&model).join(format!(".runs/{sequence:08}.json"))).unwrap();
    }
    let plan = unlocked(|| rebuild::plan(&Disk::default(), &model.folder, true));
    assert_eq!(plan.images_of_nobody(), 2, "{:?}", plan.steps);
}

#[test]
fn an_open_run_ends_and_its_files_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), 3);
    let content = model.contents[&runs[2].snapshots[0].id].clone();
    drop(model.send(&[("sda", changed(&content, &[(5, 5, 55)]))]));
    rebuilt(&mut model);
    model.check();
    let files = model.files();
    let partial = |name: &&String| name.starts_with("sda/set-aside/") && name.contains(".partial");
    assert!(files.iter().any(|name| partial(&name)), "{files:?}");
    assert!(files.iter().any(|name| name.ends_with(".ended")), "{files:?}");
    model.backup(&[("sda", content)]);
    model.check();
}

#[test]
fn where_a_merge_is_pending_open_runs_end_too_and_what_was_proven_counts_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), 4);
    model.trash(&runs[1]);
    let content = model.contents[&runs[3].snapshots[0].id].clone();
    let limit = Limit::new(0, CancellationToken::new(), || false);
    let stopped = (1..).find_map(|at| {
        let copied = tempfile::tempdir().unwrap();
        let spoiler = Spoiler::new(Fault::Kill, at);
        let mut model = model.copy(copied.path(), spoiler.disk());
        for held in model.runs.machine(&model.key).unwrap().snapshots() {
            check_image(&model.runs, &held, Way::Anew(1), &limit).unwrap();
        }
        model.runs.save_health();
        drop(model.send(&[("sda", changed(&content, &[(5, 5, 55)]))]));
        spoiler.arm(true);
        model.purge(true);
        spoiler.arm(false);
        model.close();
        let is_pending = fs::read_dir(machine(&model).join(".merge")).is_ok_and(|mut intents| {
            intents.any(|intent| intent.unwrap().path().extension().is_some_and(|it| it == "json"))
        });
        is_pending.then_some((copied, model))
    });
    let (_copied, mut model) = stopped.unwrap();
    fs::write(machine(&model).join("sda/stray.vhdx"), "stray").unwrap();
    let plan = rebuilt(&mut model);
    assert!(plan.steps.iter().any(|step| matches!(step, Step::ForgetProofs { .. })));
    assert_eq!(plan.images_of_nobody(), 1, "{:?}", plan.steps);
    let rebuilt = model.runs.machine(&model.key).unwrap();
    assert!(rebuilt.active().is_empty(), "the run was open");
    let health = rebuilt.health();
    assert!(!health.images.is_empty() && health.images.values().all(|image| image.proven_ms == 0));
    let files = model.files();
    assert!(files.iter().any(|name| name.ends_with(".ended")), "{files:?}");
    assert!(!files.iter().any(|name| name.starts_with(".merge/")), "{files:?}");
    model.check();
}

#[test]
fn the_damaged_record_of_an_open_run_is_kept_beside() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), 2);
    let content = model.contents[&runs[1].snapshots[0].id].clone();
    let (run, _) = model.send(&[("sda", changed(&content, &[(5, 5, 55)]))]);
    let record = machine(&model).join(format!(".open/{}.json", run.backup));
    drop(run);
    model.close();
    fs::write(&record, "{").unwrap();
    model.reopen();
    let files = model.files();
    let is_record = |name: &&String| name.starts_with(".open/") && name.ends_with(".damaged");
    let aside = files.iter().find(is_record).unwrap_or_else(|| panic!("{files:?}"));
    assert_eq!(fs::read(machine(&model).join(aside)).unwrap(), b"{");
    let partial = |name: &&String| name.starts_with("sda/set-aside/") && name.contains(".partial");
    assert!(files.iter().any(|name| partial(&name)), "{files:?}");
    model.backup(&[("sda", content)]);
    model.reopen();
    model.check();
}

#[test]
fn two_folders_of_one_machine_are_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, _) = chain(folder.path(), 3);
    let mut copy = std::process::Command::new("cp");
    copy.arg("-a").args([machine(&model), folder.path().join("user/copy")]);
    assert!(copy.status().unwrap().success());
    rebuilt(&mut model);
    model.check();
    assert!(folder.path().join(".set-aside").is_dir());
    assert!(!folder.path().join("user/copy").exists());
}

#[test]
fn a_dry_run_changes_nothing_and_says_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain(folder.path(), 3);
    let content = model.contents[&runs[2].snapshots[0].id].clone();
    drop(model.send(&[("sda", content)]));
    model.close();
    fs::remove_file(machine(&model).join(".machine.json")).unwrap();
    let before = model.files();
    let store = fs::read(folder.path().join(".store.json")).unwrap();
    let planned = unlocked(|| rebuild::plan(&Disk::default(), folder.path(), true));
    assert_eq!(model.files(), before);
    assert_eq!(fs::read(folder.path().join(".store.json")).unwrap(), store);
    assert!(planned.steps.len() > 2, "{:?}", planned.steps);
    let done = unlocked(|| rebuild::rebuild(&Disk::default(), folder.path(), true)).plan;
    assert_eq!(done.steps, planned.steps);
}

#[test]
fn a_store_in_use_is_not_rebuilt() {
    let folder = tempfile::tempdir().unwrap();
    let (model, _) = chain(folder.path(), 3);
    let refused = rebuild::rebuild(&Disk::default(), folder.path(), true).err().unwrap();
    assert!(matches!(refused, StoreError::Locked { .. }), "{refused}");
    model.check();
}

#[test]
fn a_folder_that_holds_no_machine_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("letter"), "mine").unwrap();
    let refused = |error: Option<StoreError>| matches!(error, Some(StoreError::NoStore { .. }));
    assert!(refused(rebuild::plan(&Disk::default(), folder.path(), true).err()));
    assert!(refused(rebuild::rebuild(&Disk::default(), folder.path(), true).err()));
    let names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["letter"]);
}
