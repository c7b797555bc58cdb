//! The commands themselves, through a server: a GPT disk is backed up, and its files come out of the snapshot without it.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

use crate::{
    images::{self, run},
    tree,
};

const MIB: u64 = 1 << 20;

fn site() -> Site {
    Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap()
}

fn backed_up(site: &Site, path: &Path) -> Client {
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
    client
}

/// What a command writes to its standard output, byte for byte.
fn bytes_of(client: &Client, arguments: &[&str]) -> Vec<u8> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_janus-client"));
    let done = command.args(arguments).arg("--config").arg(client.config()).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
    done.stdout
}

/// A disk with two partitions; the second has this file system.
fn partitioned(folder: &Path, plan: images::Plan) -> (PathBuf, tree::Truths) {
    let image = images::Image::filled(plan, 100);
    let path = folder.join("disk.raw");
    let mib = plan.mib + 34;
    disk::blank(&path, mib * MIB).unwrap();
    let (first, second) =
        ("1:2048:67583".to_owned(), format!("2:67584:{}", 67_584 + plan.mib * 2048 - 1));
    let name = path.to_str().unwrap();
    run("sgdisk", &["-o", "-n", &first, "-c", "1:first", "-n", &second, "-c", "2:data", name]);
    let (from, to) = (format!("if={}", image.path.display()), format!("of={name}"));
    run("dd", &[&from, &to, "bs=1M", "seek=33", "conv=notrunc,sparse", "status=none"]);
    (path, image.truths)
}

#[test]
fn as_root_files_come_out_of_a_snapshot_by_the_commands() {
    let site = site();
    let (path, truths) = partitioned(site.folder(), images::XFS);
    let client = backed_up(&site, &path);
    fs::remove_file(&path).unwrap();

    let volumes: Value = client.answer(&["ls", "disk"]).unwrap();
    let second = &volumes["volumes"][1];
    assert_eq!(
        (&second["number"], &second["partition_label"]),
        (&2.into(), &"data".into()),
        "{volumes}"
    );
    assert_eq!(second["file_system"], "xfs");
    print!("{}", client.run(&["ls", "disk"]).unwrap().stdout);

    let listed = client.run(&["ls", "-l", "disk:/2"]).unwrap();
    print!("{}", &listed.stdout[..listed.stdout.len().min(900)]);
    assert!(listed.stdout.contains(" -> /etc/passwd"), "{listed:?}");
    assert!(!listed.stdout.contains('\u{1b}'), "names are escaped");
    let names: Value = client.answer(&["ls", "-R", "disk:/data/"]).unwrap();
    let names = names["entries"].as_array().unwrap().len();
    assert_eq!(names, truths.len() + 1, "all of it, and a pipe");

    assert_eq!(bytes_of(&client, &["cat", "disk:/2/hello.txt"]), b"Hello from inside.\n");
    let sparse = bytes_of(&client, &["cat", "disk:/2/sparse.img"]);
    assert_eq!(blake3::hash(&sparse).to_hex().to_string(), truths[Path::new("sparse.img")].digest);

    let out = site.folder().join("out");
    fs::create_dir(&out).unwrap();
    let copied = client.run(&["cp", "-r", "disk:/2/", out.to_str().unwrap()]).unwrap();
    print!("{}{}", copied.stdout, copied.stderr);
    assert_eq!(copied.code, Some(1), "the pipe was not copied: {copied:?}");
    assert!(copied.stderr.contains("/pipe: not copied: it is a pipe"), "{copied:?}");
    let abilities = images::XFS.abilities;
    tree::assert_equal("XFS through a server", &truths, &tree::truths(&out, abilities));

    if Path::new("/dev/fuse").exists() {
        shows_the_same_when_mounted(&client, &site.folder().join("mount"), &truths);
    } else {
        println!("NOT RUN: mount needs /dev/fuse");
    }

    // One folder, under another name.
    let copy = site.folder().join("copy");
    let report: Value =
        client.answer(&["cp", "-r", "disk:/2/folder-0", copy.to_str().unwrap()]).unwrap();
    assert!(report["files"].as_u64().unwrap() > 0, "{report}");
    let kept = tree::truths(&out.join("folder-0"), abilities);
    assert_eq!(tree::truths(&copy, abilities).len(), kept.len());
}

