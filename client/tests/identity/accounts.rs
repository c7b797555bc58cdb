//! Accounts of a server's host that aren't root: what a group of theirs administers, and nothing else.

use std::{fs, os::unix::fs::PermissionsExt, process::Command, time::Duration};

use serde_json::Value;
use xtask::site::USER;

use crate::scene::{A, Scene, until};

const NOBODY: &str = "65534";

#[test]
fn as_root_an_account_administers_the_machines_of_its_group() {
    let policy = format!("[groups.ops]\nmembers = [\"nobody\"]\nadmin = [\"{USER}/*\"]\n");
    let mut scene = Scene::with_policy(Some(&policy));
    // A place that everybody may reach, unlike the store.
    let open = tempfile::tempdir().unwrap();
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, config) = (open.path().join("janus-server"), open.path().join("server.toml"));
    fs::copy(scene.site.programs().server().get_program(), &program).unwrap();
    let socket = open.path().join("admin.sock");
    scene.site.stop_server(A).unwrap();
    let server = scene.site.server(A).unwrap();
    server.settings.set("admin_socket", socket.to_string_lossy());
    server.settings.write(&config).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).unwrap();
    scene.site.start_server(A).unwrap();
    let machine = scene.enrolled("web1");
    scene.site.issue("client", "db", &["--user", "bob", "--machine", "db"]).unwrap();
    let mut other = scene.machine("other");
    for key in ["cert", "key"] {
        let path = scene.keys("db").join(format!("{key}.pem"));
        other.settings.set(key, path.to_string_lossy());
    }
    other.settings.set("ca", scene.keys("db").join("ca.pem").to_string_lossy());
    scene.site.await_ready(&machine).unwrap();
    for client in [&machine, &other] {
        client.answer::<Value>(&["backup", "--server", A]).unwrap();
    }
    let snapshot = machine.list().unwrap().snapshots[0].snapshot_id.clone();
    let of_bob = other.list().unwrap().snapshots[0].snapshot_id.clone();

    let ask = |arguments: &[&str]| -> Result<Value, String> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]);
        command.arg(&program).args(arguments).arg("--json").arg("--config").arg(&config);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let answer: Value = serde_json::from_str(text.lines().last().unwrap_or("null")).unwrap();
        println!("{arguments:?}: {answer} {}", String::from_utf8_lossy(&output.stderr));
        match answer["ok"] == true {
            true => Ok(answer),
            false => Err(answer["error"].as_str().unwrap_or_default().to_owned()),
        }
    };
    let name = format!("{USER}/web1");
    ask(&["pin", &snapshot]).unwrap();
    ask(&["unpin", &snapshot]).unwrap();
    ask(&["verify", &name]).unwrap();
    ask(&["delete", &snapshot]).unwrap();
    ask(&["trash", "restore", &snapshot]).unwrap();
    ask(&["lock", &name, "--newest", "--until", "2100-01-01"]).unwrap_err();
    for (arguments, said) in [
        (&["delete", &of_bob][..], "nobody may not do this: no group of it administers bob/db"),
        (&["delete", "bob/db"], "no group of it administers bob/db"),
        (&["alarm", "clear", "bob/db"], "no group of it administers bob/db"),
        (&["verify", "bob/db"], "no group of it administers bob/db"),
        (&["lock", "bob/db", "--newest", "--until", "2030-01-01"], "no group of it administers"),
        (&["enroll", "token", "--user", "bob", "--machine", "db"], "no group of it administers"),
        (&["trash", "purge", &name], "for root alone"),
        (&["retention", "run", "--now"], "for root alone"),
        (&["usage"], "for root alone"),
        (&["audit", "show"], "for root alone"),
        (&["verify"], "for root alone"),
        (&["pki", "revoke", "--machine", &name], "for root alone"),
    ] {
        let refused = ask(arguments).unwrap_err();
        assert!(refused.contains(said), "{arguments:?}: {refused}");
    }
    // A token for a machine that it administers, and a certificate for it.
    let token = ask(&["enroll", "token", "--user", USER, "--machine", "new"]).unwrap();
    let new = scene.machine("new");
    let done = new.run(&["enroll", &scene.enroll_url, token["token"].as_str().unwrap()]).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    // It stands in the log by its name.
    let shown = scene.site.admin(A, &["audit", "show", "--json"]).unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("local nobody (uid 65534"), "{shown}");

    scene.set_policy(A, "");
    until("its group is gone", Duration::from_secs(30), || ask(&["pin", &snapshot]).is_err());
    scene.works(&machine, "web1");
}
