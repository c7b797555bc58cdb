//! An archive in a folder, of VHDs, with what is kept there.

use std::{fs, process::Command};

use xtask::{disk, packages};

use super::{
    s3::files,
    scene::{MIB, OTHER, SERVER, Scene, done, put_together},
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
