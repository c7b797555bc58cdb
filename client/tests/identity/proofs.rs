//! Whoever holds the key of a janus acts for nobody.

use janus_proto::{error::ErrorReason, ids::BackupId, pb, proof::Statement, tls::Role};
use xtask::site::USER;

use crate::scene::{A, B, Carried, Scene, proof, refused, start_of};

#[test]
fn who_holds_a_janus_key_acts_for_nobody_who_signs() {
    let mut scene = Scene::new();
    let machine = scene.enrolled("web1");
    scene.site.issue("operator", "root", &[]).unwrap();
    let rescue = ["--user", USER, "--machine", "web1", "--hours", "1"];
    scene.site.issue("restore", "rescue", &rescue).unwrap();
    scene.works(&machine, "web1");
    scene.works(&machine, "web1");
    let snapshots = machine.list().unwrap().snapshots;
    let of = |server: &str| {
        let found = snapshots.iter().find(|snapshot| snapshot.server == server).unwrap();
        pb::OpenSnapshotRequest { snapshot_id: found.snapshot_id.clone(), ..Default::default() }
    };
    let (here, there) = (of(A), of(B));
    let url = scene.site.server(A).unwrap().url();
    // The stolen key, straight at the server.
    let thief = scene.caller(&url, "router");
    let mut cases = 0;
    for name in ["web1", "root", "rescue", B] {
        let owner = scene.identity(name);
        let as_owner = |proof| Carried { principal: Some(&owner), proof, ..Carried::default() };
        let told = Statement::open(&here);
        // Without, for another snapshot, another server, another call, by another key, and with a changed end.
        let good = proof(&owner, &told, A).unwrap();
        let mut parts: Vec<_> = good.split(';').map(str::to_owned).collect();
        parts[2] = (parts[2].parse::<u64>().unwrap() + 1).to_string();
        let start = start_of(&BackupId::new().to_string());
        for bad in [
            None,
            proof(&owner, &Statement::open(&there), A),
            proof(&owner, &told, B),
            proof(&owner, &Statement::start(&start, None), A),
            proof(&scene.identity("router"), &told, A),
            Some(parts.join(";")),
            Some("1;*;99999999999;0403;AAAA".into()),
            Some(good[..good.len() / 2].to_owned()),
        ] {
            refused(thief.open(&here, &as_owner(bad)), ErrorReason::ProofRefused);
            cases += 1;
        }
        let table =
            pb::ReadTableRequest { snapshot_id: here.snapshot_id.clone(), ..Default::default() };
        refused(thief.table(&table, &as_owner(None)), ErrorReason::ProofRefused);
        refused(thief.table(&table, &as_owner(Some(good.clone()))), ErrorReason::ProofRefused);
        let signed = proof(&owner, &Statement::table(&table), A);
        thief.table(&table, &as_owner(signed)).unwrap();
        cases += 2;
        // What the owner signed is for everybody to carry.
        thief.open(&here, &as_owner(Some(good))).unwrap();
    }
    let owner = scene.identity("web1");
    let as_owner = |proof| Carried { principal: Some(&owner), proof, ..Carried::default() };
    let id = BackupId::new().to_string();
    let start = start_of(&id);
    refused(thief.start(&start, &as_owner(None)), ErrorReason::ProofRefused);
    // One for any server is none for other disks.
    let for_any = owner.prove(&Statement::start(&start, None), None);
    let mut larger = start.clone();
    larger.disks[0].size_bytes = 1 << 40;
    refused(thief.start(&larger, &as_owner(for_any.clone())), ErrorReason::ProofRefused);
    let started = thief.start(&start, &as_owner(for_any)).unwrap();
    // It may send what it likes, but what is committed is what the owner has signed.
    let commit = |digest: [u8; 32]| pb::CommitBackupRequest {
        backup_id: id.clone(),
        epoch: started.epoch,
        disks: vec![pb::DiskCommit {
            disk_id: "disk".into(),
            expected_head_id: String::new(),
            table_digest: digest.to_vec().into(),
            ..Default::default()
        }],
        client_seal: Default::default(),
    };
    let signed = proof(&owner, &Statement::commit(&commit([1; 32]), None), A);
    refused(thief.commit(&commit([2; 32]), &as_owner(signed.clone())), ErrorReason::ProofRefused);
    refused(thief.commit(&commit([2; 32]), &as_owner(None)), ErrorReason::ProofRefused);
    let known = thief.commit(&commit([1; 32]), &as_owner(signed)).unwrap_err();
    assert_ne!(janus_proto::error::reason(&known), Some(ErrorReason::ProofRefused));
    println!("{} calls in others' names refused", cases + 4);
    // And the owner goes on.
    scene.works(&machine, "web1");
}

