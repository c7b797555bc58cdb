//! The ways that sealed snapshots take, and what comes out at their ends.

use std::{fs, path::Path};

use serde_json::Value;
use xtask::{disk, packages, site::answers};

use super::scene::{
    A, B, MACHINE, MIB, SECRET, SIZE, Scene, await_that, data, files_with, run, secret, text, write,
};

/// A disk without partitions: ext4 with a file.
fn with_files(scene: &mut Scene) -> std::path::PathBuf {
    let (files, image) = (scene.path("files"), scene.path("ext4.raw"));
    fs::create_dir(&files).unwrap();
    fs::write(files.join("accounts.txt"), secret(100_000)).unwrap();
    disk::blank(&image, 64 * MIB).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-d", text(&files), text(&image)]);
    scene.client.settings.set("disks", vec![format!("fs={}", image.display())]);
    image
}

#[test]
fn files_exports_and_formats_are_in_clear_for_who_has_the_key() {
    let (mut scene, _) = Scene::sealed();
    let image = with_files(&mut scene);
    let backup = scene.backup();
    assert_eq!(backup.server, A);
    let listed = scene.client.run(&["ls", "fs:/0/"]).unwrap();
    assert!(listed.stdout.contains("accounts.txt"), "{listed:?}");
    let said = scene.client.run(&["cat", "fs:/0/accounts.txt"]).unwrap();
    assert!(said.code == Some(0) && said.stdout.as_bytes() == secret(100_000), "{}", said.stderr);
    let to = scene.path("copied");
    let copied: Value = scene.client.answer(&["cp", "fs:/0/accounts.txt", text(&to)]).unwrap();
    assert_eq!(copied["files"], 1);
    assert!(fs::read(&to).unwrap() == secret(100_000));

    // As any program reads it.
    let socket = scene.path("x.sock");
    let mut serving = scene.client.start(&["nbd", "fs", "--socket", text(&socket)]).unwrap();
    await_that("the export listens", || socket.exists() || serving.has_ended());
    let (uri, out) = (format!("nbd+unix:///?socket={}", text(&socket)), scene.path("nbd.raw"));
    run("nbdcopy", &[&uri, text(&out)]);
    serving.interrupt();
    assert_eq!(serving.wait().unwrap().code, Some(0));
    disk::compare(&image, &out).unwrap();

    for (name, kind) in [("disk.vhdx", "VHDX"), ("disk.vhd", "VHD")] {
        let to = scene.path(name);
        let _: answers::Restore = scene.client.restore("fs", &to).unwrap();
        assert!(packages::seven_zip(&to, kind).unwrap() == fs::read(&image).unwrap(), "{name}");
    }
    let (qcow2, raw) = (scene.path("disk.qcow2"), scene.path("of-qcow2.raw"));
    let _: answers::Restore = scene.client.restore("fs", &qcow2).unwrap();
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&qcow2), text(&raw)]);
    disk::compare(&image, &raw).unwrap();
    // What the server keeps opens there, too, and says nothing.
    let kept = scene.images(A).join(&backup.disks[0].image);
    let content = packages::seven_zip(&kept, "VHDX").unwrap();
    assert_eq!(content.len() as u64, 64 * MIB);
    assert!(memchr::memmem::find(&content, SECRET.as_bytes()).is_none());
    assert!(content != fs::read(&image).unwrap());
}

#[test]
fn one_volume_comes_back_alone() {
    let (mut scene, _) = Scene::sealed();
    let image = scene.path("parted.raw");
    disk::blank(&image, 64 * MIB).unwrap();
    run("sgdisk", &["-n", "1:2048:+19M", "-n", "2:43008:+39M", text(&image)]);
    disk::write_noise(&image, MIB..15 * MIB, 1).unwrap();
    disk::write_noise(&image, 22 * MIB..30 * MIB, 2).unwrap();
    write(&image, 23 * MIB, &secret(5000));
    scene.client.settings.set("disks", vec![format!("parted={}", image.display())]);
    scene.backup();
    let to = scene.path("b.raw");
    let _: answers::Restore =
        scene.client.answer(&["restore", "parted", "--volume", "2", "--to", text(&to)]).unwrap();
    let all = fs::read(&image).unwrap();
    assert!(fs::read(&to).unwrap() == all[21 * MIB as usize..60 * MIB as usize]);
}

