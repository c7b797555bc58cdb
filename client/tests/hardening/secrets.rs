//! Whole runs at the most talkative level of the log: no key, password or secret URL is in logs, answers, arguments or core dumps.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use xtask::{
    disk,
    site::{Plan, Process, Programs, Site, free_ports},
};

const MIB: u64 = 1 << 20;
const PASSWORD: &str = "correct-horse-battery-staple";

/// What of a private key may be nowhere: its lines in PEM, and its bytes in hex.
fn of_key(path: &Path) -> Vec<String> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let text = fs::read_to_string(path).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("-----")).collect();
    let der = STANDARD.decode(lines.concat()).unwrap();
    // The secret number of a P-256 key in PKCS #8: what follows its head.
    let secret = &der[36..68];
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let decimal = secret.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    lines.into_iter().map(str::to_owned).chain([hex.to_uppercase(), hex, decimal]).collect()
}

/// Arguments and environment of all that runs, while it runs.
fn watch_arguments(stop: Arc<AtomicBool>) -> std::thread::JoinHandle<BTreeSet<String>> {
    std::thread::spawn(move || {
        let mut seen = BTreeSet::new();
        while !stop.load(Ordering::Relaxed) {
            for entry in fs::read_dir("/proc").unwrap().flatten() {
                let Ok(bytes) = fs::read(entry.path().join("cmdline")) else { continue };
                let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
                if text.contains("janus") {
                    seen.insert(text);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        seen
    })
}

#[test]
fn logs_answers_and_arguments_have_no_secrets() {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &plan).unwrap();
    let nobody = free_ports(1).unwrap()[0];
    let webhook =
        format!("http://hook:{PASSWORD}@127.0.0.1:{nobody}/services/{PASSWORD}?key={PASSWORD}");
    let settings = site.janus_settings().unwrap();
    for (key, value) in [
        ("log", json!("trace")),
        ("primary", json!(true)),
        ("alert_webhook", json!(webhook)),
        ("alert_after_minutes", json!(0)),
    ] {
        settings.set(key, value);
    }
    site.server("server-a").unwrap().settings.set("log", "trace");
    let stop = Arc::new(AtomicBool::new(false));
    let watching = watch_arguments(stop.clone());
    site.start_all().unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 4 * MIB).unwrap();
    disk::write_noise(&path, 0..4 * MIB, 1).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    client.settings.set("log", "trace");
    client.settings.set("notify.webhook", webhook.as_str());
    client.settings.set("notify.when", json!(["failure", "recovery", "success"]));
    site.await_ready(&client).unwrap();
    let said = Mutex::new(String::new());
    let run = |arguments: &[&str]| {
        let finished = client.run(arguments).unwrap();
        let mut said = said.lock().unwrap();
        said.push_str(&finished.stdout);
        said.push_str(&finished.stderr);
        finished.code
    };
    assert_eq!(run(&["backup", "--json"]), Some(0));
    let to = site.folder().join("restored");
    assert_eq!(run(&["restore", "disk", "--to", &to.to_string_lossy()]), Some(0));
    assert_eq!(run(&["list"]), Some(0));
    site.server("server-a").unwrap().process().unwrap().hang_up();
    site.kill_server("server-a").unwrap();
    fs::remove_file(&path).unwrap();
    assert_ne!(run(&["backup", "--json"]), Some(0));
    // Time for an alert to go out, and to fail.
    std::thread::sleep(Duration::from_secs(4));
    site.stop_janus().unwrap();
    stop.store(true, Ordering::Relaxed);
    let arguments = watching.join().unwrap();
    assert!(arguments.iter().any(|one| one.contains("janus-client backup")), "{arguments:?}");

    let mut texts = vec![("what the client said".to_owned(), said.into_inner().unwrap())];
    texts.push(("arguments".into(), arguments.into_iter().collect::<Vec<_>>().join("\n")));
    for entry in fs::read_dir(site.folder().join("logs")).unwrap().map(Result::unwrap) {
        let text = String::from_utf8_lossy(&fs::read(entry.path()).unwrap()).into_owned();
        texts.push((entry.path().display().to_string(), text));
    }
    let mut secrets = vec![PASSWORD.to_owned()];
    for name in ["ca.key", "machine/key.pem", "server-a/key.pem", "router/key.pem"] {
        secrets.extend(of_key(&site.folder().join("pki").join(name)));
    }
    let mut bytes = 0;
    for (name, text) in &texts {
        bytes += text.len();
        for secret in &secrets {
            if let Some(at) = text.find(secret.as_str()) {
                let around = text[..at].rfind('\n').map_or(0, |line| line + 1);
                panic!(
                    "{name} has a secret: {}",
                    text[around..].lines().next().unwrap_or_default()
                );
            }
        }
    }
    assert!(bytes > 100_000, "trace is on: {bytes}");
    println!("{} secrets in none of {} texts of {} KiB", secrets.len(), texts.len(), bytes >> 10);
}

/// The limit of core dumps of a process.
fn core_limit(pid: u32) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    line.split_whitespace().nth(5).unwrap().to_owned()
}

#[test]
fn as_root_memory_is_in_no_core_dump_and_for_no_other_process() {
    let plan = Plan { servers: vec!["server-a".into()], ..Plan::default() };
    let mut site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let server = site.server("server-a").unwrap().process().unwrap().pid();
    let janus = site.janus().unwrap().pid();
    assert_eq!(
        [server, janus].map(core_limit),
        ["1", "1"],
        "one byte: no dump, not even to a pipe"
    );

    // Of a process that can't be dumped everything in /proc is root's, whoever runs it.
    let nobody = 65_534;
    site.stop_janus().unwrap();
    let folder = site.folder().to_owned();
    for path in
        [folder.clone(), folder.join("settings"), folder.join("pki"), folder.join("pki/router")]
    {
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    }
    let key = folder.join("pki/router/key.pem");
    std::os::unix::fs::chown(&key, Some(nobody), None).unwrap();
    let open = |name: &str| {
        let path = folder.join(name);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    };
    ["settings/janus.toml", "pki/router/cert.pem", "pki/router/ca.pem"]
        .iter()
        .for_each(|name| open(name));
    let mut command = site.programs().janus();
    command.arg("serve").arg("--config").arg(folder.join("settings/janus.toml")).uid(nobody);
    let process = Process::start("janus", command, &folder.join("logs/nobody.log")).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    assert!(status.contains(&format!("Uid:\t{nobody}")), "{status}");
    let owner = fs::metadata(format!("/proc/{}/environ", process.pid())).unwrap().uid();
    assert_eq!(owner, 0, "others of its user can't read its memory");
    process.stop().unwrap();
}
