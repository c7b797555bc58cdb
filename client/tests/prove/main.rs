//! Proofs that backups can be restored: what is good is called so with its files, what is not is found and named.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod boot;
mod scene;

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
};

use serde_json::Value;

use self::scene::{MACHINE, MARKED, SERVER, Scene, find, flip};

/// A disk of a proof.
fn disk<'a>(proof: &'a Value, name: &str) -> &'a Value {
    let disks = proof["proof"]["disks"].as_array().unwrap();
    disks.iter().find(|disk| disk["disk"] == name).unwrap()
}

fn lines(said: &Value) -> Vec<&str> {
    said["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect()
}

#[test]
fn a_good_machine_is_proven_with_its_files_whether_its_server_runs_or_not() {
    let mut scene = Scene::new();
    let never = scene.standing(0);
    assert_eq!((&never["proven_ms"], &never["tried_ms"]), (&Value::Null, &Value::Null));
    let proof = scene.proof(&["--now"], 0);
    assert_eq!((&proof["failure"], &proof["warnings"]), (&Value::Null, &0.into()), "{proof}");
    let linux = disk(&proof, "linux");
    let volume = &linux["volumes"][0];
    assert_eq!(volume["file_system"], "ext4", "{proof}");
    // etc/file-0 to 39, notes.bin and the marked one; /, etc, srv, srv/deep, lost+found.
    assert_eq!((&volume["files"], &volume["folders"]), (&42.into(), &5.into()), "{proof}");
    assert_eq!(volume["files_read"], 42, "{proof}");
    assert_eq!(volume["read_bytes"], (3 << 20) + 100_000 + 39 * 40 / 2 * 100, "{proof}");
    assert!(linux["read_bytes"].as_u64().unwrap() > 3 << 20, "{proof}");
    let volume = &disk(&proof, "windows")["volumes"][0];
    assert_eq!((&volume["file_system"], &volume["files_read"]), (&"NTFS".into(), &volume["files"]));
    assert!(volume["read_bytes"].as_u64().unwrap() >= 100_000, "{proof}");

    let stands = scene.standing(0);
    assert_eq!(stands["proven_ms"], proof["proof"]["began_ms"], "{stands}");
    let snapshots = scene.client.list().unwrap().snapshots;
    assert!(snapshots.iter().all(|one| one.proven_ms > 0), "{snapshots:?}");
    scene.while_stopped(|scene| {
        assert_eq!(scene.standing(0), stands, "it survives a restart");
        let one = scene.proof(&["--now", &format!("{MACHINE}/windows")], 0);
        assert_eq!(one["proof"]["disks"].as_array().unwrap().len(), 1, "{one}");
        let both = scene.standing(0);
        assert_eq!(both["proven_ms"], stands["proven_ms"], "one disk is not the machine");
        assert_ne!(both["tried_ms"], stands["tried_ms"]);
    });
    let shown = scene.prove(&["--now", "--snapshot", &snapshots[0].snapshot_id]);
    println!("{}", String::from_utf8_lossy(&shown.stdout));
    assert_eq!(shown.status.code(), Some(0), "{shown:?}");
    let shown = scene.prove(&["status"]);
    println!("{}", String::from_utf8_lossy(&shown.stdout));
    for wrong in [&["--now", "bob/none"][..], &["--now", &format!("{MACHINE}/none")]] {
        let refused = scene.prove(wrong);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("usage"), "{said}");
    }
}