/// A disk without partitions, made without root.
fn ext4_disk(folder: &Path, size_bytes: u64) -> PathBuf {
    let (path, stage) = (folder.join("disk.raw"), folder.join("stage"));
    disk::blank(&path, size_bytes).unwrap();
    fs::create_dir_all(stage.join("etc")).unwrap();
    fs::write(stage.join("etc/hostname"), "janus\n").unwrap();
    let (name, stage) = (path.to_str().unwrap(), stage.to_str().unwrap());
    run("mke2fs", &["-q", "-t", "ext4", "-F", "-E", "nodiscard", "-d", stage, name]);
    path
}

fn shows_the_same_when_mounted(client: &Client, at: &Path, truths: &tree::Truths) {
    fs::create_dir(at).unwrap();
    for unmounted in [true, false] {
        let mut mounting = client.start(&["mount", "disk", at.to_str().unwrap()]).unwrap();
        let began = Instant::now();
        while !at.join("2").exists() {
            assert!(!mounting.has_ended(), "{}", mounting.log());
            assert!(began.elapsed().as_secs() < 20, "{}", mounting.log());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let mut shown = tree::truths(&at.join("2"), images::XFS.abilities);
        // Each name has a number of its own here.
        shown.iter_mut().for_each(|(path, truth)| truth.first = truths[path].first.clone());
        tree::assert_equal("XFS mounted from a snapshot", truths, &shown);
        assert!(fs::write(at.join("2/hello.txt"), "x").is_err(), "it is read-only");
        if unmounted {
            run("umount", &[at.to_str().unwrap()]);
        } else {
            mounting.interrupt();
        }
        let ended = mounting.wait().unwrap();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        print!("{}", ended.stdout);
        assert_eq!(fs::read_dir(at).unwrap().count(), 0);
    }
}

#[test]
fn what_is_not_there_is_said_with_the_way_out() {
    let site = site();
    let path = ext4_disk(site.folder(), 64 * MIB);
    let client = backed_up(&site, &path);
    for (arguments, code, said) in [
        (&["cat", "disk:/0/no-such-file"][..], 5, "there is no /no-such-file"),
        (&["ls", "disk:/7/"], 5, "there is no volume 7; the disk has 0"),
        (&["cat", "disk"], 2, "write WHAT:/VOLUME/PATH"),
        (&["cat", "disk:0/x"], 2, "write WHAT:/VOLUME/PATH"),
        (&["cat", "disk:/0/etc"], 1, "this is a folder"),
        (&["cp", "disk:/0/etc", "/nowhere"], 2, "-r"),
        (&["ls", "other-disk:/0"], 5, "other-disk"),
    ] {
        let failed = client.run(arguments).unwrap();
        assert_eq!(failed.code, Some(code), "{arguments:?}: {failed:?}");
        assert!(failed.stderr.contains(said), "{arguments:?}: {}", failed.stderr);
        print!("{arguments:?}: {}", failed.stderr);
    }
}

/// In CI 64 GiB, in the soak what the issue asks for: 1 TiB.
#[test]
fn the_first_file_of_a_large_sparse_disk_comes_at_once() {
    let gib = if std::env::var_os("JANUS_SOAK").is_some() { 1024 } else { 64 };
    let site = site();
    let path = ext4_disk(site.folder(), gib << 30);
    let client = backed_up(&site, &path);
    for arguments in [["ls", "disk:/0/etc"], ["cat", "disk:/0/etc/hostname"]] {
        let began = Instant::now();
        let answer = bytes_of(&client, &arguments);
        let took = began.elapsed();
        println!("{arguments:?} in a sparse disk of {gib} GiB: {took:?}, {} bytes", answer.len());
        assert!(took.as_secs_f64() < 5.0, "{took:?}");
    }
    let listed: Value = client.answer(&["ls", "disk:/0/etc"]).unwrap();
    let fetched = listed["fetched_bytes"].as_u64().unwrap();
    println!("fetched of {} allocated: {fetched} bytes", path.metadata().unwrap().blocks() * 512);
    assert!(fetched < 16 << 20, "{fetched} bytes for one folder");
}