#[test]
fn servers_scrub_seed_and_thin_without_the_key() {
    let (mut scene, _) = Scene::sealed();
    let taken: Vec<_> = (0..3)
        .map(|round| {
            scene.noise(6 + round..7 + round, 20 + round);
            let _: answers::Backup = scene.client.answer(&["backup", "--server", A]).unwrap();
            let copy = scene.path(&format!("copy-{round}"));
            fs::copy(&scene.disk, &copy).unwrap();
            let newest = scene.client.list().unwrap().snapshots[0].snapshot_id.clone();
            (newest, copy)
        })
        .collect();
    let verified = scene.admin(A, &["verify"]);
    println!("{verified}");
    assert_eq!(verified["damaged_images"].as_u64().unwrap_or(0), 0, "{verified}");
    let seeded = scene.admin(B, &["seed", "--from", A, MACHINE]);
    assert_eq!(seeded["written_bytes"], data(&scene.disk), "{seeded}");
    // What lies between goes, and its blocks become those of its child.
    scene.admin(A, &["delete", &taken[1].0]);
    scene.admin(A, &["trash", "purge"]);
    for (snapshot, copy) in [&taken[0], &taken[2]] {
        scene.assert_restores(snapshot, copy, &["--server", A]);
    }
    scene.site.kill_server(A).unwrap();
    let report = scene.assert_restores("disk", &taken[2].1, &[]);
    assert_eq!(report.server, B);
    assert!(files_with(&scene.images(B), SECRET.as_bytes()).is_empty());
    scene.noise(9..10, 30);
    let next = scene.backup();
    assert_eq!((next.server.as_str(), next.disks[0].sent_bytes), (B, MIB));
    scene.assert_restores("disk", &scene.disk, &["--verify"]);
}

#[test]
fn stubs_folders_and_archives_carry_the_seal() {
    let (mut scene, _) = Scene::sealed();
    // By hand, without a server.
    let folder = scene.path("usb");
    let made: Value = scene.client.answer(&["backup", "--to-folder", text(&folder)]).unwrap();
    assert_eq!(made["ok"], true);
    assert!(files_with(&folder, SECRET.as_bytes()).is_empty());
    scene.admin(B, &["import", text(&folder)]);
    let report = scene.assert_restores("disk", &scene.disk, &[]);
    assert_eq!(report.server, B);
    // The next backup there sends what changed.
    scene.noise(9..10, 30);
    let next: answers::Backup = scene.client.answer(&["backup", "--server", B]).unwrap();
    assert_eq!(next.disks[0].sent_bytes, MIB);

    // An archive, read with nothing but the key.
    let there = tempfile::tempdir().unwrap();
    let url = format!("file://{}", there.path().display());
    scene.site.stop_server(B).unwrap();
    scene.site.server(B).unwrap().settings.set("archive.off.url", url.clone());
    scene.site.start_server(B).unwrap();
    scene.site.await_ready(&scene.client).unwrap();
    scene.admin(B, &["archive", "off"]);
    assert!(files_with(there.path(), SECRET.as_bytes()).is_empty());
    scene.assert_restores("disk", &scene.disk, &["--from-archive", &url]);

    // A stub is read through, and filled by what is sealed.
    scene.admin(A, &["seed", "--from", B, MACHINE, "--hashes-only"]);
    scene.assert_restores("disk", &scene.disk, &["--server", A]);
    assert!(files_with(&scene.images(A), SECRET.as_bytes()).is_empty());
}

/// Its server is gone, and others have its table and most of its blocks.
#[test]
fn a_snapshot_whose_server_is_away_is_opened_by_the_seal_that_others_mirror() {
    let (mut scene, _) = Scene::sealed();
    scene.client.settings.set("failover_after_seconds", 2);
    let first = scene.backup_to(A);
    scene.backup_to(B);
    let shelf = scene.site.folder().join(B).join(".mirror");
    await_that("the other server mirrors the table", || names(&shelf, &first.snapshot));
    scene.site.kill_server(A).unwrap();
    await_that("all of it is elsewhere", || {
        let list = scene.client.list().unwrap();
        let one = list.snapshots.into_iter().find(|one| one.snapshot_id == first.snapshot);
        one.and_then(|one| one.elsewhere)
            .is_some_and(|there| there.held_bytes == there.content_bytes)
    });
    let report = scene.assert_restores(&first.snapshot, &first.copy, &[]);
    assert_eq!((report.server.as_str(), report.verified_bytes), (A, SIZE));
    fs::rename(scene.key_file(), scene.path("away.key")).unwrap();
    scene.assert_refused(&first.snapshot, &[], &["janus-client recover"]);
}

/// Whether any file below a folder has this in its name.
fn names(folder: &Path, wanted: &str) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    entries.map(Result::unwrap).any(|entry| {
        let is_named = entry.file_name().to_string_lossy().contains(wanted);
        is_named || (entry.path().is_dir() && names(&entry.path(), wanted))
    })
}
