//! A new authority for a group, while backups go on.

use std::{fs, path::Path};

use crate::scene::{A, B, Scene};

const EVERYBODY: [&str; 3] = [A, B, "router"];

/// `janus-server pki ARGUMENTS`; what it printed.
fn pki(scene: &Scene, arguments: &[&str]) -> String {
    let output = scene.site.programs().server().arg("pki").args(arguments).output().unwrap();
    let (told, failed) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("pki {}: {told}{failed}", arguments.join(" "));
    if output.status.success() { told.into_owned() } else { failed.into_owned() }
}

/// Servers and janus read their files again.
fn hang_up(scene: &mut Scene) {
    let again = |scene: &Scene| {
        EVERYBODY.map(|name| {
            let log = if name == "router" { "janus" } else { name };
            scene.site.log(log).matches("were read again").count()
        })
    };
    let before = again(scene);
    for name in [A, B] {
        scene.site.server(name).unwrap().process().unwrap().hang_up();
    }
    scene.site.janus().unwrap().hang_up();
    crate::scene::until("new files", std::time::Duration::from_secs(20), || {
        again(scene).iter().zip(before).all(|(now, before)| *now > before)
    });
}

fn give_authorities(scene: &mut Scene, ca: &Path) {
    for name in EVERYBODY {
        fs::copy(ca.join("ca.pem"), ca.join(name).join("ca.pem")).unwrap();
    }
    hang_up(scene);
}

#[test]
fn a_group_gets_a_new_authority_while_backups_go_on() {
    let mut scene = Scene::new();
    let machine = scene.enrolled("web1");
    scene.works(&machine, "web1");
    scene.admin(B, &["pki", "revoke", "--machine", "alice/early"]);
    let ca = scene.site.folder().join("pki");
    let folder = ca.to_string_lossy().into_owned();
    let step = |scene: &Scene, name: &str| pki(scene, &["ca", name, "--ca", &folder]);
    // No step out of turn.
    assert!(step(&scene, "switch").contains("`pki ca rotate` makes one"));
    assert!(step(&scene, "retire").contains("only one authority"));
    assert!(step(&scene, "rotate").contains("the old one signs"));
    assert!(step(&scene, "rotate").contains("two authorities are believed already"));
    assert!(step(&scene, "retire").contains("`pki ca switch` is next"));
    give_authorities(&mut scene, &ca);
    scene.works(&machine, "web1");
    let old = fs::read(scene.keys("web1").join("cert.pem")).unwrap();
    let old_key = fs::read(scene.keys("web1").join("key.pem")).unwrap();

    assert!(step(&scene, "switch").contains("the new authority signs now"));
    scene.works(&machine, "web1");
    // The server that enrols is still of the old authority, and names it.
    let token = scene.token("web1");
    let done = machine.run(&["enroll", &scene.enroll_url, &token, "--force"]).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    scene.works(&machine, "web1");
    for name in EVERYBODY {
        let new = format!("new-{name}");
        let role = if name == "router" { "janus" } else { "server" };
        let out = ca.join(&new);
        let host = ["--host", "127.0.0.1", "--host", "localhost"];
        let named =
            ["issue", role, "--ca", &folder, "--name", name, "--out", out.to_str().unwrap()];
        pki(&scene, &[&named[..], &host[..]].concat());
        for file in ["cert.pem", "key.pem"] {
            fs::copy(out.join(file), ca.join(name).join(file)).unwrap();
        }
    }
    hang_up(&mut scene);
    scene.works(&machine, "web1");
    // By the key of the new certificate, with which all believe it.
    let revoked = scene.admin(A, &["pki", "revoke", "--machine", "alice/late"]);
    assert_eq!(revoked["known_to"], serde_json::json!([A, B]), "{revoked}");

    assert!(step(&scene, "retire").contains("believed no more"));
    assert!(!ca.join("old.key").exists() && !ca.join("next.key").exists());
    give_authorities(&mut scene, &ca);
    fs::copy(ca.join("ca.pem"), scene.keys("web1").join("ca.pem")).unwrap();
    scene.works(&machine, "web1");
    // What was revoked under the old authority is told under the new one, to who has lost it.
    scene.site.stop_server(B).unwrap();
    fs::remove_file(scene.site.server(B).unwrap().images().join(".revoked.json")).unwrap();
    scene.site.start_server(B).unwrap();
    crate::scene::until("all revocations", std::time::Duration::from_secs(30), || {
        let known = scene.admin(B, &["pki", "revoked"]).to_string();
        ["early", "late"].iter().all(|name| known.contains(&format!("client/alice/{name}")))
    });
    let token = scene.token("web2");
    let other = scene.machine("web2");
    let done = other.run(&["enroll", &scene.enroll_url, &token]).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    // What the old one has signed is of no use.
    fs::write(scene.keys("web1").join("cert.pem"), old).unwrap();
    fs::write(scene.keys("web1").join("key.pem"), old_key).unwrap();
    let refused = machine.run(&["list"]).unwrap();
    assert!(
        refused.code != Some(0) && refused.stderr.contains("was not issued by the CA"),
        "{}",
        refused.stderr
    );
}