#[test]
fn one_flipped_bit_is_named_with_its_image_block_and_file() {
    let mut scene = Scene::new();
    let image = scene.files("linux", "vhdx").pop().unwrap();
    let at = find(&image, &scene.marks) + (1 << 20) + 77;
    let block = (find(&scene.linux, &scene.marks) + (1 << 20) + 77) / 4096;
    scene.while_stopped(|_| flip(&image, at));
    let shown = scene.prove(&["--now"]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    println!("{text}");
    assert_eq!(shown.status.code(), Some(1), "{shown:?}");
    let name = image.file_name().unwrap().to_string_lossy();
    let snapshots = scene.client.list().unwrap().snapshots;
    let hurt = snapshots.iter().find(|one| one.disk_id == "linux").unwrap();
    for named in [
        format!("block {block} is lost"),
        format!("linux/{name}"),
        format!("{MACHINE}/linux"),
        hurt.snapshot_id.clone(),
        MARKED.into(),
        format!("janus-server verify {MACHINE}/linux"),
    ] {
        assert!(text.contains(&named), "{named}: {text}");
    }
    assert_eq!((hurt.damaged_blocks, hurt.proven_ms), (1, 0), "it is asked for again");
    scene.await_figure("janus_server_damaged_snapshots", 1.0);
    let whole = snapshots.iter().find(|one| one.disk_id == "windows").unwrap();
    assert!(whole.damaged_blocks == 0 && whole.proven_ms > 0, "{snapshots:?}");
    let stands = scene.standing(1);
    assert!(stands["failure"].as_str().unwrap().contains(&format!("block {block}")), "{stands}");
    let status = scene.prove(&["status"]);
    println!("{}", String::from_utf8_lossy(&status.stdout));

    // What was lost comes with the next backup, and a proof of that is a good one.
    scene.client.backup().unwrap();
    let newest = scene.client.list().unwrap().snapshots[0].snapshot_id.clone();
    let proof = scene.proof(&["--now", "--snapshot", &newest], 0);
    assert_eq!(proof["failure"], Value::Null, "{proof}");
    assert_eq!(scene.standing(0)["failure"], Value::Null);
}

#[test]
fn a_flipped_bit_of_a_table_is_named_and_a_lost_image_too() {
    let mut scene = Scene::new();
    let table = scene.files("windows", "table").pop().unwrap();
    scene.while_stopped(|_| flip(&table, 200));
    let proof = scene.proof(&["--now"], 1);
    let failures = lines(&disk(&proof, "windows")["failures"]).join("\n");
    println!("{failures}");
    let name = table.file_name().unwrap().to_string_lossy();
    assert!(failures.contains(&*name) && failures.contains("segment 0"), "{failures}");
    assert!(lines(&disk(&proof, "linux")["failures"]).is_empty(), "{proof}");

    let image = scene.files("linux", "vhdx").pop().unwrap();
    scene.while_stopped(|_| fs::remove_file(&image).unwrap());
    let proof = scene.proof(&["--now"], 1);
    let failures = lines(&disk(&proof, "linux")["failures"]).join("\n");
    println!("{failures}");
    assert!(failures.contains(&*image.file_name().unwrap().to_string_lossy()), "{failures}");
}

#[test]
fn a_file_system_that_was_damaged_at_its_source_is_a_warning_and_no_failure() {
    let scene = Scene::with(|linux| {
        // A block of the folder etc, with its names.
        let at = find(linux, b"file-17") & !4095;
        let file = OpenOptions::new().write(true).open(linux).unwrap();
        file.write_all_at(&[0xff; 4096], at).unwrap();
    });
    let proof = scene.proof(&["--now"], 0);
    let linux = disk(&proof, "linux");
    let warnings = lines(&linux["warnings"]).join("\n");
    println!("{warnings}");
    assert!(proof["failure"].is_null() && proof["warnings"].as_u64() > Some(0), "{proof}");
    for named in ["/etc", "damaged", "when it was backed up", MACHINE] {
        assert!(warnings.contains(named), "{named}: {warnings}");
    }
    assert_eq!(linux["volumes"][0]["files"], 2, "the others are read: {proof}");
    let shown = scene.prove(&["status"]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(text.contains("warning: ") && text.contains("/etc"), "{text}");
}

#[test]
fn backups_are_proven_by_themselves_and_a_record_that_is_damaged_counts_as_none() {
    let mut scene = Scene::new();
    scene.while_stopped(|scene| {
        let settings = &mut scene.site.server(SERVER).unwrap().settings;
        settings.set("prove.every_seconds", 1);
        settings.set("prove.machines", vec!["bob/*", "alice/machine"]);
    });
    let proven = scene.await_proven(0);
    scene.await_proven(proven);
    assert!(scene.site.log(SERVER).contains("backup proven"), "{}", scene.site.log(SERVER));
    scene.while_stopped(|scene| {
        let settings = &mut scene.site.server(SERVER).unwrap().settings;
        // Once a day, and it was today.
        settings.set("prove.every_seconds", 86_400);
        flip(&scene.machine_folder().join(".proofs.json"), 40);
    });
    // Nothing is known any more: it is proven again at once.
    let again = scene.await_proven(proven);
    let image = scene.files("linux", "vhdx").pop().unwrap();
    let at = find(&image, &scene.marks);
    scene.while_stopped(|scene| {
        let settings = &mut scene.site.server(SERVER).unwrap().settings;
        settings.set("prove.every_seconds", 1);
        flip(&image, at);
    });
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while scene.site.log(SERVER).matches("can't be restored").count() == 0 {
        assert!(std::time::Instant::now() < until, "{}", scene.site.log(SERVER));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let stands = scene.standing(1);
    assert!(stands["proven_ms"].as_i64().unwrap() >= again, "{stands}");
    let (status, at) = (scene.client.status().unwrap(), scene.client.run(&["status"]).unwrap());
    println!("{}", at.stdout);
    let machine = &status.machines[0];
    let there = machine.uses.iter().find(|at| at.server == SERVER).unwrap();
    let told = there.proof.as_ref().unwrap();
    assert_eq!(told.failure, stands["failure"].as_str().unwrap());
    assert!(told.proven_ms >= Some(again), "{told:?}");
    assert_eq!(status.servers[0].proven_ms, told.proven_ms);
    assert_eq!(scene.figure("janus_machine_proof_failed"), Some(1.0));
    let seconds = scene.figure("janus_machine_last_proven_timestamp_seconds").unwrap();
    assert!(seconds * 1000.0 >= again as f64, "{seconds}");
}
