//! Certificates for tokens, and their renewal.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use janus_proto::{error::ErrorReason, tls::Identity};
use janus_server::pki::{self, Wanted};
use serde_json::json;

use crate::scene::{A, B, Caller, Carried, Scene, load, refused, start_of, until};

#[test]
fn a_machine_enrols_once_and_backs_up() {
    let mut scene = Scene::new();
    let machine = scene.machine("web1");
    let token = scene.token("web1");
    let enroll = |machine: &xtask::site::Client, token: &str| {
        let done = machine.run(&["enroll", &scene.enroll_url, token]).unwrap();
        println!("exit {:?}: {}{}", done.code, done.stdout, done.stderr);
        done
    };
    // Another authority's fingerprint: nothing is sent.
    let (secret, _) = token.rsplit_once('.').unwrap();
    let elsewhere = format!("{secret}.{}", "A".repeat(43));
    let wrong = enroll(&machine, &elsewhere);
    assert!(wrong.code == Some(1) && wrong.stderr.contains("another CA"), "{}", wrong.stderr);
    // A guess.
    let (prefix, authority) = (&token[..30], token.rsplit_once('.').unwrap().1);
    let guess = format!("{prefix}{}.{authority}", "A".repeat(secret.len() - 30));
    let unknown = enroll(&machine, &guess);
    assert!(
        unknown.code == Some(1) && unknown.stderr.contains("doesn't know the token"),
        "{}",
        unknown.stderr
    );

    let done = enroll(&machine, &token);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let keys = scene.keys("web1");
    let identity = load(&keys);
    assert!(identity.principal().limits.proof);
    assert_eq!(identity.principal().role.to_string(), "client alice/web1");
    let mode = fs::metadata(keys.join("key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    scene.works(&machine, "web1");

    // Used: by the same machine without a word about it, and by another one.
    let again = enroll(&machine, &token);
    assert!(
        again.code == Some(1)
            && again.stderr.contains("already")
            && again.stderr.contains("--force"),
        "{}",
        again.stderr
    );
    let thief = scene.machine("thief");
    let used = enroll(&thief, &token);
    assert!(used.code == Some(1) && used.stderr.contains("was used on"), "{}", used.stderr);
    assert!(!scene.keys("thief").join("cert.pem").exists());

    // Also after a restart of the server.
    scene.site.kill_server(A).unwrap();
    scene.site.start_server(A).unwrap();
    let used = enroll(&thief, &token);
    assert!(used.code == Some(1) && used.stderr.contains("was used on"), "{}", used.stderr);

    // A new token makes an open one useless; a cancelled one is none.
    let first = scene.token("web2");
    let second = scene.token("web2");
    assert!(enroll(&thief, &first).stderr.contains("doesn't know"));
    let tokens = scene.admin(A, &["enroll", "list"]);
    let open = tokens["tokens"].as_array().unwrap().iter().find(|token| token["state"] == "open");
    scene.admin(A, &["enroll", "cancel", open.unwrap()["id"].as_str().unwrap()]);
    assert!(enroll(&thief, &second).stderr.contains("doesn't know"));
    let told = scene.site.log(A);
    assert!(!told.contains(&secret[secret.len() - 20..]), "the log shows a token");
}

#[test]
fn an_answer_that_was_lost_is_asked_for_again() {
    let scene = Scene::new();
    let machine = scene.machine("web1");
    let token = scene.token("web1");
    assert_eq!(machine.run(&["enroll", &scene.enroll_url, &token]).unwrap().code, Some(0));
    let keys = scene.keys("web1");
    // A key that was never whole is made anew.
    let thief = scene.machine("web9");
    fs::create_dir_all(scene.site.client_folder("web9").join("keys")).unwrap();
    fs::write(scene.site.client_folder("web9").join("keys/key.new"), "-----BEGIN").unwrap();
    let other = scene.token("web9");
    let done = thief.run(&["enroll", &scene.enroll_url, &other]).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    // As if this machine had been switched off before the certificate came.
    fs::rename(keys.join("key.pem"), keys.join("key.new")).unwrap();
    fs::remove_file(keys.join("cert.pem")).unwrap();
    let done = machine.run(&["enroll", &scene.enroll_url, &token]).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    scene.works(&machine, "web1");
}

#[test]
fn a_machine_that_enrols_anew_goes_on_with_its_chains() {
    let scene = Scene::new();
    let machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    scene.works(&machine, "web1");
    fs::remove_dir_all(scene.keys("web1")).unwrap();
    let token = scene.token("web1");
    assert_eq!(machine.run(&["enroll", &scene.enroll_url, &token]).unwrap().code, Some(0));
    let backup = machine.backup().unwrap();
    assert_eq!(backup.disks[0].sent_bytes, 0, "{backup:?}");
    assert_eq!(machine.list().unwrap().snapshots.len(), 3);
}

#[test]
fn a_machine_that_seals_is_shown_its_recovery_key_at_enrolment() {
    let scene = Scene::new();
    let mut machine = scene.machine("web1");
    machine.settings.set("encryption", "client");
    let key = scene.site.client_folder("web1").join("seal.key");
    machine.settings.set("seal_key", key.to_string_lossy());
    let token = scene.token("web1");
    let done = machine.run(&["enroll", &scene.enroll_url, &token]).unwrap();
    assert!(done.code == Some(0) && done.stdout.contains("RECOVERY KEY of"), "{done:?}");
    let mode = fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    scene.works(&machine, "web1");
    // Shown once: who enrols anew keeps the key.
    let token = scene.token("web1");
    let done = machine.run(&["enroll", &scene.enroll_url, &token, "--force"]).unwrap();
    assert!(done.code == Some(0) && !done.stdout.contains("RECOVERY KEY"), "{done:?}");
    scene.works(&machine, "web1");
}

#[test]
fn a_certificate_is_renewed_before_it_expires() {
    let mut scene = Scene::new();
    let machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    let keys = scene.keys("web1");
    let fresh = load(&keys).expires();
    // Not due: nothing changes.
    machine.backup().unwrap();
    assert_eq!(load(&keys).expires(), fresh);
    // One that ends in 20 minutes, and began an hour ago.
    let mut wanted =
        Wanted::new(load(&keys).principal().role.clone(), vec![], Duration::from_secs(1200));
    wanted.limits.proof = true;
    wanted.limits.enrolled = Some(load(&keys).principal().issued());
    let (ca, out) = (scene.site.folder().join("pki"), scene.site.folder().join("old"));
    pki::issue(&ca, &wanted, &out).unwrap();
    for name in ["cert.pem", "key.pem"] {
        fs::copy(out.join(name), keys.join(name)).unwrap();
    }
    let old = load(&keys);
    // The server is away: the backup goes on, and says that this is to be looked at.
    let enrolled = keys.join("enrolled.json");
    let place = fs::read(&enrolled).unwrap();
    fs::write(&enrolled, json!({ "url": "https://127.0.0.1:9" }).to_string()).unwrap();
    let done = machine.run(&["backup", "--json"]).unwrap();
    assert!(
        done.code == Some(0) && done.stderr.contains("can't be renewed now"),
        "{}",
        done.stderr
    );
    assert_eq!(load(&keys).expires(), old.expires());
    fs::write(&enrolled, place).unwrap();
    scene.works(&machine, "web1");
    let new = load(&keys);
    assert!(new.expires() > old.expires() + 80 * 86_400, "{} {}", new.expires(), old.expires());
    assert!(new.principal().limits.proof);
    assert_eq!(new.principal().issued(), old.principal().issued(), "that of the enrolment");
    scene.site.stop_server(A).unwrap();
}

#[test]
fn nobody_renews_himself_out_of_a_revocation() {
    let mut scene = Scene::new();
    let machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    let keys = scene.keys("web1");
    let role = load(&keys).principal().role.clone();
    let ca = scene.site.folder().join("pki");
    let due = |name: &str, enrolled: Option<i64>| {
        let mut wanted = Wanted::new(role.clone(), vec![], Duration::from_secs(1200));
        wanted.limits.proof = true;
        wanted.limits.enrolled = enrolled;
        pki::issue(&ca, &wanted, &ca.join(name)).unwrap();
        load(&ca.join(name))
    };
    let renew = |identity: &Identity| scene.renew(identity);
    // Not yet, nor what nobody has enrolled.
    refused(renew(&load(&keys)), ErrorReason::NotAllowed);
    refused(renew(&due("by-hand", None)), ErrorReason::NotAllowed);
    let stolen = due("stolen", Some(load(&keys).principal().issued()));

    // Who makes certificates hasn't heard of it yet.
    scene.site.kill_janus().unwrap();
    scene.admin(B, &["pki", "revoke", "--machine", "alice/web1"]);
    let url = scene.site.server(A).unwrap().url();
    let renewed = scene.renew(&stolen).unwrap();
    fs::write(ca.join("stolen/cert.pem"), renewed).unwrap();
    let renewed = load(&ca.join("stolen"));
    assert!(renewed.expires() > stolen.expires());
    scene.site.start_janus().unwrap();
    until("the server knows", Duration::from_secs(60), || {
        let known = scene.admin(A, &["pki", "revoked"]);
        !known["revoked"].as_array().unwrap().is_empty()
    });
    let start = start_of(&janus_proto::ids::BackupId::new().to_string());
    let refusal = Caller::new(&url, &renewed).start(&start, &Carried::default());
    refused(refusal, ErrorReason::IdentityMissing);
}
