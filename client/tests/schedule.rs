//! Scheduled backups with real programs: the units as systemd reads them, the daemon, and what is told of a run.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    path::Path,
    process::Command,
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use xtask::{
    disk, packages,
    site::{Plan, Programs, Running, Site},
};

fn wait_for(what: &str, mut is_true: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_true() {
        assert!(began.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(running: &Running, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(running.pid()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn service(arguments: &[&str]) -> Value {
    let mut client = Programs::for_tests().unwrap().client();
    let output = client.arg("service").args(arguments).arg("--json").output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[test]
fn systemd_accepts_the_units_of_every_schedule() {
    let folder = tempfile::tempdir().unwrap();
    let schedules = [
        "",
        "days = [\"Mon\", \"Fri\"]\ntimes = [\"06:30\", \"22:00\"]\nwake = true",
        "days = [\"Sun\"]\ncatch_up = false\nrandom_delay_minutes = 0",
    ];
    for (number, schedule) in schedules.iter().enumerate() {
        // With all that a command line could misread.
        let config = folder.path().join(format!("a b 50% $HOME {number}.toml"));
        fs::write(&config, format!("[schedule]\n{schedule}\n")).unwrap();
        let answer = service(&["install", "--print", "--config", config.to_str().unwrap()]);
        let units = folder.path().join(number.to_string());
        fs::create_dir(&units).unwrap();
        let mut verify = Command::new("systemd-analyze");
        verify.args(["verify", "--man=no"]);
        for (name, text) in answer["units"].as_object().unwrap() {
            fs::write(units.join(name), text.as_str().unwrap()).unwrap();
            verify.arg(units.join(name));
        }
        let output = verify.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.trim().is_empty(), "{said}");
        let timer = fs::read_to_string(units.join("janus-client.timer")).unwrap();
        let calendars = timer.lines().filter_map(|line| line.strip_prefix("OnCalendar="));
        let mut calendar = Command::new("systemd-analyze");
        let said = packages::output(calendar.arg("calendar").args(calendars)).unwrap();
        println!("{said}");
        assert!(said.contains("Next elapse"), "{said}");
    }
    // The check finds what is wrong.
    let wrong = folder.path().join("wrong.timer");
    fs::write(&wrong, "[Timer]\nOnCalendar=Funday 25:00\n").unwrap();
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(wrong).output();
    assert!(!output.unwrap().stderr.is_empty());
}

#[test]
fn a_service_is_installed_shown_and_removed_below_a_root() {
    let folder = tempfile::tempdir().unwrap();
    let (config, root) = (folder.path().join("client.toml"), folder.path().join("root"));
    fs::write(&config, "cache_path = \"/nonexistent\"\n").unwrap();
    let (config_arg, root_arg) = (config.to_str().unwrap(), root.to_str().unwrap());
    let act = |action| service(&[action, "--config", config_arg, "--root", root_arg]);
    let states = || {
        let shown = act("show");
        let state = |unit: &Value| unit["state"].as_str().unwrap().to_owned();
        shown["units"].as_array().unwrap().iter().map(state).collect::<Vec<_>>()
    };
    assert_eq!(states(), ["not installed", "not installed"]);
    for _ in 0..2 {
        assert_eq!(act("install")["ok"], true);
        assert_eq!(states(), ["installed", "installed"]);
    }
    let units = root.join("etc/systemd/system");
    let enabled = fs::read_link(units.join("timers.target.wants/janus-client.timer")).unwrap();
    assert_eq!(enabled, Path::new("/etc/systemd/system/janus-client.timer"));
    let unit = fs::read_to_string(units.join("janus-client.service")).unwrap();
    assert!(unit.contains("ExecStart=\"/usr/bin/janus-client\" daemon --once"), "{unit}");
    fs::write(&config, "[schedule]\ntimes = [\"03:00\"]\n").unwrap();
    assert!(states()[1].contains("differs from the settings"), "{:?}", states());
    // Of a package, as long as none is installed here.
    let packaged = root.join("usr/lib/systemd/system");
    fs::create_dir_all(&packaged).unwrap();
    for unit in ["janus-client.service", "janus-client.timer"] {
        fs::rename(units.join(unit), packaged.join(unit)).unwrap();
    }
    let shown = act("show");
    let differs = "installed by the package, and differs from the settings; run `janus-client service install`";
    assert_eq!(states(), ["installed by the package", differs]);
    let path = shown["units"][0]["path"].as_str().unwrap();
    assert!(path.contains("usr/lib/systemd/system/janus-client.service"), "{path}");
    assert_eq!((&shown["enabled"], &act("install")["ok"]), (&true.into(), &true.into()));
    assert_eq!(states(), ["installed", "installed"]);
    assert_eq!(act("remove")["removed"], true);
    assert_eq!(act("show")["enabled"], false);
    assert_eq!(fs::read_dir(units.join("timers.target.wants")).unwrap().count(), 0);
    assert_eq!(act("remove")["removed"], false);
    let refused = service(&["install", "--root", root_arg]);
    assert!(refused["error"].as_str().unwrap().contains("--config"), "{refused}");
}

#[test]
fn a_unit_depends_on_a_folder_only_where_the_settings_do() {
    let folder = tempfile::tempdir().unwrap();
    let (here, config) = (folder.path().join("here"), folder.path().join("client.toml"));
    fs::create_dir(&here).unwrap();
    let unit = |settings: &str| {
        fs::write(&config, settings).unwrap();
        let mut client = Programs::for_tests().unwrap().client();
        client.current_dir(&here).args(["service", "install", "--print", "--json", "--config"]);
        let output = client.arg(&config).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["units"]["janus-client.service"].as_str().unwrap().to_owned()
    };
    let absolute = "cert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\ndisks = [\"x=/dev/x\", \"y=nbd+unix:///e?socket=/run/s\"]\npre_backup = [\"freeze\", \"--qmp\", \"/run/q\"]\n";
    let line = |unit: &str| {
        unit.lines().find(|line| line.starts_with("WorkingDirectory=")).unwrap().to_owned()
    };
    assert_eq!(line(&unit(absolute)), "WorkingDirectory=/");
    let here = format!("WorkingDirectory={}", here.display());
    for relative in ["", "cert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\ncache_path = \"cache\"\n"] {
        assert_eq!(line(&unit(relative)), here);
    }
    let paths = [
        "post_backup = [\"./thaw\"]",
        "[notify]\nca = \"hook.pem\"",
        "seal_key = \"keys/seal.key\"",
        "[pki]\nca = \"own.pem\"",
    ];
    for relative in paths {
        assert_eq!(line(&unit(&format!("{absolute}{relative}"))), here, "{relative}");
    }
    for disk in ["x=disk.raw", "x=image:1.raw", "x=qcow2:d.qcow2", "x=nbd+unix:///e?socket=s"] {
        assert_eq!(line(&unit(&absolute.replace("x=/dev/x", disk))), here, "{disk}");
    }
    for disk in ["x=/d:1.raw", "x=qcow2:/d.qcow2", "x=nbd://host/e"] {
        assert_eq!(
            line(&unit(&absolute.replace("x=/dev/x", disk))),
            "WorkingDirectory=/",
            "{disk}"
        );
    }
}

#[test]
fn the_daemon_catches_up_reloads_and_stops_and_status_needs_no_server() {
    let mut site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 8 << 20).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    client.settings.set("schedule.on_battery", true);
    client.settings.set("schedule.on_metered", true);
    let status: Value = client.answer(&["status"]).unwrap();
    assert_eq!(status["local"]["last_backup"], Value::Null);

    let before = jiff::Timestamp::now().as_millisecond();
    let mut daemon = client.start(&["daemon"]).unwrap();
    wait_for("no backup", || daemon.log().contains("next backup"));
    assert_eq!(client.list().unwrap().snapshots.len(), 1, "{}", daemon.log());
    let status: Value = client.answer(&["status"]).unwrap();
    let taken = status["local"]["last_backup"]["taken_ms"].as_i64().unwrap();
    assert!((before..=jiff::Timestamp::now().as_millisecond()).contains(&taken));

    // What was backed up is not due once more, and with --once that is all.
    let once = client.run(&["daemon", "--once"]).unwrap();
    assert_eq!((once.code, once.stdout.as_str()), (Some(0), "no backup is due\n"));

    client.settings.set("schedule.times", vec!["25:00"]);
    client.settings.write(&client.config()).unwrap();
    signal(&daemon, Signal::HUP);
    wait_for("nothing refused", || daemon.log().contains("25:00"));
    client.settings.set("schedule.times", vec!["03:33"]);
    client.settings.set("schedule.random_delay_minutes", 0);
    client.settings.write(&client.config()).unwrap();
    signal(&daemon, Signal::HUP);
    wait_for("no new settings", || daemon.log().contains("03:33:00"));
    assert!(!daemon.has_ended());
    signal(&daemon, Signal::TERM);
    let ended = daemon.wait().unwrap();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);

    site.kill_janus().unwrap();
    let failure: Value =
        serde_json::from_str(&client.run(&["status", "--json"]).unwrap().stdout).unwrap();
    assert_eq!(
        (&failure["exit_code"], &failure["local"]["last_backup"]["taken_ms"]),
        (&3.into(), &taken.into())
    );
    let text = client.run(&["status"]).unwrap().stdout;
    assert!(text.starts_with("last backup of 20"), "{text}");
}

#[test]
fn with_json_progress_is_told_before_the_answer() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    fs::write(&path, vec![7; 128 << 20]).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    // A backup that stands still for a while once it has begun.
    let backup = client.start(&["backup", "--json"]).unwrap();
    let state = client.cache().join("state.json");
    wait_for("not begun", || {
        fs::read_to_string(&state).is_ok_and(|text| text.contains("\"server\": \"server-"))
    });
    site.janus().unwrap().freeze();
    std::thread::sleep(Duration::from_millis(2500));
    site.janus().unwrap().thaw();
    let done = backup.wait().unwrap();
    let lines: Vec<Value> =
        done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (answer, events) = lines.split_last().unwrap();
    assert_eq!((done.code, &answer["ok"]), (Some(0), &true.into()), "{}", done.stdout);
    assert!(!events.is_empty(), "{}", done.stdout);
    for event in events {
        assert_eq!((&event["event"], &event["doing"]), (&"progress".into(), &"backup".into()));
        assert_eq!(event["total_bytes"], 128 << 20);
        for figure in ["done_bytes", "read_bytes", "changed_bytes", "sent_bytes"] {
            assert!(event[figure].is_u64(), "{event}");
        }
    }
    // Colours are for terminals, and for those who want them.
    assert!(!done.stderr.contains('\x1b') && !done.stdout.contains('\x1b'), "{}", done.stderr);
    let on_terminal = |no_color: &str| {
        let program = site.programs().client().get_program().to_string_lossy().into_owned();
        let line = format!("{program} status --log debug --config {}", client.config().display());
        let mut script = Command::new("script");
        script.args(["-qec", &line, "/dev/null"]).env("NO_COLOR", no_color);
        packages::output(&mut script).unwrap()
    };
    assert!(on_terminal("").contains("\x1b[2m"));
    let plain = on_terminal("1");
    assert!(plain.contains("DEBUG") && !plain.contains('\x1b'), "{plain}");
}

/// Takes one message for each connection and answers with `status`.
fn webhook(status: &'static str) -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (told, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut length = 0;
            for line in
                (&mut stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty())
            {
                if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
                    length = value.parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            let answer =
                format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
            let _ = told.send(serde_json::from_slice(&body).unwrap());
        }
    });
    (url, heard)
}

