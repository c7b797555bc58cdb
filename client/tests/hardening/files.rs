//! Who may read what is written.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;

/// All below a folder, and it, with their permissions.
fn modes(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = vec![(folder.to_owned(), mode(folder))];
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let entry = entry.unwrap();
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_symlink() {
                continue;
            }
            found.push((path.clone(), mode(&path)));
            if kind.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_is_written_is_for_its_owner() {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
    let views = site.folder().join("views");
    fs::create_dir(&views).unwrap();
    let view = views.join("view.json");
    site.janus_settings().unwrap().set("view_file", view.to_string_lossy());
    site.start_all().unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 8 * MIB).unwrap();
    disk::write_noise(&path, 0..8 * MIB, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    for seed in 2..4 {
        client.backup().unwrap();
        disk::write_noise(&path, 0..MIB, seed).unwrap();
    }
    client.list().unwrap();
    let ran = site.admin("server-a", &["retention", "run", "--now"]).unwrap();
    assert!(ran.status.success(), "{ran:?}");
    site.stop_server("server-a").unwrap();
    site.stop_janus().unwrap();

    let mut seen = 0;
    let mut assert_within = |folder: &Path, most: u32| {
        for (path, mode) in modes(folder) {
            let most = if path.is_dir() { most | (most & 0o444) >> 2 } else { most };
            assert_eq!(mode & !most, 0, "{}: {mode:o}, not {most:o}", path.display());
            seen += 1;
        }
    };
    // The cache has hashes and what is remembered of servers; it was made by the client.
    assert_within(&client.cache(), 0o600);
    assert_within(&site.folder().join("pki/machine"), 0o644);
    for name in ["pki/ca.key", "pki/machine/key.pem", "pki/server-a/key.pem", "pki/router/key.pem"]
    {
        assert_eq!(mode(&site.folder().join(name)), 0o600, "{name}");
    }
    assert_eq!(mode(&view), 0o600, "{}", view.display());
    // The folder that was there before is the administrator's; below it the group may read, as hypervisors must.
    let store = site.server("server-a").unwrap().images().to_owned();
    for entry in fs::read_dir(&store).unwrap().map(Result::unwrap) {
        match entry.path().is_dir() {
            true => assert_within(&entry.path(), 0o640),
            false => assert_eq!(mode(&entry.path()) & !0o640, 0, "{:?}", entry.path()),
        }
    }
    println!("{seen} files and folders of owner {} alone", fs::metadata(&store).unwrap().uid());
    assert!(seen > 15);
}
