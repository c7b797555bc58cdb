//! Keys: lost, recovered, wrong, switched; seals that were changed, and snapshots that have none.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::Value;
use xtask::site::Finished;

use super::scene::{A, B, MIB, SECRET, Scene, files_with, text};

fn json(finished: &Finished) -> Value {
    serde_json::from_str(finished.answer_line()).unwrap_or_else(|_| panic!("{finished:?}"))
}

#[test]
fn a_key_is_made_once_tested_lost_and_recovered() {
    let scene = Scene::plain();
    let mut client = scene.client.clone();
    client.settings.set("encryption", "client");
    let none = client.failure(&["backup"]).unwrap();
    println!("{}", none.error);
    assert!(none.error.contains("seal init") && none.exit_code == 2, "{none:?}");
    let made = client.run(&["seal", "init"]).unwrap();
    println!("{}", made.stdout);
    assert_eq!(made.code, Some(0), "{made:?}");
    let lines = made.stdout.lines().filter(|line| line.starts_with("    "));
    let recovery = lines.collect::<Vec<_>>().join("\n");
    assert_eq!(recovery.lines().count(), 3, "{recovery}");
    let before = fs::read(scene.key_file()).unwrap();
    let mode = fs::metadata(scene.key_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = client.failure(&["seal", "init"]).unwrap();
    assert!(again.error.contains("never overwritten"), "{again:?}");
    assert_eq!(fs::read(scene.key_file()).unwrap(), before);
    let shown: Value = client.answer(&["seal", "show"]).unwrap();
    assert!(!shown.to_string().contains(recovery.split_whitespace().next().unwrap()));

    let test = |more: &[&str], input: &str| {
        client.run_with_input(&[&["recover", "--test"], more].concat(), input).unwrap()
    };
    let right = test(&[], &recovery);
    println!("{}", right.stdout);
    assert!(right.code == Some(0) && right.stdout.contains("is this key"), "{right:?}");
    let typed = recovery.to_lowercase().replace(['\n', '-'], " ");
    assert_eq!(test(&["--json"], &typed).code, Some(0));
    let fourth = recovery.split_whitespace().nth(3).unwrap();
    let mut mistyped: Vec<char> = fourth.chars().collect();
    mistyped.swap(0, 1);
    if mistyped[0] == mistyped[1] {
        mistyped[0] = if mistyped[0] == 'A' { 'B' } else { 'A' };
    }
    let wrong = test(&[], &recovery.replace(fourth, &mistyped.iter().collect::<String>()));
    println!("{}", wrong.stderr);
    assert!(wrong.code == Some(1) && wrong.stderr.contains("group 4"), "{wrong:?}");
    assert!(test(&[], "").stderr.contains("9 groups"));

    let backup: Value = client.answer(&["backup"]).unwrap();
    assert_eq!(backup["sealed_by"], shown["key"], "{backup}");
    let snapshot = backup["disks"][0]["snapshot_id"].as_str().unwrap().to_owned();
    let of_snapshot = test(&["--snapshot", &snapshot, "--json"], &recovery);
    assert_eq!(json(&of_snapshot)["opens_snapshot"], true, "{of_snapshot:?}");

    // The file is lost: nothing is restored or backed up, and all that is needed is the recovery key.
    fs::remove_file(scene.key_file()).unwrap();
    let scene = Scene { client: client.clone(), ..scene };
    scene.assert_refused(&snapshot, &[], &["seal.key", "janus-client recover"]);
    let unread = client.failure(&["ls", &format!("{snapshot}:/")]).unwrap();
    assert!(unread.error.contains("janus-client recover"), "{unread:?}");
    let unread = client.failure(&["nbd", &snapshot]).unwrap();
    assert!(unread.error.contains("janus-client recover"), "{unread:?}");
    assert!(client.failure(&["backup"]).unwrap().error.contains("seal init"));
    let alone = test(&["--snapshot", &snapshot], &recovery);
    println!("{}", alone.stdout);
    assert!(alone.code == Some(0) && alone.stdout.contains("sealed with this key"), "{alone:?}");
    assert_eq!(test(&[], &recovery).code, Some(1), "there is nothing to compare with");
    let written = client.run_with_input(&["recover"], &recovery).unwrap();
    assert_eq!(written.code, Some(0), "{written:?}");
    assert_eq!(fs::read(scene.key_file()).unwrap(), before);
    scene.assert_restores(&snapshot, &scene.disk, &[]);
    assert_eq!(client.backup().unwrap().disks[0].sent_bytes, super::scene::data(&scene.disk));
    // Neither another key nor one that others may read is taken.
    let other: Value =
        client.answer(&["seal", "init", "--seal-key", text(&scene.path("other.key"))]).unwrap();
    let other = other["recovery_key"].as_str().unwrap();
    let refused = client.run_with_input(&["recover"], other).unwrap();
    assert!(refused.code == Some(1) && refused.stderr.contains("never overwritten"), "{refused:?}");
    let compared = test(&["--json", "--snapshot", &snapshot], other);
    assert_eq!((compared.code, &json(&compared)["is_key_file"]), (Some(1), &false.into()));
    fs::set_permissions(scene.key_file(), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(client.failure(&["backup"]).unwrap().error.contains("chmod 600"));
}

/// From none to a key, to another key, and back: each snapshot is of one kind, and each opens with what it was made with.
#[test]
fn machines_begin_to_seal_change_their_key_and_stop() {
    let mut scene = Scene::plain();
    let all = super::scene::data(&scene.disk);
    let plain = scene.backup_to(A);
    scene.client.settings.set("encryption", "client");
    let _: Value = scene.client.answer(&["seal", "init"]).unwrap();
    // One server after the other gets all of it once, and only what changed after that.
    let sent = |scene: &Scene, server: &str| {
        let backup = scene.client.backup().unwrap();
        assert_eq!(backup.server, server);
        backup.disks[0].sent_bytes
    };
    assert_eq!(sent(&scene, B), all);
    assert_eq!(sent(&scene, A), all);
    scene.noise(7..8, 11);
    assert_eq!((sent(&scene, B), sent(&scene, A)), (MIB, MIB));
    let sealed = scene.backup_to(B);
    scene.assert_restores(&sealed.snapshot, &sealed.copy, &[]);
    scene.assert_refused(&plain.snapshot, &[], &["is not sealed", "--allow-unsealed"]);
    scene.assert_restores(&plain.snapshot, &plain.copy, &["--allow-unsealed"]);
    // Images of B hold nothing in clear.
    let images = scene.images(B);
    assert!(files_with(&images, SECRET.as_bytes()).is_empty());

    let old = scene.path("old.key");
    fs::rename(scene.key_file(), &old).unwrap();
    let _: Value = scene.client.answer(&["seal", "init"]).unwrap();
    assert_eq!(sent(&scene, A), all);
    let newer = scene.backup_to(B);
    scene.assert_restores(&newer.snapshot, &newer.copy, &[]);
    scene.assert_refused(&sealed.snapshot, &[], &["sealed with key", "--seal-key"]);
    scene.assert_restores(&sealed.snapshot, &sealed.copy, &["--seal-key", text(&old)]);

    scene.client.settings.set("encryption", "none");
    assert_eq!(sent(&scene, A), all);
    let back = scene.backup_to(B);
    scene.assert_restores(&back.snapshot, &back.copy, &[]);
    // What is sealed is still opened by who has the key.
    scene.assert_restores(&newer.snapshot, &newer.copy, &[]);
}

/// A change journal says what hasn't changed, which is of no use for another kind of content.
#[test]
fn a_change_journal_does_not_mix_kinds_of_content() {
    let mut scene = Scene::plain();
    let image = scene.path("disk.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", "compat=1.1"];
    super::scene::run("qemu-img", &[&convert[..], &[text(&scene.disk), text(&image)]].concat());
    scene.client.settings.set("disks", vec![format!("vm=qcow2:{}", image.display())]);
    // No audit may find it by chance.
    scene.client.settings.set("audit_percent", 0);
    let only_a = |scene: &Scene| -> xtask::site::answers::Backup {
        scene.client.answer(&["backup", "--server", A]).unwrap()
    };
    only_a(&scene);
    let by_journal = only_a(&scene);
    assert_eq!(by_journal.disks[0].read_bytes, 0, "{by_journal:?}");
    scene.client.settings.set("encryption", "client");
    let _: Value = scene.client.answer(&["seal", "init"]).unwrap();
    let data = super::scene::data(&scene.disk);
    for (kind, sent) in [("sealed", data), ("the same again", 0)] {
        let backup = only_a(&scene);
        println!("{kind}: {:?}", backup.disks[0].reading);
        assert_eq!(backup.disks[0].sent_bytes, sent, "{kind}: {backup:?}");
        scene.assert_restores(&backup.disks[0].snapshot_id, &scene.disk, &[]);
    }
    scene.client.settings.set("encryption", "none");
    let plain = only_a(&scene);
    assert_eq!(plain.disks[0].sent_bytes, data);
    scene.assert_restores(&plain.disks[0].snapshot_id, &scene.disk, &[]);
}

/// A run on its way from server to server, in the hands of somebody who changes it.
#[test]
fn what_somebody_changed_is_refused() {
    let (scene, _) = Scene::sealed();
    let taken = scene.backup_to(A);
    let folder = scene.path("usb");
    scene.admin(A, &["export", super::scene::MACHINE, "--to", text(&folder)]);
    let right = fs::read_to_string(folder.join("janus-backup.json")).unwrap();
    let seal = right.split("\"client_seal\": \"").nth(1).unwrap().split('"').next().unwrap();
    assert!(seal.len() > 100, "{right}");
    let last = if seal.ends_with('0') { "1" } else { "0" };
    let changed = format!("{}{last}", &seal[..seal.len() - 1]);
    let cases = [
        ("another stamp", changed, vec!["was changed there"]),
        ("no stamps", seal[..seal.len() - 64].to_owned(), vec!["can't be read"]),
        ("no seal", String::new(), vec!["is not sealed"]),
        ("a newer one", format!("09{}", &seal[2..]), vec!["format 9"]),
        (
            "another key",
            format!("01{}{}", "ab".repeat(8), &seal[18..]),
            vec!["key abababababababab"],
        ),
    ];
    for (what, seal_now, words) in cases {
        println!("{what}:");
        rewrite(&folder, &right.replace(seal, &seal_now));
        let imported = scene.admin(B, &["import", text(&folder)]);
        let snapshot = imported["disks"][0]["snapshot_id"].as_str().unwrap().to_owned();
        scene.assert_refused(&snapshot, &["--server", B], &words);
        let read = scene.client.failure(&["ls", &format!("{snapshot}:/0/")]).unwrap();
        assert!(read.error.contains(words[0]), "{read:?}");
        scene.admin(B, &["delete", &snapshot]);
        scene.admin(B, &["trash", "purge"]);
    }
    // Under another name it is opened by who knows its own.
    rewrite(&folder, &right);
    let imported = scene.admin(B, &["import", text(&folder), "--machine", "alice/other"]);
    let snapshot = imported["disks"][0]["snapshot_id"].as_str().unwrap().to_owned();
    let mut other = scene.site.client("other", &[]).unwrap();
    other.settings.set("seal_key", text(&scene.key_file()));
    let other = Scene { client: other, site: scene.site, disk: scene.disk.clone() };
    other.assert_refused(&snapshot, &[], &["--sealed-as alice/machine"]);
    other.assert_restores(&snapshot, &taken.copy, &["--sealed-as", "alice/machine"]);
}

/// Writes a manifest with its sum made right, as that of a run which the server doesn't have.
fn rewrite(folder: &Path, manifest: &str) {
    let (body, _) = manifest.split_at(manifest.len() - 65);
    let run = body.split("\"run\": \"").nth(1).unwrap().split('"').next().unwrap();
    let body = body.replace(run, &janus_proto::ids::BackupId::new().to_string());
    let sum = blake3::hash(body.as_bytes());
    fs::write(folder.join("janus-backup.json"), format!("{body}{sum}\n")).unwrap();
}
