//! Dropped runs: gone for everybody, links of their chains still, and back again.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

use std::{fs, sync::Arc, time::Duration};

use chains::{Content, Model, changed};
use janus_server::{
    admin::{Command, ask::ask},
    config::Settings,
    retention::{self, Retention},
    runs::{Change, RunError},
};
use serde_json::json;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

mod chains;

const MIB: usize = 1 << 20;

/// A store with `links` runs of one disk, each with a change of its own.
fn chain_of(folder: &std::path::Path, links: u64) -> (Model, Vec<Arc<janus_server::chain::Run>>) {
    let mut model = Model::new(folder);
    let mut content: Content = changed(&vec![0; 5 * MIB + 512], &[(0, 700, 1)]);
    let mut runs = vec![model.backup(&[("sda", content.clone())])];
    for link in 1..links {
        content = changed(&content, &[(link * 31, 40, link + 1), (link * 100, 3, 0)]);
        runs.push(model.backup(&[("sda", content.clone())]));
    }
    (model, runs)
}

#[test]
fn a_dropped_run_is_gone_and_its_images_stay_links() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 4);
    let mut changes = model.runs.subscribe();
    model.trash(&runs[1]);
    let gone = runs[1].snapshots[0].id;
    assert!(matches!(changes.try_recv(), Ok(Change::Removed(_, ids)) if ids == [gone]));
    assert!(model.runs.snapshot(gone).is_none());
    model.check();
    model.reopen();
    model.check();
    let trashed = model.runs.trashed(&model.key);
    assert_eq!(trashed.len(), 1);
    assert_eq!(trashed[0].run, runs[1]);
    assert_eq!(trashed[0].record.reason, "test");
    assert!(!model.files().iter().any(|name| name.contains("set-aside")), "{:?}", model.files());
}

#[test]
fn what_builds_on_a_snapshot_from_the_trash_still_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    model.trash(&runs[1]);
    model.close();
    let settings = Settings { image_path: folder.path().to_owned(), ..Settings::default() };
    let command: Command =
        serde_json::from_value(json!({ "usage": { "machine": null, "snapshots": true } })).unwrap();
    let usage = ask(&settings, command, &|_| ()).unwrap().json;
    let newest_first = usage["machines"][0]["disks"][0]["snapshots"].as_array().unwrap();
    let of = |place: usize, what: &str| newest_first[place][what].as_u64().unwrap();
    assert_eq!(newest_first.len(), 2);
    // The dropped run has 43 of the base's blocks anew.
    assert_eq!(of(1, "unique_bytes"), 43 * 4096, "{usage}");
    assert_eq!(of(0, "unique_bytes"), of(0, "allocated_bytes"), "the head");
}

#[test]
fn a_dropped_run_can_be_brought_back() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    let before = model.files();
    for run in [&runs[0], &runs[2]] {
        model.trash(run);
    }
    model.check();
    model.reopen();
    for run in [&runs[2], &runs[0]] {
        model.restore(run);
        model.check();
        let again = model.runs.restore_trashed(&model.key, run.backup).unwrap_err();
        assert!(matches!(again, RunError::Unknown { .. }), "{again}");
    }
    model.reopen();
    model.check();
    assert_eq!(model.files(), before);
}

#[test]
fn without_its_newest_run_a_disk_goes_on_from_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    model.trash(&runs[2]);
    let content = changed(&model.contents[&runs[1].snapshots[0].id], &[(9, 9, 99)]);
    let next = model.backup(&[("sda", content)]);
    assert_eq!(next.snapshots[0].parent, Some(runs[1].snapshots[0].id));
    assert_eq!(next.sequence, 4, "numbers are not used twice");
    assert!(next.committed_ms > runs[2].committed_ms);
    // Two children of one parent.
    model.restore(&runs[2]);
    model.check();
    model.reopen();
    model.check();
}

#[test]
fn the_head_of_an_open_run_is_not_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 2);
    let disks = [("sda", changed(&model.contents[&runs[1].snapshots[0].id], &[(1, 1, 7)]))];
    let (open, commits) = model.send(&disks);
    let both = [runs[0].backup, runs[1].backup];
    let refused = model.runs.trash(&model.key, &both, "test", 0).unwrap_err();
    assert!(matches!(&refused, RunError::BuiltOn { holder, .. } if *holder == open.backup));
    assert!(refused.to_string().contains("disk sda"), "{refused}");
    assert!(model.runs.trashed(&model.key).is_empty(), "all or none");
    // What lies below the head may go.
    model.trash(&runs[0]);
    model.commit(&open, &commits, &disks);
    model.check();
    model.trash(&runs[1]);
    model.check();
}

#[test]
fn a_crash_leaves_a_run_kept_or_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 2);
    let machine = folder.path().join("user/machine");
    model.trash(&runs[0]);
    let (record, manifest) =
        (machine.join(".trash/00000001.why.json"), machine.join(".trash/00000001.json"));
    assert!(record.exists());
    // Before the rename: kept, and the record goes.
    fs::rename(&manifest, machine.join(".runs/00000001.json")).unwrap();
    model.live.insert(runs[0].snapshots[0].id);
    model.reopen();
    model.check();
    assert!(!record.exists());
    // A record that can't be read: dropped, not for the next purge, and not to be brought back.
    model.trash(&runs[0]);
    fs::write(&record, "{").unwrap();
    model.reopen();
    model.check();
    assert_eq!(model.runs.trashed(&model.key)[0].record.purge_not_before_ms, i64::MAX);
    let refused = model.runs.restore_trashed(&model.key, runs[0].backup).unwrap_err();
    assert!(matches!(refused, RunError::Purging { .. }), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn what_is_due_goes_on_a_schedule_and_at_once_when_space_is_low() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, runs) = chain_of(folder.path(), 3);
    let trashed = |model: &Model| model.runs.trashed(&model.key).len();
    model.trash(&runs[0]);
    let settings = Settings { reserve: "0".into(), ..Settings::default() };
    let retention = Arc::new(Retention::new(model.runs.clone(), settings));
    let (is_low, heard) = watch::channel(false);
    let stop = CancellationToken::new();
    // No new day begins while this runs.
    let at = (time::OffsetDateTime::now_utc() + Duration::from_hours(12)).time();
    let following = retention::follow(retention, Some(at), heard, stop.clone());
    let following = tokio::spawn(following);
    sleep(Duration::from_secs(59)).await;
    assert_eq!(trashed(&model), 1);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(trashed(&model), 0, "a start is soon followed by a look");
    model.trash(&runs[1]);
    sleep(Duration::from_hours(3)).await;
    assert_eq!(trashed(&model), 1, "the next look is of the next day");
    is_low.send(true).unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(trashed(&model), 0, "space is low");
    stop.cancel();
    following.await.unwrap();
    model.check();
}
