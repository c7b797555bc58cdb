//! Spans of a run in a collector of OpenTelemetry: client, janus and servers send them, each to the same trace, below the
//! call that it answers. A collector that is away costs one line of log and nothing else.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

#[path = "spans/collector.rs"]
mod collector;

use collector::{Collector, Seen};

/// A site whose programs send spans to `endpoint`, and its client.
fn site(endpoint: &str) -> (Site, Client) {
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    for name in site.server_names() {
        site.server(&name).unwrap().settings.set("otlp_endpoint", endpoint);
    }
    site.janus_settings().unwrap().set("otlp_endpoint", endpoint);
    site.start_all().unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 1 << 20).unwrap();
    disk::write_noise(&path, 0..1 << 20, 1).unwrap();
    let mut client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    client.settings.set("otlp_endpoint", endpoint);
    (site, client)
}

/// What janus and the server made of a call that the client made in its span `within`.
fn assert_handed_down(seen: &[Seen], within: &str, method: &str) {
    let one = |service: &str, name: &str| {
        let mut found = seen.iter().filter(|span| span.service == service && span.name == name);
        found.next().unwrap_or_else(|| panic!("no span {name} of {service} in {seen:#?}"))
    };
    let method = format!("janus.v1.{method}");
    let client = one("janus-client", within);
    let (janus, server) = (one("janus", &method), one("janus-server", &method));
    assert_eq!(client.parent, one("janus-client", "run").id, "{within} is part of the run");
    assert_eq!(janus.parent, client.id, "{method} of janus");
    assert_eq!(server.parent, janus.id, "{method} of the server");
    let lasted = |span: &Seen| span.ended - span.begun;
    assert!(client.begun <= janus.begun && janus.begun <= server.begun);
    // To the end of the answer, not to its beginning.
    assert!(2 * lasted(janus) >= lasted(server), "{janus:?} {server:?}");
    assert_eq!(server.fields["server"], "server-a");
    assert_eq!(janus.fields["server"], "server-a", "the one that answered");
    for span in [janus, server] {
        assert_eq!(span.fields["machine"], "alice/machine", "{span:?}");
    }
}

#[test]
fn a_backup_is_one_trace_through_all_three_programs() {
    let collector = Collector::start(None);
    let (mut site, client) = site(&collector.url);
    let run = client.run(&["backup", "--json"]).unwrap();
    assert_eq!(run.code, Some(0), "{run:?}");
    let answer: serde_json::Value = serde_json::from_str(run.answer_line()).unwrap();
    // What is sent last is sent at the end.
    site.stop_janus().unwrap();
    site.stop_server("server-a").unwrap();
    let all = collector.seen();
    let root = all.iter().find(|span| span.name == "run" && span.fields.contains_key("backup_id"));
    let root = root.unwrap_or_else(|| panic!("no run in {all:#?}"));
    let seen: Vec<Seen> = all.iter().filter(|span| span.trace == root.trace).cloned().collect();
    println!("{}", collector::tree(&seen));
    assert_eq!(root.parent, "", "the run is the root");
    assert_eq!(root.fields["backup_id"], answer["backup_id"].as_str().unwrap());
    assert_eq!(root.fields["server"], "server-a");
    assert_eq!(root.fields["machine"], "alice/machine");
    assert_handed_down(&seen, "start", "BackupService/StartBackup");
    assert_handed_down(&seen, "disk", "BackupService/WriteBlocks");
    assert_handed_down(&seen, "commit", "BackupService/CommitBackup");
    for span in seen.iter().filter(|span| span.service == "janus-server") {
        assert_eq!(span.fields["backup_id"], root.fields["backup_id"], "{span:?}");
    }
    assert!(site.log("server-a").contains(&root.trace), "the log has the same id");
    assert!(run.stderr.contains(&root.trace), "{}", run.stderr);
    assert!(!all.iter().any(|span| span.text.contains("PRIVATE")), "no key is in a span");
}

#[test]
fn a_collector_that_is_away_costs_one_warning_and_no_backup() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // Accepted by nobody, so that every attempt to send lasts as long as it may.
    let (mut site, client) = site(&format!("http://{}", nobody.local_addr().unwrap()));
    for _ in 0..3 {
        let begun = Instant::now();
        let run = client.run(&["backup"]).unwrap();
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
        std::thread::sleep(Duration::from_secs(3));
    }
    std::thread::sleep(Duration::from_secs(6));
    let begun = Instant::now();
    site.stop_janus().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?} to stop", begun.elapsed());
    for log in [site.log("janus"), site.log("server-a")] {
        assert_eq!(log.matches("spans can't be sent").count(), 1, "{log}");
    }
}

#[test]
fn a_collector_behind_tls_is_checked() {
    let (site, mut client) = site("");
    let keys = site.issue("server", "collector", &["--host", "localhost"]).unwrap();
    let collector = Collector::start(Some(&keys));
    client.settings.set("otlp_endpoint", collector.url.as_str());
    client.settings.write(&client.config()).unwrap();
    let backup = |trusted: bool| {
        let mut command = site.programs().client();
        command.args(["backup", "--config"]).arg(client.config()).stderr(Stdio::piped());
        if trusted {
            command.env("SSL_CERT_FILE", site.folder().join("pki/ca.pem"));
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let log = backup(false);
    assert!(collector.seen().is_empty());
    assert_eq!(log.matches("spans can't be sent").count(), 1, "{log}");
    let log = backup(true);
    assert!(collector.seen().iter().any(|span| span.name == "run"), "{log}");
}
