//! The Debian packages: installed, upgraded, removed and purged by dpkg in a fresh Debian.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::MetadataExt, process::Command};

use xtask::{
    dist::{self, PACKAGES, Plan, root::Root},
    packages,
    site::{Programs, target},
};

#[test]
fn as_root_packages_are_installed_upgraded_and_removed_and_nothing_of_the_user_goes() {
    let out = tempfile::tempdir_in(target()).unwrap();
    let plan = |suffix: &str| Plan {
        programs: Programs::for_tests().unwrap(),
        out: out.path().to_owned(),
        suffix: suffix.into(),
        small: false,
    };
    let pack = |suffix| PACKAGES.map(|package| dist::pack(&plan(suffix), &package).unwrap());
    let (first, second) = (pack(""), pack("+1"));
    let root = Root::unpack().unwrap();
    let at = |path: &str| root.path().join(path.trim_start_matches('/'));

    for package in &first {
        root.install(package).unwrap();
    }
    for program in ["janus-client", "janus-server", "janus"] {
        assert!(root.run(&[program, "--version"]).unwrap().starts_with(program));
        for file in [
            format!("/usr/share/man/man1/{program}.1.gz"),
            format!("/usr/share/bash-completion/completions/{program}"),
            format!("/usr/share/zsh/vendor-completions/_{program}"),
            format!("/usr/share/fish/vendor_completions.d/{program}.fish"),
            format!("/usr/share/doc/{program}/copyright"),
        ] {
            assert!(at(&file).metadata().is_ok_and(|found| found.len() > 50), "{file}");
        }
        let completions = at(&format!("/usr/share/bash-completion/completions/{program}"));
        packages::output(Command::new("bash").arg("-n").arg(completions)).unwrap();
    }
    // The page is one that man can show.
    let page = packages::output(
        Command::new("zcat").arg(at("/usr/share/man/man1/janus-client-backup.1.gz")),
    );
    assert!(page.unwrap().contains(".TH janus-client-backup 1"));
    let units = at("/usr/lib/systemd/system");
    for unit in
        ["janus-client.service", "janus-client.timer", "janus-server.service", "janus.service"]
    {
        // With the programs of this root, but the other units of this machine: a minimal root has none.
        let text = fs::read_to_string(units.join(unit)).unwrap();
        let copy = out.path().join(unit);
        let programs = format!("{}/", at("/usr/bin").display());
        fs::write(&copy, text.replace("/usr/bin/", &programs)).unwrap();
        let mut verify = Command::new("systemd-analyze");
        let verified = verify.args(["verify", "--man=no"]).arg(&copy).output().unwrap();
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(verified.status.success() && said.trim().is_empty(), "{unit}: {said}");
    }
    let unit = fs::read_to_string(units.join("janus-client.service")).unwrap();
    let line =
        "ExecStart=\"/usr/bin/janus-client\" daemon --once --config \"/etc/janus/client.toml\"";
    assert!(unit.contains(line) && !unit.contains(out.path().to_str().unwrap()), "{unit}");

    // Each program has keys of its own, and janus may write what it keeps.
    let said = |file: &str, key: &str| {
        let text = fs::read_to_string(at(file)).unwrap();
        let values: toml::Table = text.parse().unwrap();
        values[key].as_str().unwrap().to_owned()
    };
    let keys =
        ["client", "server", "janus"].map(|name| said(&format!("/etc/janus/{name}.toml"), "key"));
    assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2], "{keys:?}");
    let view = said("/etc/janus/janus.toml", "view_file");
    let folder = at(&view).parent().unwrap().metadata().unwrap();
    let router = root.run(&["id", "-u", "janus-router"]).unwrap();
    assert_eq!(folder.uid().to_string(), router.trim(), "{view}");

    // A user's settings, keys and data.
    let images = "/var/lib/janus/images/u/m/d/1.vhdx";
    root.run(&["install", "-d", "-o", "janus-server", "/var/lib/janus/images/u/m/d"]).unwrap();
    root.run(&["install", "-d", "/etc/janus/keys", "/var/cache/janus-client"]).unwrap();
    let mine = [images, "/etc/janus/keys/key.pem", "/var/cache/janus-client/state.json"];
    for file in mine {
        fs::write(at(file), "mine").unwrap();
    }
    let settings = ["client", "server", "janus"].map(|name| format!("/etc/janus/{name}.toml"));
    for file in &settings {
        let text = fs::read_to_string(at(file)).unwrap();
        fs::write(at(file), format!("# mine\n{text}")).unwrap();
    }
    let keeps = |files: &[&str]| {
        for file in files {
            assert_eq!(fs::read_to_string(at(file)).unwrap(), "mine", "{file}");
        }
    };
    let keeps_settings = || {
        for file in &settings {
            assert!(fs::read_to_string(at(file)).unwrap().starts_with("# mine\n"), "{file}");
        }
    };
    let owner = at("/var/lib/janus").metadata().unwrap().uid();
    assert!(owner > 0, "the server's folder is its user's");

    for package in &second {
        root.install(package).unwrap();
    }
    let version = root.run(&["dpkg-query", "-W", "-f", "${Version}", "janus-server"]).unwrap();
    assert!(version.ends_with("+1"), "{version}");
    keeps(&mine);
    keeps_settings();
    assert_eq!(at("/var/lib/janus").metadata().unwrap().uid(), owner);

    // Its own units are found; what was installed over them goes with the program that it starts, and what is another's stays.
    let show = ["service", "show", "--root", "/", "--config", "/etc/janus/client.toml"];
    let shown = root.run(&[&["janus-client"], &show[..]].concat()).unwrap();
    assert!(shown.contains("janus-client.timer: installed by the package\n"), "{shown}");
    assert!(shown.contains("the timer is not enabled"), "{shown}");
    let install = ["service", "install", "--root", "/", "--config", "/etc/janus/client.toml"];
    root.run(&[&["janus-client"], &install[..]].concat()).unwrap();
    let own = at("/etc/systemd/system");
    let shown = root.run(&[&["janus-client"], &show[..]].concat()).unwrap();
    assert!(shown.contains("/etc/systemd/system/janus-client.timer: installed\n"), "{shown}");
    fs::write(own.join("janus-client.mount"), "another's").unwrap();

    let all = PACKAGES.map(|package| package.name);
    root.run(&[&["dpkg", "--remove"], &all[..]].concat()).unwrap();
    assert!(!at("/usr/bin/janus-server").exists() && !units.join("janus.service").exists());
    for gone in
        ["janus-client.service", "janus-client.timer", "timers.target.wants/janus-client.timer"]
    {
        assert!(own.join(gone).symlink_metadata().is_err(), "{gone}");
    }
    assert!(own.join("janus-client.mount").exists());
    keeps(&mine);
    keeps_settings();

    root.run(&[&["dpkg", "--purge"], &all[..]].concat()).unwrap();
    assert!(settings.iter().all(|file| !at(file).exists()), "settings are purged");
    assert!(!at("/var/cache/janus-client").exists());
    keeps(&[images, "/etc/janus/keys/key.pem"]);
    let left = root.run(&["dpkg-query", "-W", "-f", "${Package}\n"]).unwrap();
    assert!(!left.contains("janus"), "{left}");
}

#[test]
fn the_same_tree_gives_the_same_package() {
    let out = tempfile::tempdir_in(target()).unwrap();
    let plan = Plan {
        programs: Programs::for_tests().unwrap(),
        out: out.path().to_owned(),
        suffix: String::new(),
        small: false,
    };
    let pack = || fs::read(dist::pack(&plan, &PACKAGES[2]).unwrap()).unwrap();
    assert!(pack() == pack(), "times or orders are in it");
}
