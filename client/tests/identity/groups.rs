//! What groups may do to machines that aren't their members' own, by a policy file.

use std::{fs, time::Duration};

use janus_proto::{error::ErrorReason, ids::BackupId, pb, proof::Statement};
use serde_json::Value;
use xtask::{
    disk,
    site::{Client, USER},
};

use crate::scene::{A, B, Carried, MIB, Scene, proof, refused, start_of, until, write_private};

/// A policy is read again, by itself, within this time.
const SOON: Duration = Duration::from_secs(30);

fn helpdesk(members: &str) -> String {
    format!("[groups.helpdesk]\nmembers = [{members}]\nrestore = [\"{USER}/*\"]\n")
}

/// What a person gets back of a machine's disk is what was backed up.
fn restores(scene: &Scene, person: &Client, machine: &str) {
    let to = scene.site.folder().join("restored-by-a-person");
    let _ = fs::remove_file(&to);
    person.restore(&format!("{USER}/{machine}/disk"), &to).unwrap();
    disk::compare(&scene.disk(machine), &to).unwrap();
}

fn list(person: &Client, machine: &str) -> Result<Vec<Value>, String> {
    let arguments = ["list", "--machine", machine, "--json"];
    let ran = person.run(&arguments).unwrap();
    let answer: Value = serde_json::from_str(ran.stdout.lines().last().unwrap_or("{}")).unwrap();
    match answer["ok"] == true {
        true => Ok(answer["snapshots"].as_array().unwrap().clone()),
        false => Err(answer["error"].as_str().unwrap_or_default().to_owned()),
    }
}

#[test]
fn a_group_reads_what_its_policy_names_until_it_does_not() {
    let mut scene = Scene::with_policy(Some(&helpdesk("\"carol\"")));
    let machine = scene.enrolled("web1");
    let [owner, carol, dave, mallory] =
        [USER, "carol", "dave", "mallory"].map(|name| scene.person(name));
    scene.works(&machine, "web1");
    scene.works(&machine, "web1");
    let name = format!("{USER}/web1");
    for person in [&owner, &carol] {
        assert_eq!(list(person, &name).unwrap().len(), 2);
        restores(&scene, person, "web1");
    }
    let said = list(&mallory, &name).unwrap_err();
    assert!(said.contains("user mallory may not"), "{said}");
    // Nothing is written in the name of who may only read.
    let url = scene.site.server(A).unwrap().url();
    let start = start_of(&BackupId::new().to_string());
    let of_web1 = Carried { machine: Some(&name), ..Carried::default() };
    refused(scene.caller(&url, "carol").start(&start, &of_web1), ErrorReason::NotAllowed);

    // What a server that is away has reported is shown to whom it would show it.
    scene.site.kill_server(B).unwrap();
    let shown = |person: &Client| {
        let listed = list(person, &name).unwrap();
        listed.iter().filter(|one| one["reachable"] == false).count()
    };
    assert_eq!(shown(&carol), 1);
    assert_eq!(shown(&owner), 1);
    list(&mallory, &name).unwrap_err();
    scene.site.start_server(B).unwrap();
    scene.site.await_ready(&machine).unwrap();

    // Servers that give different rights are named.
    scene.set_policy(A, &helpdesk("\"dave\""));
    let warned = || scene.site.log("janus").contains("policy differs");
    until("janus names the difference", SOON, warned);
    scene.set_policy(B, &helpdesk("\"dave\""));
    let took = until("carol may no more", SOON, || list(&carol, &name).is_err());
    println!("carol was refused {took:?} after the policy had changed on the second server");
    let said = list(&carol, &name).unwrap_err();
    assert!(said.contains("user carol may not"), "{said}");
    assert_eq!(list(&dave, &name).unwrap().len(), 2);

    // A policy that can't be read takes nothing away, and is told of.
    scene.set_policy(A, "[groups.helpdesk]\nmembres = []\n");
    until("it is told of", SOON, || scene.site.log(A).contains("unknown field `membres`"));
    assert_eq!(list(&dave, &name).unwrap().len(), 2);
    // But nobody begins with it.
    scene.site.stop_server(A).unwrap();
    let failed = format!("{:#}", scene.site.start_server(A).unwrap_err());
    println!("{failed}");
    assert!(scene.site.log(A).contains("line 2: unknown field `membres`"));
}

#[test]
fn a_right_that_is_taken_away_ends_what_is_open() {
    let chiefs =
        |members: &str| helpdesk(members).replace("restore", "admin").replace("helpdesk", "chiefs");
    let mut scene = Scene::with_policy(Some(&chiefs("\"carol\"")));
    let machine = scene.enrolled("web1");
    scene.person("carol");
    scene.works(&machine, "web1");
    let snapshot = machine.list().unwrap().snapshots[0].clone();
    let url = scene.site.server(&snapshot.server).unwrap().url();
    let (carol, name) = (scene.caller(&url, "carol"), format!("{USER}/web1"));
    let of_web1 = Carried { machine: Some(&name), ..Carried::default() };
    let open = pb::OpenSnapshotRequest { snapshot_id: snapshot.snapshot_id, ..Default::default() };
    carol.open(&open, &of_web1).unwrap();
    carol.start(&start_of(&BackupId::new().to_string()), &of_web1).unwrap();
    let upload = carol.write(&of_web1);
    scene.set_policy(&snapshot.server, &chiefs("\"dave\""));
    let why = upload.ended(SOON);
    println!("{why:?}");
    refused::<()>(Err(why), ErrorReason::NotAllowed);
    refused(carol.open(&open, &of_web1), ErrorReason::SnapshotUnknown);
}

