//! Certificates that are no longer believed, on all servers and in what is open.

use std::time::{Duration, Instant};

use janus_proto::{error::ErrorReason, ids::BackupId, proof::Statement};
use xtask::disk;

use crate::scene::{A, B, Carried, MIB, Scene, proof, refused, start_of, until};

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_revoked_machine_is_cut_off_everywhere_and_comes_back_with_a_new_certificate() {
    let mut scene = Scene::new();
    let mut machine = scene.enrolled("laptop7");
    scene.works(&machine, "laptop7");
    scene.works(&machine, "laptop7");
    let before = machine.list().unwrap().snapshots.len();

    // A backup that takes long, in the middle of its data.
    disk::write_noise(&scene.disk("laptop7"), 0..8 * MIB, 7).unwrap();
    machine.settings.set("bandwidth", ["1 Mbit/s"].to_vec());
    let mut running = machine.start(&["backup"]).unwrap();
    until("a run", MINUTE, || scene.site.log(A).matches("run started").count() == 2);
    std::thread::sleep(Duration::from_secs(2));
    assert!(!running.has_ended());
    let begun = Instant::now();
    let revoked = scene.admin(B, &["pki", "revoke", "--machine", "alice/laptop7"]);
    assert_eq!(revoked["known_to"], serde_json::json!([B, A]), "{revoked}");
    let took = until("the end of the run", MINUTE, || running.has_ended());
    println!(
        "revoked at {B}, the stream at {A} ended {took:?} after all knew it, {:?} in all",
        begun.elapsed()
    );
    let ended = running.wait().unwrap();
    assert!(ended.code != Some(0) && ended.stderr.contains("revoked"), "{}", ended.stderr);

    // It gets in nowhere, through janus or straight, nor does what it has signed.
    let janus = scene.site.url();
    let direct = scene.site.server(B).unwrap().url();
    for url in [janus, direct.clone()] {
        machine.settings.set("urls", [url].to_vec());
        let list = machine.run(&["list"]).unwrap();
        assert!(list.code != Some(0) && list.stderr.contains("revoked"), "{}", list.stderr);
    }
    let owner = scene.identity("laptop7");
    let start = start_of(&BackupId::new().to_string());
    let with = Carried {
        principal: Some(&owner),
        proof: proof(&owner, &Statement::start(&start, None), B),
        ..Carried::default()
    };
    refused(scene.caller(&direct, "router").start(&start, &with), ErrorReason::IdentityMissing);

    // Also after all have started anew.
    for name in [A, B] {
        scene.site.kill_server(name).unwrap();
    }
    scene.site.kill_janus().unwrap();
    scene.site.start_all().unwrap();
    assert_ne!(machine.run(&["list"]).unwrap().code, Some(0));

    // Enrolled anew it goes on with its chains.
    machine.settings.set("urls", [scene.site.url()].to_vec());
    machine.settings.set("bandwidth", Vec::<String>::new());
    std::thread::sleep(Duration::from_secs(1));
    let token = scene.token("laptop7");
    let done = machine.run(&["enroll", &scene.enroll_url, &token, "--force"]).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    scene.works(&machine, "laptop7");
    assert_eq!(machine.list().unwrap().snapshots.len(), before + 1);
}

#[test]
fn a_server_that_is_away_is_named_and_learns_of_it_on_its_return() {
    let mut scene = Scene::new();
    let mut machine = scene.enrolled("laptop7");
    scene.site.await_ready(&machine).unwrap();
    scene.site.kill_server(A).unwrap();
    let revoked = scene.admin(B, &["pki", "revoke", "--machine", "alice/laptop7"]);
    assert_eq!(revoked["known_to"], serde_json::json!([B]), "{revoked}");
    assert_eq!(revoked["not_yet_known_to"], serde_json::json!([A]), "{revoked}");
    assert_eq!(revoked["ok"], false);
    // The server that knew it is gone when the other one comes back: janus has kept it.
    scene.site.kill_server(B).unwrap();
    scene.site.start_server(A).unwrap();
    let direct = scene.site.server(A).unwrap().url();
    machine.settings.set("urls", [direct].to_vec());
    let took = until("the revocation", MINUTE, || {
        machine.run(&["list"]).unwrap().stderr.contains("revoked")
    });
    println!("{A} knew of it {took:?} after its return");
    let listed = scene.admin(A, &["pki", "revoked"]);
    assert_eq!(listed["revoked"].as_array().unwrap().len(), 2, "{listed}");
}

#[test]
fn servers_and_janus_are_revoked_too_and_nobody_makes_revocations_but_servers() {
    let mut scene = Scene::new();
    let mut machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    // Not itself.
    let own = scene.admin(A, &["pki", "revoke", "--server", A]);
    assert!(own["error"].as_str().unwrap().contains("own certificate"), "{own}");
    let nobody = scene.site.admin(A, &["pki", "revoke"]).unwrap();
    assert_eq!(nobody.status.code(), Some(2));
    // What a server has signed that is revoked then is told on by others, in their own names.
    scene.admin(B, &["pki", "revoke", "--machine", "alice/early"]);
    let kept = scene.site.server(A).unwrap().images().join(".revoked.json");
    let signers = || std::fs::read_to_string(&kept).unwrap().matches("\"certificate\"").count();
    until("the revocation of B's", MINUTE, || kept.exists() && signers() == 1);
    scene.admin(A, &["pki", "revoke", "--server", B]);
    let kept_text = std::fs::read_to_string(&kept).unwrap();
    assert!(kept_text.contains("client/alice/early") && signers() == 1, "{kept_text}");
    until("the end of B", MINUTE, || {
        let status = machine.status().unwrap();
        status.servers.iter().any(|line| line.server == B && !line.ready)
    });
    // Backups go on where they can.
    for _ in 0..2 {
        assert_eq!(machine.backup().unwrap().server, A);
    }
    // Nobody reports to a machine; its backups have asked.
    let janus = machine.settings.get("urls").unwrap().clone();
    let direct = scene.site.server(B).unwrap().url();
    machine.settings.set("urls", [direct].to_vec());
    let told = machine.run(&["list"]).unwrap();
    assert!(told.code != Some(0) && told.stderr.contains("revoked"), "{}", told.stderr);
    machine.settings.set("urls", janus);
    scene.admin(A, &["pki", "revoke", "--janus", "router"]);
    let log = machine.run(&["backup"]).unwrap();
    assert_ne!(log.code, Some(0), "{}", log.stderr);
}
