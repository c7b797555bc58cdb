//! `janus-client test`.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{Context, Failure, Outcome};
use crate::check::{self, Checked, State, Throughput};

/// Exit codes, as of `janus status --check`.
const WARNING: u8 = 1;
const CRITICAL: u8 = 2;

pub(super) async fn run(context: &Context) -> Result<Outcome, Failure> {
    // What only a backup needs is checked too: this is asked before it runs unattended.
    context.settings.encoding()?;
    context.settings.wishes()?;
    let ways = context.ways().await?;
    let mut all = Vec::new();
    // One after another: they share the line whose throughput is measured.
    for url in ways.urls() {
        let checking = context.stop.run_until_cancelled(check::check(url, ways.dialer()));
        all.push(checking.await.ok_or_else(Failure::interrupted)?);
    }
    // In the end the first that works counts as the one that worked last.
    for checked in all.iter().rev() {
        let mut memory = ways.memory();
        if let Some(peer) = &checked.peer {
            memory.note(&checked.url, peer);
        }
        if let Some(mac) = &checked.mac {
            memory.note_mac(&checked.url, mac.clone());
        }
        if !checked.behind.is_empty() {
            memory.note_behind(&checked.url, &checked.behind);
        }
    }
    let remembering = tokio::task::spawn_blocking(move || ways.memory().write());
    remembering.await.map_err(Failure::failed)?;
    let exit_code = verdict(&all);
    let json = json!({
        "ok": exit_code != CRITICAL,
        "exit_code": exit_code,
        "urls": all.iter().map(url_json).collect::<Vec<_>>(),
    });
    Ok(Outcome { json, text: text(&all) })
}

/// Critical when no URL is good for a backup; a warning when something needs to be looked at.
fn verdict(all: &[Checked]) -> u8 {
    let is_good = |checked: &Checked| checked.worst() != State::Failed;
    let is_well = |checked: &Checked| checked.worst() <= State::Skipped;
    match (all.iter().any(is_good), all.iter().all(is_well)) {
        (false, _) => CRITICAL,
        (true, false) => WARNING,
        (true, true) => 0,
    }
}

fn url_json(checked: &Checked) -> Value {
    let row = |row: &check::Row| json!({ "check": row.check, "state": row.state.as_str(), "text": row.text });
    let rate = |rate: fn(&Throughput) -> f64| checked.throughput.as_ref().map(|t| rate(t) as u64);
    json!({
        "url": checked.url,
        "peer": checked.peer.as_ref().map(ToString::to_string),
        "state": checked.worst().as_str(),
        "checks": checked.rows.iter().map(row).collect::<Vec<_>>(),
        "upload_bytes_per_second": rate(|t| t.up),
        "download_bytes_per_second": rate(|t| t.down),
        "mac": checked.mac,
        "behind": checked.behind,
    })
}

fn text(all: &[Checked]) -> String {
    let mut text = String::new();
    for checked in all {
        let _ = writeln!(text, "{}", checked.url);
        for row in &checked.rows {
            let _ = writeln!(text, "  {:<8} {:<15} {}", row.state.as_str(), row.check, row.text);
        }
        let behind = checked.behind.iter().map(|(server, mac)| format!("{server}: {mac}"));
        for mac in checked.mac.iter().cloned().chain(behind) {
            let _ =
                writeln!(text, "  {:<8} {:<15} {mac}, remembered for waking it up", "", "hardware");
        }
    }
    text
}
