//! What is damaged there is found, named, and not built on.

use std::{fs, os::unix::fs::FileExt, process::Output, time::Instant};

use xtask::disk;

use super::{
    s3::{BUCKET, S3, files},
    scene::{MACHINE, MIB, SERVER, Scene, json},
};

fn verify(scene: &Scene) -> Output {
    scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap()
}

#[test]
fn a_flipped_byte_is_named_and_never_restored() {
    let s3 = S3::start();
    let url = format!("s3://{BUCKET}/of/us");
    let mut scene = Scene::with(&s3, 32, 12);
    scene.backup();
    scene.archive(&[]);
    let image = files(&s3.objects(), ".vhdx.")
        .into_iter()
        .filter(|path| path.extension().is_some_and(|name| name == "zst"))
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let part = fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let at = part.metadata().unwrap().len() / 2;
    let mut byte = [0];
    part.read_exact_at(&mut byte, at).unwrap();
    part.write_all_at(&[byte[0] ^ 1], at).unwrap();

    let found = verify(&scene);
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    let name = image.file_name().unwrap().to_str().unwrap();
    let wrong = json(&found)["wrong"].clone();
    println!("{wrong}");
    assert!(wrong.to_string().contains(name), "{wrong}");

    let to = scene.path("restored.raw");
    let arguments = ["restore", "disk", "--from-archive", &url, "--to", to.to_str().unwrap()];
    let refused = scene.bare(&arguments, Some(&s3)).output().unwrap();
    assert_ne!(refused.status.code(), Some(0), "{refused:?}");
    let said = json(&refused);
    println!("{said}");
    assert!(!to.exists() && !said["lost"].as_array().unwrap().is_empty(), "{said}");
    // All that is left, and a map of the rest.
    let map = scene.path("lost.map");
    let partial = [&arguments[..], &["--partial", map.to_str().unwrap()]].concat();
    let restored = scene.bare(&partial, Some(&s3)).output().unwrap();
    assert_eq!(restored.status.code(), Some(0), "{restored:?}");
    assert!(map.exists());
    fs::remove_file(&to).unwrap();

    // The same backup again, with nothing of what is there; an ordinary one sees nothing wrong with names and sizes.
    assert_eq!(scene.archive(&[])["runs"][0]["was_there"], true);
    let anew = scene.archive(&["--full", "alice/machine/disk"]);
    assert_eq!(anew["runs"][0]["disks"][0]["kind"], "full", "{anew}");
    assert_eq!(verify(&scene).status.code(), Some(0));
    scene.assert_one_restored(&scene.taken[0], &url, Some(&s3));

    // A new base needs nothing of it.
    disk::write_noise(&scene.disk, 20 * MIB..21 * MIB, 5).unwrap();
    scene.backup();
    let second = scene.archive(&["--full"]);
    assert_eq!(second["runs"][0]["disks"][0]["kind"], "full", "{second}");
    scene.assert_one_restored(&scene.taken[1], &url, Some(&s3));

    // Nor is anything built on what has gone, but on what was there before it.
    let gone = files(&s3.objects(), &format!("{}.table.0", scene.taken[1].snapshot));
    fs::remove_file(&gone[0]).unwrap();
    disk::write_noise(&scene.disk, 22 * MIB..23 * MIB, 6).unwrap();
    scene.backup();
    let disk = &scene.archive(&[])["runs"][0]["disks"][0];
    assert_eq!((&disk["kind"], &disk["differing_bytes"]), (&"delta".into(), &(2 * MIB).into()));
    scene.assert_one_restored(&scene.taken[2], &url, Some(&s3));

    // What lost an object stays damaged, and can be removed. The others stay.
    let found = json(&verify(&scene));
    println!("{}", found["wrong"]);
    assert_eq!(found["wrong"].as_array().unwrap().len(), 1, "{found}");
    let run = second["runs"][0]["backup_id"].as_str().unwrap();
    let remove = |run: &str| {
        scene.site.admin(SERVER, &["archive", "remove", "off", MACHINE, run, "--json"]).unwrap()
    };
    assert_eq!(json(&remove(run))["removed"], *run);
    assert_eq!(remove(run).status.code(), Some(1));
    assert!(files(&s3.objects(), &scene.taken[1].snapshot).is_empty());
    assert_eq!(verify(&scene).status.code(), Some(0));
    for taken in [&scene.taken[0], &scene.taken[2]] {
        scene.assert_one_restored(taken, &url, Some(&s3));
    }
}

#[test]
fn a_backup_whose_objects_are_incomplete_is_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/of #1 100% us", folder.path().display());
    let there = folder.path().join("of #1 100% us");
    fs::create_dir(&there).unwrap();
    let mut scene = Scene::new(&url, &[], 16, 6);
    scene.backup();
    scene.archive(&[]);
    let cut = |name: &str| {
        let path = files(&there, name).remove(0);
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    };

    // A part of which half is missing is named at once.
    cut(".vhdx.0000000");
    let to = scene.path("restored.raw");
    let arguments = ["restore", "disk", "--from-archive", &url, "--to", to.to_str().unwrap()];
    let began = Instant::now();
    let refused = scene.bare(&arguments, None).output().unwrap();
    println!("{:.1} s: {}", began.elapsed().as_secs_f64(), json(&refused));
    assert_ne!(refused.status.code(), Some(0));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!said.contains("onnection"), "{said}");

    for cut_one in [".vhdx.0000000", ".json", ".index"] {
        if cut_one != ".vhdx.0000000" {
            cut(cut_one);
        }
        let anew = scene.archive(&[]);
        println!("{cut_one}: {anew}");
        assert_eq!(anew["runs"][0]["was_there"], false, "{cut_one}: {anew}");
        assert_eq!(scene.archive(&[])["runs"][0]["was_there"], true);
        let verified = scene.site.admin(SERVER, &["archive", "verify", "off"]).unwrap();
        assert_eq!(verified.status.code(), Some(0), "{cut_one}: {verified:?}");
        scene.assert_one_restored(&scene.taken[0], &url, None);
    }

    let unknown = scene.site.admin(SERVER, &["archive", "off", "alice/machine/none"]).unwrap();
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
    let no_folder = ["list", "--from-archive", &format!("file://{}", scene.disk.display())];
    assert_ne!(scene.bare(&no_folder, None).output().unwrap().status.code(), Some(0));
}
