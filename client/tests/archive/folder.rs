//! An archive in a folder, of VHDs, with what is kept there.

use std::{fs, process::Command};

use xtask::{disk, packages};

use super::{
    s3::files,
    scene::{MACHINE, MIB, OTHER, SERVER, Scene, done, put_together},
};

#[test]
fn a_folder_keeps_as_many_runs_as_it_is_to() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let settings = [
        ("archive.off.keep", 2.into()),
        ("archive.off.full_every", 2.into()),
        ("prefer_vhdx", false.into()),
    ];
    let mut scene = Scene::new(&url, &settings, 24, 8);
    let mut kinds = Vec::new();
    for round in 0..4 {
        scene.backup();
        let archived = scene.archive(&[]);
        kinds.push(archived["runs"][0]["disks"][0]["kind"].as_str().unwrap().to_owned());
        disk::change(&scene.disk, MIB, 30 + round).unwrap();
    }
    assert_eq!(kinds, ["full", "delta", "full", "delta"]);
    let manifests = files(folder.path(), ".json");
    assert_eq!(manifests.len(), 2, "{manifests:?}");
    // Of the first two nothing is needed any more.
    for taken in scene.taken.drain(..2) {
        assert!(files(folder.path(), &taken.snapshot).is_empty());
    }
    done(&scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap());
    scene.assert_restored(&url, None);
    let base = scene.path(&format!("{}.vhd", scene.taken[0].snapshot));
    put_together(&files(folder.path(), &format!("{}.vhd.0", scene.taken[0].snapshot)), &base);
    let [options, image] = packages::for_qemu(&base, "vpc");
    let [_, copy] = packages::for_qemu(&scene.taken[0].copy, "raw");
    let mut command = Command::new("qemu-img");
    let compared = command.args(["compare", &options, &image, &copy]).output();
    let compared = compared.expect("apt-get install qemu-utils");
    assert!(compared.status.success(), "{compared:?}");

    scene.site.start_server(OTHER).unwrap();
    let import = ["import", "--from-archive", &url, "--machine", "alice/machine", "--json"];
    done(&scene.site.admin(OTHER, &import).unwrap());
    // A folder that isn't mounted is not taken for an empty archive.
    fs::rename(folder.path(), scene.path("elsewhere")).unwrap();
    let missing = scene.site.admin(SERVER, &["archive", "off"]).unwrap();
    assert_eq!(missing.status.code(), Some(1), "{missing:?}");
    assert!(String::from_utf8_lossy(&missing.stderr).contains("mounted"), "{missing:?}");
    fs::rename(scene.path("elsewhere"), folder.path()).unwrap();
}

/// What `keep` is about are disks: one that is no longer backed up keeps its last backup.
#[test]
fn what_is_kept_is_kept_of_each_disk() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let mut scene = Scene::new(&url, &[("archive.off.keep", 1.into())], 12, 3);
    let other = scene.path("other.raw");
    fs::copy(&scene.disk, &other).unwrap();
    disk::change(&other, MIB, 77).unwrap();
    let both = [format!("disk={}", scene.disk.display()), format!("data={}", other.display())];
    scene.client.settings.set("disks", both.to_vec());
    let first = scene.client.backup().unwrap();
    let data = first.disks.iter().find(|one| one.disk_id == "data").unwrap();
    scene.archive(&[]);
    scene.client.settings.set("disks", both[..1].to_vec());
    disk::change(&scene.disk, MIB, 78).unwrap();
    scene.client.backup().unwrap();
    for round in 0..2 {
        let archived = scene.archive(&[]);
        assert_eq!(archived["sent_bytes"].as_u64() > Some(0), round == 0, "{archived}");
        let to = scene.path("restored.raw");
        let to_text = to.to_str().unwrap();
        let restore = ["restore", &data.snapshot_id, "--from-archive", &url, "--to", to_text];
        done(&scene.bare(&restore, None).output().unwrap());
        disk::compare(&other, &to).unwrap();
        fs::remove_file(to).unwrap();
    }

    // Disks of one backup that come to another server one by one lie there in one manifest.
    scene.site.start_server(OTHER).unwrap();
    let there = tempfile::tempdir().unwrap();
    let elsewhere = format!("file://{}", there.path().display());
    scene.site.stop_server(OTHER).unwrap();
    scene.site.server(OTHER).unwrap().settings.set("archive.off.url", elsewhere.clone());
    scene.site.start_server(OTHER).unwrap();
    let run = &first.backup_id;
    for name in ["data", "disk"] {
        let import = ["import", "--from-archive", &url, "--machine", MACHINE, "--run", run];
        let import = [&import[..], &["--disk", name, "--json"]].concat();
        done(&scene.site.admin(OTHER, &import).unwrap());
        let archive = scene.site.admin(OTHER, &["archive", "off", "--json"]).unwrap();
        done(&archive);
    }
    assert_eq!(files(there.path(), ".json").len(), 1);
    // One of them sent anew takes nothing from the other.
    let anew = ["archive", "off", "alice/machine/disk", "--full", "--json"];
    done(&scene.site.admin(OTHER, &anew).unwrap());
    done(&scene.site.admin(OTHER, &["archive", "verify", "off", "--json"]).unwrap());
    let list = ["list", "--from-archive", &elsewhere, "--machine", MACHINE];
    let listed = done(&scene.bare(&list, None).output().unwrap());
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2, "{listed}");
}
