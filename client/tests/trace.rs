//! One run, one trace: its id stands in the log lines of client, janus and server, for people and as JSON.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

/// Ids of the lines that say `what`.
fn ids<'a>(log: &'a str, what: &str) -> Vec<&'a str> {
    let id = |line: &'a str| Some(line.split_once("trace_id=\"")?.1.split_once('"')?.0);
    log.lines().filter(|line| line.contains(what)).filter_map(id).collect()
}

/// A client of the site with a small disk.
fn client(site: &Site) -> Client {
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 1 << 20).unwrap();
    disk::write_noise(&path, 0..1 << 20, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    client
}

#[test]
fn the_log_lines_of_a_run_carry_one_trace_id_in_all_three_programs() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let client = client(&site);
    let mut seen = Vec::new();
    for server in ["server-a", "server-b"] {
        let run = client.run(&["backup"]).unwrap();
        assert_eq!(run.code, Some(0), "{run:?}");
        let (janus, log) = (site.log("janus"), site.log(server));
        let (started, committed) = (ids(&janus, "run started"), ids(&log, "run committed"));
        let id = *committed.last().unwrap_or_else(|| panic!("no id in {log}"));
        assert_eq!(id.len(), 32, "{id}");
        assert_eq!(started.last(), Some(&id), "{janus}");
        assert!(ids(&run.stderr, "").contains(&id), "{}", run.stderr);
        seen.push(id.to_owned());
    }
    assert_ne!(seen[0], seen[1], "each run has its own");
}

/// The lines of a log, each of which must be one JSON object with what every line has.
fn objects(log: &str) -> Vec<Value> {
    // What a program says on stdout stands in the same file.
    let lines = log.lines().filter(|line| !line.contains("listening on https://"));
    let object = |line: &str| {
        let value: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for key in ["timestamp", "level", "target", "message"] {
            assert!(value[key].is_string(), "no {key} in {line}");
        }
        value
    };
    lines.map(object).collect()
}

/// The line that says `message`, and the trace of its outermost span.
fn line<'a>(log: &'a [Value], message: &str) -> (&'a Value, &'a str) {
    let line = log.iter().find(|line| line["message"] == message);
    let line = line.unwrap_or_else(|| panic!("nobody says {message:?} in {log:#?}"));
    (line, line["spans"][0]["trace_id"].as_str().unwrap())
}

#[test]
fn with_json_every_log_line_of_the_three_programs_is_one_object() {
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    for name in site.server_names() {
        site.server(&name).unwrap().settings.set("log_format", "json");
    }
    site.janus_settings().unwrap().set("log_format", "json");
    site.start_all().unwrap();
    let mut client = client(&site);
    client.settings.set("log_format", "json");
    client.settings.set("log", "info,janus_client=debug");
    let run = client.run(&["backup"]).unwrap();
    assert_eq!(run.code, Some(0), "{run:?}");
    let [janus, server] = ["janus", "server-a"].map(|name| objects(&site.log(name)));
    let of_client = objects(&run.stderr);
    let (started, trace) = line(&janus, "run started");
    assert_eq!(
        (&started["server"], &started["machine"]),
        (&"server-a".into(), &"alice/machine".into())
    );
    let (committed, same) = line(&server, "run committed");
    assert_eq!((same, &committed["level"]), (trace, &"INFO".into()));
    assert_eq!(line(&of_client, "started").1, trace);
}