#[test]
fn failures_and_recoveries_are_told_once_and_who_does_not_listen_changes_nothing() {
    let mut site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let (path, mailed) = (site.folder().join("disk.raw"), site.folder().join("mailed"));
    disk::blank(&path, 8 << 20).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    let (url, heard) = webhook("204 No Content");
    client.settings.set("notify.webhook", url);
    let script = format!("cat >> {}", mailed.display());
    client.settings.set("notify.command", vec!["/bin/sh".to_owned(), "-c".into(), script]);
    client.backup().unwrap();
    assert!(heard.try_recv().is_err() && !mailed.exists(), "a success is no news");

    site.kill_janus().unwrap();
    assert_eq!(client.failure(&["backup"]).unwrap().exit_code, 3);
    let told = heard.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!((&told["event"], &told["exit_code"]), (&"failure".into(), &3.into()), "{told}");
    assert!(told["last_backup_ms"].is_i64(), "{told}");
    assert!(told["text"].as_str().unwrap().contains("backup failed"), "{told}");
    assert_eq!(client.failure(&["backup"]).unwrap().exit_code, 3);
    assert!(heard.try_recv().is_err(), "the same failure is no news");

    site.start_janus().unwrap();
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
    let told = heard.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!((&told["event"], &told["failures"]), (&"recovery".into(), &2.into()), "{told}");
    let mailed = fs::read_to_string(mailed).unwrap();
    let events = mailed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let events: Vec<_> = events.map(|told| told["event"].clone()).collect();
    assert_eq!(events, ["failure", "recovery"]);

    // A recovery that nobody has taken is told of again, once somebody does.
    site.kill_janus().unwrap();
    assert_eq!(client.failure(&["backup"]).unwrap().exit_code, 3);
    assert_eq!(heard.recv_timeout(Duration::from_secs(5)).unwrap()["event"], "failure");
    site.start_janus().unwrap();
    site.await_ready(&client).unwrap();
    let good = client.settings.get("notify.webhook").unwrap().clone();
    let (deaf, refused) = webhook("503 Service Unavailable");
    client.settings.set("notify.webhook", deaf);
    client.settings.set("notify.command", json!([]));
    client.backup().unwrap();
    assert_eq!(refused.recv_timeout(Duration::from_secs(5)).unwrap()["event"], "recovery");
    client.settings.set("notify.webhook", good);
    client.backup().unwrap();
    let told = heard.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!((&told["event"], &told["failures"]), (&"recovery".into(), &1.into()), "{told}");
    client.backup().unwrap();
    assert!(heard.try_recv().is_err(), "it was taken");

    // With receivers that refuse, hang or aren't there.
    client.settings.set("notify.when", vec!["failure", "recovery", "success"]);
    client.settings.set("notify.seconds", 1);
    for command in [vec!["/nonexistent"], vec!["/bin/sh", "-c", "exit 9"], vec!["sleep", "60"]] {
        let (url, heard) = webhook("503 Service Unavailable");
        client.settings.set("notify.webhook", url);
        client.settings.set("notify.command", command);
        let done = client.run(&["backup", "--json"]).unwrap();
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(
            done.stderr.contains("answered 503") && done.stderr.contains("notify.command"),
            "{}",
            done.stderr
        );
        let told = heard.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(told["event"], "success");
    }
}
