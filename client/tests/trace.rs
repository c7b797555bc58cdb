//! One run, one trace: its id stands in the log lines of client, janus and server.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

/// Ids of the lines that say `what`.
fn ids<'a>(log: &'a str, what: &str) -> Vec<&'a str> {
    let id = |line: &'a str| Some(line.split_once("trace_id=\"")?.1.split_once('"')?.0);
    log.lines().filter(|line| line.contains(what)).filter_map(id).collect()
}

#[test]
fn the_log_lines_of_a_run_carry_one_trace_id_in_all_three_programs() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 1 << 20).unwrap();
    disk::write_noise(&path, 0..1 << 20, 1).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
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
