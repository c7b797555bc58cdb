//! What is damaged there is found, named, and not built on.

use std::{fs, os::unix::fs::FileExt};

use xtask::disk;

use super::{
    s3::{BUCKET, S3, files},
    scene::{MIB, SERVER, Scene, json},
};

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

    let verify = || scene.site.admin(SERVER, &["archive", "verify", "off", "--json"]).unwrap();
    let found = verify();
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

    // A new base needs nothing of it.
    disk::write_noise(&scene.disk, 20 * MIB..21 * MIB, 5).unwrap();
    scene.backup();
    let anew = scene.archive(&["--full"]);
    assert_eq!(anew["runs"][0]["disks"][0]["kind"], "full", "{anew}");
    scene.assert_one_restored(&scene.taken[1], &url, Some(&s3));

    // Nor is anything built on what has gone.
    let gone = files(&s3.objects(), &format!("{}.table.0", scene.taken[1].snapshot));
    fs::remove_file(&gone[0]).unwrap();
    disk::write_noise(&scene.disk, 22 * MIB..23 * MIB, 6).unwrap();
    scene.backup();
    let anew = scene.archive(&[]);
    assert_eq!(anew["runs"][0]["disks"][0]["kind"], "full", "{anew}");
    scene.assert_one_restored(&scene.taken[2], &url, Some(&s3));
}
