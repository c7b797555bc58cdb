//! `janus-client restore`.

use std::{ops::Range, path::PathBuf};

use clap::ArgMatches;
use janus_proto::{
    pb::Consistency,
    show::{amount, date},
};
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, chosen::selection};
use crate::{
    catalog::consistency_name,
    progress::{self, Doing, Progress},
    restore::{Lost, Restore},
};

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
        "fetched_bytes": report.fetched_bytes,
        "written_bytes": report.written_bytes,
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
        "{lost}{smeared}restored {} of {} from {} to {}: {} of {} fetched, all checked, in {:.1} s\n",
        snapshot.disk_id,
        date(snapshot.committed_ms),
        snapshot.server_id,
        to.display(),
        amount(report.fetched_bytes),
        amount(snapshot.size_bytes),
        report.seconds,
    );
    Ok(Outcome { json, text })
}

/// Lost parts as `--json` prints them.
pub(super) fn lost_json(lost: &Lost) -> Value {
    let range =
        |range: &Range<u64>| json!({ "offset": range.start, "bytes": range.end - range.start });
    lost.ranges().iter().map(range).collect()
}