#[test]
fn a_host_backs_its_guests_up_and_reads_nothing_back() {
    let policy = "[groups.hosts]\nmembers = [\"site/host\"]\nbackup = [\"guests/*\"]\n";
    let mut scene = Scene::with_policy(Some(policy));
    let owner = scene.person("guests");
    let mut host = scene.machine("host");
    let keys =
        scene.site.issue("client", "host", &["--user", "site", "--machine", "host", "--proof"]);
    for key in ["cert", "key", "ca"] {
        host.settings.set(key, keys.as_ref().unwrap().get(key).unwrap().clone());
    }
    host.settings.set("for_machine", "guests/vm1");
    scene.site.await_ready(&host).unwrap();
    let mut servers: Vec<String> = (0..4).map(|_| host.backup().unwrap().server).collect();
    println!("{servers:?}");
    servers.dedup();
    assert_eq!(servers.len(), 4, "each other server in turn");
    let disk = scene.disk("host");
    disk::write_noise(&disk, 0..MIB, 7).unwrap();
    let delta = host.backup().unwrap();
    assert_eq!(delta.disks[0].sent_bytes, MIB);
    // The owner of the machine, not the host, gets it back.
    let to = scene.site.folder().join("restored");
    owner.restore("guests/vm1/disk", &to).unwrap();
    disk::compare(&disk, &to).unwrap();
    let failed =
        host.failure(&["restore", "disk", "--to", &format!("{}-2", to.display())]).unwrap();
    assert!(failed.error.contains("may not restore machine guests/vm1"), "{failed:?}");
    // Hashes are compared all the same.
    assert_eq!(host.backup().unwrap().disks[0].sent_bytes, MIB, "the other server");
    fs::remove_dir_all(host.cache()).unwrap();
    assert_eq!(host.backup().unwrap().disks[0].sent_bytes, 0);
    // Nor for others.
    host.settings.set("for_machine", format!("{USER}/web1"));
    let failed = host.failure(&["backup"]).unwrap();
    assert!(failed.error.contains("this certificate belongs to machine site/host"), "{failed:?}");

    // Who holds a janus' key doesn't turn what the host has signed into something else.
    let url = scene.site.server(A).unwrap().url();
    let (thief, identity) = (scene.caller(&url, "router"), scene.identity("host"));
    let start = start_of(&BackupId::new().to_string());
    let other = "guests/vm1".parse().unwrap();
    let signed = proof(&identity, &Statement::start(&start, Some(&other)), A);
    let as_host = |machine, proof: &Option<String>| Carried {
        principal: Some(&identity),
        proof: proof.clone(),
        machine,
    };
    for machine in [None, Some("guests/vm2"), Some("site/host")] {
        refused(thief.start(&start, &as_host(machine, &signed)), ErrorReason::ProofRefused);
    }
    let for_itself = proof(&identity, &Statement::start(&start, None), A);
    let wrong = as_host(Some("guests/vm1"), &for_itself);
    refused(thief.start(&start, &wrong), ErrorReason::ProofRefused);
    thief.start(&start, &as_host(Some("guests/vm1"), &signed)).unwrap();
}

#[test]
fn a_janus_of_some_users_does_not_reach_others_by_their_rights() {
    let policy = "[groups.all]\nmembers = [\"carol\"]\nrestore = [\"*\"]\n";
    let mut scene = Scene::with_policy(Some(policy));
    let machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    scene.person("carol");
    scene.site.issue("janus", "branch", &["--host", "127.0.0.1", "--only-user", "carol"]).unwrap();
    let snapshot = machine.list().unwrap().snapshots[0].clone();
    let url = scene.site.server(&snapshot.server).unwrap().url();
    let carol = scene.identity("carol");
    let open = pb::OpenSnapshotRequest { snapshot_id: snapshot.snapshot_id, ..Default::default() };
    let signed = proof(&carol, &Statement::open(&open), &snapshot.server);
    let as_carol = Carried { principal: Some(&carol), proof: signed, ..Carried::default() };
    refused(scene.caller(&url, "branch").open(&open, &as_carol), ErrorReason::SnapshotUnknown);
    scene.caller(&url, "router").open(&open, &as_carol).unwrap();
}

#[test]
fn a_policy_that_anybody_may_write_is_none() {
    let mut scene = Scene::with_policy(Some(""));
    scene.site.stop_server(A).unwrap();
    let path = scene.site.folder().join(format!("{A}-policy.toml"));
    write_private(&path, &helpdesk("\"carol\""));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    fs::set_permissions(&path, mode).unwrap();
    scene.site.start_server(A).unwrap_err();
    let log = scene.site.log(A);
    assert!(log.contains("mode 666") && log.contains("chmod go-w"), "{log}");
}