#[test]
fn only_certificates_that_ask_for_it_need_a_proof_unless_the_server_asks_all() {
    let mut scene = Scene::new();
    scene.site.client("plain", &[]).unwrap();
    let owner = scene.identity("plain");
    assert!(matches!(owner.principal().role, Role::Client(_)) && !owner.principal().limits.proof);
    let as_owner = Carried { principal: Some(&owner), proof: None, ..Carried::default() };
    let url = scene.site.server(A).unwrap().url();
    let start = start_of(&BackupId::new().to_string());
    scene.caller(&url, "router").start(&start, &as_owner).unwrap();
    // Who isn't a janus speaks for himself, whatever he sends along.
    let other = scene.enrolled("other");
    let elsewhere = scene.caller(&url, "other");
    let run = start_of(&BackupId::new().to_string());
    elsewhere.start(&run, &as_owner).unwrap();
    scene.site.stop_server(A).unwrap();
    scene.site.server(A).unwrap().settings.set("require_proof", "always");
    scene.site.start_server(A).unwrap();
    let start = start_of(&BackupId::new().to_string());
    let thief = scene.caller(&url, "router");
    refused(thief.start(&start, &as_owner), ErrorReason::ProofRefused);
    let straight = scene.caller(&url, "plain");
    straight.start(&start, &Carried::default()).unwrap();
    scene.site.stop_server(A).unwrap();
    scene.site.server(A).unwrap().settings.set("require_proof", "never");
    scene.site.start_server(A).unwrap();
    let enrolled = scene.identity("other");
    let as_enrolled = Carried { principal: Some(&enrolled), ..Carried::default() };
    let thief = scene.caller(&url, "router");
    thief.start(&start_of(&BackupId::new().to_string()), &as_enrolled).unwrap();
    drop(other);
}

#[test]
fn a_janus_of_some_users_speaks_for_no_others() {
    let mut scene = Scene::new();
    let hosts = ["--host", "127.0.0.1"];
    let only = [&hosts[..], &["--only-user", "bob"]].concat();
    scene.site.issue("janus", "of-bob", &only).unwrap();
    scene.site.client("alices", &[]).unwrap();
    scene.site.issue("client", "bobs", &["--user", "bob", "--machine", "pc"]).unwrap();
    scene.site.issue("operator", "root", &[]).unwrap();
    let url = scene.site.server(A).unwrap().url();
    let janus = scene.caller(&url, "of-bob");
    let start = || start_of(&BackupId::new().to_string());
    let open =
        pb::OpenSnapshotRequest { snapshot_id: BackupId::new().to_string(), ..Default::default() };
    for other in ["alices", "root", B] {
        let owner = scene.identity(other);
        let with = Carried {
            principal: Some(&owner),
            proof: proof(&owner, &Statement::open(&open), A),
            ..Carried::default()
        };
        refused(janus.open(&open, &with), ErrorReason::NotAllowed);
    }
    let bob = scene.identity("bobs");
    janus.start(&start(), &Carried { principal: Some(&bob), ..Carried::default() }).unwrap();
}
