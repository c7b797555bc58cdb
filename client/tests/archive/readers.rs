//! What is archived, how much of it travels, and who can read it.

use std::{fs, process::Command};

use serde_json::Value;
use xtask::{disk, packages};

use super::{
    s3::{BUCKET, S3, files},
    scene::{MACHINE, MIB, OTHER, SERVER, Scene, done, put_together},
};

/// What travels may be a tenth more than what is new.
fn assert_little(sent: u64, new: u64) {
    assert!(sent <= new + new / 10, "{sent} bytes sent for {new} that are new");
    assert!(sent >= new, "{sent} bytes sent for {new} that are new: noise can't be packed");
}

#[test]
fn only_what_differs_travels_and_all_of_it_can_be_read_without_servers_or_without_us() {
    let s3 = S3::start();
    let url = format!("s3://{BUCKET}/of/us");
    let mut scene = Scene::with(&s3, 64, 24);
    scene.backup();
    let first = scene.archive(&[]);
    println!("{first}");
    assert_eq!(first["runs"][0]["disks"][0]["kind"], "full", "{first}");
    assert_little(s3.take_put_bytes(), 24 * MIB);
    let again = scene.archive(&[MACHINE]);
    assert_eq!((&again["runs"][0]["was_there"], &again["sent_bytes"]), (&true.into(), &0.into()));

    // Single blocks everywhere, and a run that is not archived.
    let changed = disk::change(&scene.disk, 2 * MIB, 7).unwrap();
    scene.backup();
    let between = scene.taken.pop().unwrap();
    let more = disk::change(&scene.disk, MIB, 8).unwrap();
    scene.backup();
    let second = scene.archive(&[]);
    println!("{second}");
    let union = changed.union(&more).count() as u64 * 4096;
    assert_eq!(second["runs"][0]["disks"][0]["differing_bytes"], union, "{second}");
    assert_little(s3.take_put_bytes(), union);

    // Also where nothing runs, and where the last archived snapshot is gone here: its hashes are in the archive.
    let gone = scene.taken[1].snapshot.clone();
    disk::write_noise(&scene.disk, 40 * MIB..41 * MIB, 9).unwrap();
    scene.backup();
    done(&scene.site.admin(SERVER, &["delete", &gone, "--json"]).unwrap());
    scene.site.stop_server(SERVER).unwrap();
    let third = scene.archive(&["alice/machine"]);
    println!("{third}");
    assert_eq!(third["runs"][0]["disks"][0]["kind"], "delta", "{third}");
    assert_little(s3.take_put_bytes(), MIB);

    let verified =
        done(&scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap());
    assert_eq!((&verified["runs"], &verified["images"]), (&3.into(), &3.into()), "{verified}");
    let listed = done(&scene.site.admin(SERVER, &["archive", "list", "off", "--json"]).unwrap());
    assert_eq!(listed["runs"].as_array().unwrap().len(), 3, "{listed}");

    fs::remove_dir_all(scene.site.server(SERVER).unwrap().images()).unwrap();
    scene.assert_restored(&url, Some(&s3));
    assert_read_by_others(&scene, &s3);
    assert_listed_and_looked_into(&scene, &url, &s3);
    assert_imported(&mut scene, &between.snapshot);
    scene.assert_secret();
}

/// Any tool for images reads them, once their parts are put together by any tool for zstd.
fn assert_read_by_others(scene: &Scene, s3: &S3) {
    let folder = scene.path("put-together");
    fs::create_dir(&folder).unwrap();
    for taken in &scene.taken {
        let parts = files(&s3.objects(), &format!("{}.vhdx.", taken.snapshot));
        let parts: Vec<_> =
            parts.into_iter().filter(|part| part.extension().unwrap() == "zst").collect();
        put_together(&parts, &folder.join(format!("{}.vhdx", taken.snapshot)));
    }
    for taken in &scene.taken {
        let leaf = folder.join(format!("{}.vhdx", taken.snapshot));
        let read = packages::seven_zip(&leaf, "VHDX").unwrap();
        assert!(read == fs::read(&taken.copy).unwrap(), "7-Zip reads another disk");
    }
    let mut command = Command::new("qemu-img");
    let base = folder.join(format!("{}.vhdx", scene.taken[0].snapshot));
    command.args(["compare", "-f", "vhdx", "-F", "raw"]).arg(base).arg(&scene.taken[0].copy);
    let compared = command.output().expect("apt-get install qemu-utils");
    assert!(compared.status.success(), "{compared:?}");
}

fn assert_listed_and_looked_into(scene: &Scene, url: &str, s3: &S3) {
    let listed = done(&scene.bare(&["list", "--from-archive", url], Some(s3)).output().unwrap());
    let snapshots = listed["snapshots"].as_array().unwrap();
    assert_eq!(snapshots.len(), 3, "{listed}");
    assert_eq!(snapshots[0]["snapshot_id"], scene.taken[2].snapshot.as_str(), "{listed}");
    // By its name, without an id: the only machine there.
    let to = scene.path("newest.raw");
    let arguments = ["restore", "disk", "--from-archive", url, "--to", to.to_str().unwrap()];
    done(&scene.bare(&arguments, Some(s3)).output().unwrap());
    disk::compare(&scene.taken[2].copy, &to).unwrap();
    // What is there already isn't fetched.
    disk::change(&to, MIB, 12).unwrap();
    s3.take_got_bytes();
    let again = [&arguments[..], &["--force"]].concat();
    let restored = done(&scene.bare(&again, Some(s3)).output().unwrap());
    disk::compare(&scene.taken[2].copy, &to).unwrap();
    let fetched = restored["fetched_bytes"].as_u64().unwrap();
    assert!(fetched < 4 * MIB, "{restored}");
    let refused =
        scene.bare(&["restore", "disk", "--from-archive", "s3://nowhere/", "--to", "/x"], Some(s3));
    let refused = { refused }.output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
}

/// An empty server gets the newest run, and the next backup there is a delta.
fn assert_imported(scene: &mut Scene, unknown: &str) {
    scene.site.start_server(OTHER).unwrap();
    let import = ["import", "--from-archive", "off", "--machine", MACHINE, "--json"];
    let imported = done(&scene.site.admin(OTHER, &import).unwrap());
    println!("{imported}");
    assert_eq!(imported["disks"][0]["kind"], "full", "{imported}");
    let again = done(&scene.site.admin(OTHER, &import).unwrap());
    assert_eq!(again["was_here"], true, "{again}");
    let wrong = [&import[..], &["--run", unknown]].concat();
    let wrong = scene.site.admin(OTHER, &wrong).unwrap();
    assert_eq!(wrong.status.code(), Some(1), "{wrong:?}");
    let url: Value = vec![scene.site.server(OTHER).unwrap().url()].into();
    scene.client.settings.set("urls", url);
    disk::write_noise(&scene.disk, 50 * MIB..51 * MIB, 10).unwrap();
    let backup = scene.client.backup().unwrap();
    let sent = (backup.server.as_str(), backup.disks[0].kind.as_str(), backup.disks[0].sent_bytes);
    assert_eq!(sent, (OTHER, "delta", MIB), "{backup:?}");
}
