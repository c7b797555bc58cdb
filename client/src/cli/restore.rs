//! `janus-client restore`.

use std::{ops::Range, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches};
use janus_proto::{
    pb::Consistency,
    show::{amount, date},
};
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, chosen::selection};
use crate::{
    catalog::consistency_name,
    progress::{self, Doing, Progress},
    restore::{Lost, Restore, RestoreReport},
};

/// Arguments about how it is done.
pub(super) fn arguments() -> [Arg; 3] {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    [
        flag("in-place").requires("force").help(
            "Overwrite the file itself instead of a copy: needs no space, but until it is done the file is neither old nor new",
        ),
        flag("full").help("Fetch all of it, without reading what is there"),
        flag("verify").help("Read all of it back in the end and compare it once more"),
    ]
}

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let wanted = selection(matches, &text("what"))?;
    let settings = &context.settings;
    let to = PathBuf::from(text("to"));
    let progress = Progress::new(0);
    let display = progress::show(Doing::Restore, &progress, context.events);
    let restore = Restore {
        ways: context.ways_awake().await?,
        wanted,
        to: to.clone(),
        force: matches.get_flag("force"),
        in_place: matches.get_flag("in-place"),
        full: matches.get_flag("full"),
        verify: matches.get_flag("verify"),
        partial: matches.get_one::<String>("partial").map(PathBuf::from),
        packing: settings.encoding()?,
        threads: settings.threads(),
        failover_after: settings.failover_after(),
        direct: settings.direct,
        progress,
        stop: context.stop.clone(),
    };
    let report = restore.run().await?;
    drop(display);
    let snapshot = &report.snapshot;
    let json = json!({
        "ok": true,
        "snapshot_id": snapshot.snapshot_id,
        "server": snapshot.server_id,
        "disk_id": snapshot.disk_id,
        "to": to,
        "size_bytes": snapshot.size_bytes,
        "consistency": consistency_name(snapshot.consistency()),
        "resumed": report.resumed,
        "read_bytes": report.read_bytes,
        "fetched_bytes": report.fetched_bytes,
        "sources": sources_json(&report),
        "written_bytes": report.written_bytes,
        "verified_bytes": report.verified_bytes,
        "read_back_bytes": report.read_back_bytes,
        "lost": lost_json(&report.lost),
        "seconds": report.seconds,
    });
    let lost = match report.lost.is_empty() {
        true => String::new(),
        false => format!(
            "LOST, zeros now: {} at bytes {}\n",
            amount(report.lost.bytes()),
            report.lost.said()
        ),
    };
    let smeared = match snapshot.consistency() {
        Consistency::Smeared => {
            "SMEARED: its parts are from different times, read while the disk was in use\n"
        }
        _ => "",
    };
    let text = format!(
        "{lost}{smeared}restored {} of {} from {} to {} in {:.1} s\n{}\n",
        snapshot.disk_id,
        date(snapshot.committed_ms),
        snapshot.server_id,
        to.display(),
        report.seconds,
        figures(&report),
    );
    Ok(Outcome { json, text })
}

/// What was read, fetched, written and verified, in one line.
fn figures(report: &RestoreReport) -> String {
    let mut text = format!(
        "read {} there, fetched {}",
        amount(report.read_bytes),
        amount(report.fetched_bytes)
    );
    if report.sources.len() > 1 {
        let from = |(server, bytes): &(String, u64)| format!("{} from {server}", amount(*bytes));
        let from: Vec<_> = report.sources.iter().map(from).collect();
        text += &format!(" ({})", from.join(", "));
    }
    text += &format!(
        ", wrote {}, verified {} of {}",
        amount(report.written_bytes),
        amount(report.verified_bytes),
        amount(report.snapshot.size_bytes)
    );
    if report.read_back_bytes > 0 {
        text += &format!(", read {} back", amount(report.read_back_bytes));
    }
    text
}

fn sources_json(report: &RestoreReport) -> Value {
    let source = |(server, bytes): &(String, u64)| json!({ "server": server, "bytes": bytes });
    report.sources.iter().map(source).collect()
}

/// Lost parts as `--json` prints them.
pub(super) fn lost_json(lost: &Lost) -> Value {
    let range =
        |range: &Range<u64>| json!({ "offset": range.start, "bytes": range.end - range.start });
    lost.ranges().iter().map(range).collect()
}
